"""Lowered ONNX files and a script of trtexec commands, for a device that builds without Python."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path

import onnx

from skipvision_export.bundle import atomic_folder
from skipvision_export.errors import ConfigError
from skipvision_export.graph.passes.names import PREFILL
from skipvision_export.tensorrt.build import BuildPlan, lowered_graph
from skipvision_export.tensorrt.commands import Tool, trtexec
from skipvision_export.tensorrt.library import MINIMUM, Compiler, parse_version

SCRIPT = "build_engines.sh"


def target_compiler(planned: BuildPlan) -> Compiler:
    """The compiler that a recipe names; raises ConfigError where it names none."""
    builder = planned.recipe.builder
    if builder.product is None:
        raise ConfigError(f"recipe {planned.recipe.name} names no builder.product to write ONNX files for")
    version = parse_version(builder.version) if builder.version else MINIMUM[builder.product]
    return Compiler(builder.product, version)


def write_onnx(planned: BuildPlan, out: Path, force: bool = False) -> dict[str, str]:
    """Write OUT/*.onnx with their weights, and OUT/build_engines.sh; atomic.

    Returns the trtexec command of each graph. Raises BundleError, ConfigError and OutputError.
    """
    compiler = target_compiler(planned)
    planned.manifest.verify(planned.folder)
    commands: dict[str, str] = {}
    with atomic_folder(out, force) as folder:
        for graph in planned.manifest.graphs:
            lowered, origin = lowered_graph(planned, graph, compiler)
            onnx.save(lowered, str(folder / f"{graph}.onnx"))
            for weights in _external_files(lowered):
                if not (folder / weights).exists():
                    shutil.copyfile(origin.parent / weights, folder / weights)
            commands[graph] = command_line(planned, graph)
        script = folder / SCRIPT
        lines = ["#!/bin/sh", f"# {planned.recipe.name}: built with {compiler} or newer", "set -eu"]
        lines += ['cd "$(dirname "$0")"', *commands.values()]
        script.write_text("\n".join(lines) + "\n", encoding="utf-8")
        script.chmod(0o755)
    return commands


def command_line(planned: BuildPlan, graph: str, tool: Tool = trtexec) -> str:
    """The command of one graph, quoted for a shell; only prefill has plugin layers."""
    library = planned.library if graph == PREFILL else None
    return shlex.join(
        tool(f"{graph}.onnx", f"{graph}.engine", planned.profiles(graph), planned.recipe, library)
    )


def _external_files(model: onnx.ModelProto) -> set[str]:
    return {
        entry.value
        for tensor in model.graph.initializer
        for entry in tensor.external_data
        if entry.key == "location"
    }
