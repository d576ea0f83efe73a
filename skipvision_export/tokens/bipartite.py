"""Merge by bipartite soft matching: the method's own merge."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from skipvision_export.errors import ConfigError
from skipvision_export.tokens.ops import EPS, constant, take_rows, topk, transposed, unit_rows
from skipvision_export.tokens.registry import Merge

if TYPE_CHECKING:
    import onnx_ir as ir
    from onnx_ir import tape
    from torch import Tensor


class Bipartite(Merge):
    """The most redundant tokens are averaged into the most similar of the others.

    A token's redundancy is the sum of its cosine similarities to all others. The N-K most redundant
    are sources, the other K destinations, which come out in the order of descending redundancy, each
    as the plain mean of itself and its sources. With K = N the input comes back as it is.
    Similarities are float32 whatever the type: in bfloat16 too few stay distinct. Source:
    Skip-Vision, "choosing and merging" (the authors' RandomBipartiteSoftMatching, which is
    deterministic); zero rows, which the authors do not guard, have similarity 0 to all.
    """

    name = "bipartite"

    def merge(self, x: Tensor, keep: int, by: Tensor | None = None) -> Tensor:
        """[B, N, D] -> [B, keep, D]; raises ConfigError unless 0 < keep <= N."""
        import torch

        n = x.shape[1]
        if not 0 < keep <= n:
            raise ConfigError(f"cannot merge {n} tokens to {keep}; expected 1 to {n}")
        if keep == n:
            return x
        sources, targets, nearest = self._pairs(x if by is None else by, keep)
        count = torch.ones(x.shape[0], keep, device=x.device)
        count.scatter_add_(1, nearest, torch.ones_like(nearest, dtype=count.dtype))
        # Sums in float32 at least, so that a mean of many bfloat16 rows keeps its digits.
        wide = x.to(torch.promote_types(x.dtype, torch.float32))

        def take(index: Tensor) -> Tensor:
            return wide.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))

        where = nearest.unsqueeze(-1).expand(-1, -1, x.shape[-1])
        total = take(targets).scatter_add(1, where, take(sources))
        return (total / count.unsqueeze(-1)).to(x.dtype)

    def destinations(self, x: Tensor, keep: int) -> Tensor:
        """[B, N, D] -> [B, keep] int64, in the order in which they come out."""
        import torch

        if keep == x.shape[1]:
            return torch.arange(keep, device=x.device).expand(x.shape[0], -1)
        return self._pairs(x, keep)[1]

    def _pairs(self, x: Tensor, keep: int) -> tuple[Tensor, Tensor, Tensor]:
        """Indices of the sources [B, N-K], of the destinations [B, K], and of each source's among these."""
        import torch
        import torch.nn.functional as F

        n = x.shape[1]
        with torch.no_grad():
            unit = F.normalize(x.float(), dim=-1, eps=EPS)
            similarity = unit @ unit.transpose(1, 2)
            # Left out before the sum: subtracting it after would round equal redundancies apart.
            redundancy = similarity.masked_fill(torch.eye(n, dtype=torch.bool, device=x.device), 0).sum(-1)
            order = redundancy.sort(dim=1, descending=True, stable=True).indices
            sources, targets = order[:, : n - keep], order[:, n - keep :]
            rows = similarity.gather(1, sources.unsqueeze(-1).expand(-1, -1, n))
            between = rows.gather(2, targets.unsqueeze(1).expand(-1, n - keep, -1))
            return sources, targets, between.argmax(-1)

    def graph_merge(
        self, t: tape.Tape, x: ir.Value, keep: int | ir.Value, by: ir.Value | None = None
    ) -> tuple[ir.Value, ir.Value]:
        """The same in ONNX: the assignment is a one-hot matrix, the sums are a product with it.

        The number of tokens may be dynamic but must be at least `keep`.
        """
        import onnx_ir as ir

        unit = unit_rows(t, x if by is None else by)
        similarity = t.op("MatMul", [unit, transposed(t, unit)])
        n = t.op("Shape", [x], {"start": 1, "end": 2})
        k = constant(t, keep) if isinstance(keep, int) else keep
        zero, axis = constant(t, 0), constant(t, 1)
        # A Range with itself, not EyeLike: TensorRT's wants a static shape.
        start, step = (t.op("Constant", [], {"value_int": i}) for i in (0, 1))
        place = t.op("Range", [start, t.op("Squeeze", [n]), step])
        itself = t.op("Equal", [place, t.op("Unsqueeze", [place, constant(t, -1)])])
        others = t.op("Where", [itself, constant(t, 0, dtype=np.float32), similarity])
        redundancy = t.op("ReduceSum", [others, constant(t, -1)], {"keepdims": 0})
        # With as many as are kept the order must stay: equal scores go by index.
        some = t.op("Cast", [t.op("Greater", [n, k])], {"to": ir.DataType.FLOAT})
        order = topk(t, t.op("Mul", [redundancy, some]), n)[1]
        cut = t.op("Sub", [n, k])
        sources = t.op("Slice", [order, zero, cut, axis])
        targets = t.op("Slice", [order, cut, n, axis])
        wide = t.op("Cast", [x], {"to": ir.DataType.FLOAT})
        between = t.op("MatMul", [take_rows(t, unit, sources), transposed(t, take_rows(t, unit, targets))])
        nearest = t.op("ArgMax", [between], {"axis": -1, "keepdims": 0})
        ends = constant(t, 0, 1, dtype=np.float32)
        assigned = t.op("OneHot", [nearest, k, ends], {"axis": -1})  # [B, N-K, K]
        total = t.op("MatMul", [transposed(t, assigned), take_rows(t, wide, sources)])
        total = t.op("Add", [total, take_rows(t, wide, targets)])
        count = t.op("ReduceSum", [assigned, axis], {"keepdims": 0})
        count = t.op("Add", [count, constant(t, 1, dtype=np.float32)])
        mean = t.op("Div", [total, t.op("Unsqueeze", [count, constant(t, -1)])])
        return t.op("CastLike", [mean, x]), targets
