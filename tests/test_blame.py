"""The layer that is named is the one that is wrong, whatever is wrong with it; and none is where none is."""

import numpy as np
import pytest
from families import FAMILIES
from family_check import config_of, picture
from faults import draw, inject
from full import FULL

from skipvision_export.benchmark.blame import compare_layers, judge, record
from skipvision_export.benchmark.contenders import Prompt
from skipvision_export.benchmark.parity import synthetic_prompts
from skipvision_export.exporter import trace_skeleton
from skipvision_export.models.loading import resolve_model
from skipvision_export.runtime.torch_reference import TorchReference
from skipvision_export.validation.blame import ALONE_DB, CHAINED_DB, Point, blame
from skipvision_export.validation.compare import TensorGap

FAULTS, PARTS = 100 if FULL else 40, 4
FAMILY_SIZES = ((96, 96), (200, 90))
PROMPT = synthetic_prompts(1, 96)[0]


@pytest.fixture(scope="module")
def recorded(bundle, reference):
    return record(bundle, reference, PROMPT)


@pytest.mark.parametrize("part", range(PARTS))
def test_the_named_layer_is_the_wrong_one(bundle, recorded, tmp_path, part):
    """Random faults, each in a graph, layer and part that are drawn; 100 of them in the long run."""
    token = int(recorded.placed.input_ids[0, -1])
    wrong = []
    for seed in range(part, FAULTS, PARTS):
        rng = np.random.default_rng(seed)
        fault = draw(rng, bundle.manifest.model.num_layers, len(recorded.taps.paths.vision_layers))
        broken = inject(bundle, tmp_path / str(seed), fault, rng, token)
        verdict = judge(broken, recorded).verdict
        if verdict is None or not fits(fault, verdict):
            wrong.append((seed, str(fault), verdict and (verdict.kind, verdict.point, verdict.shared)))
    assert not wrong, wrong


def fits(fault, verdict) -> bool:
    """Is it the fault's graph, layer and part?"""
    at = verdict.point
    if verdict.kind != "break" or at.graph.split(".")[0] != fault.graph:
        return False
    if fault.part == "all":
        return verdict.shared
    if fault.layer is None:
        return at.name == fault.part
    part = "vision" if at.name.startswith("vision") else ("attention" if at.in_attention else "ffn")
    return not verdict.shared and (at.layer, part) == (fault.layer, fault.part)


@pytest.mark.parametrize("prompt", synthetic_prompts(2, 96), ids=["first", "second"])
def test_nothing_is_blamed_where_nothing_is_wrong(form, reference, prompt):
    report = compare_layers(form, reference, prompt)
    assert report.verdict is None, report.line()
    assert {point.graph.split(".")[0] for point in report.points} == {
        *("vision_encoder", "embed_tokens", "decoder_prefill", "decoder_decode")
    }


@pytest.mark.parametrize("name", FAMILIES if FULL else ("gemma3", "qwen3_vl"))
def test_no_family_is_blamed(name, tmp_path):
    traced = trace_skeleton(resolve_model(FAMILIES[name](tmp_path / "model")))
    bundle, reference = traced.write(tmp_path / "skip", config_of(traced)), TorchReference(traced.source)
    for size in FAMILY_SIZES:
        report = compare_layers(bundle, reference, Prompt(picture(size), "What is in the picture?"))
        assert report.verdict is None, report.line()


@pytest.mark.parametrize("options", [{}, {"weights": "int4"}], ids=["float16", "int4"])
def test_rounded_bundles_are_not_blamed(tiny_folder, tmp_path, options):
    dtype = "float32" if options else "float16"
    traced = trace_skeleton(resolve_model(tiny_folder), dtype)
    bundle = traced.write(tmp_path / "half", config_of(traced), **options)
    report = compare_layers(bundle, TorchReference(traced.source), PROMPT)
    assert report.verdict is None, report.line()


def points(alone: list[float], chained: list[float]) -> list[Point]:
    """Of layers in turn."""
    return [
        Point("decoder_prefill", f"layers.{i}.ffn", TensorGap(0, 1, a), TensorGap(0, 1, c))
        for i, (a, c) in enumerate(zip(alone, chained, strict=True))
    ]


def test_rising_error_is_no_break():
    right, grown = ALONE_DB["float32"] + 20, CHAINED_DB["float32"] - 1
    verdict = blame(points([right] * 4, [110, 95, grown, grown - 10]))
    assert verdict is not None
    assert (verdict.kind, verdict.point.layer) == ("rounding", 2)
    assert blame(points([right] * 4, [110, 95, 90, 85])) is None


def test_a_break_counts_before_error_that_rose_earlier():
    verdict = blame(points([120, 120, 60, 120], [110, 70, 60, 60]))
    assert verdict is not None
    assert (verdict.kind, verdict.point.layer) == ("break", 2)
