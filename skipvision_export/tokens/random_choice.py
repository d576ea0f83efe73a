"""Select at random: the first of the two baselines that every report shows."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from skipvision_export.tokens.registry import StaticSelector


class RandomChoice(StaticSelector):
    """One random order of the positions, the same for every image, from the configuration's seed."""

    name = "random"

    def static_scores(self, visual_tokens: int, seed: int) -> npt.NDArray[np.float32]:
        """A permutation, as scores."""
        return np.random.default_rng(seed).permutation(visual_tokens).astype(np.float32)
