"""Proof that a region of a graph acts on each token alone.

A value is "row-wise" if it is [B, S, ...] (axis 0 batch, axis 1 tokens, rank 3) and its row (b, s)
is a function of row (b, s) of the region's input only. Every node's rule either derives that for
its outputs or raises; there is no default that lets an unknown operator through.

Static quantization of activations acts on each number alone, so QuantizeLinear and DequantizeLinear
pass with scales that are constants; DynamicQuantizeLinear, whose scale is that of all tokens, does not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import onnx_ir as ir

from skipvision_export.errors import PassError
from skipvision_export.graph.passes.matching import constant_ints
from skipvision_export.graph.passes.regions import is_constant

RANK = 3

_UNARY = frozenset(
    "Abs Cast Celu Ceil Clip Cos Elu Erf Exp Floor Gelu HardSigmoid HardSwish Identity LeakyRelu Log "
    "Mish Neg Reciprocal Relu Round Selu Sigmoid Sign Sin Softplus Softsign Sqrt Swish Tanh "
    "ThresholdedRelu".split()
)
_NARY = frozenset("Add Div Max Min Mul Pow Sub Sum Where Mod PRelu Greater Less Equal".split())
_REDUCE = frozenset("ReduceMean ReduceSum ReduceMax ReduceMin ReduceL2 ReduceSumSquare".split())


class _NotRowwiseError(Exception):
    """Why one node mixes tokens, or cannot be shown not to."""


def prove_rowwise(nodes: Iterable[ir.Node], source: ir.Value, what: str) -> None:
    """Check a region in topological order; `source` is its only non-constant input.

    Raises PassError that names `what`, the node and the reason.
    """
    rowwise = {source}
    for node in nodes:
        try:
            rule = _rule(node)
            rule(node, rowwise)
        except _NotRowwiseError as reason:
            raise PassError(
                f"{what} cannot be split: node {node.name} ({node.op_type}) {reason}; only operators "
                "that act on each token alone may stand between the norm and the residual add"
            ) from None
        rowwise.update(node.outputs)


def is_rowwise(node: ir.Node) -> bool:
    """Does one node act on each token alone, where all of its inputs but constants are row-wise?"""
    sources = {value for value in node.inputs if value is not None and not is_constant(value)}
    if any(rank(value) != RANK for value in sources):
        return False
    try:
        _rule(node)(node, sources)
    except _NotRowwiseError:
        return False
    return True


def rank(value: ir.Value) -> int | None:
    """Number of axes; of a value without a shape, that of what it is quantized from."""
    if value.shape is not None:
        return len(value.shape)
    producer = value.producer()
    source = producer.inputs[0] if producer is not None else None
    follows = producer is not None and producer.op_type in ("QuantizeLinear", "DequantizeLinear")
    return rank(source) if follows and source is not None else None


def _rule(node: ir.Node) -> Callable[[ir.Node, set[ir.Value]], None]:
    kind = node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}::{node.op_type}"
    if kind in _UNARY:
        return _elementwise
    if kind in _NARY:
        return _elementwise
    if kind in _REDUCE:
        return _reduce
    if kind in _RULES:
        return _RULES[kind]
    raise _NotRowwiseError("is not known to act on each token alone")


def _elementwise(node: ir.Node, rowwise: set[ir.Value]) -> None:
    for value in node.inputs:
        if value is None or value in rowwise:
            continue
        shape = _constant_shape(value)
        # Aligned from the right, a constant must not vary along batch or tokens.
        if len(shape) > RANK or any(size != 1 for size in shape[: max(0, len(shape) - 1)]):
            raise _NotRowwiseError(f"broadcasts {value.name} of shape {shape} along the tokens")


def _matmul(node: ir.Node, rowwise: set[ir.Value]) -> None:
    left, right = node.inputs[0], node.inputs[1]
    if left not in rowwise:
        raise _NotRowwiseError("multiplies from the left, which mixes tokens")
    assert right is not None
    if right in rowwise or len(_constant_shape(right)) != 2:
        raise _NotRowwiseError(f"has no constant matrix as its second input, but {right.name}")


def _norm(node: ir.Node, rowwise: set[ir.Value]) -> None:
    _last_axis(node, node.attributes.get_int("axis", -1))
    if len(node.outputs) > 1:
        raise _NotRowwiseError("has statistics outputs")
    _elementwise(node, rowwise)


def _softmax(node: ir.Node, rowwise: set[ir.Value]) -> None:
    _last_axis(node, node.attributes.get_int("axis", -1))


def _split(node: ir.Node, rowwise: set[ir.Value]) -> None:
    _last_axis(node, node.attributes.get_int("axis", 0))


def _concat(node: ir.Node, rowwise: set[ir.Value]) -> None:
    _last_axis(node, node.attributes.get_int("axis", 0))
    if any(value not in rowwise for value in node.inputs):
        raise _NotRowwiseError("joins a constant, whose number of tokens is fixed")


def _slice(node: ir.Node, rowwise: set[ir.Value]) -> None:
    if len(node.inputs) < 4 or node.inputs[3] is None:
        raise _NotRowwiseError("slices from the first axis on")
    for axis in _constant(node.inputs[3]):
        _last_axis(node, axis)


def _reduce(node: ir.Node, rowwise: set[ir.Value]) -> None:
    if not node.attributes.get_int("keepdims", 1):
        raise _NotRowwiseError("drops an axis")
    axes = node.inputs[1] if len(node.inputs) > 1 else None
    if axes is None:
        raise _NotRowwiseError("reduces all axes")
    for axis in _constant(axes):
        _last_axis(node, axis)


def _quantize(node: ir.Node, rowwise: set[ir.Value]) -> None:
    """Static scales: one number, or one for each feature; the same for every token."""
    if node.inputs[0] not in rowwise:
        raise _NotRowwiseError("quantizes something else than the tokens")
    for value in node.inputs[1:]:
        if value is None:
            continue
        if not is_constant(value):
            raise _NotRowwiseError(
                f"takes {value.name}, which is no constant: a scale that is computed from the tokens mixes "
                "them; quantize with static scales"
            )
        shape = _constant_shape(value)
        if len(shape) > 1:
            raise _NotRowwiseError(f"takes {value.name} of shape {shape}: blocks of an activation")
        if shape and shape != [1]:
            _last_axis(node, node.attributes.get_int("axis", 1))


def _dynamic(node: ir.Node, rowwise: set[ir.Value]) -> None:
    raise _NotRowwiseError(
        "computes one scale from all tokens, which mixes them; quantize with static scales"
    )


_RULES: dict[str, Callable[[ir.Node, set[ir.Value]], None]] = {
    "MatMul": _matmul,
    "LayerNormalization": _norm,
    "RMSNormalization": _norm,
    "SimplifiedLayerNormalization": _norm,
    "Softmax": _softmax,
    "LogSoftmax": _softmax,
    "Split": _split,
    "Concat": _concat,
    "Slice": _slice,
    "QuantizeLinear": _quantize,
    "DequantizeLinear": _quantize,
    "DynamicQuantizeLinear": _dynamic,
}


def _last_axis(node: ir.Node, axis: int) -> None:
    if axis not in (-1, RANK - 1):
        raise _NotRowwiseError(f"works along axis {axis}, not along the features")


def _constant_shape(value: ir.Value) -> list[int]:
    """Of a constant; without shape inference too for what makes one (see `is_constant`)."""
    if value.shape is None and (producer := value.producer()) is not None and is_constant(value):
        if producer.op_type == "Constant":
            held = ir.convenience.get_const_tensor(value)
            return [int(size) for size in held.numpy().shape] if held is not None else []
        assert producer.inputs[0] is not None
        shape = _constant_shape(producer.inputs[0])
        if producer.op_type != "Transpose":
            return shape
        order = producer.attributes.get_ints("perm", list(reversed(range(len(shape)))))
        return [shape[axis] for axis in order or []]
    if value.shape is None or not all(isinstance(size, int) for size in value.shape):
        raise _NotRowwiseError(f"takes {value.name}, whose shape is not known")
    return [int(size) for size in value.shape]  # type: ignore[arg-type]


def _constant(value: ir.Value) -> list[int]:
    found = constant_ints(value)
    if found is None:
        raise _NotRowwiseError(f"takes {value.name}, which is no constant")
    return found
