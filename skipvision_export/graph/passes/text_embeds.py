"""Embeddings of ids alone, as transformers.js wants them: it puts features in their places itself."""

from __future__ import annotations

import onnx_ir as ir

from skipvision_export.errors import PassError
from skipvision_export.graph.passes.names import IMAGE_FEATURES


class TextEmbedsPass(ir.passes.InPlacePass):
    """Leave the input `image_features` out of the token embeddings.

        before   inputs_embeds = Where(takes a feature, features, embeds)
        after    inputs_embeds = embeds

    A graph of another form, or whose `embeds` read `image_features`, is refused.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite in place."""
        graph = model.graph
        (out,) = graph.outputs
        features = next(value for value in graph.inputs if value.name == IMAGE_FEATURES)
        chosen = out.producer()
        embeds = chosen.inputs[2] if chosen is not None and chosen.op_type == "Where" else None
        if embeds is None or _reads(embeds, features):
            raise PassError(
                f"{out.name} does not end in a choice between features and embeddings; export with another "
                "target than transformers.js"
            )
        embeds.shape, embeds.type = out.shape, out.type
        embeds.name, out.name = out.name, f"{out.name}.merged"
        graph.outputs[0] = embeds
        _remove_unused(graph)
        graph.inputs.remove(features)
        return ir.passes.PassResult(model, modified=True)


def _reads(value: ir.Value, source: ir.Value) -> bool:
    """Does a value depend on another one?"""
    stack, seen = [value], set()
    while stack:
        each = stack.pop()
        if each is source:
            return True
        producer = each.producer()
        if producer is not None and producer not in seen:
            seen.add(producer)
            stack.extend(taken for taken in producer.inputs if taken is not None)
    return False


def _remove_unused(graph: ir.Graph) -> None:
    """Nodes that nothing reads; an input can go only when they are gone."""
    for node in reversed(list(graph)):
        if not any(value.uses() or value.is_graph_output() for value in node.outputs):
            graph.remove(node, safe=True)
