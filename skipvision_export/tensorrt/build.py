"""From a bundle and a recipe to a folder of engines."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import onnx
import onnx_ir as ir

from skipvision_export.bundle import MANIFEST, Manifest, atomic_folder, check_output, sha256_of
from skipvision_export.errors import CompilerError, ConfigError
from skipvision_export.graph.module_paths import ModulePaths
from skipvision_export.models.loading import resolve_model
from skipvision_export.tensorrt import plugin
from skipvision_export.tensorrt.compile import Compiled, compile_graph
from skipvision_export.tensorrt.driver import require_gpu
from skipvision_export.tensorrt.library import NAMES, Compiler, TensorRT, find
from skipvision_export.tensorrt.lowering import lower
from skipvision_export.tensorrt.manifest import (
    ENGINES,
    BundleRef,
    EngineInfo,
    EnginesManifest,
    EngineTensor,
)
from skipvision_export.tensorrt.profiles import Shapes, Sizes, shapes, sizes
from skipvision_export.tensorrt.recipe import Recipe
from skipvision_export.tensorrt.rtx import cache_folder

Progress = Callable[[str], None]
# What plugins/kv_prune builds.
LIBRARY = "libskipvision_kv_prune.so"
_TYPES = {
    "float32": onnx.TensorProto.FLOAT,
    "float16": onnx.TensorProto.FLOAT16,
    "bfloat16": onnx.TensorProto.BFLOAT16,
}
KVPruneForm = Literal["library", "declared", "function"]


@dataclass(frozen=True)
class BuildPlan:
    """All that is decided before a compiler runs. paths: where engines also give what each layer computes."""

    folder: Path
    manifest: Manifest
    recipe: Recipe
    sizes: list[Sizes]
    form: KVPruneForm
    library: Path | None
    paths: ModulePaths | None = None

    def profiles(self, graph: str) -> list[Shapes]:
        """The shapes of a graph's inputs in each profile."""
        info, layout = self.manifest.graphs[graph], self.manifest.layout
        return [shapes(graph, info, each, layout) for each in self.sizes]


def plan(
    bundle: Path,
    recipe: Recipe,
    library: Path | None = None,
    elsewhere: bool = False,
    taps: bool = False,
) -> BuildPlan:
    """Check a recipe against a bundle.

    elsewhere: another machine compiles, and has the plugin library; taps: see `build`. Raises BundleError,
    ConfigError for a precision or profile that does not fit, and CompilerError for a plugin library that is
    missing.
    """
    manifest = Manifest.load(bundle)
    if manifest.dtype not in recipe.precision:
        raise ConfigError(
            f"{bundle} is {manifest.dtype}, recipe {recipe.name} builds {', '.join(recipe.precision)}; "
            f"export again with --dtype {recipe.precision[0]}"
        )
    if manifest.weights is not None:
        raise ConfigError(
            f"{bundle} has {manifest.weights} weights as ONNX Runtime's MatMulNBits, which TensorRT does not "
            "know; export again without --weights"
        )
    if manifest.model.merge_size is not None:
        raise ConfigError(
            f"{bundle} takes pictures of any shape and positions of three axes ({manifest.source.family}), "
            "which engines and their runtimes do not know; run it with ONNX Runtime"
        )
    source = resolve_model(bundle)
    family, positions = source.family, manifest.model.max_positions
    crops = family.most_visual_tokens(source.config) // family.visual_tokens(source.config)
    if family.cropped and not all(profile.images for profile in recipe.profiles):
        raise ConfigError(
            f"a picture may be several crops to {family.name}, recipe {recipe.name} does not say how many: "
            "give each profile images = [least, usual, most], the crops of all pictures in a run"
        )
    found = [sizes(profile, manifest, positions, crops) for profile in recipe.profiles]
    if elsewhere and library is None and recipe.plugin.kv_prune == "library":
        library = Path(LIBRARY)
    form, paths = _form(recipe, library, elsewhere), ModulePaths.of_source(source) if taps else None
    return BuildPlan(bundle, manifest, recipe, found, form, library, paths)


def _form(recipe: Recipe, library: Path | None, elsewhere: bool) -> KVPruneForm:
    wanted = recipe.plugin.kv_prune
    if library is not None:
        if wanted in ("none", "declared"):
            raise ConfigError(f'recipe {recipe.name} says kv_prune = "{wanted}"; leave out --plugin')
        if not elsewhere:
            plugin.require_library(library)
        return "library"
    if wanted == "library":
        raise CompilerError(
            f"recipe {recipe.name} wants the KVPrune plugin; build it from plugins/kv_prune and pass "
            f'--plugin {LIBRARY}, or set kv_prune = "none"'
        )
    return "declared" if wanted == "declared" else "function"


