"""Prompts whose tokens also see later ones: those of their own picture, or all of the prompt."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir import tape

from skipvision_export.graph.passes.matching import require
from skipvision_export.graph.passes.strict_mask import (
    change_masks,
    image_index_input,
    pictures,
    starts_late,
)
from skipvision_export.tokens.ops import constant


class WiderMaskPass(ir.passes.InPlacePass):
    """Let each layer's Attention see more of the prompt than what comes before.

    With M the boolean mask [B, 1, S, P+S], P cached positions, and valid = attention_mask != 0:

        sees "prompt"   M or valid[b, k]
        sees "image"    M or (valid[b, k] and image_index[b, q] != 0
                              and |image_index[b, q]| == |image_index[b, k]|)

    image_index [B, S] int64 is a new input, as StrictMask's; of cached positions it is 0. Source: PaliGemma
    (arXiv 2407.07726), prefix-LM masking; Gemma 3 (arXiv 2503.19786), attention over image tokens.

    Raises PassError for an Attention without a boolean mask, and where there is none at all.
    """

    def __init__(self, sees: str) -> None:
        """sees: "image" or "prompt"."""
        super().__init__()
        self.sees = sees

    def requires(self, model: ir.Model) -> None:
        """Before LastLayer: the mask has a row for every query."""
        require(not starts_late(model), "WiderMask runs before LastLayer")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite the prefill graph in place."""
        graph = model.graph
        valid = next(value for value in graph.inputs if value.name == "attention_mask")
        t = tape.Tape()
        more = t.op("Cast", [t.op("Unsqueeze", [valid, constant(t, 1, 2)])], {"to": ir.DataType.BOOL})
        if self.sees == "image":
            queries, keys, _ = pictures(t, graph, image_index_input(graph))
            inside = t.op("And", [t.op("Equal", [queries, keys]), t.op("Greater", [queries, constant(t, 0)])])
            more = t.op("And", [more, inside])
        graph.insert_before(graph[0], t.nodes)
        change_masks(graph, "Or", more, "seeing later tokens")
        return ir.passes.PassResult(model, modified=True)
