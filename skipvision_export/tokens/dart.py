"""Select by diversity: DART's duplication to a few pivots."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from skipvision_export.tokens.ops import constant, take_rows, topk, transposed, unit_rows
from skipvision_export.tokens.registry import GraphImage, Selector, TorchImage

if TYPE_CHECKING:
    import onnx_ir as ir
    from onnx_ir import tape
    from torch import Tensor

PIVOTS = 4
# Above every cosine similarity's negative: pivots come first.
PIVOT_SCORE = 2.0


class Dart(Selector):
    """Tokens that least duplicate the pivots: the four with the largest features, by L1 norm.

    After DART (arXiv 2502.11494), with two simplifications: pivots are visual tokens only, chosen on
    the decoder's input instead of its keys, and a token counts by its most similar pivot instead of
    each pivot taking its share in turn.
    """

    name = "dart"

    def scores(self, image: TorchImage) -> Tensor:
        """Minus the largest cosine similarity to a pivot."""
        import torch.nn.functional as F

        x = image.features.detach().float()
        # Not topk: where sizes are equal the lower index must come first.
        pivots = x.abs().sum(-1).sort(dim=1, descending=True, stable=True).indices[:, :PIVOTS]
        x = F.normalize(x, dim=-1)
        picked = x.gather(1, pivots.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
        scores = -(x @ picked.transpose(1, 2)).amax(-1)
        return scores.scatter(1, pivots, PIVOT_SCORE)

    def graph_scores(self, t: tape.Tape, image: GraphImage) -> ir.Value:
        """The same on graph values."""
        import onnx_ir as ir

        x = t.op("Cast", [image.features], {"to": ir.DataType.FLOAT})
        size = t.op("ReduceL1", [x, constant(t, -1)], {"keepdims": 0})
        found = image.visual_tokens
        if isinstance(found, int):
            count = constant(t, min(PIVOTS, found))
        else:
            count = t.op("Min", [constant(t, PIVOTS), found])
        top, pivots = topk(t, size, count)
        unit = unit_rows(t, x)
        similar = t.op("MatMul", [unit, transposed(t, take_rows(t, unit, pivots))])
        scores = t.op("Neg", [t.op("ReduceMax", [similar, constant(t, -1)], {"keepdims": 0})])
        zero = constant(t, 0, dtype=np.float32)
        first = t.op("Add", [t.op("Mul", [top, zero]), constant(t, PIVOT_SCORE, dtype=np.float32)])
        return t.op("ScatterElements", [scores, pivots, first], {"axis": 1})
