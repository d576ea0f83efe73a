"""Prefill's attention as ONNX Runtime's GroupQueryAttention, which is faster on a CPU than its Attention."""

from __future__ import annotations

import onnx_ir as ir

from skipvision_export.graph.passes.group_query import flat_output, heads_of, replace_attention, row_lengths
from skipvision_export.graph.passes.kv_prune import OP as KV_PRUNE
from skipvision_export.graph.passes.matching import has_input, require
from skipvision_export.graph.passes.names import CONTRIB_DOMAIN, IMAGE_INDEX, KV_KEEP_INDEX


class GroupedPrefillPass(ir.passes.InPlacePass):
    """Causal attention over a prompt that knows no mask, for prompts without padding on the left.

        before   Attention(q, k, v, mask), KVPrune(k, v, keep)
        after    GroupQueryAttention(q, k, v, n - 1, total_sequence) -> out, K, V; KVPrune(K, V, keep)

    with n = sum(attention_mask) of each row. Attention over 1,088 tokens takes a fifth less time so, a
    prefill with few tokens in the FFN 8 to 12 % (benchmarks/decoder_cpu.py's model).

    The mask that it replaces is causal and leaves out padding on the right; a batch padded on the left
    needs the graph as it was. The last layer's one query is left as it is. A graph whose masks differ, or
    are strict, is left as it is.
    """

    def requires(self, model: ir.Model) -> None:
        """After KVPrune, which then reads what the operator gives."""
        require(has_input(model, KV_KEEP_INDEX), "GroupedPrefill runs after KVPrune")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite a prefill graph in place; what it replaces is left for dead-code removal."""
        graph = model.graph
        nodes = [node for node in graph if node.op_type == "Attention" and not _one_query(node)]
        masks = {node.inputs[3] if len(node.inputs) > 3 else None for node in nodes}
        matches = nodes and len(masks) == 1 and not has_input(model, IMAGE_INDEX)
        if not matches or not all(map(_replaceable, nodes)):
            return ir.passes.PassResult(model, modified=False)
        lengths = row_lengths(graph)
        for node in nodes:
            query, *full = (value for value in node.inputs[:3] if value is not None)
            present = [ir.Value(name=f"{v.name}.grouped", type=v.type, shape=v.shape) for v in full]
            replace_attention(graph, node, (query, *full), (None, None), lengths, present)
            for old, new in zip(full, present, strict=True):
                for use in tuple(old.uses()):
                    if use.node.op_type == KV_PRUNE:
                        use.node.replace_input_with(use.idx, new)
        graph.sort()  # KVPrune stood in front of its layer's attention
        model.opset_imports[CONTRIB_DOMAIN] = 1
        return ir.passes.PassResult(model, modified=True)


def _one_query(node: ir.Node) -> bool:
    """Is it the last layer's, of which only one position is computed?"""
    query = node.inputs[0]
    return query is not None and query.shape is not None and query.shape[2] == 1


def _replaceable(node: ir.Node) -> bool:
    if node.attributes.get_int("is_causal", 0) or flat_output(node) is None:
        return False
    values = [node.inputs[i] for i in range(3)]
    return all(heads_of(value) is not None for value in values)
