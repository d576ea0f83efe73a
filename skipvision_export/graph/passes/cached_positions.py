"""Positions as an input where a graph takes them from the number of cached tokens."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from skipvision_export.errors import PassError
from skipvision_export.graph.passes.names import POSITION_IDS
from skipvision_export.graph.passes.regions import is_constant
from skipvision_export.graph.passes.skip_ffn import token_input

OP = "GroupQueryAttention"
_POSITIONS = 9  # GroupQueryAttention's input
# Operators that rotate, and the first of their inputs that says by how much.
_ROTATIONS = {"RotaryEmbedding": 1, "Cos": 0, "Sin": 0}


class CachedPositionsPass(ir.passes.InPlacePass):
    """Let the caller say where new tokens stand, so that keys and values before them may be dropped.

    GroupQueryAttention that rotates by itself counts cached tokens: with fewer of them it would place
    new ones too early. It gets the input `position_ids` [B, S] int64. In ONNX Runtime on the CPU it
    reads all of them in decode, and in prefill the first one, from which the others run on.

    Cases:
    1. GroupQueryAttention with do_rotary: reads `position_ids`, which becomes an input unless it is one.
    2. RotaryEmbedding, Cos and Sin whose angles `position_ids` flows into: left alone.
    3. Of values that it does not flow into; an attention with do_rotary of another kind; one with a
       window, which counts cached tokens; a graph that has no positions at all: PassError.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite in place."""
        graph = model.graph
        rotating = [node for node in graph if node.attributes.get_int("do_rotary", 0)]
        for node in graph:
            if node.attributes.get_int("local_window_size", -1) > 0:
                raise _refused(node, "its window counts cached tokens, which would no longer stand in a row")
        other = next((node for node in rotating if node.op_type != OP), None)
        if other is not None:
            raise _refused(other, "it takes positions from the number of cached tokens")
        positions = next((value for value in graph.inputs if value.name == POSITION_IDS), None)
        placed = set() if positions is None else set(_behind(positions))
        for node in graph:
            if not placed.issuperset(_angles(node)):
                raise _refused(node, f"it rotates by positions that are not {POSITION_IDS}")
        if not rotating and len(placed) < 2:
            raise PassError(
                f"the keys and values cannot be pruned: nothing in the graph reads {POSITION_IDS}, so "
                "positions must follow from the number of cached tokens; leave them whole (--keep-kv)"
            )
        bare = [node for node in rotating if not any(node.inputs[_POSITIONS : _POSITIONS + 1])]
        if bare and positions is None:
            tokens = token_input(graph)
            assert tokens.shape is not None
            shape = ir.Shape(tokens.shape[:2])
            positions = ir.Value(name=POSITION_IDS, type=ir.TensorType(ir.DataType.INT64), shape=shape)
            graph.inputs.append(positions)
        for node in bare:
            node.resize_inputs(max(len(node.inputs), _POSITIONS + 1))
            node.replace_input_with(_POSITIONS, positions)
        return ir.passes.PassResult(model, modified=bool(bare))


def _angles(node: ir.Node) -> list[ir.Value]:
    """What a node rotates by, constants left out."""
    if node.op_type in _ROTATIONS:
        read = node.inputs[_ROTATIONS[node.op_type] :]
    elif node.op_type == OP and node.attributes.get_int("do_rotary", 0) == 1:
        read = node.inputs[_POSITIONS : _POSITIONS + 1]
    else:
        read = ()
    return [value for value in read if value is not None and not is_constant(value)]


def _behind(value: ir.Value) -> Iterator[ir.Value]:
    """A value and every other that it flows into."""
    seen: set[ir.Value] = set()
    stack = [value]
    while stack:
        value = stack.pop()
        if value not in seen:
            seen.add(value)
            yield value
            stack.extend(output for use in value.uses() for output in use.node.outputs)


def _refused(node: ir.Node, why: str) -> PassError:
    return PassError(
        f"the keys and values cannot be pruned: node {node.name} ({node.op_type}): {why}; leave them whole "
        "(--keep-kv)"
    )
