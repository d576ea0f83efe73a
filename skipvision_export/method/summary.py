"""Summary tokens, the method's only learnable addition (Skip-Vision, section "choosing and merging")."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from torch import Tensor


class SummaryTokens(nn.Module):
    """Pools a block of tokens into one, by a learned weight of each.

    `ada` is LayerNorm and Linear to one number; the softmax runs over the block's tokens, in the
    model's dtype. One module serves both the retained and the skipped block. It starts as the plain
    mean: the linear layer's weights are zero.
    """

    def __init__(self, hidden_size: int) -> None:
        """hidden_size: the decoder's width D."""
        super().__init__()
        self.ada = nn.Sequential(nn.LayerNorm(hidden_size, eps=1e-5), nn.Linear(hidden_size, 1))
        linear: nn.Linear = self.ada[1]  # type: ignore[assignment]
        nn.init.zeros_(linear.weight)
        nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor, by: Tensor | None = None) -> Tensor:
        """[B, N, D] -> [B, D]: sum over i of softmax_i(ada(x_i)) x_i; by: what is weighed in place of x."""
        return (self.ada(x if by is None else by).softmax(dim=1) * x).sum(dim=1)
