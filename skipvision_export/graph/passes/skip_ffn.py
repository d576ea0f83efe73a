"""Skip-FFN: let only the rows of `ffn_index` go through each decoder FFN."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir import tape

from skipvision_export.errors import PassError
from skipvision_export.graph.passes.matching import has_input, require
from skipvision_export.graph.passes.names import FFN_INDEX, TOKEN_INPUTS, ffn_dim_name, ffn_index_name
from skipvision_export.graph.passes.regions import Branch, is_product, residual_branches
from skipvision_export.graph.passes.rowwise import RANK, prove_rowwise


class SkipFFNPass(ir.passes.InPlacePass):
    """Split every decoder FFN into a path for the rows of `ffn_index` and a bypass.

    With X [B, S, D] the residual stream before an FFN and R its region (norm and MLP):

        before   Y = X + R(X)
        after    rows = Gather(Reshape(X, [B*S, D]), ffn_index)            [1, M, D]
                 Y = Reshape(ScatterND(X, ffn_index, rows + R(rows)))      [B, S, D]

    Cases:
    1. A residual branch that depends on X alone and multiplies by a constant matrix is an FFN; it
       is proved to act row by row (see `rowwise`), then split. Weights and activations may be
       quantized with static scales: QuantizeLinear and DequantizeLinear stay where they are.
    2. An FFN with an operator that mixes tokens, or that no rule covers: PassError names the node.
    3. A branch that also takes the mask, positions or a cache is attention: left alone.
    4. No FFN, or another number than the model has layers: PassError.
    5. X is the last position alone, [B, 1, D] (see LastLayerPass): its FFN is computed, and taken where
       `ffn_index` names the last row of that sequence:

           after    Y = Where(any(ffn_index == b*S + S - 1), X + R(X), X)

    6. Layers of several tiers (a policy): each tier's FFNs take an index of their own, named by
       `ffn_index_name`; a layer of tier 0 is left as it is.
    """

    def __init__(self, tiers: Sequence[int]) -> None:
        """tiers: of each decoder layer in order (TokenLayout.layer_tier); each must have one FFN."""
        super().__init__()
        self.tiers = tuple(tiers)
        self.count = 0

    def requires(self, model: ir.Model) -> None:
        """Once, and before whatever fuses a residual Add away."""
        require(not has_input(model, FFN_INDEX), "SkipFFN runs once")
        fused = [n.op_type for n in model.graph if n.op_type.startswith("Skip")]
        require(not fused, f"SkipFFN runs before residual adds are fused, but there is {fused[:1]}")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite the prefill graph in place."""
        graph = model.graph
        ffns = find_ffns(graph)
        if not ffns:
            raise PassError(
                "no FFN found in the decoder: no residual branch of the graph depends on the residual "
                "stream alone and holds a MatMul with constant weights"
            )
        if len(ffns) != len(self.tiers):
            raise PassError(
                f"found {len(ffns)} FFNs in a decoder of {len(self.tiers)} layers: "
                f"{', '.join(ffn.scope for ffn in ffns)}"
            )
        tokens = token_input(graph)
        split = [(ffn, tier) for ffn, tier in zip(ffns, self.tiers, strict=True) if tier]
        for ffn, _ in split:
            _check_trunk(ffn, tokens)
            prove_rowwise(ffn.nodes, ffn.trunk, f"the FFN {ffn.scope}")
            _check_closed(ffn, graph)
        indices = {tier: _index_input(graph, tier) for tier in sorted({tier for _, tier in split})}
        for ffn, tier in split:
            if is_one_row(ffn, tokens):
                _choose(graph, ffn, indices[tier][0], tokens)
            else:
                _split(graph, ffn, *indices[tier])
        self.count = len(split)
        return ir.passes.PassResult(model, modified=bool(split))


def find_ffns(graph: ir.Graph) -> list[Branch]:
    """Residual branches with at least one product by constant weights."""
    return [b for b in residual_branches(graph) if any(map(is_product, b.nodes))]


def token_input(graph: ir.Graph) -> ir.Value:
    """What the decoder takes its tokens as: embedded [B, S, D] or as ids [B, S]; raises PassError."""
    inputs = {value.name: value for value in graph.inputs}
    for name in TOKEN_INPUTS:
        if name in inputs:
            return inputs[name]
    raise PassError(f"no decoder: the graph takes neither {' nor '.join(TOKEN_INPUTS)}")


def _check_trunk(ffn: Branch, tokens: ir.Value) -> None:
    """The row gather flattens [B, S, D]; the residual stream must have that shape."""
    shape, want = ffn.trunk.shape, tokens.shape
    lead = None if want is None or len(want) < 2 else [*want[:2]]
    if shape is None or any(isinstance(size, ir.SymbolicDim) and size.value is None for size in shape):
        raise PassError(
            f"the FFN {ffn.scope} cannot be split: the shape of its input {ffn.trunk.name} is not known; "
            "give a graph with value_info, as shape inference leaves it"
        )
    whole = lead is not None and [*shape[:2]] in (lead, [lead[0], 1])
    if len(shape) != RANK or not whole or not isinstance(shape[2], int):
        raise PassError(
            f"the FFN {ffn.scope} cannot be split: its input {ffn.trunk.name} has shape {shape}, not "
            f"[batch, sequence, features] of {tokens.name} ({want})"
        )


