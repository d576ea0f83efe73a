"""Sizes of a mixture's tokens from the tokens themselves, not from the decoder's inputs."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir import tape

from skipvision_export.graph.passes.regions import is_constant
from skipvision_export.tokens.ops import constant


class OwnSizesPass(ir.passes.InPlacePass):
    """Let what flattens tokens for experts turn back to the shape that they had there.

        before   y = Reshape(experts(Reshape(x, [-1, D])), [B, S, D]), B and S of the decoder's inputs
        after    y = Reshape(experts(Reshape(x, [-1, D])), Concat(Shape(x)[:2], [D]))

    The same sizes, but they follow where a region gets fewer rows, and a region that takes its sizes from
    elsewhere would be no FFN. What is not of this form is left alone.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite in place."""
        modified = False
        for node in tuple(model.graph):
            out, target = node.outputs[0], node.inputs[1] if len(node.inputs) > 1 else None
            if node.op_type != "Reshape" or target is None or is_constant(target) or _rank(out) != 3:
                continue
            source = _flattened(node.inputs[0]) if _rank(node.inputs[0]) == 2 else None
            if source is None or source.shape is None or out.shape is None:
                continue
            if list(source.shape[:2]) != list(out.shape[:2]) or not isinstance(out.shape[2], int):
                continue
            t = tape.Tape()
            sizes = t.op("Shape", [source], {"start": 0, "end": 2})
            own = t.op("Concat", [sizes, constant(t, out.shape[2])], {"axis": 0})
            scope = node.metadata_props.get("name_scopes", "")
            for made in t.nodes:
                made.metadata_props["name_scopes"] = scope
            model.graph.insert_before(node, t.nodes)
            node.replace_input_with(1, own)
            modified = True
        return ir.passes.PassResult(model, modified=modified)


def _rank(value: ir.Value | None) -> int | None:
    return len(value.shape) if value is not None and value.shape is not None else None


def _flattened(value: ir.Value | None) -> ir.Value | None:
    """The tokens [B, S, F] that were flattened last on the way to a value [B*S, F]."""
    stack, seen = [value], set()
    while stack:
        each = stack.pop()
        node = each.producer() if each is not None else None
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.op_type == "Reshape" and _rank(node.inputs[0]) == 3:
            return node.inputs[0]
        stack.extend(taken for taken in node.inputs if _rank(taken) == 2)
    return None
