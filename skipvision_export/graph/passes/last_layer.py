"""Compute only the last position where only the last position is read: most of the last layer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir import tape

from skipvision_export.errors import PassError
from skipvision_export.graph.passes.matching import constant_ints, has_input, require
from skipvision_export.graph.passes.names import FFN_INDEX
from skipvision_export.graph.passes.regions import Branch, is_constant, residual_branches
from skipvision_export.graph.passes.rowwise import RANK, is_rowwise, prove_rowwise, rank
from skipvision_export.tokens.ops import constant

# A value and the axis along which its tokens lie.
Rows = tuple[ir.Value, int]


class LastLayerPass(ir.passes.InPlacePass):
    """Move the Slice that picks the head's one position up to the last layer's input.

        before   logits = head(norm(X + Attention(q(n), K, V) + FFN(...))[:, -1:]), n = norm(X)
        after    logits = head(norm(x + Attention(q(n[:, -1:]), K, V) + FFN(...))), x = X[:, -1:]

    Exact: every other row of q, of attention's output, o_proj, FFN and final norm of the last layer is
    computed for nothing, whether the model skips or not. Its K and V are read by attention and by
    decode and stay whole.

    A node is computed for the last row alone if each of its outputs is read by such nodes only, and
    1. it is row-wise over [B, S, D] (see `rowwise`), or
    2. Transpose, or Reshape between [B, S, H*Dh] and [B, S, H, Dh], or
    3. RotaryEmbedding of [B, H, S, Dh] with tables [B, S, Dh/2], or
    4. Attention over [B, H, S, Dh] with its queries' axis; the mask's follows. Not with is_causal,
       which would take the one query for the first, or
    5. it stands in the FFN of a mixture of experts, which is row-wise as a whole.

    What such a node reads from elsewhere is cut there. Left as it is: a graph whose head reads more than
    the last position, and one with an FFN that cannot be cut whole. Run after StrictMask, whose mask
    has a row for each query.
    """

    def requires(self, model: ir.Model) -> None:
        """Before SkipFFN, between whose gather and scatter no position can be told any more."""
        require(not has_input(model, FFN_INDEX), "LastLayer runs before SkipFFN")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite the prefill graph in place."""
        graph = model.graph
        last = next((node for node in graph if _is_last_position(node)), None)
        region = _region(graph, last) if last is not None else []
        if last is None or not region or _cuts_a_branch(graph, {row.node for row in region}):
            return ir.passes.PassResult(model, modified=False)
        inside = {row.node.outputs[0] for row in region}
        sliced: dict[Rows, ir.Value] = {}
        for row in reversed(region):
            for i, (value, axis) in zip(row.reads, tuple(row.inputs()), strict=True):
                if value in inside:
                    continue
                if (value, axis) not in sliced:
                    sliced[value, axis] = _last_of(graph, row.node, value, axis)
                row.node.replace_input_with(i, sliced[value, axis])
            _one_row(graph, row)
        assert last.inputs[0] is not None
        ir.convenience.replace_all_uses_with(last.outputs[0], last.inputs[0])
        graph.remove(last, safe=True)
        return ir.passes.PassResult(model, modified=True)


def _cuts_a_branch(graph: ir.Graph, inside: set[ir.Node]) -> bool:
    """Is a part of an FFN inside, where another is not? SkipFFN would no longer know it for one."""
    branches = ({*branch.nodes, branch.add} for branch in residual_branches(graph))
    return any(nodes & inside and not nodes <= inside for nodes in branches)


def _is_last_position(node: ir.Node) -> bool:
    """Is it x[:, -1:]?"""
    if node.op_type != "Slice" or len(node.inputs) < 4:
        return False
    starts, ends, axes, *steps = (constant_ints(value) for value in node.inputs[1:])
    to_end = ends is not None and ends[0] >= np.iinfo(np.int32).max
    return starts == [-1] and to_end and axes == [1] and all(step == [1] for step in steps)


@dataclass(frozen=True)
class _OneRow:
    """A node to compute for the last position: the token axis of its output, and those of its inputs.

    None: its output has rows [B*S, F], or other things that follow from them.
    """

    node: ir.Node
    axis: int | None
    reads: dict[int, int]

    def inputs(self) -> Iterator[Rows]:
        for i, axis in self.reads.items():
            value = self.node.inputs[i]
            assert value is not None
            yield value, axis


