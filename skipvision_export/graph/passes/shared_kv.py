"""Decode that appends to the cache in place: ONNX Runtime's GroupQueryAttention over a shared buffer."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from skipvision_export.graph.passes.group_query import flat_output, heads_of, replace_attention, row_lengths
from skipvision_export.graph.passes.matching import made_by, require
from skipvision_export.graph.passes.names import CONTRIB_DOMAIN
from skipvision_export.graph.passes.native_gqa import repeated_heads

# Sizes of the buffer that past and present share.
MAX_SEQUENCE = "max_sequence"


@dataclass(frozen=True)
class _Layer:
    """One layer's attention: the new rows of q, k and v [B, H, S, Dh], and its cache."""

    node: ir.Node
    query: ir.Value
    new: tuple[ir.Value, ir.Value]
    past: tuple[ir.Value, ir.Value]


class SharedKVPass(ir.passes.InPlacePass):
    """Decode whose past and present K/V are one buffer, which each step only appends to.

    past.i and present.i become [B, H, max_sequence, Dh]; where both are bound to the same memory, a step
    copies one position instead of the whole cache. With n = sum(attention_mask) of each row:

        before   present = Concat(past, new), Attention(q, present_k, present_v, mask)
        after    GroupQueryAttention(q, new_k, new_v, past_k, past_v, n - 1, total_sequence), of
                 com.microsoft; rotation stays in front of it, because positions are not those of the
                 pruned cache

    The mask that it replaces is causal and leaves out padding on the right; a batch padded on the left
    needs the graph as it was. The head's sizes must be static, and all layers must share one mask (with
    sliding windows they do not). A graph that does not match in every layer is left as it is.
    """

    def requires(self, model: ir.Model) -> None:
        """After NativeGQA, behind whose repeats no cache would be found."""
        attention = [node for node in model.graph if node.op_type == "Attention"]
        repeated = [n for n in attention if any(repeated_heads(n.inputs[i]) is not None for i in (1, 2))]
        require(not repeated, "SharedKV runs after NativeGQA")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite a decode graph in place; what it replaces is left for dead-code removal."""
        graph = model.graph
        nodes = [node for node in graph if node.op_type == "Attention"]
        layers = [layer for layer in map(_match, nodes) if layer is not None]
        masks = {node.inputs[3] if len(node.inputs) > 3 else None for node in nodes}
        if not nodes or len(layers) != len(nodes) or len(masks) != 1:
            return ir.passes.PassResult(model, modified=False)
        lengths = row_lengths(graph)
        for layer in layers:
            _share(graph, layer, lengths)
        model.opset_imports[CONTRIB_DOMAIN] = 1
        return ir.passes.PassResult(model, modified=True)


def _match(node: ir.Node) -> _Layer | None:
    if node.attributes.get_int("is_causal", 0):
        return None
    caches = [_cache(node.inputs[i]) for i in (1, 2)]
    query = node.inputs[0]
    if None in caches or query is None or flat_output(node) is None:
        return None
    (past_k, new_k), (past_v, new_v) = (cache for cache in caches if cache is not None)
    if any(heads_of(value) is None for value in (query, past_k, past_v)):
        return None
    return _Layer(node, query, (new_k, new_v), (past_k, past_v))


def _cache(value: ir.Value | None) -> tuple[ir.Value, ir.Value] | None:
    """The past and the new rows whose Concat along the tokens is this output of the graph."""
    join = made_by(value, "Concat")
    if join is None or value is None or not value.is_graph_output() or len(join.inputs) != 2:
        return None
    past, new = join.inputs
    if past is None or new is None or not past.is_graph_input():
        return None
    return (past, new) if join.attributes.get_int("axis", 0) in (-2, 2) else None


def _share(graph: ir.Graph, layer: _Layer, lengths: tuple[ir.Value, ir.Value]) -> None:
    present = []
    for i, past in zip((1, 2), layer.past, strict=True):
        whole = layer.node.inputs[i]
        assert whole is not None and past.shape is not None
        past.shape[2] = ir.SymbolicDim(MAX_SEQUENCE)
        value = ir.Value(name=whole.name, type=whole.type, shape=past.shape.copy())
        whole.name = f"{whole.name}.joined"
        graph.outputs[list(graph.outputs).index(whole)] = value
        present.append(value)
    replace_attention(graph, layer.node, (layer.query, *layer.new), layer.past, lengths, present)
