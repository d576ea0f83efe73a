"""Let Attention share key and value heads itself."""

from __future__ import annotations

import onnx_ir as ir

from skipvision_export.graph.passes.matching import constant_ints, made_by


class NativeGQAPass(ir.passes.InPlacePass):
    """Take K and V of grouped-query attention as they are, without repeating their heads.

        before   Attention(q, Reshape(Expand(Unsqueeze(k, 2))), Reshape(Expand(Unsqueeze(v, 2))))
        after    Attention(q, k, v)

    Bit-identical (ONNX Attention: query head h reads key/value head h // group), and decode no
    longer copies the cache. Both K and V must match, else the node is left alone.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite in place; the repeats are left for dead-code removal."""
        modified = False
        for node in model.graph:
            if node.op_type != "Attention":
                continue
            sources = [repeated_heads(node.inputs[i]) for i in (1, 2)]
            if any(source is None for source in sources):
                continue
            for i, source in zip((1, 2), sources, strict=True):
                node.replace_input_with(i, source)
            modified = True
        return ir.passes.PassResult(model, modified=modified)


def repeated_heads(value: ir.Value | None) -> ir.Value | None:
    """The [B, Hkv, S, Dh] value that was repeated along a new axis 2 and flattened, if it was."""
    for kind in ("Reshape", "Expand", "Unsqueeze"):
        producer = made_by(value, kind)
        if producer is None or (kind == "Unsqueeze" and constant_ints(producer.inputs[1]) != [2]):
            return None
        value = producer.inputs[0]
    return value
