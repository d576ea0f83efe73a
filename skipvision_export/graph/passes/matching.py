"""What several passes ask of a graph before they change it."""

from __future__ import annotations

import onnx_ir as ir

HALF_TYPES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def require(condition: bool, what: str) -> None:
    """Raise PreconditionError: passes ran in an order that would give a wrong graph, or a slow one."""
    if not condition:
        raise ir.passes.PreconditionError(what)


def has_input(model: ir.Model, name: str) -> bool:
    """Does the graph take an input of this name?"""
    return any(value.name == name for value in model.graph.inputs)


def made_by(value: ir.Value | None, kind: str) -> ir.Node | None:
    """The node of operator type `kind` that makes a value, if one does."""
    producer = value.producer() if value is not None else None
    return producer if producer is not None and producer.op_type == kind else None


def constant_ints(value: ir.Value | None) -> list[int] | None:
    """A constant's integers, flat; None where the value is none."""
    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    return None if tensor is None else [int(x) for x in tensor.numpy().reshape(-1)]
