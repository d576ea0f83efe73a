"""Matrices that lie in the checkpoint as a graph can refer to them, turned around by the graph itself."""

from __future__ import annotations

import onnx_ir as ir

from skipvision_export.models.weights import WeightTensor


def turn_in_graph(model: ir.Model) -> None:
    """Undo on the weights what the trace did to them, where that leaves them as they are stored.

        before   MatMul(x, W' [K, N])
        after    MatMul(x, Transpose(W [N, K]))

    Each Transpose stands in front of its first reader, so that a runtime that runs it holds one turned
    matrix at a time. ONNX Runtime makes FusedMatMul of the two, TensorRT a product that reads W turned.
    Weights that have to be cast stay turned already.
    """
    graph = model.graph
    turned: dict[ir.Value, ir.Value] = {}
    for node in tuple(graph):
        for i, value in enumerate(node.inputs):
            if value is None or not value.is_initializer():
                continue
            weight = value.const_value
            if not isinstance(weight, WeightTensor) or not weight.transposed:
                continue
            if value not in turned and weight.transpose().as_stored:
                turned[value] = _turn(graph, node, value, weight.transpose())
            if value in turned:
                node.replace_input_with(i, turned[value])
    for value in turned:
        graph.initializers.pop(str(value.name))


def _turn(graph: ir.Graph, reader: ir.Node, value: ir.Value, weight: WeightTensor) -> ir.Value:
    stored = ir.Value(
        name=f"{value.name}.stored", type=value.type, shape=weight.shape.copy(), const_value=weight
    )
    graph.register_initializer(stored)
    node = ir.node("Transpose", [stored], {"perm": [1, 0]}, name=f"{value.name}.turn")
    node.metadata_props.update(reader.metadata_props)
    out = node.outputs[0]
    out.name, out.type, out.shape = f"{value.name}.turned", value.type, ir.Shape(weight.shape.numpy()[::-1])
    graph.insert_before(reader, node)
    return out
