"""How far two arrays are apart, in numbers that stay readable from float32 to 8 bit."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

# Signal-to-noise of identical arrays is infinite, which JSON has no number for.
MAX_SQNR_DB = 300.0


@dataclass(frozen=True)
class TensorGap:
    """Largest absolute difference, cosine similarity, signal-to-quantization-noise in dB."""

    max_abs: float
    cosine: float
    sqnr_db: float

    def to_json(self) -> dict[str, float]:
        """The fields as a JSON object."""
        return asdict(self)


def tensor_gap(expected: Array, actual: Array) -> TensorGap:
    """Compare two arrays of one shape, in float64.

    A shape that differs, or a value that is not finite on either side, counts as infinitely far.
    """
    a, b = np.asarray(expected, np.float64).ravel(), np.asarray(actual, np.float64).ravel()
    if np.shape(expected) != np.shape(actual) or not (np.isfinite(a).all() and np.isfinite(b).all()):
        return TensorGap(float("inf"), 0.0, -MAX_SQNR_DB)
    if a.size == 0:
        return TensorGap(0.0, 1.0, MAX_SQNR_DB)
    noise, signal = float(((a - b) ** 2).sum()), float((a**2).sum())
    norm = float(np.linalg.norm(a) * np.linalg.norm(b))
    if noise == 0:
        sqnr = MAX_SQNR_DB
    elif signal == 0:
        sqnr = -MAX_SQNR_DB
    else:
        sqnr = float(np.clip(10 * np.log10(signal / noise), -MAX_SQNR_DB, MAX_SQNR_DB))
    cosine = float(a @ b) / norm if norm else float(noise == 0)
    return TensorGap(float(abs(a - b).max()), cosine, sqnr)


def worst(gaps: list[TensorGap]) -> TensorGap:
    """The worst of each number over several comparisons."""
    return TensorGap(
        max(gap.max_abs for gap in gaps),
        min(gap.cosine for gap in gaps),
        min(gap.sqnr_db for gap in gaps),
    )
