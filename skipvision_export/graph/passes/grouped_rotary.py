"""Rotation inside ONNX Runtime's GroupQueryAttention, by a table of every position."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from skipvision_export.graph.passes.matching import made_by
from skipvision_export.graph.passes.names import CONTRIB_DOMAIN
from skipvision_export.graph.passes.regions import is_constant

# Of rows of the table, which the runtime holds in memory for each graph that has it.
_MOST_POSITIONS = 1 << 17
_HEAD_MULTIPLE = 16
# What may stand between position_ids and the angles' cosine: each position's row is made of it alone.
_OF_ONE_POSITION = frozenset("Cast Cos Mul Sin Unsqueeze".split())


class GroupedRotaryPass(ir.passes.InPlacePass):
    """Let GroupQueryAttention rotate q and k, and take them as their packed projection leaves them.

    With f, g the nodes that make cosine and sine [B, S, Dh/2] of position_ids:

        before   q, k, v = Split(x); GroupQueryAttention(Rotary(q, f(ids), g(ids)), Rotary(k, ...), v, ...)
        after    GroupQueryAttention(x, , , ..., f(0..N-1), g(0..N-1), ids), do_rotary = 1

    The table is left as nodes on the constant 0..N-1, N = `positions`, which ONNX Runtime folds when it
    loads the graph: so it holds what the graph would compute, whatever scales the angles. Three operators
    less in each layer of a decode step, 2 to 3 % of it on a CPU (benchmarks/decoder_cpu.py's model).

    Left alone: more than 131,072 positions, angles that depend on more than the own position (dynamic
    scaling), a rotation of pairs or of a part of each head, q and k that are normed after projection, and
    heads whose size is no multiple of 16, which the operator does not rotate.
    """

    def __init__(self, positions: int | None) -> None:
        """positions: one more than the largest id that is ever fed; None where there is no limit."""
        super().__init__()
        self.positions = positions

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite in place; what it replaces is left for dead-code removal."""
        graph = model.graph
        ids = next((value for value in graph.inputs if value.name == "position_ids"), None)
        grouped = [node for node in graph if node.op_type == "GroupQueryAttention"]
        pairs = {_tables_of(node) for node in grouped}
        pair = pairs.pop() if len(pairs) == 1 else None
        if ids is None or pair is None or not 0 < (self.positions or 0) <= _MOST_POSITIONS:
            return ir.passes.PassResult(model, modified=False)
        makers = [_makers(value, ids) for value in pair]
        if any(found is None for found in makers):
            return ir.passes.PassResult(model, modified=False)
        tables = self._tables(graph, pair, ids, [node for found in makers for node in found or ()])
        for node in grouped:
            _rotate(graph, node, tables, ids)
        return ir.passes.PassResult(model, modified=True)

    def _tables(
        self, graph: ir.Graph, pair: tuple[ir.Value, ir.Value], ids: ir.Value, makers: Sequence[ir.Node]
    ) -> list[ir.Value]:
        """Cosine and sine [N, Dh/2] of 0..N-1."""
        ends = [
            ir.node("Constant", [], {"value": ir.tensor(np.array(n, np.int64))})
            for n in (0, self.positions, 1)
        ]
        every = ir.node("Range", [node.outputs[0] for node in ends])
        axis = ir.node("Constant", [], {"value": ir.tensor(np.array([0], np.int64))})
        row = ir.node("Unsqueeze", [every.outputs[0], axis.outputs[0]])
        new: dict[ir.Value, ir.Value] = {ids: row.outputs[0]}
        made = [*ends, every, axis, row]
        for node in dict.fromkeys(makers):
            inputs = [new.get(value, value) if value is not None else None for value in node.inputs]
            copy = ir.Node(node.domain, node.op_type, inputs, node.attributes.values(), num_outputs=1)
            new[node.outputs[0]] = copy.outputs[0]
            made.append(copy)
        tables = [ir.node("Squeeze", [new[value], axis.outputs[0]]) for value in pair]
        graph.insert_before(graph[0], [*made, *tables])
        return [node.outputs[0] for node in tables]


def _tables_of(node: ir.Node) -> tuple[ir.Value, ir.Value] | None:
    """Cosine and sine by which q and k of a GroupQueryAttention are rotated in front of it."""
    past = node.inputs[3]
    size = past.shape[3] if past is not None and past.shape is not None else None
    if not isinstance(size, int) or size % _HEAD_MULTIPLE:
        return None
    rotations = [made_by(value, "RotaryEmbedding") for value in node.inputs[:2]]
    pairs = set()
    for rotary in rotations:
        if rotary is None or len(rotary.inputs) != 3 or rotary.inputs[0] is None:
            return None
        source = rotary.inputs[0]
        partly = rotary.attributes.get_int("rotary_embedding_dim", 0)
        if rotary.attributes.get_int("interleaved", 0) or partly:
            return None
        if source.shape is None or len(source.shape) != 3:
            return None
        pairs.add((rotary.inputs[1], rotary.inputs[2]))
    cos, sin = pairs.pop()
    return (cos, sin) if not pairs and cos is not None and sin is not None else None


def _makers(value: ir.Value, ids: ir.Value) -> list[ir.Node] | None:
    """The nodes that make `value` of `ids`, in order; None where one might look at other positions."""
    found: dict[ir.Node, None] = {}

    def visit(value: ir.Value | None) -> bool:
        if value is None or value is ids or is_constant(value):
            return True
        node = value.producer()
        if node is None or node.domain != "" or node.op_type not in _OF_ONE_POSITION:
            return False
        if node not in found:
            if not all(map(visit, node.inputs)):
                return False
            found[node] = None
        return True

    return list(found) if visit(value) and found else None


def _rotate(graph: ir.Graph, node: ir.Node, tables: Sequence[ir.Value], ids: ir.Value) -> None:
    rotations = [made_by(value, "RotaryEmbedding") for value in node.inputs[:2]]
    plain = [rotary.inputs[0] for rotary in rotations if rotary is not None]
    rows: list[ir.Value | None] = [*plain, node.inputs[2]]
    split = made_by(rows[0], "Split")
    if split is not None and rows == list(split.outputs):
        rows = [split.inputs[0], None, None]
    attributes = {**node.attributes, "do_rotary": ir.AttrInt64("do_rotary", 1)}
    rotating = ir.Node(
        CONTRIB_DOMAIN,
        "GroupQueryAttention",
        [*rows, *node.inputs[3:], *tables, ids],
        list(attributes.values()),
        num_outputs=len(node.outputs),
        version=1,
    )
    rotating.metadata_props.update(node.metadata_props)
    for old, new in zip(node.outputs, rotating.outputs, strict=True):
        new.name, new.type, new.shape = old.name, old.type, old.shape
    graph.insert_before(node, rotating)
    for old, new in zip(node.outputs, rotating.outputs, strict=True):
        ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
    graph.remove(node, safe=True)
