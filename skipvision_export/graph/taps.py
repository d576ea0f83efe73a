"""Values of a graph that a module of the model has too: where two implementations can be compared.

Found by the module paths that tracing leaves on nodes, which passes keep; in another exporter's decoder,
which has none, by structure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from skipvision_export.errors import PassError
from skipvision_export.graph.passes.names import CONTRIB_DOMAIN
from skipvision_export.graph.passes.regions import is_constant, module_path
from skipvision_export.graph.passes.skip_ffn import find_ffns

GIVEN = ".given"  # behind the name of a value that a cut graph is given
_FLOATS = (None, ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
# Fused norms whose fourth output is the residual sum that they normalize.
_SUMMED = ("SkipSimplifiedLayerNormalization", "SkipLayerNormalization")


@dataclass(frozen=True)
class Tap:
    """A value of a graph and what it is called in comparisons, such as `layers.3.attention`."""

    name: str
    value: ir.Value


def module_taps(graph: ir.Graph, entered: Iterable[tuple[str, str]]) -> list[Tap]:
    """(name, module path) -> the value that the module's first operator reads, in the given order.

    Fused residual sums count as what their norm reads. Raises PassError where a module is not in the graph.
    """
    by_path: dict[str, list[ir.Node]] = {}
    for node in graph:
        by_path.setdefault(module_path(node), []).append(node)
    taps = []
    for name, path in entered:
        value = _entering(by_path.get(path, []))
        if value is None:
            raise PassError(f"no node of the graph stands in module {path}; its layers cannot be compared")
        taps.append(Tap(name, value))
    return taps


def _entering(nodes: Sequence[ir.Node]) -> ir.Value | None:
    own = {value for node in nodes for value in node.outputs}
    for node in nodes:
        if node.domain == CONTRIB_DOMAIN and node.op_type in _SUMMED and len(node.outputs) > 3:
            return node.outputs[3]
        for value in node.inputs:
            if value is not None and value not in own and not is_constant(value) and value.dtype in _FLOATS:
                return value
    return None


def leaving(graph: ir.Graph, path: str) -> ir.Value:
    """What a layer of module path `path` gives on: the output of its own last operator.

    Raises PassError where the layer is not in the graph.
    """
    own = [node for node in graph if module_path(node) == path]
    if not own:
        raise PassError(f"no node of the graph stands in module {path}; its layers cannot be compared")
    return own[-1].outputs[0]


def structure_taps(graph: ir.Graph) -> list[Tap]:
    """The residual stream behind each attention and each FFN of a decoder that no module paths tell of.

    Raises PassError for a graph in which no FFN is found.
    """
    ffns = find_ffns(graph)
    if not ffns:
        raise PassError("no FFN was found in the graph; its layers cannot be compared")
    return [
        tap
        for i, ffn in enumerate(ffns)
        for tap in (
            Tap(f"layers.{i}.attention", ffn.trunk),
            Tap(f"layers.{i}.ffn", ffn.add.outputs[0]),
        )
    ]


def show(model: ir.Model, values: Iterable[ir.Value]) -> None:
    """Make values outputs of the graph, next to those it has; runtimes infer their types."""
    outputs = set(model.graph.outputs)
    for value in values:
        if value not in outputs and not value.is_graph_input():
            value.type = value.shape = None
            model.graph.outputs.append(value)
            outputs.add(value)


def cut(model: ir.Model, taps: Iterable[Tap]) -> None:
    """Let everything that reads a tap read a new input `NAME.given` instead; taps become outputs.

    So an error stays where it begins: each part of the graph starts from given values. They are of the type
    of the graph's float inputs.
    """
    dtypes = [value.dtype for value in model.graph.inputs if value.dtype in _FLOATS[1:]]
    dtype = dtypes[0] if dtypes and dtypes[0] else ir.DataType.FLOAT
    taps = [tap for tap in taps if not tap.value.is_graph_input()]
    show(model, (tap.value for tap in taps))
    for tap in taps:
        given = ir.Value(name=f"{tap.value.name}{GIVEN}", type=ir.TensorType(dtype))
        for use in tuple(tap.value.uses()):
            use.node.replace_input_with(use.idx, given)
        model.graph.inputs.append(given)


def values_of(graph: ir.Graph, wanted: Callable[[ir.Node], bool]) -> list[ir.Value]:
    """The outputs of some nodes that may hold floats, in graph order."""
    return [
        value
        for node in graph
        if wanted(node)
        for value in node.outputs
        if value.name and value.dtype in _FLOATS
    ]
