"""Proof that a region of a graph acts on each token alone.

A value is "row-wise" if it is [B, S, F] (axis 0 batch, axis 1 tokens) and its row (b, s) is a function
of row (b, s) of the region's input only; or the same flattened to [B*S, F], as a Gemm wants it. Every
node's rule either derives that for its outputs or raises; there is no default that lets an unknown
operator through.

Rows that are picked for an expert of a mixture: see `picked_rows`.

Static quantization of activations acts on each number alone, so QuantizeLinear and DequantizeLinear
pass with scales that are constants; DynamicQuantizeLinear, whose scale is that of all tokens, does not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import onnx_ir as ir

from skipvision_export.errors import PassError
from skipvision_export.graph.passes.matching import constant_ints
from skipvision_export.graph.passes.names import CONTRIB_DOMAIN
from skipvision_export.graph.passes.picked_rows import KnownRows, NotRowwiseError, pick_rows
from skipvision_export.graph.passes.regions import is_constant
from skipvision_export.graph.passes.sizes import (
    BATCH,
    ROWS,
    TOKENS,
    UnknownSizesError,
    follow,
    reshaped,
    sizes_of,
)

RANK = 3

_UNARY = frozenset(
    "Abs Cast Celu Ceil Clip Cos Elu Erf Exp Floor Gelu HardSigmoid HardSwish Identity LeakyRelu Log "
    "Mish Neg Reciprocal Relu Round Selu Sigmoid Sign Sin Softplus Softsign Sqrt Swish Tanh "
    "ThresholdedRelu".split()
)
_NARY = frozenset("Add Div Max Min Mul Pow Sub Sum Where Mod PRelu Greater Less Equal".split())
_REDUCE = frozenset("ReduceMean ReduceSum ReduceMax ReduceMin ReduceL2 ReduceSumSquare".split())


# Proves a node's outputs row-wise, raises, or says what else they are in `known`.
_Rule = Callable[[ir.Node, KnownRows], None]


def prove_rowwise(nodes: Iterable[ir.Node], source: ir.Value, what: str) -> None:
    """Check a region in topological order; `source` is its only non-constant input.

    Raises PassError that names `what`, the node and the reason.
    """
    known = KnownRows({source: RANK})
    for node in nodes:
        try:
            _prove(node, known)
        except (NotRowwiseError, UnknownSizesError) as reason:
            raise PassError(
                f"{what} cannot be split: node {node.name} ({node.op_type}) {reason}; only operators "
                "that act on each token alone may stand between the norm and the residual add"
            ) from None


def is_rowwise(node: ir.Node) -> bool:
    """Does one node act on each token alone, where all of its inputs but constants are row-wise?"""
    sources = {value for value in node.inputs if value is not None and not is_constant(value)}
    if any(rank(value) != RANK for value in sources):
        return False
    known = KnownRows(dict.fromkeys(sources, RANK))
    try:
        _prove(node, known)
    except (NotRowwiseError, UnknownSizesError):
        return False
    return all(known.ranks.get(value) == RANK for value in node.outputs)


def _prove(node: ir.Node, known: KnownRows) -> None:
    tokens = any(value in known for value in node.inputs)
    if node.op_type == "NonZero" or any(value in known.picks for value in node.inputs):
        pick_rows(node, known)
        return
    if node.op_type == "Expand":
        _expand(node, known)
        return
    if any(value in known.sizes for value in node.inputs):
        if not tokens:
            known.sizes[node.outputs[0]] = follow(node, known.sizes)
            return
        if node.op_type != "Reshape":
            raise NotRowwiseError("computes with the number of tokens")
    _rule(node)(node, known)
    if not any(value in known.sizes or value in known for value in node.outputs):
        known.ranks.update(dict.fromkeys(node.outputs, known.rank(node)))
        part = next((known.parts[v] for v in node.inputs if v is not None and v in known.parts), None)
        if part is not None:
            known.parts.update(dict.fromkeys(node.outputs, part))


def rank(value: ir.Value) -> int | None:
    """Number of axes; of a value without a shape, that of what it is quantized from."""
    if value.shape is not None:
        return len(value.shape)
    producer = value.producer()
    source = producer.inputs[0] if producer is not None else None
    follows = producer is not None and producer.op_type in ("QuantizeLinear", "DequantizeLinear")
    return rank(source) if follows and source is not None else None


def _rule(node: ir.Node) -> _Rule:
    kind = node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}::{node.op_type}"
    if kind in _UNARY or kind in _NARY:
        return _elementwise
    if kind in _REDUCE:
        return _reduce
    if kind in _RULES:
        return _RULES[kind]
    raise NotRowwiseError("is not known to act on each token alone")


def _elementwise(node: ir.Node, known: KnownRows) -> None:
    for value in node.inputs:
        if value is not None and value not in known:
            _broadcast(node, known, value)


def _broadcast(node: ir.Node, known: KnownRows, value: ir.Value) -> None:
    """Aligned from the right, a constant must not vary along batch or tokens."""
    shape = _constant_shape(value)
    if len(shape) > known.rank(node) or any(size != 1 for size in shape[: max(0, len(shape) - 1)]):
        raise NotRowwiseError(f"broadcasts {value.name} of shape {shape} along the tokens")


def _matmul(node: ir.Node, known: KnownRows) -> None:
    left, right = node.inputs[0], node.inputs[1]
    if left not in known:
        raise NotRowwiseError("multiplies from the left, which mixes tokens")
    assert right is not None
    if right in known or len(_constant_shape(right)) != 2:
        raise NotRowwiseError(f"has no constant matrix as its second input, but {right.name}")


def _gemm(node: ir.Node, known: KnownRows) -> None:
    if node.attributes.get_int("transA", 0):
        raise NotRowwiseError("turns the tokens around")
    _matmul(node, known)
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        _broadcast(node, known, node.inputs[2])


def _matmul_packed(node: ir.Node, known: KnownRows) -> None:
    """MatMulNBits: each row by a constant matrix, its own activations quantized where they are at all."""
    if node.inputs[0] not in known:
        raise NotRowwiseError("multiplies something else than the tokens")
    for value in node.inputs[1:]:
        if value is not None and not is_constant(value):
            raise NotRowwiseError(f"has no constant matrix, but {value.name}")


def _experts(node: ir.Node, known: KnownRows) -> None:
    """MoE and QMoE: each row by the experts that its own router probabilities choose."""
    tokens = node.inputs[0]
    if tokens is None or tokens not in known or node.inputs[1] not in known:
        raise NotRowwiseError("takes tokens and their router probabilities from elsewhere")
    for value in node.inputs[2:]:
        if value is not None and not is_constant(value):
            raise NotRowwiseError(f"has experts that are no constants, but {value.name}")
    # Probabilities come as rows [B*S, E] for tokens [B, S, D] too, in the same order.
    known.ranks[node.outputs[0]] = known.ranks[tokens]


def _norm(node: ir.Node, known: KnownRows) -> None:
    _last_axis(node, known, node.attributes.get_int("axis", -1))
    if len(node.outputs) > 1:
        raise NotRowwiseError("has statistics outputs")
    _elementwise(node, known)


def _softmax(node: ir.Node, known: KnownRows) -> None:
    _last_axis(node, known, node.attributes.get_int("axis", -1))


def _split(node: ir.Node, known: KnownRows) -> None:
    _last_axis(node, known, node.attributes.get_int("axis", 0))


def _concat(node: ir.Node, known: KnownRows) -> None:
    _last_axis(node, known, node.attributes.get_int("axis", 0))
    if any(value not in known for value in node.inputs):
        raise NotRowwiseError("joins a constant, whose number of tokens is fixed")


def _slice(node: ir.Node, known: KnownRows) -> None:
    if len(node.inputs) < 4 or node.inputs[3] is None:
        raise NotRowwiseError("slices from the first axis on")
    for axis in _constant(node.inputs[3]):
        _last_axis(node, known, axis)


def _reduce(node: ir.Node, known: KnownRows) -> None:
    if not node.attributes.get_int("keepdims", 1):
        raise NotRowwiseError("drops an axis")
    given = node.inputs[1] if len(node.inputs) > 1 else None
    # An attribute up to opset 17, an input since.
    axes = _constant(given) if given is not None else node.attributes.get_ints("axes", None)
    if not axes:
        raise NotRowwiseError("reduces all axes")
    for axis in axes:
        _last_axis(node, known, axis)


def _quantize(node: ir.Node, known: KnownRows) -> None:
    """Static scales: one number, or one for each feature; the same for every token."""
    if node.inputs[0] not in known:
        raise NotRowwiseError("quantizes something else than the tokens")
    for value in node.inputs[1:]:
        if value is None:
            continue
        if not is_constant(value):
            raise NotRowwiseError(
                f"takes {value.name}, which is no constant: a scale that is computed from the tokens mixes "
                "them; quantize with static scales"
            )
        shape = _constant_shape(value)
        if len(shape) > 1:
            raise NotRowwiseError(f"takes {value.name} of shape {shape}: blocks of an activation")
        if shape and shape != [1]:
            _last_axis(node, known, node.attributes.get_int("axis", 1))


def _topk(node: ir.Node, known: KnownRows) -> None:
    _last_axis(node, known, node.attributes.get_int("axis", -1))
    if node.inputs[0] not in known or node.inputs[1] is None or not is_constant(node.inputs[1]):
        raise NotRowwiseError("takes a number of values that is no constant")


def _expand(node: ir.Node, known: KnownRows) -> None:
    """The same number for all tokens, or rows."""
    value, target = node.inputs[0], node.inputs[1]
    assert value is not None and target is not None
    sizes = known.sizes.get(target, ())
    rank = RANK if sizes[:-1] == (BATCH, TOKENS) else 2 if sizes[:-1] == (ROWS,) else None
    if not is_constant(value) or any(size != 1 for size in _constant_shape(value)) or rank is None:
        raise NotRowwiseError("expands something else than one number to the tokens' shape")
    known.ranks[node.outputs[0]] = rank


def _shape(node: ir.Node, known: KnownRows) -> None:
    value = node.inputs[0]
    assert value is not None
    if value in known.parts:
        raise NotRowwiseError("counts picked rows")
    sizes = sizes_of(known.rank(node), value)
    start = node.attributes.get_int("start", 0)
    known.sizes[node.outputs[0]] = sizes[start : node.attributes.get_int("end", len(sizes))]


def _reshape(node: ir.Node, known: KnownRows) -> None:
    tokens, target = node.inputs[0], node.inputs[1]
    assert tokens is not None and target is not None
    if tokens not in known or tokens in known.parts:
        raise NotRowwiseError("reshapes something else than the tokens")
    sizes = known.sizes[target] if target in known.sizes else tuple(_constant(target))
    copies_zero = not node.attributes.get_int("allowzero", 0)
    rank = reshaped(sizes_of(known.ranks[tokens], tokens), sizes, copies_zero)
    known.ranks[node.outputs[0]] = rank


def _dynamic(node: ir.Node, known: KnownRows) -> None:
    raise NotRowwiseError("computes one scale from all tokens, which mixes them; quantize with static scales")


_RULES: dict[str, _Rule] = {
    "MatMul": _matmul,
    "Gemm": _gemm,
    f"{CONTRIB_DOMAIN}::MatMulNBits": _matmul_packed,
    f"{CONTRIB_DOMAIN}::MoE": _experts,
    f"{CONTRIB_DOMAIN}::QMoE": _experts,
    "Shape": _shape,
    "Reshape": _reshape,
    "LayerNormalization": _norm,
    "RMSNormalization": _norm,
    "SimplifiedLayerNormalization": _norm,
    "TopK": _topk,
    "Softmax": _softmax,
    "LogSoftmax": _softmax,
    "Split": _split,
    "Concat": _concat,
    "Slice": _slice,
    "QuantizeLinear": _quantize,
    "DequantizeLinear": _quantize,
    "DynamicQuantizeLinear": _dynamic,
    f"{CONTRIB_DOMAIN}::DynamicQuantizeMatMul": _dynamic,
    **dict.fromkeys(
        (f"{CONTRIB_DOMAIN}::{kind}" for kind in ("Gelu", "FastGelu", "QuickGelu", "BiasGelu")), _elementwise
    ),
}


def _last_axis(node: ir.Node, known: KnownRows, axis: int) -> None:
    if axis not in (-1, known.rank(node) - 1):
        raise NotRowwiseError(f"works along axis {axis}, not along the features")


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
        raise NotRowwiseError(f"takes {value.name}, whose shape is not known")
    return [int(size) for size in value.shape]  # type: ignore[arg-type]


def _constant(value: ir.Value) -> list[int]:
    found = constant_ints(value)
    if found is None:
        raise NotRowwiseError(f"takes {value.name}, which is no constant")
    return found
