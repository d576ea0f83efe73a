"""Retain the thumbnail of a tiled image."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from skipvision_export.tokens.registry import StaticSelector


class Thumbnail(StaticSelector):
    """The first tokens, which are the thumbnail's: the tiles' tokens come behind them."""

    name = "thumbnail"

    def static_scores(self, visual_tokens: int, seed: int) -> npt.NDArray[np.float32]:
        """Minus the position."""
        return -np.arange(visual_tokens, dtype=np.float32)