def build(
    bundle: str | Path,
    recipe: Recipe,
    out: str | Path,
    *,
    library: Path | None = None,
    taps: bool = False,
    force: bool = False,
    progress: Progress = lambda _: None,
) -> EnginesManifest:
    """Build an engine of every graph of a bundle; atomic: a failing build leaves nothing behind.

    library: the KVPrune plugin. taps: engines also give the residual stream behind each attention and FFN and
    the vision tower's layers, by the names of `skipvision validate`; for comparisons, it keeps a compiler
    from fusing over them. Raises BundleError, ConfigError, OutputError, and CompilerError, which
    names the ONNX node that a compiler refuses.
    """
    bundle, out = Path(bundle), Path(out)
    check_output(out, force)
    planned = plan(bundle, recipe, library, taps=taps)
    planned.manifest.verify(bundle)
    tensorrt = find(recipe.builder.product, recipe.builder.version)
    if recipe.builder.version_compatible and tensorrt.compiler.product != "tensorrt":
        raise ConfigError(
            f"recipe {recipe.name}: builder.version_compatible: {tensorrt.compiler} has no such engines; "
            "leave it out"
        )
    if tensorrt.compiler.product == "tensorrt":
        require_gpu()  # it times kernels on the device; without one its builder is a null pointer
    _prepare_plugin(tensorrt, planned)
    engines: dict[str, EngineInfo] = {}
    with atomic_folder(out, force) as folder:
        for graph in planned.manifest.graphs:
            progress(f"building {graph}")
            engines[graph] = _build_graph(tensorrt, planned, graph, folder, progress)
        made = EnginesManifest(
            bundle=BundleRef(
                name=bundle.resolve().name,
                sha256=sha256_of(bundle / MANIFEST),
                preset=planned.manifest.preset,
                dtype=planned.manifest.dtype,
            ),
            route=tensorrt.route,
            platform=f"{platform.system()} {platform.machine()}".lower(),
            kv_prune=planned.form,
            recipe=recipe.model_dump(mode="json"),
            engines=engines,
        )
        made = made.write(folder / ENGINES)
    return made


def lowered_graph(planned: BuildPlan, graph: str, compiler: Compiler) -> tuple[onnx.ModelProto, Path]:
    """A graph as `compiler` takes it, and the file that its external weights lie beside."""
    model, origin = shown_graph(planned, graph)
    return lower(model, compiler, plugin=planned.form != "function"), origin


def shown_graph(planned: BuildPlan, graph: str) -> tuple[onnx.ModelProto, Path]:
    """A graph as the bundle has it, its taps among its outputs where they are wanted, and its file."""
    origin = planned.folder / planned.manifest.graphs[graph].file
    model = onnx.load(str(origin), load_external_data=False)
    if planned.paths is not None:
        kind = _TYPES[planned.manifest.dtype]
        for tap in planned.paths.taps(graph, ir.load(origin).graph):
            if tap.value.name != tap.name:
                node = onnx.helper.make_node(
                    "Identity", [str(tap.value.name)], [tap.name], f"taps.{tap.name}"
                )
                model.graph.node.append(node)
            model.graph.output.append(onnx.helper.make_tensor_value_info(tap.name, kind, None))
    return model, origin


def _prepare_plugin(tensorrt: TensorRT, planned: BuildPlan) -> None:
    if planned.form == "library":
        assert planned.library is not None
        plugin.load_library(tensorrt.module, planned.library)
    elif planned.form == "declared":
        plugin.declare(tensorrt.module)


def _build_graph(
    tensorrt: TensorRT, planned: BuildPlan, graph: str, folder: Path, progress: Progress
) -> EngineInfo:
    lowered, origin = lowered_graph(planned, graph, tensorrt.compiler)
    nodes = sum(node.op_type == plugin.NAME for node in lowered.graph.node)
    settings = planned.recipe.builder
    profiles = planned.profiles(graph)
    start = time.perf_counter()
    compiled = compile_graph(
        tensorrt,
        lowered,
        origin,
        profiles,
        settings,
        timing_cache=_timing_cache(tensorrt) if settings.timing_cache else None,
        plugins_to_serialize=_to_serialize(planned) if nodes else (),
        progress=progress,
    )
    seconds = time.perf_counter() - start
    expected = nodes if planned.form != "function" else 0
    if len(compiled.plugin_layers) != expected:
        raise CompilerError(
            f"{origin.name}: {len(compiled.plugin_layers)} plugin layers were built of {expected} KVPrune "
            'nodes; a compiler that inlines them needs no plugin: set kv_prune = "none" in the recipe'
        )
    return _write(compiled, tensorrt, folder / f"{graph}.engine", profiles, seconds)


def _write(
    compiled: Compiled, tensorrt: TensorRT, file: Path, profiles: list[Shapes], seconds: float
) -> EngineInfo:
    file.write_bytes(memoryview(compiled.data))

    def tensors(found: list[tuple[str, str, list[int]]]) -> list[EngineTensor]:
        return [EngineTensor(name=name, dtype=dtype, shape=shape) for name, dtype, shape in found]

    return EngineInfo(
        file=file.name,
        bytes=file.stat().st_size,
        sha256=sha256_of(file),
        seconds=round(seconds, 3),
        builder=NAMES[tensorrt.compiler.product],
        builder_version=".".join(map(str, tensorrt.compiler.version)),
        layers=compiled.layers,
        plugin_layers=len(compiled.plugin_layers),
        inputs=tensors(compiled.inputs),
        outputs=tensors(compiled.outputs),
        profiles=[{name: [list(s) for s in found] for name, found in p.items()} for p in profiles],
    )


def _timing_cache(tensorrt: TensorRT) -> Path | None:
    """One file for each version; TensorRT-RTX compiles ahead of time and times nothing."""
    if tensorrt.compiler.product != "tensorrt":
        return None
    return cache_folder() / f"timing-{'.'.join(map(str, tensorrt.compiler.version))}.cache"


def _to_serialize(planned: BuildPlan) -> tuple[str, ...]:
    if not planned.recipe.plugin.serialize or planned.library is None:
        return ()
    return (str(planned.library.resolve()),)
