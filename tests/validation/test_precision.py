"""Limits in signal to noise, and what must never pass."""

from dataclasses import dataclass, field

import numpy as np
import pytest

from skipvision_export.validation import (
    LIMIT,
    MIN_DB,
    Gap,
    compare_precision,
    compare_steps,
    same_choice,
)


@dataclass
class Done:
    token_ids: list = field(default_factory=lambda: [5])
    logits: list = field(default_factory=list)
    kv: list = field(default_factory=list)
    raster: np.ndarray | None = None
    order: list = field(default_factory=list)


def done(noise=0.0, seed=0, scale=1.0, **more):
    """A generation of one step; noise: its share of the signal."""
    rng = np.random.default_rng(seed)
    arrays = [scale * np.random.default_rng(i).standard_normal(64) for i in range(4)]
    arrays = [a + noise * scale * rng.standard_normal(64) for a in arrays]
    return Done(**{"logits": arrays[:1], "kv": arrays[1:3], "raster": arrays[3]} | more)


def gap(half, dtype="float16", same=None, wide=None, groups=(2, 2)):
    wide = wide or done()
    return compare_precision("precision", [(wide, same or half, half)], dtype, lambda visual: groups)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
@pytest.mark.parametrize(("dtype", "fine", "coarse"), [("float16", 4e-3, 2e-2), ("bfloat16", 3e-2, 0.2)])
def test_the_limit_knows_the_scale(scale, dtype, fine, coarse):
    wide = done(scale=scale)
    assert gap(done(fine, 1, scale), dtype, wide=wide).passed
    found = gap(done(coarse, 1, scale), dtype, wide=wide)
    assert found.passed is False
    assert f"expected {MIN_DB[dtype]:.0f} or more" in found.failures()[0]


def test_every_output_is_held_to_it():
    assert set(gap(done()).outputs) == {"image_features", "logits", "present.0.key", "present.0.value"}
    bad = done(0.5, 1)
    for change in ({"logits": bad.logits}, {"kv": bad.kv}, {"raster": bad.raster}):
        assert gap(done(**change)).passed is False


def test_tokens_are_reported_only():
    found = gap(done(token_ids=[6]), same=done())
    assert found.greedy_match == 0.0
    assert found.passed


def test_choice():
    assert same_choice([0, 1, 2, 3], [1, 0, 2, 3], (2, 2)) == 1.0
    assert same_choice([0, 1, 2, 3], [0, 2, 1, 3], (2, 2)) == 0.5
    assert same_choice([0, 1, 2, 3], [2, 3, 0, 1], (2, 2)) == 0.0
    assert same_choice([0, 1, 2, 3], [0, 2, 1, 3], (1, 1, 2)) == 0.5
    assert same_choice([0, 1], [1, 0], (0, 2)) == 1.0
    assert same_choice([0, 1], [0], (1, 1)) == 0.0


def test_another_choice_fails():
    wide, half = done(order=[[0, 1, 2, 3]]), done(order=[[0, 2, 1, 3]])
    found = gap(half, wide=wide)
    assert found.passed is False
    assert (found.choice.tokens, found.choice.pictures) == (0.5, 0.0)
    assert "50.0% of the chosen visual tokens" in found.failures()[0]
    assert gap(done(order=[[0, 1, 2, 3]]), wide=wide).passed


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("where", ["logits", "kv", "raster"])
def test_overflow_says_what_to_do(value, where):
    half = done()
    array = half.raster if where == "raster" else getattr(half, where)[0]
    array[3] = value
    found = gap(half)
    assert found.passed is False
    assert found.not_finite
    assert "float16 overflowed" in found.failures()[0]
    assert "bfloat16" in found.failures()[0]
    assert "overflowed" not in gap(half, "bfloat16").failures()[0]
    # not with the tight limit either
    if where != "raster":
        assert compare_steps("rewrite", [(done(), half)], LIMIT).passed is False


def test_not_run_is_neither_passed_nor_failed():
    skipped = Gap("backend", None, not_run="no kernels")
    assert skipped.passed is None
    assert not skipped.failures()
    data = skipped.to_json()
    assert (data["passed"], data["n"], data["max_abs"], data["greedy_match"]) == (None, 0, None, None)


def test_nothing_compared_does_not_pass():
    assert compare_steps("rewrite", [], LIMIT).passed is False
    assert compare_precision("precision", [], "float16", lambda visual: (2, 2)).passed is False


def test_unrecorded_features_are_an_error():
    with pytest.raises(ValueError, match="recorded"):
        gap(done(raster=None))
