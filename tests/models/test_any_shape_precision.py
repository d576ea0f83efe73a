"""Half types and int4 weights with pictures of any shape: rounding apart from structure."""

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest
from damage import leave_as_it_is, twin
from family_check import LIMIT, SIZES, picture
from full import FULL

from skipvision_export import SkipVisionConfig
from skipvision_export.benchmark.contenders import Contenders
from skipvision_export.benchmark.parity import Prompt, measure_gaps
from skipvision_export.exporter import trace_skeleton
from skipvision_export.validation import INT4_MIN_DB, MIN_CHOICE, MIN_DB

# The bundle's type, and what the decoder's matrices become.
KINDS = {"float16": ("float16", None), "int4": ("float32", "int4")}
if FULL:
    KINDS |= {"bfloat16": ("bfloat16", None), "int4 in float16": ("float16", "int4")}
QUARTER = SkipVisionConfig.preset("quarter")
# Six tokens of a picture are retained: in bfloat16 a near tie or two turn round, more than may be.
# There the choice does not look at the picture.
UNIFORM = replace(QUARTER, selector="uniform")


def config_of(dtype):
    return UNIFORM if dtype == "bfloat16" else QUARTER


@pytest.fixture(scope="module")
def rounded(any_shape, tmp_path_factory):
    """A merging bundle of each kind, with summaries."""
    folder, source = tmp_path_factory.mktemp("rounded"), any_shape.traced.source
    made = {}
    for kind, (dtype, weights) in KINDS.items():
        traced = any_shape.traced if dtype == "float32" else trace_skeleton(source, dtype)
        made[kind] = traced.write(folder / kind, config_of(dtype), weights=weights)
    return made


def measure(subject, bundle, gaps=None, **more):
    asked = [Prompt(picture(size), "What?") for size in SIZES]
    return measure_gaps(bundle, subject.reference, asked, max_new_tokens=3, gaps=gaps, **more)


@pytest.mark.parametrize("kind", KINDS)
def test_gaps(any_shape, rounded, kind):
    dtype, weights = KINDS[kind]
    report = measure(any_shape, rounded[kind])
    assert report.passed
    for tight in ("export", "rewrite"):
        assert report.gaps[tight].overall.max_abs <= LIMIT
        assert report.gaps[tight].greedy_match == 1.0
    for name in ("backend", "precision"):
        gap = report.gaps[name]
        if name == "backend" and dtype == "bfloat16":
            assert "no CPU kernels" in gap.not_run
            continue
        assert gap.n == len(SIZES) and not gap.not_run
        assert gap.min_db == (INT4_MIN_DB[name] if weights else MIN_DB[dtype])
        assert gap.overall.max_abs > LIMIT  # or nothing would be rounded
        assert gap.choice.tokens >= MIN_CHOICE


def turn_the_scores(graph):
    node = next(n for n in graph if n.op_type == "TopK")
    node.attributes["largest"] = ir.AttrInt64("largest", 0)


def test_damage_to_the_choice_shows(any_shape, rounded, tmp_path):
    """The real graph chooses by negated scores, the widened one does not."""

    class Mixed(Contenders):
        """Widens the undamaged bundle, runs the damaged one."""

        @property
        def wide(self):
            return intact.wide

    bundle, found = rounded["float16"], {}
    intact = Contenders(bundle, any_shape.reference, 3)
    with intact:
        for damage in (leave_as_it_is, turn_the_scores):
            damaged = twin(bundle, tmp_path, damage, "vision_encoder")
            mixed = Mixed(damaged, any_shape.reference, 3)
            found[damage] = measure(any_shape, damaged, ["backend"], contenders=mixed).gaps["backend"]
    assert found[leave_as_it_is].passed
    assert found[turn_the_scores].choice.tokens < 0.5
    assert any("chosen visual tokens" in line for line in found[turn_the_scores].failures())


def test_features_are_read_at_the_places_that_come_with_them(any_shape):
    """Else a comparison on the same features would have them at the places of another choice."""
    reference, prompt = any_shape.reference, any_shape.reference.prepare(picture(SIZES[1]), "What?")
    first, _ = reference.run(prompt, 3, QUARTER, keep_features=True)
    again, _ = reference.run(prompt, 3, QUARTER, same=first)
    turned = replace(first, places=[places[::-1].copy() for places in first.places])
    moved, _ = reference.run(prompt, 3, QUARTER, same=turned)
    assert np.abs(again.logits[0] - first.logits[0]).max() == 0
    assert np.abs(moved.logits[0] - first.logits[0]).max() > 100 * LIMIT
