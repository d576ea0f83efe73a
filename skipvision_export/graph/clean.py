"""Making an exported graph fit to ship: no local paths, no symbols of the tracer."""

from __future__ import annotations

import re

import onnx_ir as ir
import onnx_ir.passes.common as common

from skipvision_export.graph.passes.names import DECODE, EMBED, GRID, VISION, WINDOWS

_TRACER = re.compile(r"\b[su]\d+\b")

_NAMED: dict[str, dict[str, list[str | None]]] = {
    VISION: {"pixel_values": ["num_images", None, None, None]},
    EMBED: {
        "input_ids": ["batch", "sequence"],
        "image_features": ["num_images", "visual_tokens", None],
        "inputs_embeds": ["batch", "sequence", None],
    },
    DECODE: {
        "inputs_embeds": ["batch", "sequence", None],
        "attention_mask": ["batch", "total_sequence"],
        "position_ids": ["batch", "sequence"],
    },
}


def clean(model: ir.Model) -> None:
    """Strip the tracer's metadata and fold what is unused or equal.

    `stack_trace` holds absolute local paths; `name_scopes` stay: errors name layers by them.
    """
    for node in model.graph.all_nodes():
        scope = node.metadata_props.get("pkg.torch.onnx.name_scopes")
        node.metadata_props.clear()
        node.meta.clear()
        node.doc_string = None
        if scope is not None:
            node.metadata_props["name_scopes"] = scope
    for value in _all_values(model):
        value.metadata_props.clear()
        value.meta.clear()
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.graph.doc_string = None
    model.doc_string = None
    model.functions.clear()
    for each in (
        common.CommonSubexpressionEliminationPass(),
        common.IdentityEliminationPass(),
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedOpsetsPass(),
    ):
        each(model)


def clear_inferred_types(model: ir.Model) -> None:
    """Drop shapes of everything inside the graph: stale ones make ONNX Runtime fail."""
    boundary = {id(v) for v in (*model.graph.inputs, *model.graph.outputs)}
    boundary |= {id(v) for v in model.graph.initializers.values()}
    for node in model.graph.all_nodes():
        for value in node.outputs:
            if id(value) not in boundary:
                value.shape = None


def unique_node_names(model: ir.Model) -> None:
    """Name every node by position and kind: the checker does not see doubles, ONNX Runtime does."""
    for i, node in enumerate(model.graph):
        node.name = f"{node.op_type}_{i}"


def name_dims(model: ir.Model, graph: str) -> None:
    """Give the dynamic dimensions of inputs and outputs names that users know, equal ones tied."""
    renamed: dict[str, str] = {}
    named = _NAMED[graph]
    axis_names: list[str | None]
    for value in model.graph.inputs:
        assert value.name is not None and value.shape is not None
        names = named.get(value.name)
        if value.name == "pixel_values" and len(value.shape) == 5:
            names = ["num_images", "num_crops", None, None, None]
        if value.name == "pixel_values" and len(value.shape) == 2:
            names = ["num_patches", None]
        if value.name == WINDOWS:
            names = ["num_windows", None]
        if value.name == "position_ids" and len(value.shape) == 3:
            names = [None, "batch", "sequence"]
        if names is None and value.name.startswith("past_key_values."):
            names = ["batch", None, "past_sequence", None]
        for axis, name in enumerate(names or []):
            if name is not None:
                renamed.setdefault(str(value.shape[axis]), name)
                value.shape[axis] = ir.SymbolicDim(name)
    for value in model.graph.outputs:
        assert value.name is not None and value.shape is not None
        if value.name.startswith("present."):
            axis_names = ["batch", None, "total_sequence", None]
        elif value.name == "logits":
            axis_names = ["batch", None, None]
        elif value.name == "image_features":
            # Of a picture of any shape: its own number of tokens.
            patches = any(v.name == GRID for v in model.graph.inputs)
            axis_names = [None, "visual_tokens", None] if patches else ["num_images", None, None]
        else:
            axis_names = ["batch", "sequence", None]
        for axis, name in enumerate(axis_names):
            if name is not None:
                value.shape[axis] = ir.SymbolicDim(name)
    # Inside the graph shapes only serve the passes; what has no name there loses it.
    for value in _all_values(model):
        if value.shape is not None:
            for axis, size in enumerate(value.shape):
                if not isinstance(size, int):
                    value.shape[axis] = ir.SymbolicDim(renamed.get(str(size), _own_name(size)))
    left = tracer_symbols(model)
    if left:
        raise RuntimeError(f"{graph}: dimensions without a name remain: {', '.join(sorted(left))}")


def _own_name(size: ir.SymbolicDim) -> str | None:
    name = str(size)
    return None if _TRACER.search(name) else name


def tracer_symbols(model: ir.Model) -> set[str]:
    """Dimension names such as s17 or u0, or formulas of them, anywhere in the graph."""
    found = set()
    for value in _all_values(model):
        for size in value.shape or []:
            if not isinstance(size, int) and _TRACER.search(str(size)):
                found.add(str(size))
    return found


def _all_values(model: ir.Model) -> list[ir.Value]:
    values = [*model.graph.inputs, *model.graph.initializers.values()]
    for node in model.graph.all_nodes():
        values.extend(node.outputs)
    return values
