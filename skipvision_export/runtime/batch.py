"""Prompts of different lengths as one prefill: padded on the left, and what the graphs are told of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

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


# One layout for every picture, or those of each row's pictures.
Layouts = TokenLayout | Sequence[Sequence[TokenLayout]]


def prefill_indices(
    batch: PromptBatch, image_token: int, layout: Layouts, tiers: Sequence[int] | None = None
) -> PrefillIndices:
    """What prefill is told of prompts that have a layout's `total` placeholders for each image.

    tiers: those that it has an index for, by default the layout's.
    """
    is_image = batch.input_ids == image_token
    layouts = _by_row(layout, is_image)
    real = batch.mask

    def kept(flags: Callable[[TokenLayout], list[bool]]) -> Flags:
        keep = real.copy()
        for row, places, own in zip(keep, is_image, layouts, strict=True):
            row[places] = np.array([f for one in own for f in flags(one)], np.bool_)[: places.sum()]
        return keep

    if tiers is None:
        assert isinstance(layout, TokenLayout)
        tiers = layout.used_tiers()
    rows = {
        tier: np.flatnonzero(kept(partial(TokenLayout.ffn_mask, tier=tier))).astype(np.int64)
        for tier in tiers
    }
    keep = kept(TokenLayout.kv_mask)
    # Stable: what a row keeps comes first, then the first of the rest.
    order = np.argsort(~keep, axis=1, kind="stable")[:, : keep.sum(1).max()]
    index = np.sort(order, axis=1).astype(np.int64)
    return PrefillIndices(rows, index, np.take_along_axis(keep, index, 1))


def image_index(batch: PromptBatch, image_token: int, layout: Layouts) -> Ints:
    """The input of strict masking, [B, S]: 0 for text, i or -i for the tokens of a row's i-th picture.

    Negative where K and V are dropped; see StrictMaskPass.
    """
    is_image = batch.input_ids == image_token
    index = np.zeros(batch.input_ids.shape, np.int64)
    for row, places, own in zip(index, is_image, _by_row(layout, is_image), strict=True):
        signs = [i if kept else -i for i, one in enumerate(own, 1) for kept in one.kv_mask()]
        row[places] = np.array(signs, np.int64)[: places.sum()]
    return index


def _by_row(layout: Layouts, is_image: Flags) -> Sequence[Sequence[TokenLayout]]:
    if isinstance(layout, TokenLayout):
        return [[layout] * -(-int(places.sum()) // layout.total) for places in is_image]
    return layout
