"""Static Q/DQ around the matrix products of a traced decoder, as NVIDIA ModelOpt's exporter leaves them.

Looked at in what modelopt 0.47 exports of INT8_DEFAULT_CFG and FP8_DEFAULT_CFG:

    x -> QuantizeLinear -> DequantizeLinear -> MatMul        one scale, a Constant
    W [N, K] -> QuantizeLinear -> DequantizeLinear -> Transpose -> MatMul
                                                             int8: a scale for each of N, axis 0
                                                             fp8: one scale

`folded` stores W quantized and transposed, as the exporter's last step writes fp8:

    W [K, N] -> DequantizeLinear -> MatMul
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir
import onnxruntime as ort

LARGEST = {"int8": 127.0, "fp8": 448.0}
TYPE = {"int8": np.int8, "fp8": ml_dtypes.float8_e4m3fn}


def session(model, optimize=False):
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if not optimize:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(ir.to_proto(model).SerializeToString(), options)


def products(graph):
    """MatMuls by a constant matrix."""
    return [n for n in graph if n.op_type == "MatMul" and n.inputs[1].is_initializer()]


def largest_activations(model, feeds):
    """Largest absolute value that each of these MatMuls reads, by its weight's name."""
    model = model.clone()
    read = {n.inputs[1].name: n.inputs[0] for n in products(model.graph)}
    values = list(dict.fromkeys(read.values()))
    model.graph.outputs.clear()
    model.graph.outputs.extend(values)
    names = [value.name for value in values]
    found = dict(zip(names, session(model).run(names, feeds), strict=True))
    return {name: float(abs(found[value.name]).max()) for name, value in read.items()}


def insert(model, largest, kind="int8", folded=False):
    """A quantized copy; returns it and the number of Q and of DQ nodes."""
    model = model.clone()
    graph = model.graph
    quantize = dequantize = 0
    for node in products(graph):
        x, weight = node.inputs
        name = weight.name
        held_as = weight.const_value.numpy().T  # [N, K], as PyTorch holds it
        scale = np.array(largest[name] / LARGEST[kind], np.float32)
        by_row = kind == "int8"
        peak = abs(held_as).max(1) if by_row else abs(held_as).max()
        steps = np.asarray(peak / LARGEST[kind], np.float32)
        made = []

        def op(op_type, inputs, made=made, name=name, **attributes):
            made.append(ir.node(op_type, inputs, attributes, name=f"{name}.{op_type}.{len(made)}"))
            return made[-1].outputs[0]

        def constant(array, op=op):
            return op("Constant", [], value=ir.tensor(array))

        zero = constant(np.zeros((), TYPE[kind]))
        scale = constant(scale)
        q = op("QuantizeLinear", [x, scale, zero])
        dq = op("DequantizeLinear", [q, scale, zero])
        dq.type, dq.shape = x.type, x.shape
        zeros, held = constant(np.zeros(steps.shape, TYPE[kind])), constant(steps)
        if folded:
            divided = held_as / (steps.reshape(-1, 1) if by_row else steps)
            whole = np.rint(divided) if kind == "int8" else divided
            held_as = np.clip(whole, -LARGEST[kind], LARGEST[kind]).astype(TYPE[kind]).T
        array = np.ascontiguousarray(held_as)
        stored = ir.Value(name=f"{name}.stored", const_value=ir.tensor(array, name=f"{name}.stored"))
        stored.type, stored.shape = ir.TensorType(stored.const_value.dtype), ir.Shape(array.shape)
        graph.register_initializer(stored)
        axis = {"axis": 1 if folded else 0} if by_row else {}
        wq = stored if folded else op("QuantizeLinear", [stored, held, zeros], **axis)
        w = op("DequantizeLinear", [wq, held, zeros], **axis)
        if not folded:
            w = op("Transpose", [w], perm=[1, 0])
        for each in made:
            each.metadata_props.update(node.metadata_props)
        graph.insert_before(node, made)
        node.replace_input_with(0, dq)
        node.replace_input_with(1, w)
        quantize, dequantize = quantize + 1 + (not folded), dequantize + 2
        if not weight.uses():
            graph.initializers.pop(name)
    return model, (quantize, dequantize)


def counts(model):
    kinds = [node.op_type for node in model.graph]
    return kinds.count("QuantizeLinear"), kinds.count("DequantizeLinear")
