"""Select by CLS attention: the method's own choice."""

from __future__ import annotations

from typing import TYPE_CHECKING

from skipvision_export.tokens.registry import GraphImage, Selector, TorchImage

if TYPE_CHECKING:
    import onnx_ir as ir
    from onnx_ir import tape
    from torch import Tensor


class ClsAttention(Selector):
    """How much the CLS row looks at each patch at the feature layer, heads summed.

    Source: Skip-Vision, "choosing and merging".
    """

    name = "cls_attention"

    def scores(self, image: TorchImage) -> Tensor:
        """As the vision tower gave them."""
        return image.cls_attention()

    def graph_scores(self, t: tape.Tape, image: GraphImage) -> ir.Value:
        """As the graph computes them from the feature layer's query and key."""
        return image.cls_attention(t)
