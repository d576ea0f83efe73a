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
    x = image.features
    n, v, d = x.shape
    sizes = layout.selection_sizes()
    if config.order == "raster":
        through = torch.tensor(layout.ffn_mask(min(layout.used_tiers(), default=0)), device=x.device)
        return x, (~through).to(torch.int8).sort(stable=True).indices.expand(n, v)
    order = layout_order(selector(config.selector).scores(image), sizes[:-1])
    x = x.gather(1, order.unsqueeze(-1).expand(-1, -1, d))
    if layout.tiers:
        return x, order
    retained, rest = x[:, : sizes[0]], x[:, sizes[0] :]
    if 0 < sizes[1] < rest.shape[1]:
        rest = merge(config.merge).merge(rest, sizes[1])
    blocks = []
    for block in (retained, rest):
        if block.shape[1]:
            blocks.append(block)
            if layout.summaries:
                assert summary is not None
                blocks.append(summary(block).unsqueeze(1))
    return torch.cat(blocks, dim=1), order
