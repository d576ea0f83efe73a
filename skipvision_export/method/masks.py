"""Which positions see which: B batch, S sequence, K kept positions."""

from __future__ import annotations

import torch
from torch import Tensor


def kept_positions(skipped: Tensor) -> tuple[Tensor, Tensor]:
    """Positions that keep their K/V, as a rectangle.

    skipped: [B, S] bool -> index [B, K] int64 ascending, and mask [B, K] int64 that is 0 where a
    row keeps fewer than the longest row and was filled up with skipped positions.
    """
    kept = int((~skipped).sum(1).max())
    # Stable: a row's kept positions first, ascending, then its skipped ones as filling.
    index = torch.sort(skipped.to(torch.int8), dim=1, stable=True).indices[:, :kept]
    index = index.sort(dim=1).values
    return index, (~skipped).gather(1, index).long()


def prefill_mask(
    attention_mask: Tensor | None,
    skipped: Tensor,
    image: Tensor,
    *,
    cached: int = 0,
    strict: bool,
    answers: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Additive causal mask [B, 1, S, P+S] in which skipped tokens are hidden from some queries.

    cached: P, positions of turns before, of which none is skipped any more. attention_mask: [B, P+S], 0 at
    padding; skipped: [B, S] bool; image: [B, S] int64, 0 for text, i for
    the row's i-th picture. strict hides a picture's skipped tokens from all that is outside of it
    (Skip-Vision's stricter variant); answers [B, S] bool are queries from which all are hidden.
    """
    length = skipped.shape[1]
    seen = torch.ones(length, length, dtype=torch.bool, device=skipped.device).tril()
    padded = torch.ones_like(skipped) if attention_mask is None else attention_mask[:, cached:].bool()
    seen = seen & padded[:, None]
    hidden = skipped[:, None, :]  # [B, 1, S]: as a key
    if strict:
        seen = seen & ~(hidden & (image[:, :, None] != image[:, None, :]))
    if answers is not None:
        seen = seen & ~(hidden & answers[:, :, None])
    # A padding row sees itself at least: a softmax over nothing is NaN.
    seen = seen | torch.eye(length, dtype=torch.bool, device=seen.device)
    if cached:
        assert attention_mask is not None
        before = attention_mask[:, None, :cached].bool().expand(-1, length, -1)
        seen = torch.cat([before, seen], 2)
    mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
    return mask.masked_fill(~seen, torch.finfo(dtype).min)[:, None]