def _check_closed(ffn: Branch, graph: ir.Graph) -> None:
    """Nothing outside may read a value inside the region: it will have M rows, not B*S."""
    inside = {*ffn.nodes, ffn.add}
    for node in ffn.nodes:
        for value in node.outputs:
            readers = {use.node for use in value.uses()}
            if not readers <= inside or value in graph.outputs:
                raise PassError(
                    f"the FFN {ffn.scope} cannot be split: {value.name} of node {node.name} "
                    f"({node.op_type}) is also read outside of it"
                )


def _index_input(graph: ir.Graph, tier: int) -> tuple[ir.Value, ir.Value]:
    """A tier's index of rows [M], a new input, and as [M, 1], which ScatterND takes; made once."""
    index = ir.Value(
        name=ffn_index_name(tier),
        type=ir.TensorType(ir.DataType.INT64),
        shape=ir.Shape([ffn_dim_name(tier)]),
    )
    graph.inputs.append(index)
    builder = tape.Tape(graph)
    axes = _ints(graph, "skip_ffn.one", [1])
    column = builder.op("Unsqueeze", [index, axes])
    column.name = f"{index.name}.column"
    for node in builder.nodes:
        graph.remove(node)
        graph.insert_before(graph[0], node)
    return index, column


def _split(graph: ir.Graph, ffn: Branch, index: ir.Value, column: ir.Value) -> None:
    trunk, add = ffn.trunk, ffn.add
    assert trunk.shape is not None
    width = trunk.shape[2]
    assert isinstance(width, int)  # by _check_trunk
    flat_shape = _ints(graph, f"skip_ffn.flat_{width}", [-1, width])
    zero = _ints(graph, "skip_ffn.zero", [0])
    scope = {"name_scopes": ffn.nodes[0].metadata_props.get("name_scopes", "")}

    before = tape.Tape()
    flat = before.op("Reshape", [trunk, flat_shape])
    picked = before.op("Gather", [flat, index], {"axis": 0})
    rows = before.op("Unsqueeze", [picked, zero])
    shape = before.op("Shape", [trunk])
    for node in before.nodes:
        node.metadata_props.update(scope)
    graph.insert_before(ffn.nodes[0], before.nodes)

    for node in (*ffn.nodes, add):
        for i, value in enumerate(node.inputs):
            if value is trunk:
                node.replace_input_with(i, rows)

    out = add.outputs[0]
    after = tape.Tape()
    updated = after.op("Squeeze", [out, zero])
    scattered = after.op("ScatterND", [flat, column, updated])
    whole = after.op("Reshape", [scattered, shape])
    for node in after.nodes:
        node.metadata_props.update(scope)
    if out in graph.outputs:
        whole.name, whole.shape, whole.type = out.name, out.shape, out.type
        out.name = f"{out.name}.rows"
    ir.convenience.replace_all_uses_with(out, whole, replace_graph_outputs=True)
    after.nodes[0].replace_input_with(0, out)
    graph.insert_after(add, after.nodes)


def is_one_row(ffn: Branch, tokens: ir.Value) -> bool:
    """Does an FFN get one position of each sequence, of several that the decoder takes?"""
    whole, own = tokens.shape, ffn.trunk.shape
    return whole is not None and own is not None and own[1] == 1 and whole[1] != 1


def _choose(graph: ir.Graph, ffn: Branch, index: ir.Value, tokens: ir.Value) -> None:
    """Keep the FFN's sum where the index [M] names the last row of a sequence."""
    out = ffn.add.outputs[0]
    t = tape.Tape()

    def const(*values: int, scalar: bool = False) -> ir.Value:
        array = np.array(values[0] if scalar else values, np.int64)
        return t.op("Constant", [], {"value": ir.tensor(array)})

    zero = const(0, scalar=True)
    batch = t.op("Squeeze", [t.op("Shape", [tokens], {"start": 0, "end": 1})])
    length = t.op("Shape", [tokens], {"start": 1, "end": 2})
    order = t.op("Range", [zero, batch, const(1, scalar=True)])
    last = t.op("Sub", [t.op("Add", [t.op("Mul", [order, length]), length]), const(1)])  # [B]
    same = t.op("Equal", [t.op("Unsqueeze", [last, const(1)]), index])  # [B, M]
    # A sum, because a maximum over no rows at all is not defined.
    named = t.op("ReduceSum", [t.op("Cast", [same], {"to": ir.DataType.INT64}), const(1)], {"keepdims": 1})
    chosen = t.op("Unsqueeze", [t.op("Greater", [named, zero]), const(2)])  # [B, 1, 1]
    picked = t.op("Where", [chosen, out, ffn.trunk])
    # Says the shape again: ONNX's shape inference loses the batch in Range.
    whole = t.op("Reshape", [picked, t.op("Shape", [ffn.trunk])])
    scope = ffn.nodes[0].metadata_props.get("name_scopes", "")
    for node in t.nodes:
        node.metadata_props["name_scopes"] = scope
    ir.convenience.replace_all_uses_with(out, whole, replace_graph_outputs=True)
    made = picked.producer()
    assert made is not None
    made.replace_input_with(1, out)
    graph.insert_after(ffn.add, t.nodes)


def _ints(graph: ir.Graph, name: str, values: list[int]) -> ir.Value:
    """An int64 initializer, made once."""
    if name in graph.initializers:
        return graph.initializers[name]
    value = ir.Value(name=name, const_value=ir.tensor(np.array(values, np.int64), name=name))
    value.shape, value.type = ir.Shape([len(values)]), ir.TensorType(ir.DataType.INT64)
    graph.register_initializer(value)
    return value
