"""Decode that appends to the cache in place: ONNX Runtime's GroupQueryAttention over a shared buffer."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir
from onnx_ir import tape

from skipvision_export.graph.passes.matching import made_by, require
from skipvision_export.graph.passes.names import CONTRIB_DOMAIN
from skipvision_export.graph.passes.native_gqa import repeated_heads
from skipvision_export.tokens.ops import constant

# Sizes of the buffer that past and present share.
MAX_SEQUENCE = "max_sequence"


@dataclass(frozen=True)
class _Layer:
    """One layer's attention: the new rows of q, k and v [B, H, S, Dh], its cache, and what follows."""

    node: ir.Node
    query: ir.Value
    new: tuple[ir.Value, ir.Value]
    past: tuple[ir.Value, ir.Value]
    out: ir.Value  # [B, S, H*Dh]


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
        lengths = _lengths(graph)
        for layer in layers:
            _share(graph, layer, lengths)
        model.opset_imports[CONTRIB_DOMAIN] = 1
        return ir.passes.PassResult(model, modified=True)


def _match(node: ir.Node) -> _Layer | None:
    if node.attributes.get_int("is_causal", 0):
        return None
    caches = [_cache(node.inputs[i]) for i in (1, 2)]
    query = node.inputs[0]
    readers = [use.node for use in node.outputs[0].uses()]
    turn = readers[0] if len(readers) == 1 else None
    flat = next((use.node for use in turn.outputs[0].uses()), None) if turn is not None else None
    if None in caches or query is None or turn is None or flat is None:
        return None
    if (turn.op_type, flat.op_type) != ("Transpose", "Reshape"):
        return None
    (past_k, new_k), (past_v, new_v) = (cache for cache in caches if cache is not None)
    if any(_heads(value) is None for value in (query, past_k, past_v)):
        return None
    return _Layer(node, query, (new_k, new_v), (past_k, past_v), flat.outputs[0])


def _cache(value: ir.Value | None) -> tuple[ir.Value, ir.Value] | None:
    """The past and the new rows whose Concat along the tokens is this output of the graph."""
    join = made_by(value, "Concat")
    if join is None or value is None or not value.is_graph_output() or len(join.inputs) != 2:
        return None
    past, new = join.inputs
    if past is None or new is None or not past.is_graph_input():
        return None
    return (past, new) if join.attributes.get_int("axis", 0) in (-2, 2) else None


def _heads(value: ir.Value) -> int | None:
    """H of [B, H, S, Dh], where it and Dh are static."""
    shape = value.shape
    if shape is None or len(shape) != 4 or not all(isinstance(shape[i], int) for i in (1, 3)):
        return None
    return int(shape[1])  # type: ignore[arg-type]


def _lengths(graph: ir.Graph) -> tuple[ir.Value, ir.Value]:
    """seqlens_k [B] int32, the last valid position of each row, and total_sequence_length, int32."""
    mask = next(value for value in graph.inputs if value.name == "attention_mask")
    t = tape.Tape()
    counts = t.op("ReduceSum", [mask, constant(t, 1)], {"keepdims": 0})
    last = t.op("Cast", [t.op("Sub", [counts, constant(t, 1)])], {"to": ir.DataType.INT32})
    total = t.op("Squeeze", [t.op("Shape", [mask], {"start": 1, "end": 2})])
    total = t.op("Cast", [total], {"to": ir.DataType.INT32})
    graph.insert_before(graph[0], t.nodes)
    return last, total


def _share(graph: ir.Graph, layer: _Layer, lengths: tuple[ir.Value, ir.Value]) -> None:
    t = tape.Tape()
    heads, kv_heads = _heads(layer.query), _heads(layer.past[0])
    assert heads is not None and kv_heads is not None
    rows = [_flat(t, value) for value in (layer.query, *layer.new)]
    for node in t.nodes:
        node.metadata_props.update(layer.node.metadata_props)
    out = ir.Value(name=f"{layer.node.name}.shared", type=layer.out.type, shape=layer.out.shape)
    present = []
    for i, past in zip((1, 2), layer.past, strict=True):
        whole = layer.node.inputs[i]
        assert whole is not None and past.shape is not None
        past.shape[2] = ir.SymbolicDim(MAX_SEQUENCE)
        value = ir.Value(name=whole.name, type=whole.type, shape=past.shape.copy())
        whole.name = f"{whole.name}.joined"
        graph.outputs[list(graph.outputs).index(whole)] = value
        present.append(value)
    attributes = {"num_heads": heads, "kv_num_heads": kv_heads, "do_rotary": 0}
    scale = layer.node.attributes.get("scale")
    softcap = layer.node.attributes.get_float("softcap", 0.0)
    node = ir.Node(
        CONTRIB_DOMAIN,
        "GroupQueryAttention",
        [*rows, *layer.past, *lengths],
        [
            *(ir.AttrInt64(name, value) for name, value in attributes.items()),
            ir.AttrFloat32("softcap", softcap),
            *([ir.AttrFloat32("scale", scale.as_float())] if scale is not None else []),
        ],
        outputs=[out, *present],
        version=1,
    )
    node.metadata_props.update(layer.node.metadata_props)
    graph.insert_before(layer.node, [*t.nodes, node])
    ir.convenience.replace_all_uses_with(layer.out, out)


def _flat(t: tape.Tape, value: ir.Value) -> ir.Value:
    """[B, H, S, Dh] -> [B, S, H*Dh], undoing what split the heads where that is all that was done."""
    rotary = made_by(value, "RotaryEmbedding")
    source = _unsplit(rotary.inputs[0] if rotary is not None else value)
    if rotary is not None and source is not None and len(rotary.inputs) == 3:
        interleaved = rotary.attributes.get_int("interleaved", 0)
        partly = rotary.attributes.get_int("rotary_embedding_dim", 0)
        return t.op(
            "RotaryEmbedding",
            [source, *rotary.inputs[1:]],
            {"interleaved": interleaved, "rotary_embedding_dim": partly, "num_heads": _heads(value)},
        )
    if rotary is None and source is not None:
        return source
    rows = t.op("Transpose", [value], {"perm": [0, 2, 1, 3]})
    assert value.shape is not None
    size = int(value.shape[1]) * int(value.shape[3])  # type: ignore[arg-type]
    return t.op("Reshape", [rows, constant(t, 0, 0, size)])


def _unsplit(value: ir.Value | None) -> ir.Value | None:
    """x [B, S, H*Dh] where `value` is Transpose(Reshape(x, [B, S, H, Dh]), 0 2 1 3)."""
    turn = made_by(value, "Transpose")
    if turn is None or tuple(turn.attributes.get_ints("perm", ())) != (0, 2, 1, 3):
        return None
    split = made_by(turn.inputs[0], "Reshape")
    source = split.inputs[0] if split is not None else None
    if source is None or source.shape is None or len(source.shape) != 3 or turn.inputs[0] is None:
        return None
    shape = turn.inputs[0].shape
    same = shape is not None and list(shape[:2]) == list(source.shape[:2])
    return source if same else None
