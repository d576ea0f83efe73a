"""How much the CLS row looks at each patch, out of a vision encoder's last attention."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir import tape

from skipvision_export.errors import PassError
from skipvision_export.tokens.ops import constant


def cls_attention(t: tape.Tape, graph: ir.Graph, visual_tokens: int, vision_layers: int) -> ir.Value:
    """[N, V] float32: softmax probabilities of the CLS query at the feature layer, heads summed.

    Computed again from the query and key of the layer's Attention node, for that one row. Source:
    Skip-Vision, "choosing and merging". Raises PassError where the graph has not one Attention node
    for each of the `vision_layers` that the features go through.
    """
    nodes = [node for node in graph if node.op_type == "Attention"]
    if len(nodes) != vision_layers:
        raise PassError(
            f"the vision encoder has {len(nodes)} Attention nodes, expected one for each of its "
            f"{vision_layers} layers: cannot tell whose CLS row to choose by"
        )
    query, key = nodes[-1].inputs[0], nodes[-1].inputs[1]
    assert query is not None and key is not None
    scale = nodes[-1].attributes.get_float("scale", None)
    if scale is None:
        raise PassError(f"node {nodes[-1].name} (Attention) has no scale attribute")
    one = constant(t, 1)
    cls_query = t.op("Slice", [query, constant(t, 0), one, constant(t, 2)])  # [N, H, 1, Dh]
    keys = t.op("Transpose", [key], {"perm": [0, 1, 3, 2]})
    weights = t.op("MatMul", [cls_query, keys])  # [N, H, 1, 1+V]
    # float32 whatever the model's type: in bfloat16 too few scores stay distinct.
    weights = t.op("Cast", [weights], {"to": ir.DataType.FLOAT})
    weights = t.op("Mul", [weights, constant(t, scale, dtype=np.float32)])
    probabilities = t.op("Softmax", [weights], {"axis": -1})
    scores = t.op("ReduceSum", [probabilities, constant(t, 1, 2)], {"keepdims": 0})  # [N, 1+V]
    return t.op("Slice", [scores, one, constant(t, visual_tokens + 1), one])
