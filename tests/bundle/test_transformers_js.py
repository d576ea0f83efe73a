"""Dense bundles in transformers.js: its files and names, and every step's logits are Hugging Face's."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from damage import held, instead_of_input, twin
from families import FAMILIES, write_idefics3
from full import only_in_full
from other_runtimes import IMAGE, STEPS, VISUAL, check_int4, in_pytorch, prompt, strided_positions
from PIL import Image

from skipvision_export import Bundle, SkipVisionConfig
from skipvision_export.bundle import check_transformers_js
from skipvision_export.cli import run
from skipvision_export.errors import ConfigError
from skipvision_export.exporter import trace_skeleton
from skipvision_export.models.loading import load_model, load_processor, resolve_model

LIMIT = 1e-4
DENSE = SkipVisionConfig.dense()
PROGRAM = Path(__file__).parents[1] / "transformers_js.mjs"


@pytest.fixture(scope="module")
def folder(traced, tmp_path_factory):
    return traced.write(tmp_path_factory.mktemp("js") / "dense", DENSE, target="transformers.js").folder


def in_its_way(folder, ids, pixels, steps=STEPS):
    """Logits [STEPS, vocab] and ids, by what transformers.js does with the three files."""
    stem = "decoder_model_merged"
    types = json.loads((folder / "config.json").read_text())["transformers.js_config"]["dtype"]
    names = {name: name + {"fp32": "", "q4": "_q4"}[kind] for name, kind in types.items()}
    vision, embed, decoder = (
        ort.InferenceSession(folder / "onnx" / f"{names[name]}.onnx")
        for name in ("vision_encoder", "embed_tokens", stem)
    )
    embeds = embed.run(["inputs_embeds"], {"input_ids": ids[None]})[0]
    if pixels is not None:
        features = vision.run(["image_features"], {"pixel_values": pixels})[0]
        embeds[0, ids == IMAGE] = features.reshape(-1, features.shape[-1])
    known = {"batch_size": 1}
    cache = {
        value.name: np.zeros([d if isinstance(d, int) else known.get(d, 0) for d in value.shape], np.float32)
        for value in decoder.get_inputs()
        if value.name.startswith("past_key_values.")
    }
    presents = [value.name for value in decoder.get_outputs()][1:]
    logits, tokens, mask = [], [], np.ones((1, len(ids)), np.int64)
    for _ in range(steps):
        positions = (mask.cumsum(-1) - 1)[:, -embeds.shape[1] :]
        fed = {"inputs_embeds": embeds, "attention_mask": mask, "position_ids": positions} | cache
        found, *present = decoder.run(["logits", *presents], fed)
        cache = dict(zip((n.replace("present", "past_key_values") for n in presents), present, strict=True))
        logits.append(found[0, -1])
        tokens.append(int(found[0, -1].argmax()))
        embeds = embed.run(None, {"input_ids": np.array([tokens[-1:]])})[0]
        mask = np.ones((1, mask.shape[1] + 1), np.int64)
    return np.array(logits), tokens


@pytest.mark.parametrize("pictures", [0, 1, 2])
def test_its_way_answers_as_hugging_face(pictures, folder, traced):
    ids, pixels = prompt(pictures)
    found, expected = in_its_way(folder, ids, pixels), in_pytorch(traced.model, ids, pixels)
    assert found[1] == expected[1]
    assert np.abs(found[0] - expected[0]).max() <= LIMIT


TEXT = "USER: <image>\nWhat is it? ASSISTANT:"
NOISE = np.random.default_rng(0).integers(0, 256, (96, 96, 3), np.uint8)


def in_transformers_js(folder, ids, pixels):
    """Its answer, and the ids and pixels that its processor makes of NOISE and TEXT."""
    node = shutil.which("node")
    modules = os.environ.get("SKIPVISION_NODE_MODULES", "node_modules")
    if node is None or not (Path(modules) / "@huggingface" / "transformers").is_dir():
        pytest.skip(
            "needs node, and SKIPVISION_NODE_MODULES: where `npm install @huggingface/transformers` put it"
        )
    image = folder.parent / "picture.png"
    Image.fromarray(NOISE).save(image)
    given = {"image": str(image), "prompt": TEXT, "ids": ids.tolist(), "steps": STEPS}
    if pixels is not None:
        given["pixels"] = {"data": pixels.ravel().tolist(), "dims": pixels.shape}
    done = subprocess.run(
        [node, PROGRAM, Path(modules).absolute(), folder],
        input=json.dumps(given),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def check_transformers_js_run(folder, source, ids, pixels, logits, tokens):
    found = in_transformers_js(folder, ids, pixels)
    given = load_processor(source.folder)(images=Image.fromarray(NOISE), text=TEXT, return_tensors="np")
    assert found["prompt_ids"] == given["input_ids"][0].tolist()
    np.testing.assert_allclose(found["pixels"], given["pixel_values"].ravel(), atol=1e-5)
    assert found["generated"] == tokens
    assert np.abs(np.array(found["logits"]) - logits[0]).max() <= LIMIT


@pytest.mark.parametrize("pictures", [0, 1, 2])
def test_transformers_js_answers_as_hugging_face(pictures, folder, traced):
    ids, pixels = prompt(pictures)
    expected = in_pytorch(traced.model, ids, pixels)
    check_transformers_js_run(folder, traced.source, ids, pixels, *expected)


def test_transformers_js_runs_int4(traced, tmp_path):
    folder = traced.write(tmp_path / "int4", DENSE, weights="int4", target="transformers.js").folder
    ids, pixels = prompt(1)
    check_transformers_js_run(folder, traced.source, ids, pixels, *in_its_way(folder, ids, pixels))


@only_in_full
@pytest.mark.parametrize("name", [name for name in FAMILIES if name.startswith("llava:")])
def test_every_tower_and_text_model(name, tmp_path):
    source = resolve_model(FAMILIES[name](tmp_path / "model"))
    folder = trace_skeleton(source).write(tmp_path / "dense", DENSE, target="transformers.js").folder
    ids, pixels = prompt(1)
    logits, tokens = in_pytorch(load_model(source), ids, pixels)
    found = in_its_way(folder, ids, pixels)
    assert found[1] == tokens
    assert np.abs(found[0] - logits).max() <= LIMIT
    check_transformers_js_run(folder, source, ids, pixels, logits, tokens)


def test_int4(traced, tmp_path):
    bundle = traced.write(tmp_path / "int4", DENSE, weights="int4", target="transformers.js")
    assert (bundle.folder / "onnx" / "decoder_model_merged_q4.onnx_data").is_file()
    ids, pixels = prompt(1)
    check_int4(traced, ids, pixels, in_its_way(bundle.folder, ids, pixels)[0])


def swapped_patches(graph):
    """The picture is turned upside down."""
    start, end, axis, step = (
        held(graph, name, [n]) for name, n in zip("abcd", (-1, -97, 2, -1), strict=True)
    )
    instead_of_input(
        graph, "pixel_values", lambda pixels: [ir.node("Slice", [pixels, start, end, axis, step])]
    )


def next_word(graph):
    one = held(graph, "one", 1)
    instead_of_input(graph, "input_ids", lambda ids: [ir.node("Sub", [ids, one])])


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("decoder_model_merged", strided_positions),
        ("vision_encoder", swapped_patches),
        ("embed_tokens", next_word),
    ],
)
def test_broken_twins_are_caught(name, damage, folder, traced, tmp_path):
    broken = twin(Bundle.load(folder, verify=False), tmp_path, damage, name).folder
    ids, pixels = prompt(1)
    found, expected = in_its_way(broken, ids, pixels, 1)[0], in_pytorch(traced.model, ids, pixels)[0][:1]
    assert np.abs(found - expected).max() > 100 * LIMIT


def test_what_is_written(folder, dense_folder):
    """The names that transformers.js wants, in place of some of ours; all of them in the manifest."""
    mine = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    plain = {str(p.relative_to(dense_folder)) for p in dense_folder.rglob("*") if p.is_file()}
    more = {
        "preprocessor_config.json",
        *(f"onnx/{name}" for name in ("embed_tokens.merging.onnx", "decoder_model_merged.onnx")),
        "onnx/decoder_model_merged.onnx_data",
    }
    assert mine - plain == more
    assert plain - mine == {"onnx/decoder.onnx_data"}
    manifest = json.loads((folder / "skipvision.json").read_text())
    assert more <= set(manifest["files"])
    assert manifest["graphs"]["embed_tokens"]["file"] == "onnx/embed_tokens.merging.onnx"
    inputs = [value["name"] for value in manifest["variants"]["embed_tokens.transformers.js"]["inputs"]]
    assert inputs == ["input_ids"]
    config = json.loads((folder / "config.json").read_text())["transformers.js_config"]
    assert config["use_external_data_format"] == {"decoder_model_merged": 1}


def test_large_graphs_have_the_data_files_that_it_looks_for(traced, tmp_path, monkeypatch):
    monkeypatch.setattr("skipvision_export.bundle.graphs._MAX_INLINE_TOTAL", 0)
    folder = traced.write(tmp_path / "large", DENSE, target="transformers.js").folder
    config = json.loads((folder / "config.json").read_text())["transformers.js_config"]
    names = ("vision_encoder", "embed_tokens", "decoder_model_merged")
    assert config["use_external_data_format"] == dict.fromkeys(names, 1)
    for name in names:
        model = ir.load(folder / "onnx" / f"{name}.onnx")
        held_in = {
            value.const_value.location
            for value in model.graph.initializers.values()
            if isinstance(value.const_value, ir.ExternalTensor)
        }
        assert held_in == {f"{name}.onnx_data"}
    ids, pixels = prompt(1)
    error = np.abs(in_its_way(folder, ids, pixels)[0] - in_pytorch(traced.model, ids, pixels)[0]).max()
    assert error <= LIMIT


def test_it_is_a_bundle_as_any_other(folder, dense_folder):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 120, 3), np.uint8))
    mine, plain = (Bundle.load(each).generate(image, "What?", 4) for each in (folder, dense_folder))
    assert mine.token_ids == plain.token_ids
    assert mine.prompt_tokens == plain.prompt_tokens > VISUAL


def test_what_transformers_js_cannot_run_is_refused(traced, tmp_path, capsys):
    source, layout = traced.source, DENSE.layout(VISUAL)
    with pytest.raises(ConfigError, match=r"dense exports only.*positions by what is cached"):
        traced.write(tmp_path / "out", SkipVisionConfig.preset("skip-75"), target="transformers.js")
    with pytest.raises(ConfigError, match="in float32, not float16"):
        check_transformers_js(layout, source, "float16", False)
    with pytest.raises(ConfigError, match="leave out --reference-weights"):
        check_transformers_js(layout, source, "float32", True)
    other = str(write_idefics3(tmp_path / "idefics3"))
    asked = ["export", other, "-o", str(tmp_path / "out"), "--dense", "--target", "transformers.js"]
    assert run(asked) == 2
    assert "pictures of family 'idefics3' in another form" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    asked[1] = str(resolve_model(source.folder).folder)
    assert run([*asked, "--dry-run"]) == 0
