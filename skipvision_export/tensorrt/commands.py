"""The same builds with NVIDIA's own tools: trtexec and polygraphy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from skipvision_export.tensorrt.profiles import Shapes
from skipvision_export.tensorrt.recipe import Recipe

Tool = Callable[[str, str, list[Shapes], Recipe, Path | None], list[str]]

_TRTEXEC_LEVELS = {"ampere_plus": "ampere+", "same_compute_capability": "sameComputeCapability"}


def trtexec(
    onnx: str, engine: str, profiles: list[Shapes], recipe: Recipe, library: Path | None = None
) -> list[str]:
    """Arguments of trtexec; types are those of the ONNX file, so no precision is named."""
    command = ["trtexec", f"--onnx={onnx}", f"--saveEngine={engine}", "--skipInference", "--stronglyTyped"]
    for i, shapes in enumerate(profiles):
        if len(profiles) > 1:
            command.append(f"--profile={i}")
        for kind, which in (("min", 0), ("opt", 1), ("max", 2)):
            sizes = ",".join(f"{name}:{'x'.join(map(str, s[which]))}" for name, s in shapes.items())
            command.append(f"--{kind}Shapes={sizes}")
    builder = recipe.builder
    command.append(f"--builderOptimizationLevel={builder.optimization_level}")
    if builder.workspace_mib is not None:
        command.append(f"--memPoolSize=workspace:{builder.workspace_mib}")
    if not builder.tf32:
        command.append("--noTF32")
    if builder.version_compatible:
        command.append("--versionCompatible")
    if builder.hardware_compatibility != "none":
        command.append(f"--hardwareCompatibilityLevel={_TRTEXEC_LEVELS[builder.hardware_compatibility]}")
    if library is not None:
        command.append(f"--dynamicPlugins={library}")
        if recipe.plugin.serialize:
            command.append(f"--setPluginsToSerialize={library}")
    return command


def polygraphy(
    onnx: str, engine: str, profiles: list[Shapes], recipe: Recipe, library: Path | None = None
) -> list[str]:
    """Arguments of `polygraphy convert`.

    With a plugin the model is a script that loads it and then the ONNX file: polygraphy's own --plugins
    opens a library without registering what TensorRT would find in it.
    """
    command = ["polygraphy", "convert", onnx]
    if library is not None:
        script = "polygraphy_network.py"
        command = ["env", f"ONNX={onnx}", f"KV_PRUNE={library}", "polygraphy", "convert", script]
    command += ["--convert-to", "trt", "-o", engine, "--strongly-typed"]
    for shapes in profiles:
        for kind, which in (("min", 0), ("opt", 1), ("max", 2)):
            sizes = [f"{name}:[{','.join(map(str, s[which]))}]" for name, s in shapes.items()]
            command += [f"--trt-{kind}-shapes", *sizes]
    builder = recipe.builder
    command += ["--builder-optimization-level", str(builder.optimization_level)]
    if builder.workspace_mib is not None:
        command += ["--pool-limit", f"workspace:{builder.workspace_mib}M"]
    if builder.tf32:
        command.append("--tf32")
    if builder.version_compatible:
        command.append("--version-compatible")
    if builder.hardware_compatibility != "none":
        command += ["--hardware-compatibility-level", builder.hardware_compatibility]
    return command
