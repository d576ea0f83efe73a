"""Positions as an input where a graph takes them from the number of cached tokens."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from skipvision_export.errors import PassError
from skipvision_export.graph.passes.names import POSITION_IDS
from skipvision_export.graph.passes.skip_ffn import token_input

OP = "GroupQueryAttention"
_POSITIONS = 9  # GroupQueryAttention's input
_ROTATIONS = ("RotaryEmbedding", "Cos", "Sin")


class CachedPositionsPass(ir.passes.InPlacePass):
    """Let the caller say where new tokens stand, so that keys and values before them may be dropped.

    GroupQueryAttention that rotates by itself counts cached tokens: with fewer of them it would place
    new ones too early. It gets the input `position_ids` [B, S] int64. In ONNX Runtime on the CPU it
    reads all of them in decode, and in prefill the first one, from which the others run on.

    Cases:
    1. GroupQueryAttention with do_rotary: reads `position_ids`, which becomes an input unless it is one.
    2. RotaryEmbedding, Cos and Sin of values that `position_ids` flows into: left alone.
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
            if node.op_type in _ROTATIONS and node not in placed:
                raise _refused(node, f"it rotates by positions that are not {POSITION_IDS}")
        if not rotating and not placed:
            raise PassError(
                f"the keys and values cannot be pruned: nothing in the graph reads {POSITION_IDS}, so "
                "positions must follow from the number of cached tokens; leave them whole (--keep-kv)"
            )
        bare = [
            node for node in rotating if len(node.inputs) <= _POSITIONS or node.inputs[_POSITIONS] is None
        ]
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


def _behind(value: ir.Value) -> Iterator[ir.Node]:
    """Every node that a value flows into."""
    seen: set[ir.Node] = set()
    stack = [value]
    while stack:
        for use in stack.pop().uses():
            if use.node not in seen:
                seen.add(use.node)
                yield use.node
                stack.extend(use.node.outputs)


def _refused(node: ir.Node, why: str) -> PassError:
    return PassError(
        f"the keys and values cannot be pruned: node {node.name} ({node.op_type}): {why}; leave them whole "
        "(--keep-kv)"
    )
