"""How the next token is taken from logits."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from skipvision_export.runtime.generation import Choose


def sampler(temperature: float = 0.0, top_p: float = 1.0, seed: int | None = None) -> Choose:
    """A function from logits [vocab] float32 to a token id.

    temperature: 0 takes the likeliest; top_p, above 0: only the likeliest tokens that together have this
    much probability are drawn from; seed: for the same draws again.
    """
    if temperature == 0:
        return lambda logits: int(logits.argmax())
    draws = np.random.default_rng(seed)

    def choose(logits: npt.NDArray[np.float32]) -> int:
        scaled = (logits.astype(np.float64) - logits.max()) / temperature
        order = np.argsort(-scaled, kind="stable")
        likely = np.exp(scaled[order])
        total = likely.cumsum()
        kept = int(np.searchsorted(total, top_p * total[-1])) + 1
        at = np.searchsorted(total[:kept], draws.random() * total[:kept][-1], side="right")
        return int(order[min(int(at), kept - 1)])

    return choose
