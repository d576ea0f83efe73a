"""Choosing the retained visual tokens (Skip-Vision, section "choosing and merging")."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


def cls_attention_scores(attention: Tensor) -> Tensor:
    """How much the CLS row looks at each patch, heads summed.

    attention: [B, H, R, 1+N] with R >= 1 and the CLS token in row 0 and column 0 -> [B, N].
    """
    return attention[:, :, 0, 1:].sum(dim=1)


def select_by_cls_attention(attention: Tensor, features: Tensor, keep: int) -> tuple[Tensor, Tensor, Tensor]:
    """Split patch features in those with the most CLS attention and the rest.

    attention: [B, H, 1+N, 1+N] (softmax probabilities); features: [B, 1+N, D], CLS first.
    Returns retained [B, keep, D], rest [B, N-keep, D], both in raster order, and the retained
    patches' indices [B, keep] int64, ascending in [0, N).
    """
    order = layout_order(cls_attention_scores(attention), [keep])
    patches = features[:, 1:]
    picked = patches.gather(1, order.unsqueeze(-1).expand(-1, -1, patches.shape[-1]))
    return picked[:, :keep], picked[:, keep:], order[:, :keep]


def layout_order(scores: Tensor, sizes: Sequence[int]) -> Tensor:
    """Patch indices in layout order: groups by descending score, each in raster order.

    scores: [B, N]; sizes: of the first groups, the rest is one more
    -> [B, N] int64, a permutation of each row's range(N).
    """
    n = scores.shape[1]
    ranked = scores.sort(dim=1, descending=True, stable=True).indices
    group_of_rank = torch.zeros(n, dtype=torch.int64, device=scores.device)
    start = 0
    for size in sizes:
        start += size
        group_of_rank[start:] += 1
    group = torch.empty_like(ranked).scatter_(1, ranked, group_of_rank.expand_as(ranked))
    # Stable: raster order within each group.
    return group.sort(dim=1, stable=True).indices
