"""ONNX Runtime's residual sum and norm in one operator taken apart, so that the Add can be seen."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir
from onnx_ir import tape

from skipvision_export.errors import PassError
from skipvision_export.graph.passes.regions import is_product

SUM = 3  # the output that is the residual stream


@dataclass(frozen=True)
class _Form:
    """The norm inside of a fused operator, and which of its inputs are the norm's and the sum's bias."""

    norm: str
    weights: slice
    bias: int


_FORMS = {
    "SkipSimplifiedLayerNormalization": _Form("SimplifiedLayerNormalization", slice(2, 3), 3),
    "SkipLayerNormalization": _Form("LayerNormalization", slice(2, 4), 4),
}


class SplitNormPass(ir.passes.InPlacePass):
    """The opposite of SkipNorm: x + y and its norm as two nodes.

        before   SkipSimplifiedLayerNormalization(x, y, scale) -> norm, , , s
        after    s = Add(x, y); SimplifiedLayerNormalization(s, scale) -> norm

    SkipLayerNormalization likewise, to LayerNormalization. Run it before SkipFFN, which looks for the
    Add. Nothing puts them together again: behind a split FFN the norm reads gathered rows, or scattered
    ones, no sum; and ONNX Runtime fuses what it still can when it loads the graph.

    A bias of the sum goes to the product that it belongs to, so that rows which skip that do not get it.
    Raises PassError, which names the node, for statistics that something reads, for x and y of different
    shapes, and for a bias where not exactly one of x and y is a product.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite in place."""
        found = [node for node in model.graph if node.op_type in _FORMS]
        for node in found:
            _split(model.graph, node)
        return ir.passes.PassResult(model, modified=bool(found))


def _split(graph: ir.Graph, node: ir.Node) -> None:
    form = _FORMS[node.op_type]
    x, y = node.inputs[:2]
    statistics = [value for value in node.outputs[1:SUM] if value.uses() or value.is_graph_output()]
    if statistics:
        raise _refused(node, f"something reads its statistics {statistics[0].name}")
    if x is None or y is None or (x.shape is not None and y.shape is not None and x.shape != y.shape):
        raise _refused(node, "its two summands have different shapes")
    t = tape.Tape()
    bias = node.inputs[form.bias] if len(node.inputs) > form.bias else None
    if bias is not None:
        ends = [value.producer() for value in (x, y)]
        branches = [end is not None and is_product(end) for end in ends]
        if branches.count(True) != 1:
            raise _refused(node, f"its bias {bias.name} belongs to neither summand for sure")
        x, y = (t.op("Add", [x, bias]), y) if branches[0] else (x, t.op("Add", [y, bias]))
    total = t.op("Add", [x, y])
    attributes = {"axis": -1, "epsilon": node.attributes.get_float("epsilon", 1e-5)}
    if form.norm == "SimplifiedLayerNormalization":
        attributes["stash_type"] = 1
    normed = t.op(form.norm, [total, *node.inputs[form.weights]], attributes)
    old = node.outputs
    for new, value in ((normed, old[0]), *([(total, old[SUM])] if len(old) > SUM else [])):
        new.name, new.type, new.shape = value.name, value.type, value.shape
        ir.convenience.replace_all_uses_with(value, new, replace_graph_outputs=True)
    total.type, total.shape = normed.type, normed.shape
    for made in t.nodes:
        made.name = str(node.name) if made is normed.producer() else f"{node.name}.{made.op_type}"
        made.metadata_props.update(node.metadata_props)
    if bias is not None:
        t.nodes[0].name = f"{node.name}.bias"
    graph.insert_after(node, t.nodes)
    graph.remove(node, safe=True)


def _refused(node: ir.Node, why: str) -> PassError:
    return PassError(f"node {node.name} ({node.op_type}) cannot be taken apart: {why}")
