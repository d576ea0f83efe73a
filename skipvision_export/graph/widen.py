"""A graph with every number it computes in float32: the same structure, without the rounding."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from skipvision_export.graph.passes.int4_weights import EXACT, OP
from skipvision_export.graph.passes.matching import HALF_TYPES

# Attributes of standard operators whose integer names a type.
_TYPE_ATTRIBUTES = frozenset(
    {"to", "dtype", "output_dtype", "output_datatype", "stash_type", "softmax_precision"}
)


def widen(model: ir.Model) -> ir.Model:
    """A copy with float32 in place of every float16 and bfloat16; nothing else changes.

    Cases:
    1. Types of inputs, outputs and everything between them: float32.
    2. Initializers, those in external files too, constants and other tensor attributes: the same
       numbers in float32.
    3. Attributes that name a type, such as `to` of Cast: float32. A Cast that is idle then stays.
    4. Bodies of functions, and graphs inside nodes: the same.
    5. MatMulNBits takes its activations as floats, where it would round them to 8 bits; its int4
       weights stay.

    A float32 model of full weights comes back as it was, bit for bit.
    """
    model = model.clone()
    for graph in _graphs(model):
        for value in _values(graph):
            if _is_half(value):
                value.type = copy.deepcopy(value.type)  # types may be shared between values
                value.dtype = ir.DataType.FLOAT
            if value.const_value is not None:
                value.const_value = _wide(value.const_value)
        for node in graph:
            for attribute in node.attributes.values():
                if (wide := _wide_attribute(node, attribute)) is not None:
                    node.attributes[attribute.name] = wide
            if node.op_type == OP:
                node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", EXACT)
    return model


def half_types(model: ir.Model) -> list[str]:
    """Names of the values and nodes of a model that have, hold or name a half type."""
    found = []
    for graph in _graphs(model):
        for value in _values(graph):
            tensor = value.const_value
            if _is_half(value) or (tensor is not None and tensor.dtype in HALF_TYPES):
                found.append(str(value.name))
        for node in graph:
            if any(_wide_attribute(node, attribute) is not None for attribute in node.attributes.values()):
                found.append(str(node.name))
    return found


def _graphs(model: ir.Model) -> Iterator[ir.Graph]:
    """The graph, the bodies of functions, and the graphs inside their nodes."""
    for graph in (model.graph, *(function.graph for function in model.functions.values())):
        yield graph
        yield from graph.subgraphs()


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph:
        yield from node.outputs


def _is_half(value: ir.Value) -> bool:
    return value.type is not None and value.dtype in HALF_TYPES


def _wide(tensor: ir.TensorProtocol) -> ir.TensorProtocol:
    """The tensor itself unless it is of a half type."""
    if tensor.dtype not in HALF_TYPES:
        return tensor
    return ir.tensor(np.asarray(tensor.numpy()).astype(np.float32), name=tensor.name)


def _wide_attribute(node: ir.Node, attribute: ir.Attr) -> ir.Attr | None:
    """What to put in an attribute's place; None where it has nothing to do with half types."""
    if attribute.is_ref():
        return None
    name, kind = attribute.name, attribute.type
    if kind == ir.AttributeType.TENSOR and attribute.as_tensor().dtype in HALF_TYPES:
        return ir.AttrTensor(name, _wide(attribute.as_tensor()))
    if kind == ir.AttributeType.TENSORS and any(t.dtype in HALF_TYPES for t in attribute.as_tensors()):
        return ir.AttrTensors(name, [_wide(t) for t in attribute.as_tensors()])
    names_type = kind == ir.AttributeType.INT and node.domain == "" and name in _TYPE_ATTRIBUTES
    if names_type and attribute.as_int() in HALF_TYPES:
        return ir.AttrInt64(name, ir.DataType.FLOAT)
    return None
