"""LLaVA-NeXT exported: the thumbnail retained, the tiles of pictures of any size merged in the graph."""

import numpy as np
import pytest
from damage import twin
from PIL import Image
from tiny import write_tiny_next

from skipvision_export import SkipVisionConfig
from skipvision_export.benchmark.parity import Prompt, measure_gaps
from skipvision_export.cli import run
from skipvision_export.exporter import trace_model
from skipvision_export.models.loading import resolve_model
from skipvision_export.runtime.torch_reference import TorchReference
from skipvision_export.tensorrt.build import build, plan
from skipvision_export.tensorrt.recipe import Recipe

CONFIG = SkipVisionConfig.counts(64, 40, summaries=True, selector="thumbnail", tiled=True)


@pytest.fixture(scope="module")
def traced(tmp_path_factory):
    return trace_model(resolve_model(write_tiny_next(tmp_path_factory.mktemp("next") / "model")))


@pytest.fixture(scope="module")
def bundle(traced, tmp_path_factory):
    return traced.write(tmp_path_factory.mktemp("next") / "bundle", CONFIG)


@pytest.fixture(scope="module")
def reference(traced):
    return TorchReference(traced.source, traced.model)


def prompts():
    rng = np.random.default_rng(0)
    for size in ((200, 90), (90, 220), (180, 180), (300, 90)):
        blocks = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
        yield Prompt(Image.fromarray(blocks).resize(size), "What?")


def test_gaps(bundle, reference):
    report = measure_gaps(bundle, reference, list(prompts()), max_new_tokens=4)
    for name in ("export", "rewrite", "backend"):
        assert report.gaps[name].passed, name
        assert report.gaps[name].overall.max_abs <= 1e-4
    assert report.gaps["method"].outputs["logits"].max_abs > 0.1
    prompt = report.transcripts["ort"][0]
    text = prompt.prompt_tokens - CONFIG.layout(64, tiled=True).total
    assert prompt.kv_tokens_after_prefill == text + 64 + 2


def test_a_merge_that_is_off_is_caught(bundle, reference, tmp_path):
    def flip_nearest(graph):
        # the most similar destination becomes the least similar one
        next(node for node in graph if node.op_type == "ArgMax").op_type = "ArgMin"

    broken = twin(bundle, tmp_path, flip_nearest, "vision_encoder")
    gap = measure_gaps(broken, reference, list(prompts())[:1], max_new_tokens=4, gaps=["rewrite"])
    assert not gap.gaps["rewrite"].passed


def test_what_does_not_fit_is_refused(traced, capsys, tmp_path):
    folder = str(traced.source.folder)
    assert run(["export", folder, "-o", str(tmp_path / "out"), "--preset", "skip-75"]) == 2
    said = capsys.readouterr().err
    assert "a thumbnail and tiles" in said and "--retained 64 --skipped N" in said
    asked = ["--retained", "64", "--skipped", "16", "--dry-run"]
    assert run(["export", folder, "-o", str(tmp_path / "out"), *asked]) == 0
    assert run(["inspect", folder]) == 0
    out = capsys.readouterr().out
    assert "320 visual tokens" in out


def test_engines_take_pictures_of_any_number_of_tiles(bundle):
    planned = plan(bundle.folder, Recipe())
    pixels = planned.profiles("vision_encoder")[0]["pixel_values"]
    assert [shape[1] for shape in pixels] == [2, 5, 5]


def test_engines_build(rtx, bundle, tmp_path):
    assert set(build(bundle.folder, Recipe(), tmp_path / "e").engines) == set(bundle.manifest.graphs)
