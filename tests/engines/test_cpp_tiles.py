"""LLaVA-NeXT in the C++ runtime: pictures of any size as a thumbnail and tiles."""

import json
import shutil

import numpy as np
import pytest
from cpp_build import alter, ask, run
from cpp_inputs import random_pictures
from PIL import Image
from tiny import tiny_next_processor, write_tiny_next

from skipvision_export import SkipVisionConfig
from skipvision_export.exporter import trace_model
from skipvision_export.models.loading import resolve_model

CONFIG = SkipVisionConfig.counts(64, 40, summaries=True, selector="thumbnail", tiled=True)
SIZES = [(200, 90), (90, 220), (180, 180), (300, 90), (31, 30), (97, 500), (640, 480), (1, 40)]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cpp_tiles")
    traced = trace_model(resolve_model(write_tiny_next(folder / "model")))
    return traced.write(folder / "bundle", CONFIG)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for i, size in enumerate(SIZES):
        blocks = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
        Image.fromarray(blocks).resize(size).save(folder / f"s{i}.png")
    return sorted(folder.glob("s*.png"))


def test_pixels_are_hugging_faces(probe, pictures, tmp_path):
    processor = tiny_next_processor().image_processor
    processor.save_pretrained(tmp_path)
    files = [*pictures, *random_pictures(tmp_path)]
    request = {"folder": str(tmp_path), "images": [str(file) for file in files]}
    assert ask(probe, "pixels", out=str(tmp_path / "out"), **request) == [96, 96]
    found, at = np.fromfile(tmp_path / "out", np.float32), 0
    crops = set()
    for file in files:
        expected = processor(Image.open(file).convert("RGB"), return_tensors="np")["pixel_values"][0]
        own = found[at : at + expected.size].reshape(expected.shape)
        assert np.array_equal(own, expected), file.name
        at += expected.size
        crops.add(len(expected))
    assert at == found.size and crops == {3, 4, 5}


def answers(build, folder, pictures, *arguments):
    lines = [json.dumps({"image": str(file), "prompt": "What" + "?" * i}) for i, file in enumerate(pictures)]
    done = run(build, folder, "--lines", "--max-new-tokens", 6, *arguments, input="\n".join(lines))
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_answers_are_pythons(bundle, build, pictures):
    found = answers(build, bundle.folder, pictures)
    for i, (file, own) in enumerate(zip(pictures, found, strict=True)):
        expected = bundle.generate(file, "What" + "?" * i, 6)
        assert own["token_ids"] == expected.token_ids, file.name
        assert own["prompt_tokens"] == expected.prompt_tokens
    together = answers(build, bundle.folder, pictures, "--batch", 8)
    assert [own["token_ids"] for own in together] == [own["token_ids"] for own in found]
    requests = [(file, "What" + "?" * i) for i, file in enumerate(pictures)]
    python = bundle.generate_batch(requests, 6)
    assert [own.token_ids for own in python] == [own["token_ids"] for own in found]


def change_processor(folder, change):
    file = folder / "processor_config.json"
    config = json.loads(file.read_text())
    change(config["image_processor"])
    file.write_text(json.dumps(config))
    alter(folder, lambda m: m["files"][file.name].update(bytes=file.stat().st_size))


def test_other_grids_are_noticed(bundle, build, pictures, tmp_path):
    """The broken twin: the same pictures, cut otherwise, give other answers."""
    folder = shutil.copytree(bundle.folder, tmp_path / "bundle")
    change_processor(folder, lambda p: p.update(image_grid_pinpoints=[[96, 192]]))
    right, wrong = (answers(build, own, pictures, "--no-hashes") for own in (bundle.folder, folder))
    assert [own["token_ids"] for own in right] != [own["token_ids"] for own in wrong]


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda p: p.update(image_grid_pinpoints=[[96, 100]]), "image_grid_pinpoints.0: expected multiples"),
        (lambda p: p.update(image_grid_pinpoints=[]), "image_grid_pinpoints: is empty"),
        (lambda p: p.update(image_grid_pinpoints=[[96]]), "expected [height, width]"),
        (lambda p: p.update(image_processor_type="CLIPImageProcessor", do_pad=False), "model.tiled is true"),
    ],
)
def test_a_damaged_processor_is_one_line(change, part, bundle, build, pictures, tmp_path):
    folder = shutil.copytree(bundle.folder, tmp_path / "bundle")
    change_processor(folder, change)
    done = run(build, folder, "--image", pictures[0], "--prompt", "x", "--no-hashes")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: ") and part in done.stderr


def test_a_picture_too_narrow_is_one_line(bundle, build, tmp_path):
    Image.new("RGB", (1, 4000)).save(tmp_path / "thin.png")
    done = run(build, bundle.folder, "--image", tmp_path / "thin.png", "--prompt", "x")
    assert done.returncode == 2 and "too narrow" in done.stderr
