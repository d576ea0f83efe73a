"""The prefill graph, out of the decode graph: prefill is decode with an empty cache.

Tracing a decoder is the slowest step of an export by far; this halves it.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common

from skipvision_export.errors import PassError

_PAST = "past_key_values."


def prefill_from_decode(decode: ir.Model) -> ir.Model:
    """A copy of a decode graph without its cache inputs.

    Cases:
    1. Concat(past, new) along the tokens: `new`, also where it is a graph output.
    2. Shape of a past tensor: 0 for the cached length, the size of inputs_embeds for the batch, a
       constant for heads and head size.
    3. Any other use of a past tensor: PassError names the node.
    """
    model = decode.clone()
    graph = model.graph
    embeds = next(v for v in graph.inputs if v.name == "inputs_embeds")
    for past in [v for v in graph.inputs if (v.name or "").startswith(_PAST)]:
        for use in tuple(past.uses()):
            if use.node.op_type == "Concat" and use.idx == 0:
                _drop_concat(graph, use.node)
            elif use.node.op_type == "Shape":
                _replace_shape(graph, use.node, past, embeds)
            else:
                raise PassError(
                    f"node {use.node.name} ({use.node.op_type}) reads {past.name}; expected only the "
                    "Concat with the new tokens"
                )
        graph.inputs.remove(past)
    for value in (*graph.inputs, *graph.outputs):
        for axis, size in enumerate(value.shape or []):
            if str(size) == "total_sequence":
                assert value.shape is not None
                value.shape[axis] = ir.SymbolicDim("sequence")
    common.RemoveUnusedNodesPass()(model)
    return model


def _drop_concat(graph: ir.Graph, node: ir.Node) -> None:
    whole, new = node.outputs[0], node.inputs[1]
    assert new is not None
    if whole in graph.outputs:
        name, shape = whole.name, whole.shape
        whole.name = f"{name}.whole"
        new.name, new.shape = name, shape
        graph.outputs[list(graph.outputs).index(whole)] = new
    ir.convenience.replace_all_uses_with(whole, new)
    graph.remove(node, safe=True)


def _replace_shape(graph: ir.Graph, node: ir.Node, past: ir.Value, embeds: ir.Value) -> None:
    start, end = node.attributes.get_int("start", 0), node.attributes.get_int("end", 4)
    if end != start + 1:
        raise PassError(f"node {node.name} reads more than one size of {past.name}")
    if start == 0:
        node.replace_input_with(0, embeds)
        return
    assert past.shape is not None
    size = 0 if start == 2 else past.shape[start]
    constant = ir.node("Constant", [], attributes={"value": ir.tensor(np.array([size], np.int64))})
    graph.insert_before(node, constant)
    ir.convenience.replace_all_uses_with(node.outputs[0], constant.outputs[0])
    graph.remove(node, safe=True)
