"""Merging and laying out visual tokens in PyTorch (Skip-Vision, section "choosing and merging")."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from skipvision_export.config import SkipVisionConfig
from skipvision_export.layout import TokenLayout
from skipvision_export.method.selection import layout_order
from skipvision_export.tokens import TorchImage, merge, selector

if TYPE_CHECKING:
    from torch import Tensor, nn


def merge_tokens(x: Tensor, keep: int) -> Tensor:
    """Merge by the method's bipartite matching: [B, N, D] -> [B, keep, D], by descending redundancy.

    Values carry gradients, choices do not. Raises ConfigError unless 0 < keep <= N.
    """
    return merge("bipartite").merge(x, keep)


def lay_out(
    image: TorchImage, layout: TokenLayout, config: SkipVisionConfig, summary: nn.Module | None
) -> tuple[Tensor, Tensor]:
    """Bring an image's features into the layout: [retained][q1][skipped][q2].

    image.features: [N, V, D] in raster order. Returns [N, layout.total, D], and the patch index of
    each token before merging, [N, V] int64, retained ones first.
    """
    return lay_out_placed(image, layout, config, summary, image.features, places=False)[:2]


def lay_out_placed(
    image: TorchImage,
    layout: TokenLayout,
    config: SkipVisionConfig,
    summary: nn.Module | None,
    x: Tensor,
    *,
    places: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """`lay_out` of x [N, V, W], whose first D features are image.features, by which all is chosen.

    Returns a third tensor, the patch index of each token of the layout, [N, layout.total] int64: a merged
    token's is its destination's, a summary token's -1. Without `places`, which take a second matching of the
    merged tokens, merged tokens have -1 as well.
    """
    by = image.features
    n, v = x.shape[:2]
    sizes = layout.selection_sizes()
    if config.order == "raster":
        through = torch.tensor(layout.ffn_mask(min(layout.used_tiers(), default=0)), device=x.device)
        order = (~through).to(torch.int8).sort(stable=True).indices.expand(n, v)
        return x, order, torch.arange(v, device=x.device).expand(n, v)
    order = layout_order(selector(config.selector).scores(image), sizes[:-1])

    def taken(x: Tensor, index: Tensor) -> Tensor:
        return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))

    x, by = taken(x, order), taken(by, order)
    if layout.tiers:
        return x, order, order
    r = sizes[0]
    rest, by_rest, behind = x[:, r:], by[:, r:], order[:, r:]
    if 0 < sizes[1] < rest.shape[1]:
        how = merge(config.merge)
        rest = how.merge(rest, sizes[1], by_rest)
        if places:
            behind = behind.gather(1, how.destinations(by_rest, sizes[1]))
        else:
            behind = behind.new_full((n, sizes[1]), -1)
    blocks, indices = [], []
    for block, index in ((x[:, :r], order[:, :r]), (rest, behind)):
        if block.shape[1]:
            blocks.append(block)
            indices.append(index)
            if layout.summaries:
                assert summary is not None
                blocks.append(summary(block, block[..., : by.shape[-1]]).unsqueeze(1))
                indices.append(index.new_full((n, 1), -1))
    return torch.cat(blocks, dim=1), order, torch.cat(indices, dim=1)
