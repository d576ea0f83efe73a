"""Finding residual branches in a decoder graph."""

from __future__ import annotations

from dataclasses import dataclass
from posixpath import commonpath

import onnx_ir as ir

from skipvision_export.graph.passes.names import CONTRIB_DOMAIN


@dataclass(frozen=True)
class Branch:
    """`add = trunk + branch(trunk)`: a region whose only non-constant input is `trunk`."""

    add: ir.Node
    trunk: ir.Value
    nodes: tuple[ir.Node, ...]

    @property
    def scope(self) -> str:
        """Where the branch stands: `decoder.layers.3.mlp` or, in others' graphs, `/model/layers.3/mlp`.

        The module path that our tracer left, what the names of the products have in common where they
        are paths, or the last product's name.
        """
        products = [node for node in self.nodes if is_product(node)]
        for node in products:
            if node.metadata_props.get("name_scopes"):
                return module_path(node)
        names = [node.name or "" for node in products]
        if len(names) > 1 and all(name.startswith("/") for name in names):
            common = commonpath(names)
            if common.strip("/"):
                return common
        return next(filter(None, reversed([*names, self.add.name])), "an unnamed node")


def module_path(node: ir.Node) -> str:
    """The innermost module of a node's `name_scopes` metadata, or its own name."""
    scopes = node.metadata_props.get("name_scopes", "")
    names = [name for name in scopes.strip("[]").replace("'", "").split(", ") if name]
    return names[-2] if len(names) > 1 else (names[-1] if names else str(node.name))


# What stands between a stored weight and the product that reads it in a quantized model.
_OF_WEIGHTS = frozenset(("QuantizeLinear", "DequantizeLinear", "Transpose", "Cast", "Identity"))
# Products of tokens and a matrix; of the last the matrix is packed to a few bits.
_PRODUCTS = (("", "MatMul"), ("", "Gemm"), (CONTRIB_DOMAIN, "MatMulNBits"))


def is_product(node: ir.Node) -> bool:
    """A product by constant weights, whole or packed."""
    return (node.domain, node.op_type) in _PRODUCTS and any(
        value is not None and is_constant(value) for value in node.inputs
    )


def is_constant(value: ir.Value) -> bool:
    """An initializer that is no graph input, the output of a Constant node, or a weight made of those.

    Such a weight goes through QuantizeLinear, DequantizeLinear, Transpose, Cast and Identity only.
    """
    if value.is_initializer():
        return not value.is_graph_input()
    producer = value.producer()
    if producer is None or producer.domain != "":
        return False
    if producer.op_type in _OF_WEIGHTS:
        return all(part is None or is_constant(part) for part in producer.inputs)
    return producer.op_type == "Constant"


def residual_branches(graph: ir.Graph) -> list[Branch]:
    """Every Add of a trunk and a region that depends on that trunk alone, in graph order.

    What makes a constant of constants is not among a region's nodes.

    Attention branches also take the mask and the positions, so they are not among them.
    """
    order = {node: i for i, node in enumerate(graph)}
    found = []
    for node in graph:
        if node.op_type != "Add" or any(v is None or is_constant(v) for v in node.inputs):
            continue
        first, second = node.inputs
        for trunk, end in ((first, second), (second, first)):
            assert trunk is not None and end is not None
            region = _region(end, trunk)
            if region:
                nodes = tuple(sorted(region, key=order.__getitem__))
                found.append(Branch(node, trunk, nodes))
                break
    return found


def _region(end: ir.Value, trunk: ir.Value) -> set[ir.Node] | None:
    """Nodes between `trunk` and `end`; None if something else flows in, or trunk is not reached."""
    region: set[ir.Node] = set()
    reached = False
    stack = [end]
    while stack:
        value = stack.pop()
        if value is trunk:
            reached = True
            continue
        if is_constant(value):
            continue
        producer = value.producer()
        if producer is None:
            return None
        if producer not in region:
            region.add(producer)
            stack.extend(v for v in producer.inputs if v is not None)
    return region if reached else None
