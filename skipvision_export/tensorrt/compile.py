"""One ONNX graph to one serialized engine, with an error that names the node."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from skipvision_export.errors import CompilerError
from skipvision_export.tensorrt.library import TensorRT
from skipvision_export.tensorrt.profiles import Shapes
from skipvision_export.tensorrt.recipe import BuilderSettings

Progress = Callable[[str], None]

# What a compiler says, and what to do about it.
_ADVICE = (
    ("Plugin not found", 'pass --plugin LIBRARY, or set kv_prune = "none" in the recipe'),
    ("dedicated kernel", "the compiler has no kernel for this attention; export with --dtype float16"),
    ("workspace", "raise workspace_mib in the recipe, or narrow its profiles"),
    ("memory", "set workspace_mib in the recipe, or narrow its profiles"),
    ("profile", "check the recipe's profiles"),
    ("Unsupported", "the operator is new to this compiler; use a newer one"),
)


@dataclass(frozen=True)
class Compiled:
    """A serialized engine and what the network looked like."""

    data: Any  # bytes-like
    layers: int
    plugin_layers: tuple[str, ...]
    inputs: list[tuple[str, str, list[int]]]
    outputs: list[tuple[str, str, list[int]]]


def compile_graph(
    tensorrt: TensorRT,
    model: onnx.ModelProto,
    origin: Path,
    profiles: list[Shapes],
    settings: BuilderSettings,
    *,
    timing_cache: Path | None = None,
    plugins_to_serialize: tuple[str, ...] = (),
    progress: Progress = lambda _: None,
) -> Compiled:
    """Parse and build `model`, whose external weights lie beside the file `origin`.

    Raises CompilerError with the node, the compiler's words and what to do.
    """
    trt = tensorrt.module
    log = _logger(trt)
    builder = trt.Builder(log)
    network = builder.create_network(_network_flags(trt))
    parser = trt.OnnxParser(network, log)
    if not parser.parse(model.SerializeToString(), str(origin.resolve())):
        raise CompilerError(_parse_error(parser, origin))
    config = builder.create_builder_config()
    _configure(trt, config, settings, plugins_to_serialize)
    for shapes in profiles:
        profile = builder.create_optimization_profile()
        for name, sizes in shapes.items():
            profile.set_shape(name, *sizes)
        if config.add_optimization_profile(profile) < 0:
            raise CompilerError(f"{origin.name}: TensorRT refuses a profile: {log.last_error()}")
    monitor = _monitor(trt, origin.stem, progress)
    config.progress_monitor = monitor
    cache = _read_timing_cache(config, timing_cache)
    data = builder.build_serialized_network(network, config)
    if data is None:
        raise CompilerError(_build_error(log.errors, model, origin))
    if cache is not None and timing_cache is not None:
        _write_timing_cache(config, timing_cache)
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    return Compiled(
        data,
        len(layers),
        tuple(layer.name for layer in layers if layer.type == trt.LayerType.PLUGIN_V3),
        [_tensor(network.get_input(i)) for i in range(network.num_inputs)],
        [_tensor(network.get_output(i)) for i in range(network.num_outputs)],
    )


def _network_flags(trt: Any) -> int:
    """Types come from the ONNX model. TensorRT 11 knows nothing else, and has no need of the flag."""
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def _tensor(tensor: Any) -> tuple[str, str, list[int]]:
    return tensor.name, str(tensor.dtype).rsplit(".", 1)[-1].lower(), list(tensor.shape)


def _configure(trt: Any, config: Any, settings: BuilderSettings, plugins: tuple[str, ...]) -> None:
    config.builder_optimization_level = settings.optimization_level
    if settings.workspace_mib is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, settings.workspace_mib << 20)
    if not settings.tf32:
        config.clear_flag(trt.BuilderFlag.TF32)
    if settings.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if settings.hardware_compatibility != "none":
        level = getattr(trt.HardwareCompatibilityLevel, settings.hardware_compatibility.upper())
        config.hardware_compatibility_level = level
    if plugins:
        config.plugins_to_serialize = list(plugins)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED


def _read_timing_cache(config: Any, file: Path | None) -> Any:
    if file is None:
        return None
    cache = config.create_timing_cache(file.read_bytes() if file.is_file() else b"")
    return cache if cache is not None and config.set_timing_cache(cache, False) else None


def _write_timing_cache(config: Any, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    # Whole or not at all: two builds may end at once.
    scratch = file.with_name(f"{file.name}.{os.getpid()}")
    scratch.write_bytes(bytes(config.get_timing_cache().serialize()))
    os.replace(scratch, file)


def _logger(trt: Any) -> Any:
    class Log(trt.ILogger):  # type: ignore[misc]
        """Keeps what went wrong."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(message)

        def last_error(self) -> str:
            return self.errors[-1] if self.errors else "no reason given"

    return Log()


def _monitor(trt: Any, name: str, progress: Progress) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        """Tells the outermost phase."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.steps[phase_name] = num_steps

        def step_complete(self, phase_name: str, step: int) -> bool:
            progress(f"building {name}: {phase_name} {step + 1}/{self.steps.get(phase_name, 0)}")
            return True

        def phase_finish(self, phase_name: str) -> None:
            pass

    return Monitor()


def _parse_error(parser: Any, origin: Path) -> str:
    error = parser.get_error(0)
    name = error.node_name() or f"number {error.node()}"
    return _explained(f"node {name} ({error.node_operator()})", error.desc(), origin)


def _build_error(errors: list[str], model: onnx.ModelProto, origin: Path) -> str:
    """A compiler names its own layers, which begin like the nodes they came from, or only a kind."""
    text = " ".join(errors) or "no reason given"
    words = set(re.findall(r"[A-Za-z]\w*", text))
    named = [node for node in model.graph.node if node.name and node.name in words]
    kinds = [node for node in model.graph.node if node.op_type in words]
    if named:
        where = f"node {named[0].name} ({named[0].op_type})"
    elif kinds:
        same = [node.name for node in kinds if node.op_type == kinds[0].op_type]
        where = f"node {same[0]} ({kinds[0].op_type}), or another of its {len(same)}"
    else:
        where = "a node that the compiler does not name"
    return _explained(where, errors[0] if errors else text, origin)


def _explained(where: str, reason: str, origin: Path) -> str:
    advice = next((what for sign, what in _ADVICE if sign.lower() in reason.lower()), None)
    reason = " ".join(reason.split())
    short = reason if len(reason) <= 300 else reason[:300] + " ..."
    return f"{origin.name}: {where}: {short}; {advice or 'try another precision or a newer compiler'}"
