"""ONNX Runtime's GroupQueryAttention in the place of Attention: what its two passes share."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir
from onnx_ir import tape

from skipvision_export.graph.passes.matching import made_by
from skipvision_export.graph.passes.names import CONTRIB_DOMAIN
from skipvision_export.tokens.ops import constant


def heads_of(value: ir.Value | None) -> int | None:
    """H of [B, H, S, Dh], where it and Dh are static."""
    shape = value.shape if value is not None else None
    if shape is None or len(shape) != 4 or not all(isinstance(shape[i], int) for i in (1, 3)):
        return None
    return int(shape[1])  # type: ignore[arg-type]


def flat_output(node: ir.Node) -> ir.Value | None:
    """[B, S, H*Dh] that is made of an Attention's output, where nothing else reads that."""
    readers = [use.node for use in node.outputs[0].uses()]
    turn = readers[0] if len(readers) == 1 else None
    flat = next((use.node for use in turn.outputs[0].uses()), None) if turn is not None else None
    if turn is None or flat is None or (turn.op_type, flat.op_type) != ("Transpose", "Reshape"):
        return None
    return flat.outputs[0]


def row_lengths(graph: ir.Graph) -> tuple[ir.Value, ir.Value]:
    """seqlens_k [B] int32, the last valid position of each row, and total_sequence_length, int32."""
    mask = next(value for value in graph.inputs if value.name == "attention_mask")
    t = tape.Tape()
    counts = t.op("ReduceSum", [mask, constant(t, 1)], {"keepdims": 0})
    last = t.op("Cast", [t.op("Sub", [counts, constant(t, 1)])], {"to": ir.DataType.INT32})
    total = t.op("Squeeze", [t.op("Shape", [mask], {"start": 1, "end": 2})])
    total = t.op("Cast", [total], {"to": ir.DataType.INT32})
    graph.insert_before(graph[0], t.nodes)
    return last, total


def replace_attention(
    graph: ir.Graph,
    node: ir.Node,
    new: Sequence[ir.Value],
    past: Sequence[ir.Value | None],
    lengths: tuple[ir.Value, ir.Value],
    present: Sequence[ir.Value],
) -> None:
    """Put GroupQueryAttention in the place of an Attention node.

    new: q, k and v [B, H, S, Dh] of the new positions, rotated; past and present: of K and V each.
    """
    flat = flat_output(node)
    assert flat is not None
    t = tape.Tape()
    rows = [_flat(t, value) for value in new]
    for made in t.nodes:
        made.metadata_props.update(node.metadata_props)
    out = ir.Value(name=f"{node.name}.grouped", type=flat.type, shape=flat.shape)
    attributes = {"num_heads": heads_of(new[0]), "kv_num_heads": heads_of(new[1]), "do_rotary": 0}
    scale = node.attributes.get("scale")
    softcap = node.attributes.get_float("softcap", 0.0)
    grouped = ir.Node(
        CONTRIB_DOMAIN,
        "GroupQueryAttention",
        [*rows, *past, *lengths],
        [
            *(ir.AttrInt64(name, value) for name, value in attributes.items() if value is not None),
            ir.AttrFloat32("softcap", softcap),
            *([ir.AttrFloat32("scale", scale.as_float())] if scale is not None else []),
        ],
        outputs=[out, *present],
        version=1,
    )
    grouped.metadata_props.update(node.metadata_props)
    graph.insert_before(node, [*t.nodes, grouped])
    ir.convenience.replace_all_uses_with(flat, out)


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
            {"interleaved": interleaved, "rotary_embedding_dim": partly, "num_heads": heads_of(value)},
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
