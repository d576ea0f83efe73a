"""A residual Add and the norm that reads it as one operator of ONNX Runtime."""

from __future__ import annotations

import onnx_ir as ir

from skipvision_export.graph.passes.matching import made_by
from skipvision_export.graph.passes.names import CONTRIB_DOMAIN
from skipvision_export.graph.passes.rowwise import rank

OP = "SkipSimplifiedLayerNormalization"


class SkipNormPass(ir.passes.InPlacePass):
    """One operator for x + y and its RMS norm.

        before   s = Add(x, y); RMSNormalization(s, scale)
        after    SkipSimplifiedLayerNormalization(x, y, scale) -> norm, , , s; of com.microsoft

    In decode, where it counts how many operators there are, 3 to 5 % of a step on a CPU
    (benchmarks/decoder_cpu.py's model). Left alone: a sum with a constant or of another rank than
    [B, S, D], and a norm over more than the last axis. Run it after SkipFFN, which looks for the Add.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite in place."""
        graph, modified = model.graph, False
        for norm in tuple(graph):
            add = made_by(norm.inputs[0], "Add") if norm.op_type == "RMSNormalization" else None
            if add is None or not _fits(norm, add):
                continue
            _fuse(graph, norm, add)
            modified = True
        if modified:
            model.opset_imports[CONTRIB_DOMAIN] = 1
        return ir.passes.PassResult(model, modified=modified)


def _fits(norm: ir.Node, add: ir.Node) -> bool:
    if norm.attributes.get_int("axis", -1) != -1 or add.outputs[0].is_graph_output():
        return False
    shapes = [value.shape for value in add.inputs if value is not None and not value.is_initializer()]
    if len(shapes) != 2 or shapes[0] is None or shapes[0] != shapes[1] or rank(add.outputs[0]) != 3:
        return False
    scale = norm.inputs[1]
    return scale is not None and scale.shape is not None and len(scale.shape) == 1


def _fuse(graph: ir.Graph, norm: ir.Node, add: ir.Node) -> None:
    epsilon = norm.attributes.get_float("epsilon", 1e-5)
    normed, total = norm.outputs[0], add.outputs[0]
    outputs = [
        ir.Value(name=normed.name, type=normed.type, shape=normed.shape),
        ir.Value(name=""),
        ir.Value(name=""),
        ir.Value(name=total.name, type=total.type, shape=total.shape),
    ]
    fused = ir.Node(
        CONTRIB_DOMAIN,
        OP,
        [*add.inputs, norm.inputs[1]],
        [ir.AttrFloat32("epsilon", epsilon)],
        outputs=outputs,
        version=1,
    )
    fused.metadata_props.update(norm.metadata_props)
    graph.insert_after(add, fused)
    ir.convenience.replace_all_uses_with(normed, outputs[0], replace_graph_outputs=True)
    ir.convenience.replace_all_uses_with(total, outputs[3])
    graph.remove([norm, add], safe=True)
