"""Choosing the retained visual tokens inside the vision encoder's graph."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir import tape

from skipvision_export.errors import PassError


class SelectTokensPass(ir.passes.InPlacePass):
    """Put image_features [N, V, D] in layout order: `retained` by CLS attention, then the rest.

    Both groups stay in raster order. Scores are the CLS row's softmax probabilities in the
    attention of the feature layer, heads summed; no shape depends on data. Source: Skip-Vision,
    section "choosing and merging".

    Raises PassError where the graph has not one Attention node for each vision layer.
    """

    def __init__(self, retained: int, visual_tokens: int, vision_layers: int) -> None:
        """Counts; vision_layers are those that the features go through."""
        super().__init__()
        self.retained = retained
        self.visual_tokens = visual_tokens
        self.vision_layers = vision_layers

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite the vision encoder in place; nothing to do where all tokens are retained."""
        if self.retained == self.visual_tokens:
            return ir.passes.PassResult(model, modified=False)
        graph = model.graph
        attentions = [node for node in graph if node.op_type == "Attention"]
        if len(attentions) != self.vision_layers:
            raise PassError(
                f"the vision encoder has {len(attentions)} Attention nodes, expected one for each of "
                f"its {self.vision_layers} layers: cannot tell whose CLS row to choose by"
            )
        t = tape.Tape()
        order = self._order(t, attentions[-1])
        features = graph.outputs[0]
        name, shape, dtype = features.name, features.shape, features.type
        features.name = f"{name}.raster"
        ordered = t.op("GatherND", [features, t.op("Unsqueeze", [order, _const(t, -1)])], {"batch_dims": 1})
        ordered.name, ordered.shape, ordered.type = name, shape, dtype
        graph.extend(t.nodes)
        graph.outputs[0] = ordered
        return ir.passes.PassResult(model, modified=True)

    def _order(self, t: tape.Tape, attention: ir.Node) -> ir.Value:
        """[N, V] int64: patch index of each token in layout order."""
        query, key = attention.inputs[0], attention.inputs[1]
        assert query is not None and key is not None
        scale = attention.attributes.get_float("scale", None)
        if scale is None:
            raise PassError(f"node {attention.name} (Attention) has no scale attribute")
        first, last, end = _const(t, 0), _const(t, 1), _const(t, self.visual_tokens + 1)
        cls_query = t.op("Slice", [query, first, last, _const(t, 2)])  # [N, H, 1, Dh]
        keys = t.op("Transpose", [key], {"perm": [0, 1, 3, 2]})
        weights = t.op("MatMul", [cls_query, keys])  # [N, H, 1, 1+V]
        # float32 whatever the model's type: in bfloat16 too few scores stay distinct.
        weights = t.op("Cast", [weights], {"to": ir.DataType.FLOAT})
        weights = t.op("Mul", [weights, _const(t, scale, dtype=np.float32)])
        probabilities = t.op("Softmax", [weights], {"axis": -1})
        scores = t.op("ReduceSum", [probabilities, _const(t, 1, 2)], {"keepdims": 0})  # [N, 1+V]
        scores = t.op("Slice", [scores, last, end, _const(t, 1)])  # [N, V]
        top, chosen = _topk(t, scores, self.retained, largest=1)
        zero, one = _const(t, 0, dtype=np.float32), _const(t, 1, dtype=np.float32)
        zeros = t.op("Mul", [scores, zero])
        ones = t.op("Add", [t.op("Mul", [top, zero]), one])
        mask = t.op("ScatterElements", [zeros, chosen, ones], {"axis": 1})
        # Sort key: raster index, moved back by V where a patch is not chosen; all are distinct.
        raster = _const(t, *range(self.visual_tokens), dtype=np.float32)
        ranks = t.op("Sub", [raster, t.op("Mul", [mask, _const(t, self.visual_tokens, dtype=np.float32)])])
        return _topk(t, ranks, self.visual_tokens, largest=0)[1]


def _topk(t: tape.Tape, scores: ir.Value, k: int, largest: int) -> tuple[ir.Value, ir.Value]:
    values, indices = t.op_multi_out(
        "TopK",
        [scores, _const(t, k)],
        {"axis": -1, "largest": largest, "sorted": 1},
        num_outputs=2,
    )
    return values, indices


def _const(t: tape.Tape, *values: float, dtype: type = np.int64) -> ir.Value:
    return t.op("Constant", [], {"value": ir.tensor(np.array(values, dtype))})
