"""Prompts of different lengths as one prefill: padded on the left, and what the graphs are told of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from skipvision_export.layout import TokenLayout

Ints = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class PromptBatch:
    """input_ids [B, S] with a placeholder for each visual token, and padding [B], positions in front of each.

    Padding is masked, sits at position 0 and passes by every FFN.
    """

    input_ids: Ints
    padding: Ints

    @classmethod
    def join(cls, prompts: Sequence[Ints], image_token: int) -> PromptBatch:
        """Prompts [1, S'] each, in their order."""
        longest = max(ids.shape[1] for ids in prompts)
        padding = np.array([longest - ids.shape[1] for ids in prompts], np.int64)
        filler = int(image_token == 0)  # any id but the picture's
        rows = [
            np.pad(ids[0], (n, 0), constant_values=filler) for ids, n in zip(prompts, padding, strict=True)
        ]
        return cls(np.stack(rows).astype(np.int64), padding)

    @property
    def lengths(self) -> Ints:
        """[B], tokens of each prompt."""
        return np.asarray(self.input_ids.shape[1] - self.padding, np.int64)

    @property
    def mask(self) -> Flags:
        """[B, S], False at padding."""
        return np.asarray(np.arange(self.input_ids.shape[1]) >= self.padding[:, None])

    @property
    def positions(self) -> Ints:
        """[B, S], from 0 at each prompt's first token on."""
        places = np.arange(self.input_ids.shape[1], dtype=np.int64) - self.padding[:, None]
        return np.maximum(places, 0)


@dataclass(frozen=True)
class PrefillIndices:
    """ffn_rows: [M] by tier, rows of the flattened [B*S] that go through the FFN; kv_keep: [B, K], positions
    whose K/V stay; both ascending. kv_mask: [B, K], False where a row keeps fewer than the longest one
    and was filled up, with padding if it has any.
    """

    ffn_rows: dict[int, Ints]
    kv_keep: Ints
    kv_mask: Flags


def prefill_indices(batch: PromptBatch, image_token: int, layout: TokenLayout) -> PrefillIndices:
    """What prefill is told of prompts that have `layout.total` placeholders for each image."""
    is_image = batch.input_ids == image_token
    real = batch.mask

    def kept(flags: list[bool]) -> Flags:
        keep = real.copy()
        for row, places in zip(keep, is_image, strict=True):
            if places.any():
                row[places] = np.resize(flags, int(places.sum()))
        return keep

    rows = {
        tier: np.flatnonzero(kept(layout.ffn_mask(tier))).astype(np.int64) for tier in layout.used_tiers()
    }
    keep = kept(layout.kv_mask())
    # Stable: what a row keeps comes first, then the first of the rest.
    order = np.argsort(~keep, axis=1, kind="stable")[:, : keep.sum(1).max()]
    index = np.sort(order, axis=1).astype(np.int64)
    return PrefillIndices(rows, index, np.take_along_axis(keep, index, 1))


def image_index(batch: PromptBatch, image_token: int, layout: TokenLayout) -> Ints:
    """The input of strict masking, [B, S]: 0 for text, i or -i for the tokens of a row's i-th picture.

    Negative where K and V are dropped; see StrictMaskPass.
    """
    index = np.zeros(batch.input_ids.shape, np.int64)
    for row, places in zip(index, batch.input_ids == image_token, strict=True):
        picture = 1 + np.arange(places.sum()) // layout.total
        row[places] = np.where(np.resize(layout.kv_mask(), picture.size), picture, -picture)
    return index