def _region(graph: ir.Graph, last: ir.Node) -> list[_OneRow]:
    """What only the last position is read of above the Slice `last`, bottom up."""
    assert last.inputs[0] is not None
    needed = {last.inputs[0]: 1}
    readers = {last}
    region: list[_OneRow] = []
    mixtures = _mixtures(graph)
    for node in reversed(tuple(graph)):
        out = node.outputs[0]
        if node in mixtures and needed.get(out) == 1 and {use.node for use in out.uses()} <= readers:
            branch = mixtures[node]
            if needed.setdefault(branch.trunk, 1) == 1:
                region += [_inner(each, branch.trunk) for each in reversed(branch.nodes)]
                readers.update(branch.nodes)
            continue
        if out not in needed or len(node.outputs) > 1 or out.is_graph_output():
            continue
        reads = _reads(node, needed[out]) if {use.node for use in out.uses()} <= readers else None
        if reads is None:
            continue
        row = _OneRow(node, needed[out], reads)
        # One value read along two axes cannot become one row.
        if any(needed.get(value, axis) != axis for value, axis in row.inputs()):
            continue
        needed.update(row.inputs())
        readers.add(node)
        region.append(row)
    return region


def _mixtures(graph: ir.Graph) -> dict[ir.Node, Branch]:
    """FFNs with experts that are row-wise and closed, by their last node."""
    found = {}
    for branch in residual_branches(graph):
        inside = {*branch.nodes, branch.add}
        closed = all(use.node in inside for n in branch.nodes for v in n.outputs for use in v.uses())
        if closed and any(node.op_type == "NonZero" for node in branch.nodes):
            with contextlib.suppress(PassError):  # SkipFFN says what it misses
                prove_rowwise(branch.nodes, branch.trunk, branch.scope)
                found[branch.nodes[-1]] = branch
    return found


def _inner(node: ir.Node, trunk: ir.Value) -> _OneRow:
    reads = {i: 1 for i, value in enumerate(node.inputs) if value is trunk}
    return _OneRow(node, 1 if rank(node.outputs[0]) == RANK else None, reads)


def _reads(node: ir.Node, axis: int) -> dict[int, int] | None:
    """Which inputs have tokens, along which axis, where the output's lie along `axis`; None: unknown."""
    out = node.outputs[0]
    axes = rank(out)
    if axes is None:
        return None
    if node.op_type == "Attention":
        return _attention_reads(node) if (axes, axis) == (4, 2) else None
    if node.op_type == "RotaryEmbedding":
        tables = len(node.inputs) == 3 and (axes, axis) == (4, 2)
        return {0: 2, 1: 1, 2: 1} if tables else None
    if node.op_type == "Transpose":
        perm = node.attributes.get_ints("perm", tuple(reversed(range(axes))))
        return {0: perm[axis]}
    if node.op_type == "Reshape":
        before, after = node.inputs[0].shape if node.inputs[0] is not None else None, out.shape
        if before is None or after is None or axis != 1 or list(before[:2]) != list(after[:2]):
            return None
        return {0: 1} if all(isinstance(size, int) for size in after[2:]) else None
    if (axes, axis) == (RANK, 1) and is_rowwise(node):
        return {i: 1 for i, v in enumerate(node.inputs) if v is not None and not is_constant(v)}
    return None


def _attention_reads(node: ir.Node) -> dict[int, int] | None:
    if node.attributes.get_int("is_causal", 0) or len(node.inputs) > 4:
        return None
    mask = node.inputs[3] if len(node.inputs) > 3 else None
    if mask is None:
        return {0: 2}
    # [B, 1, S, T]; StrictMask's has no shape yet. Slicing an axis of size 1 changes nothing.
    return {0: 2, 3: 2} if mask.shape is None or len(mask.shape) == 4 else None


def _last_of(graph: ir.Graph, before: ir.Node, value: ir.Value, axis: int) -> ir.Value:
    """value's last position along `axis`.

    A Gather: of a Slice from -1 on, TensorRT does not know that it is one position.
    """
    t = tape.Tape()
    size = t.op("Shape", [value], {"start": axis, "end": axis + 1})
    last = t.op("Sub", [size, constant(t, 1)])
    out = t.op("Gather", [value, last], {"axis": axis})
    graph.insert_before(before, t.nodes)
    out.type = value.type
    out.shape = _with_one(value.shape, axis) if value.shape is not None else None
    return out


def _one_row(graph: ir.Graph, row: _OneRow) -> None:
    """The shape of an output that now has one position; a Reshape names its sizes itself."""
    node, out = row.node, row.node.outputs[0]
    if row.axis is None:
        return
    if out.shape is not None:
        out.shape = _with_one(out.shape, row.axis)
    if node.op_type == "Reshape" and row.reads and out.shape is not None:
        # 0 copies the batch. The shape that stood there names all positions; other layers share it.
        sizes = [0, *map(int, out.shape[1:])]  # type: ignore[arg-type]
        t = tape.Tape()
        node.replace_input_with(1, constant(t, *sizes))
        graph.insert_before(node, t.nodes)
        node.attributes["allowzero"] = ir.AttrInt64("allowzero", 0)


def _with_one(shape: ir.Shape, axis: int) -> ir.Shape:
    return ir.Shape([1 if i == axis else size for i, size in enumerate(shape)])
