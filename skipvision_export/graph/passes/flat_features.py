"""The features of all pictures as rows of one matrix, as onnxruntime-genai hands them on."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir import tape

from skipvision_export.graph.passes.names import IMAGE_FEATURES
from skipvision_export.tokens.ops import constant


class FlatFeaturesPass(ir.passes.InPlacePass):
    """Let the output or input `image_features` [N, V, D] be [N*V, D].

        vision encoder   after    image_features = Reshape(features, [-1, D])
        embeddings       after    features = Unsqueeze(image_features, 0)

    Without a picture genai gives embeddings a matrix of no rows, which has no place for N. The embeddings
    read only the rows, in order, so that one picture of N*V tokens is the same. A graph without
    `image_features` is left alone.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite in place."""
        graph, t = model.graph, tape.Tape()
        for i, value in enumerate(graph.outputs):
            if value.name == IMAGE_FEATURES:
                value.name = f"{IMAGE_FEATURES}.batched"
                width = _width(value)
                rows = t.op("Reshape", [value, constant(t, -1, width)])
                rows.name, rows.type, rows.shape = (
                    IMAGE_FEATURES,
                    value.type,
                    ir.Shape(["visual_rows", width]),
                )
                graph.outputs[i] = rows
                graph.extend(t.nodes)
                return ir.passes.PassResult(model, modified=True)
        for i, value in enumerate(graph.inputs):
            if value.name == IMAGE_FEATURES:
                shape = ir.Shape(["visual_rows", _width(value)])
                flat = ir.Value(name=IMAGE_FEATURES, type=value.type, shape=shape)
                batched = t.op("Unsqueeze", [flat, constant(t, 0)])
                ir.convenience.replace_all_uses_with(value, batched)
                graph.inputs[i] = flat
                graph.insert_before(graph[0], t.nodes)
                return ir.passes.PassResult(model, modified=True)
        return ir.passes.PassResult(model, modified=False)


def _width(value: ir.Value) -> int:
    assert value.shape is not None and isinstance(value.shape[-1], int)
    return int(value.shape[-1])
