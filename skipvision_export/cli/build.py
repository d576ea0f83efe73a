"""The command that builds engines."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from skipvision_export.cli.common import (
    BundleArgument,
    ForceOption,
    JsonOption,
    PluginOption,
    Progress,
    finish,
    si,
)


def build(
    bundle: BundleArgument,
    recipe: Annotated[
        Path, typer.Option(metavar="FILE", help="A target's recipe, such as engines/recipes/rtx.toml.")
    ],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="ENGINES", help="Folder to write.")],
    plugin: PluginOption = None,
    onnx_only: Annotated[
        bool,
        typer.Option("--onnx-only", help="Write ONNX for the target and a script of trtexec commands."),
    ] = False,
    taps: Annotated[
        bool,
        typer.Option("--taps", help="Also give what each layer computes, for validate --engines; slower."),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show profiles and commands; write nothing.")
    ] = False,
    force: ForceOption = False,
    json: JsonOption = None,
) -> None:
    """Build a TensorRT engine of every graph of BUNDLE, as a recipe says for its target.

    Example: skipvision build bundle --recipe engines/recipes/rtx.toml -o engines_rtx

    TensorRT-RTX builds ahead of time, without a GPU; TensorRT builds on the device that will run the
    engine, or there with --onnx-only's files. Types are those of the bundle (export --dtype).
    """
    from skipvision_export.bundle import check_output
    from skipvision_export.tensorrt.build import build as run_build
    from skipvision_export.tensorrt.build import plan
    from skipvision_export.tensorrt.recipe import Recipe

    chosen = Recipe.load(recipe)
    if dry_run or onnx_only:
        from skipvision_export.tensorrt import handover

        check_output(output, force)
        planned = plan(bundle, chosen, plugin, elsewhere=True, taps=taps)
        if onnx_only and not dry_run:
            commands = handover.write_onnx(planned, output, force)
            print(f"{output / handover.SCRIPT}: run it on the device")
        else:
            commands = {graph: handover.command_line(planned, graph) for graph in planned.manifest.graphs}
            print("\n".join(commands.values()))
        profiles = {graph: planned.profiles(graph) for graph in planned.manifest.graphs}
        finish({"engines": {}, "commands": commands, "profiles": profiles}, json)
        return
    progress = Progress()
    made = run_build(bundle, chosen, output, library=plugin, taps=taps, force=force, progress=progress)
    progress("")
    for name, engine in made.engines.items():
        print(_line(name, engine))
    finish(made.model_dump(mode="json"), json)


def _line(name: str, engine: Any) -> str:
    layers = f", {engine.plugin_layers} KVPrune layers" if engine.plugin_layers else ""
    return (
        f"{name:<16} {si(engine.bytes, 'B'):>8}  {engine.seconds:6.1f} s  "
        f"{engine.builder} {engine.builder_version}{layers}"
    )
