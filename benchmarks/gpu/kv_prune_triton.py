"""KVPrune in Triton, beside the CUDA kernel: one program for some kept rows of one head of K or V."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _prune(  # type: ignore[no-untyped-def]
    key, value, index, key_out, value_out, heads, sequence, kept, size: tl.constexpr, rows: tl.constexpr
):
    head, second = tl.program_id(0).to(tl.int64), tl.program_id(2)
    row = tl.program_id(1) * rows + tl.arange(0, rows)
    inside = row < kept
    source = tl.load(index + (head // heads) * kept + row, mask=inside, other=0)
    column = tl.arange(0, size)
    read = (head * sequence + source)[:, None] * size + column[None, :]
    write = (head * kept + row)[:, None] * size + column[None, :]
    if second == 0:
        tl.store(key_out + write, tl.load(key + read, mask=inside[:, None]), mask=inside[:, None])
    else:
        tl.store(value_out + write, tl.load(value + read, mask=inside[:, None]), mask=inside[:, None])


def kv_prune(
    key: torch.Tensor,
    value: torch.Tensor,
    keep: torch.Tensor,
    key_out: torch.Tensor,
    value_out: torch.Tensor,
    rows: int = 32,
) -> None:
    """key, value [B, H, S, Dh], Dh a power of two, and keep [B, K] int64 -> outputs [B, H, K, Dh]."""
    batch, heads, sequence, size = key.shape
    kept = keep.shape[1]
    if not kept:  # a grid of nothing is an error
        return
    grid = (batch * heads, triton.cdiv(kept, rows), 2)
    _prune[grid](
        key, value, keep, key_out, value_out, heads, sequence, kept, size=size, rows=rows, num_warps=4
    )
