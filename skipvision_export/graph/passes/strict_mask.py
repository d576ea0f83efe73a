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
        require(not starts_late(model), "StrictMask runs before LastLayer")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite the prefill graph in place."""
        graph = model.graph
        change_masks(graph, "And", _allowed(graph, image_index_input(graph)), "strict masking")
        return ir.passes.PassResult(model, modified=True)


def starts_late(model: ir.Model) -> bool:
    """Has the queries of some Attention been cut to the last position (by LastLayer)?"""
    queries = [node.inputs[0] for node in model.graph if node.op_type == "Attention"]
    return any(q is not None and q.shape is not None and q.shape[2] == 1 for q in queries)


def image_index_input(graph: ir.Graph) -> ir.Value:
    """The new input `image_index` [B, S] int64, see StrictMaskPass."""
    index = ir.Value(
        name=IMAGE_INDEX,
        type=ir.TensorType(ir.DataType.INT64),
        shape=ir.Shape(["batch", "sequence"]),
    )
    graph.inputs.append(index)
    return index


def change_masks(graph: ir.Graph, kind: str, other: ir.Value, what: str) -> None:
    """Put And or Or of `other` [B, 1, S, S] in the place of each Attention's boolean mask.

    Raises PassError, which names `what`, for an Attention without one, and where there is no Attention.
    """
    nodes = [node for node in graph if node.op_type == "Attention"]
    if not nodes:
        raise PassError(f"the decoder has no Attention node: {what} has nothing to mask")
    changed: dict[ir.Value, ir.Value] = {}
    for node in nodes:
        mask = node.inputs[3] if len(node.inputs) > 3 else None
        if mask is None or mask.dtype != ir.DataType.BOOL:
            raise PassError(
                f"node {node.name} (Attention) has no boolean mask but {mask}: {what} cannot be added"
            )
        if mask not in changed:
            both = ir.node(kind, [mask, other])
            graph.insert_before(node, both)
            changed[mask] = both.outputs[0]
        node.replace_input_with(3, changed[mask])


def _allowed(graph: ir.Graph, index: ir.Value) -> ir.Value:
    """[B, S] -> [B, 1, S, P+S] bool, at the head of the graph."""
    t = tape.Tape()
    queries, keys, padded = pictures(t, graph, index)
    kept = t.op("GreaterOrEqual", [padded, constant(t, 0)])
    kept = t.op("Unsqueeze", [kept, constant(t, 1, 2)])
    allowed = t.op("Or", [kept, t.op("Equal", [queries, keys])])
    graph.insert_before(graph[0], t.nodes)
    return allowed


def pictures(t: tape.Tape, graph: ir.Graph, index: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
    """The picture of each query [B, 1, S, 1] and key [B, 1, 1, P+S], 0 for none; the keys' index [B, P+S]."""
    queries = t.op("Unsqueeze", [t.op("Abs", [index]), constant(t, 1, 3)])
    if any((value.name or "").startswith("past_key_values") for value in graph.inputs):
        mask = next(value for value in graph.inputs if value.name == "attention_mask")
        total, new = (t.op("Shape", [value], {"start": 1, "end": 2}) for value in (mask, index))
        before = t.op("Concat", [constant(t, 0), t.op("Sub", [total, new]), constant(t, 0, 0)], {"axis": 0})
        index = t.op("Pad", [index, before])  # [B, P+S], 0 for cached positions
    keys = t.op("Unsqueeze", [t.op("Abs", [index]), constant(t, 1, 2)])
    return queries, keys, index
