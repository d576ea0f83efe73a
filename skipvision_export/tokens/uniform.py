"""Select evenly over the picture: the second baseline that every report shows."""

from __future__ import annotations

import functools
import math

import numpy as np
import numpy.typing as npt

from skipvision_export.tokens.registry import StaticSelector


class UniformGrid(StaticSelector):
    """Positions spread evenly over the grid of patches, for every number of them.

    Farthest-point order: each position is the one farthest from those before it, so that the first
    K of the order cover the picture for any K. A number of tokens that is no square is taken as a
    line.
    """

    name = "uniform"

    def static_scores(self, visual_tokens: int, seed: int) -> npt.NDArray[np.float32]:
        """Minus the position's place in the order."""
        return _scores(visual_tokens)


@functools.cache
def _scores(visual_tokens: int) -> npt.NDArray[np.float32]:
    side = math.isqrt(visual_tokens)
    width = side if side * side == visual_tokens else visual_tokens
    places = np.stack(np.divmod(np.arange(visual_tokens), width), axis=1)
    scores = np.zeros(visual_tokens, np.float32)
    # The first is the one nearest to the centre.
    here = int(((places - places.max(0) / 2) ** 2).sum(1).argmin())
    distance = np.full(visual_tokens, np.inf)
    for rank in range(visual_tokens):
        scores[here] = -rank
        distance = np.minimum(distance, ((places - places[here]) ** 2).sum(1))
        distance[here] = -1
        here = int(distance.argmax())
    scores.setflags(write=False)
    return scores
