"""RotaryEmbedding where the tracer's own fusion stops at the casts of a half type."""

from __future__ import annotations

import onnx_ir as ir

from skipvision_export.graph.passes.matching import HALF_TYPES, constant_ints, made_by


class HalfRotaryPass(ir.passes.InPlacePass):
    """Fuse a half type's rotation of q or k [B, H, S, Dh] into one RotaryEmbedding.

    angles [B, S, Dh/2] float32:

        before   c, s = (Unsqueeze(Cast(f(Concat(angles, angles))), 1) for f in (Cos, Sin))
                 Add(Mul(x, c), Mul(Concat(Neg(Slice(x, Dh/2..)), Slice(x, ..Dh/2)), s))
        after    RotaryEmbedding(x, Cast(Cos(angles)), Cast(Sin(angles)))

    onnxscript's rule expects no Cast. The tables are rounded to the half type in both; what differs
    is only that the operator may round its products once instead of twice.

    Cases that are left alone: float32; halves that are not equal; a number of heads or a head size
    that is not static; cosine and sine of different angles.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite in place; what it replaces is left for dead-code removal."""
        graph = model.graph
        tables: dict[tuple[ir.Value, int], tuple[ir.Value, ir.Value]] = {}
        modified = False
        for node in tuple(graph):
            match = _match(node)
            if match is None:
                continue
            x, angles = match
            assert x.shape is not None and x.dtype is not None
            key = (angles, int(x.dtype))
            if key not in tables:
                tables[key] = _tables(graph, node, angles, x.dtype)
            rotary = ir.node(
                "RotaryEmbedding",
                [x, *tables[key]],
                {"interleaved": 0, "num_heads": int(x.shape[1])},  # type: ignore[arg-type]
            )
            rotary.metadata_props.update(node.metadata_props)
            out = rotary.outputs[0]
            out.type, out.shape = node.outputs[0].type, node.outputs[0].shape
            graph.insert_before(node, rotary)
            old = node.outputs[0]
            out.name, old.name = old.name, f"{old.name}.rotated"
            if old in graph.outputs:
                graph.outputs[list(graph.outputs).index(old)] = out
            ir.convenience.replace_all_uses_with(old, out)
            modified = True
        return ir.passes.PassResult(model, modified=modified)


def _tables(
    graph: ir.Graph, before: ir.Node, angles: ir.Value, dtype: ir.DataType
) -> tuple[ir.Value, ir.Value]:
    """Cosine and sine of the angles in `dtype`, [B, S, Dh/2]."""
    found = []
    for kind in ("Cos", "Sin"):
        wave = ir.node(kind, [angles])
        cast = ir.node("Cast", [wave.outputs[0]], {"to": dtype})
        graph.insert_before(before, [wave, cast])
        found.append(cast.outputs[0])
    return found[0], found[1]


def _match(add: ir.Node) -> tuple[ir.Value, ir.Value] | None:
    """x and the angles of a rotation that ends in `add`."""
    products = [made_by(value, "Mul") for value in add.inputs] if add.op_type == "Add" else []
    if len(products) != 2:
        return None
    for plain, turned in (products, products[::-1]):
        if plain is None or turned is None:
            return None
        for x, cos in (plain.inputs, plain.inputs[::-1]):
            for half_turn, sin in (turned.inputs, turned.inputs[::-1]):
                angles = _angles(cos, "Cos")
                if angles is None or angles is not _angles(sin, "Sin"):
                    continue
                if x is not None and _turned(half_turn, x) and _half_wide(angles, x):
                    return x, angles
    return None


def _angles(value: ir.Value | None, kind: str) -> ir.Value | None:
    """The angles whose cosine or sine, doubled and cast to a half type, `value` holds."""
    unsqueeze = made_by(value, "Unsqueeze")
    if unsqueeze is None or constant_ints(unsqueeze.inputs[1]) != [1]:
        return None
    cast = made_by(unsqueeze.inputs[0], "Cast")
    if cast is None or cast.attributes.get_int("to", 0) not in HALF_TYPES:
        return None
    wave = made_by(cast.inputs[0], kind)
    double = made_by(wave.inputs[0], "Concat") if wave is not None else None
    if double is None or double.attributes.get_int("axis", 0) != -1:
        return None
    same = len(double.inputs) == 2 and double.inputs[0] is double.inputs[1]
    return double.inputs[0] if same else None


def _turned(value: ir.Value | None, x: ir.Value) -> bool:
    """Is `value` Concat(-second half of x, first half of x), x [B, H, S, Dh] of static H and Dh?"""
    if x.dtype not in HALF_TYPES or x.shape is None or len(x.shape) != 4:
        return False
    heads, size = x.shape[1], x.shape[3]
    if not isinstance(heads, int) or not isinstance(size, int):
        return False
    join = made_by(value, "Concat")
    if join is None or len(join.inputs) != 2 or join.attributes.get_int("axis", 0) not in (-1, 3):
        return False
    negative = made_by(join.inputs[0], "Neg")
    second = made_by(negative.inputs[0], "Slice") if negative is not None else None
    first = made_by(join.inputs[1], "Slice")
    return _cut(first, x, 0, size // 2, size) and _cut(second, x, size // 2, size, size)


def _cut(node: ir.Node | None, x: ir.Value, start: int, end: int, size: int) -> bool:
    """Is it x[..., start:end]?"""
    if node is None or node.inputs[0] is not x:
        return False
    starts, ends, axes, *steps = (constant_ints(value) for value in node.inputs[1:])
    if any(step != [1] for step in steps) or axes not in ([3], [-1]) or starts != [start]:
        return False
    return ends is not None and min(ends[0], size) == end


def _half_wide(angles: ir.Value, x: ir.Value) -> bool:
    """Does the table have half of x's head size, where its shape is known?"""
    size = angles.shape[-1] if angles.shape is not None else None
    assert x.shape is not None
    return not isinstance(size, int) or 2 * size == x.shape[3]
