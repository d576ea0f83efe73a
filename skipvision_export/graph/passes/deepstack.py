"""Adding further features of the visual tokens behind the decoder's first layers."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir import tape

from skipvision_export.errors import PassError
from skipvision_export.graph.passes.names import DEEPSTACK
from skipvision_export.graph.passes.regions import residual_branches
from skipvision_export.tokens.ops import constant


class DeepstackPass(ir.passes.InPlacePass):
    """Add deepstack_embeds [B, S, levels * D], level by level, to what comes out of the first layers.

        before   h = x + FFN(x)
        after    h = x + FFN(x) + deepstack_embeds[..., i*D : (i+1)*D]

    A token that passes by the FFN gets its features all the same. Decode has no such input: text has no
    features there. Source: Qwen3-VL's `_deepstack_process`.

    Raises PassError where the graph has fewer FFNs than levels. Run before SkipFFN, which takes FFNs apart.
    """

    def __init__(self, levels: int) -> None:
        """levels: layers that get features, the first ones."""
        super().__init__()
        self.levels = levels

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite the prefill graph in place."""
        graph = model.graph
        branches = residual_branches(graph)
        if len(branches) < self.levels:
            raise PassError(f"found {len(branches)} FFNs, expected {self.levels} or more to add features to")
        embeds = next(v for v in graph.inputs if v.name == "inputs_embeds")
        assert embeds.shape is not None and isinstance(embeds.shape[2], int)
        width = embeds.shape[2]
        shape = ir.Shape([embeds.shape[0], embeds.shape[1], self.levels * width])
        given = ir.Value(name=DEEPSTACK, type=embeds.type, shape=shape)
        graph.inputs.append(given)
        for i, branch in enumerate(branches[: self.levels]):
            out = branch.add.outputs[0]
            users = [(use.node, use.idx) for use in out.uses()]
            t = tape.Tape()
            level = t.op("Slice", [given, *(constant(t, n) for n in (i * width, (i + 1) * width, -1))])
            added = t.op("Add", [out, level])
            added.type, added.shape = out.type, out.shape
            for node, at in users:
                node.replace_input_with(at, added)
            graph.insert_after(branch.add, t.nodes)
        return ir.passes.PassResult(model, modified=True)
