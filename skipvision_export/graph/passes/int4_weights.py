"""MatMuls by constant weights with those weights in 4 bits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from skipvision_export.errors import PassError
from skipvision_export.graph.passes.names import CONTRIB_DOMAIN
from skipvision_export.graph.passes.regions import is_constant, module_path

Array = npt.NDArray[Any]

OP = "MatMulNBits"
BITS = 4
# Columns of K that share a scale.
BLOCK = 32
# What an element is counted from where there are no zero points.
ZERO = 8
# Accuracy levels of ONNX Runtime's kernel: activations in 8 bits, in decode more than twice as fast as
# with those in floats.
FAST, EXACT = 4, 0
_SOURCES = (ir.DataType.FLOAT, ir.DataType.FLOAT16)


@dataclass(frozen=True)
class Int4Matrix:
    """A matrix [K, N] in MatMulNBits' layout, C being the blocks of BLOCK along K.

    packed [N, C, BLOCK / 2] uint8, the even element in the low half; scales [N * C] in the matrix's
    own type. An element e stands for (e - ZERO) * scale.
    """

    packed: Array
    scales: Array


class Int4WeightsPass(ir.passes.InPlacePass):
    """Put MatMulNBits in the place of every MatMul by a constant matrix.

        before   MatMul(x, W [K, N])
        after    MatMulNBits(x, packed, scales)

    Run it last: no other pass knows the operator. One pass object serves the graphs of a model, and
    quantizes a matrix that they share once.

    Cases:
    1. The second input is an initializer [K, N] of float32 or float16: replaced.
    2. Neither input is constant, as in attention: left alone.
    3. The constant has another type or rank, or goes through QuantizeLinear already: PassError names
       the node.
    4. Nothing to replace: PassError.
    """

    def __init__(self, quantize: Callable[[Array], Int4Matrix]) -> None:
        """quantize: of a matrix [K, N]."""
        super().__init__()
        self.quantize = quantize
        self.count = 0
        # By the tensor's identity; the tensor itself is held, or another might get its id.
        self._done: dict[int, tuple[ir.TensorProtocol, Int4Matrix]] = {}

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite in place; full weights that nothing reads any more leave the graph."""
        graph = model.graph
        inputs: dict[ir.Value, list[ir.Value]] = {}
        self.count = 0
        for node in tuple(graph):
            weight = _weight(node)
            if weight is None:
                continue
            if weight not in inputs:
                inputs[weight] = self._initializers(graph, weight)
            _replace(graph, node, weight, inputs[weight])
            self.count += 1
        if not self.count:
            raise PassError("no MatMul by constant weights found: there is nothing to make int4")
        for weight in inputs:
            if not weight.uses() and weight not in graph.outputs:
                graph.initializers.pop(str(weight.name))
        model.opset_imports[CONTRIB_DOMAIN] = 1
        return ir.passes.PassResult(model, modified=True)

    def _initializers(self, graph: ir.Graph, weight: ir.Value) -> list[ir.Value]:
        tensor = weight.const_value
        assert tensor is not None
        if id(tensor) not in self._done:
            self._done[id(tensor)] = (tensor, self.quantize(tensor.numpy()))
        matrix = self._done[id(tensor)][1]
        made = []
        for part in ("packed", "scales"):
            name = f"{weight.name}.int4.{part}"
            array: Array = getattr(matrix, part)
            held = ir.tensor(array, name=name)
            made.append(ir.Value(name=name, const_value=held, type=ir.TensorType(held.dtype)))
            made[-1].shape = ir.Shape(array.shape)
            graph.register_initializer(made[-1])
        return made


def _weight(node: ir.Node) -> ir.Value | None:
    """The constant matrix that a MatMul multiplies by."""
    weight = node.inputs[1] if node.op_type == "MatMul" and node.domain == "" else None
    if weight is None or not is_constant(weight):
        return None
    tensor = weight.const_value if weight.is_initializer() else None
    if tensor is None or len(tensor.shape) != 2 or tensor.dtype not in _SOURCES:
        what = "no initializer" if tensor is None else f"{tensor.dtype.name.lower()} {list(tensor.shape)}"
        raise PassError(
            f"node {node.name} (MatMul, {module_path(node)}) cannot take int4 weights: {weight.name} is "
            f"{what}; expected a matrix of float32 or float16 that is not quantized yet"
        )
    return weight


def _replace(graph: ir.Graph, node: ir.Node, weight: ir.Value, made: list[ir.Value]) -> None:
    assert weight.const_value is not None
    k, n = (int(size) for size in weight.const_value.shape.numpy())
    attributes = {"K": k, "N": n, "bits": BITS, "block_size": BLOCK, "accuracy_level": FAST}
    new = ir.node(OP, [node.inputs[0], *made], attributes, domain=CONTRIB_DOMAIN, version=1)
    new.metadata_props.update(node.metadata_props)
    old, out = node.outputs[0], new.outputs[0]
    out.name, out.type, out.shape = old.name, old.type, old.shape
    ir.convenience.replace_nodes_and_values(graph, node, [node], [new], [old], [out])


def dequantized(matrix: Int4Matrix, k: int) -> Array:
    """[K, N]: (element - ZERO) * scale, float32. Source: ONNX Runtime, ContribOperators.md."""
    n, blocks, half = matrix.packed.shape
    elements = _unpacked(matrix.packed).reshape(n, blocks, 2 * half)
    scales = matrix.scales.astype(np.float32).reshape(n, blocks, 1)
    return np.ascontiguousarray(((elements - ZERO) * scales).reshape(n, -1)[:, :k].T)


def _unpacked(packed: Array) -> Array:
    """Low and high halves of each byte side by side along the last axis, float32."""
    halves = np.stack([packed & 15, packed >> 4], axis=-1)
    return halves.reshape(*packed.shape[:-1], -1).astype(np.float32)
