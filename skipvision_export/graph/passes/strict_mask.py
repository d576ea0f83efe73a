"""Strict masking: skipped tokens are hidden from all that is outside of their picture."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir import tape

from skipvision_export.errors import PassError
from skipvision_export.graph.passes.matching import require
from skipvision_export.graph.passes.names import IMAGE_INDEX
from skipvision_export.tokens.ops import constant


class StrictMaskPass(ir.passes.InPlacePass):
    """Let each layer's Attention see a picture's skipped tokens from inside that picture only.

    A new input `image_index` [B, S] int64 is 0 for text, i for the tokens of a row's i-th picture
    that keep their K/V, and -i for those that lose them. With M the boolean mask [B, 1, S, S]:

        after    M[b, 0, q, k] and (image_index[b, k] >= 0 or |image_index[b, q]| == |image_index[b, k]|)

    Keys that come from a cache were kept, and are seen by all. A token always sees itself, so no row
    becomes empty. Source: Skip-Vision, the stricter variant of
    Skip KV-cache.

    Raises PassError for an Attention without a boolean mask, and where there is none at all.
    """

    def requires(self, model: ir.Model) -> None:
        """Before LastLayer: the mask has a row for every query."""
        shapes = [n.inputs[0].shape for n in model.graph if n.op_type == "Attention" and n.inputs[0]]
        require(all(s is None or s[2] != 1 for s in shapes), "StrictMask runs before LastLayer")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite the prefill graph in place."""
        graph = model.graph
        nodes = [node for node in graph if node.op_type == "Attention"]
        if not nodes:
            raise PassError("the decoder has no Attention node: strict masking has nothing to mask")
        index = ir.Value(
            name=IMAGE_INDEX,
            type=ir.TensorType(ir.DataType.INT64),
            shape=ir.Shape(["batch", "sequence"]),
        )
        graph.inputs.append(index)
        allowed = _allowed(graph, index)
        stricter: dict[ir.Value, ir.Value] = {}
        for node in nodes:
            mask = node.inputs[3] if len(node.inputs) > 3 else None
            if mask is None or mask.dtype != ir.DataType.BOOL:
                raise PassError(
                    f"node {node.name} (Attention) has no boolean mask but {mask}: strict masking "
                    "cannot be added"
                )
            if mask not in stricter:
                both = ir.node("And", [mask, allowed])
                graph.insert_before(node, both)
                stricter[mask] = both.outputs[0]
            node.replace_input_with(3, stricter[mask])
        return ir.passes.PassResult(model, modified=True)


def _allowed(graph: ir.Graph, index: ir.Value) -> ir.Value:
    """[B, S] -> [B, 1, S, P+S] bool, at the head of the graph."""
    t = tape.Tape()
    queries = t.op("Unsqueeze", [t.op("Abs", [index]), constant(t, 1, 3)])  # [B, 1, S, 1]
    if any((value.name or "").startswith("past_key_values") for value in graph.inputs):
        mask = next(value for value in graph.inputs if value.name == "attention_mask")
        total, new = (t.op("Shape", [value], {"start": 1, "end": 2}) for value in (mask, index))
        before = t.op("Concat", [constant(t, 0), t.op("Sub", [total, new]), constant(t, 0, 0)], {"axis": 0})
        index = t.op("Pad", [index, before])  # [B, P+S], 0 for cached positions
    keys = t.op("Unsqueeze", [t.op("Abs", [index]), constant(t, 1, 2)])  # [B, 1, 1, P+S]
    kept = t.op("GreaterOrEqual", [index, constant(t, 0)])
    kept = t.op("Unsqueeze", [kept, constant(t, 1, 2)])
    allowed = t.op("Or", [kept, t.op("Equal", [queries, keys])])
    graph.insert_before(graph[0], t.nodes)
    return allowed
