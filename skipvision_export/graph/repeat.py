"""A graph of many equal layers, out of a trace of a few.

Tracing takes seconds for each layer, and every layer of a tower gives the same nodes. So the last
layer that was traced is repeated; that it is a copy of the one before is proved node by node.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field

import onnx_ir as ir

from skipvision_export.models.weights import WeightTensor

# The first layer also makes what all share; the next two prove that layers are equal.
TRACED = 3

WeightOfLayer = Callable[[WeightTensor, int], WeightTensor]


class NotRepeatableError(Exception):
    """Why the layers of a graph are no copies of each other; then all of them must be traced."""


@dataclass
class _Layer:
    """Nodes of one layer in graph order, and their outputs by place."""

    number: int
    nodes: list[ir.Node]
    places: dict[ir.Value, tuple[int, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.places = {v: (i, k) for i, n in enumerate(self.nodes) for k, v in enumerate(n.outputs)}


def repeat_layers(model: ir.Model, path: str, count: int, weight_of_layer: WeightOfLayer) -> None:
    """Append layers behind the last of TRACED ones until there are `count`.

    path: where the layers stand, such as `decoder.layers`, by which `name_scopes` tell a node's layer.
    weight_of_layer: another layer's weight for one of a layer.

    Cases:
    1. A value of the layer itself: the copy's.
    2. A value of the layer before (the hidden state): the same place's in the layer before the copy.
    3. A graph input or output whose name holds the layer's number: a new one with the copy's number.
    4. A weight: the copy's own.
    5. Anything else (masks, angles, constants): shared.

    Raises NotRepeatableError where the last two layers differ in more than that.
    """
    pattern = re.compile(rf"('{re.escape(path)})\.(\d+)\b")
    before, last = (_layer(model.graph, pattern, n) for n in (TRACED - 2, TRACED - 1))
    carried = _prove_equal(before, last, weight_of_layer)
    outside = [use for v in last.places for use in v.uses() if use.node not in set(last.nodes)]
    end = last
    for number in range(TRACED, count):
        end = _copy(model.graph, last, end, _Rules(number, last.number, pattern, carried, weight_of_layer))
    for use in outside:  # whatever stands behind the layers reads the last copy
        value = use.node.inputs[use.idx]
        assert value is not None
        i, k = last.places[value]
        use.node.replace_input_with(use.idx, end.nodes[i].outputs[k])


def _layer(graph: ir.Graph, pattern: re.Pattern[str], number: int) -> _Layer:
    nodes = []
    for node in graph:
        found = pattern.search(node.metadata_props.get("name_scopes", ""))
        if found and int(found[2]) == number:
            nodes.append(node)
    if not nodes:
        raise NotRepeatableError(f"layer {number} left no nodes")
    return _Layer(number, nodes)


def _prove_equal(before: _Layer, last: _Layer, weight_of_layer: WeightOfLayer) -> dict[ir.Value, ir.Value]:
    """What `last` takes from `before` -> the value of `last` at the same place."""
    if len(before.nodes) != len(last.nodes):
        raise NotRepeatableError("layers differ in their number of nodes")
    carried: dict[ir.Value, ir.Value] = {}
    for one, two in zip(before.nodes, last.nodes, strict=True):
        if _kind(one) != _kind(two):
            raise NotRepeatableError(f"{one.name} and {two.name} differ")
        for a, b in zip(one.inputs, two.inputs, strict=True):
            if b is not None and b in before.places:
                i, k = before.places[b]
                carried[b] = last.nodes[i].outputs[k]
            elif not _same(a, b, before, last, weight_of_layer):
                raise NotRepeatableError(f"{one.name} and {two.name} read different values")
    return carried


def _kind(node: ir.Node) -> tuple[object, ...]:
    attributes = sorted((a.name, str(a.value)) for a in node.attributes.values())
    return (node.domain, node.op_type, len(node.inputs), len(node.outputs), attributes)


def _same(
    a: ir.Value | None, b: ir.Value | None, before: _Layer, last: _Layer, weight_of_layer: WeightOfLayer
) -> bool:
    if a is b:
        return True
    if a is None or b is None:
        return False
    if a in before.places or b in last.places:
        return before.places.get(a) == last.places.get(b)
    one, two = a.const_value, b.const_value
    if isinstance(one, WeightTensor) and isinstance(two, WeightTensor):
        return weight_of_layer(one, last.number).identity == two.identity
    return b.is_graph_input() and b.name == _renamed(a, before.number, last.number)


def _renamed(value: ir.Value, old: int, new: int) -> str:
    return re.sub(rf"\.{old}\b", f".{new}", value.name or "", count=1)


@dataclass(frozen=True)
class _Rules:
    """How the copy of layer `old` with the number `new` differs from it."""

    new: int
    old: int
    scope: re.Pattern[str]
    carried: dict[ir.Value, ir.Value]
    weight_of_layer: WeightOfLayer

    def name(self, value: ir.Value) -> str:
        renamed = _renamed(value, self.old, self.new)
        return renamed if renamed != value.name else f"{value.name}.layer_{self.new}"

    def outside(self, graph: ir.Graph, value: ir.Value) -> ir.Value:
        """What the copy reads in place of a value that the layer does not make itself."""
        weight = value.const_value
        if isinstance(weight, WeightTensor):
            weight = self.weight_of_layer(weight, self.new)
            if weight is not value.const_value:
                value = ir.Value(
                    name=self.name(value), type=value.type, shape=value.shape, const_value=weight
                )
                graph.register_initializer(value)
        elif value.is_graph_input() and _renamed(value, self.old, self.new) != value.name:
            shape = value.shape.copy() if value.shape is not None else None
            value = ir.Value(name=self.name(value), type=value.type, shape=shape)
            graph.inputs.append(value)
        return value


def _copy(graph: ir.Graph, last: _Layer, end: _Layer, rules: _Rules) -> _Layer:
    """One more layer, behind `end`; `last` is what it is copied from."""
    new: dict[ir.Value | None, ir.Value | None] = {None: None}
    for source, value in rules.carried.items():
        i, k = last.places[value]
        new[source] = end.nodes[i].outputs[k]
    nodes = []
    for node in last.nodes:
        for taken in node.inputs:
            if taken is not None and taken not in new:
                new[taken] = rules.outside(graph, taken)
        copy = ir.Node(
            node.domain,
            node.op_type,
            [new[value] for value in node.inputs],
            node.attributes.values(),
            num_outputs=len(node.outputs),
            version=node.version,
            name=f"{node.name}.layer_{rules.new}",
        )
        for key, text in node.metadata_props.items():
            copy.metadata_props[key] = rules.scope.sub(rf"\1.{rules.new}", text)
        for old, out in zip(node.outputs, copy.outputs, strict=True):
            out.type, out.name = old.type, rules.name(old)
            out.shape = old.shape.copy() if old.shape is not None else None
            new[old] = out
            if old.is_graph_output():
                graph.outputs.append(out)
        nodes.append(copy)
    graph.insert_after(end.nodes[-1], nodes)
    return _Layer(rules.new, nodes)
