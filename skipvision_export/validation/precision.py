"""What a half type costs: signal to quantization noise, apart from what it chooses otherwise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from skipvision_export.validation.compare import Array, tensor_gap, worst
from skipvision_export.validation.gaps import Choice, Gap, Steps, compare_steps

# Least signal to noise of every output. Three bits less mantissa are 18 dB.
MIN_DB = {"float16": 40.0, "bfloat16": 22.0}
# The same of a bundle with int4 weights, by gap: `backend` is the rounding of activations to 8 bits;
# what int4 itself costs, `precision`, depends on the model and is only reported.
INT4_MIN_DB = {"backend": 20.0, "precision": None}
# Least share of the chosen visual tokens that a half type has to choose too.
MIN_CHOICE = 0.9

FEATURES = "image_features"
NOTE = (
    "logits, keys and values with the same image features on both sides: rounding turns near ties of "
    "choosing and merging tokens round, and then whole tokens differ; image_features is before that; "
    "greedy tokens are end to end"
)

# Sizes of the groups that a picture's tokens are chosen for, the last one being the rest, by their number.
Groups = Callable[[int], Sequence[int]]


class Seen(Steps, Protocol):
    """A generation that also recorded its picture; see runtime.transcript.Transcript."""

    raster: Array | None
    order: list[list[int]]


def compare_precision(
    name: str,
    triples: Sequence[tuple[Seen, Steps, Seen]],
    dtype: str,
    groups: Groups,
    note: str = NOTE,
) -> Gap:
    """Compare generations in float32 with the same in a half type.

    triples: in float32; in the half type, given the first one's image features as the decoder reads
    them; in the half type, end to end. Image features are compared in raster order, before anything is
    chosen. Raises ValueError for a generation that did not record its features.
    """
    gap = compare_steps(name, [(wide, same) for wide, same, _ in triples], None, note, dtype)
    gap.min_db = MIN_DB.get(dtype)
    features = []
    for wide, _, half in triples:
        if wide.raster is None or half.raster is None:
            raise ValueError("compare_precision needs generations that recorded their features")
        features.append(tensor_gap(wide.raster, half.raster))
        if np.isfinite(wide.raster).all() and not np.isfinite(half.raster).all():
            gap.not_finite = list(dict.fromkeys([FEATURES, *gap.not_finite]))
    if features:
        gap.outputs = {FEATURES: worst(features), **gap.outputs}
        gap.greedy_match = float(np.mean([wide.token_ids == half.token_ids for wide, _, half in triples]))
        if any(wide.order for wide, _, _ in triples):
            shares = [
                np.mean(
                    [same_choice(a, b, groups(len(a))) for a, b in zip(wide.order, half.order, strict=True)]
                )
                for wide, _, half in triples
            ]
            gap.choice = Choice(float(np.mean(shares)), float(np.mean(np.array(shares) == 1)), MIN_CHOICE)
    return gap


def same_choice(a: Sequence[int], b: Sequence[int], groups: Sequence[int]) -> float:
    """Share of the chosen tokens, all but the last group's, that stand in the same group in both.

    a, b: tokens in layout order, groups one after the other; 1 where nothing is chosen.
    """
    if len(a) != len(b):
        return 0.0
    same, start = 0, 0
    for size in groups[:-1]:
        same += len(set(a[start : start + size]) & set(b[start : start + size]))
        start += size
    return same / start if start and a else 1.0
