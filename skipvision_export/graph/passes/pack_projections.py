"""The products of one input, such as those that make queries, keys and values, as one product."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import onnx_ir as ir
from onnx_ir import tape

from skipvision_export.graph.passes.names import CONTRIB_DOMAIN
from skipvision_export.tokens.ops import constant

# Of matrices [K, N_i]: [K, sum N_i], side by side.
Pack = Callable[[Sequence[ir.TensorProtocol]], ir.TensorProtocol]


class PackProjectionsPass(ir.passes.InPlacePass):
    """One MatMul for those that read the same input: q, k and v; gate and up.

        before   MatMul(x, Wq [K, Nq]), MatMul(x, Wk [K, Nk]), MatMul(x, Wv [K, Nv])
        after    Split(MatMul(x, [Wq Wk Wv]), [Nq, Nk, Nv], axis=-1)

    Exact: every output column is the same sum. In decode, where each product reads its weights once, three
    products fewer in each layer are 10 to 15 % of a step on a CPU (benchmarks/decoder_cpu.py's model), most
    of it q, k and v; in prefill what the Split copies is won back by larger products.

    One pass object serves the graphs of a model: the first one decides which matrices are packed, so that
    the others share them. So give it prefill first, in whose last layer the query reads a row only and
    stays apart. Run it behind the passes that look at products, and before those that know no MatMul
    afterwards.
    """

    def __init__(self, pack: Pack) -> None:
        """pack: of matrices that graphs share."""
        super().__init__()
        self._pack = pack
        # By the tensors' identities; the tensors are held, or others might get their ids.
        self._packed: dict[tuple[int, ...], tuple[list[ir.TensorProtocol], ir.TensorProtocol]] | None = None

    def requires(self, model: ir.Model) -> None:
        """Before int4 weights, which are no MatMul's any more."""
        if any(node.domain == CONTRIB_DOMAIN and node.op_type == "MatMulNBits" for node in model.graph):
            raise ir.passes.PreconditionError("PackProjections runs before Int4Weights")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite in place; weights that nothing reads any more leave the graph."""
        graph, first = model.graph, self._packed is None
        packed = self._packed = self._packed if self._packed is not None else {}
        modified = False
        for value in [*graph.inputs, *(out for node in tuple(graph) for out in node.outputs)]:
            group = [use.node for use in value.uses() if use.idx == 0 and _has_own_matrix(use.node)]
            for nodes in [group] if first else _known(group, packed):
                if len(nodes) < 2:
                    continue
                tensors = [_weight(node).const_value for node in nodes]
                key = tuple(map(id, tensors))
                if key not in packed:
                    held = [tensor for tensor in tensors if tensor is not None]
                    packed[key] = held, self._pack(held)
                _replace(graph, value, nodes, packed[key][1])
                modified = True
        return ir.passes.PassResult(model, modified=modified)


def _has_own_matrix(node: ir.Node) -> bool:
    """Is it MatMul by a matrix that nothing else reads?"""
    if node.op_type != "MatMul" or node.domain != "":
        return False
    weight = node.inputs[1]
    if weight is None or not weight.is_initializer() or len(weight.uses()) != 1 or weight.const_value is None:
        return False
    return len(weight.const_value.shape) == 2 and not node.outputs[0].is_graph_output()


def _weight(node: ir.Node) -> ir.Value:
    weight = node.inputs[1]
    assert weight is not None
    return weight


def _known(
    group: list[ir.Node], packed: dict[tuple[int, ...], tuple[list[ir.TensorProtocol], ir.TensorProtocol]]
) -> list[list[ir.Node]]:
    """The parts of a group that were packed in the first graph."""
    by_tensor = {id(_weight(node).const_value): node for node in group}
    return [[by_tensor[one] for one in key] for key in packed if all(one in by_tensor for one in key)]


def _replace(graph: ir.Graph, x: ir.Value, nodes: list[ir.Node], tensor: ir.TensorProtocol) -> None:
    weights = [_weight(node) for node in nodes]
    sizes = [weight.const_value.shape.numpy()[1] for weight in weights]  # type: ignore[union-attr]
    whole = ir.Value(name=tensor.name, type=weights[0].type, const_value=tensor)
    whole.shape = ir.Shape(tensor.shape.numpy())  # type: ignore[attr-defined]
    graph.register_initializer(whole)
    t = tape.Tape()
    product = t.op("MatMul", [x, whole])
    product.type = nodes[0].outputs[0].type
    parts = t.op_multi_out("Split", [product, constant(t, *sizes)], {"axis": -1}, num_outputs=len(nodes))
    for node in t.nodes:
        node.metadata_props.update(nodes[0].metadata_props)
    # In front of the first of them; all read the same input.
    first = next(node for node in graph if node in nodes)
    graph.insert_before(first, t.nodes)
    for node, part, weight in zip(nodes, parts, weights, strict=True):
        old = node.outputs[0]
        part.type, part.shape = old.type, old.shape
        ir.convenience.replace_all_uses_with(old, part)
        graph.remove(node, safe=True)
        graph.initializers.pop(str(weight.name))
