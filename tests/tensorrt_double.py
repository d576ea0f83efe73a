"""Stand-ins for TensorRT's and CUDA's libraries, and folders of "engines" that they run.

They prove the host's logic of the C++ runtime's TensorRT backend: profiles, buffers, positions, graphs,
threads. They prove nothing about TensorRT, whose headers are all that is real here.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
from cpp_build import SOURCE, call, include_folder, request_lines

from skipvision_export.bundle import MANIFEST, Manifest, seal, sha256_of
from skipvision_export.tensorrt.build import plan
from skipvision_export.tensorrt.manifest import ENGINES, BundleRef, EngineInfo, EnginesManifest, EngineTensor
from skipvision_export.tensorrt.recipe import Recipe

# The classes that the stand-in implements, and the namespace of each.
_CLASSES = (
    ("VRuntime", "apiv"),
    ("VCudaEngine", "apiv"),
    ("VExecutionContext", "apiv"),
    ("IPluginRegistry", ""),
)
_TYPES = {"float": "float", "float16": "half", "int64": "int64"}


def tensorrt_headers() -> Path:
    """The folder of NvInfer.h that TensorRT_ROOT names; skips the test without one."""
    root = os.environ.get("TensorRT_ROOT")  # noqa: SIM112 (CMake's spelling)
    if not root:
        pytest.skip("set TensorRT_ROOT to a folder with include/NvInfer.h of TensorRT 10.3 or later")
    folder = Path(root) / "include"
    if not (folder / "NvInfer.h").is_file():
        pytest.skip(f"TensorRT_ROOT: {folder} holds no NvInfer.h")
    return folder


def cuda_headers() -> Path:
    """The folder of cuda_runtime_api.h; skips the test without one."""
    for root in (os.environ.get("CUDA_PATH"), "/usr/local/cuda"):
        if root and (Path(root) / "include" / "cuda_runtime_api.h").is_file():
            return Path(root) / "include"
    pytest.skip("set CUDA_PATH to a folder with include/cuda_runtime_api.h")


def version(headers: Path) -> str:
    """The version of TensorRT's headers, such as 11.1.0."""
    text = (headers / "NvInferVersion.h").read_text()
    values = dict(re.findall(r"#define (\w+) (\w+)", text))
    parts = []
    for part in ("MAJOR", "MINOR", "PATCH"):
        value = values[f"NV_TENSORRT_{part}"]
        parts.append(values.get(value, value))
    return ".".join(parts)


def write_stubs(headers: Path, file: Path) -> None:
    """A class NAMEStub for each of _CLASSES, whose functions are all unexpected calls."""
    text = "\n".join(
        re.sub(r"//[^\n]*", "", (headers / name).read_text())
        for name in ("NvInferImpl.h", "NvInferRuntimeCommon.h")
    )
    out = []
    for name, space in _CLASSES:
        body = re.search(rf"^class {name}\b[^;{{]*\{{(.*?)^\}};", text, re.DOTALL | re.MULTILINE)
        assert body, name
        out.append(f"namespace nvinfer1::{space} {{" if space else "namespace nvinfer1 {")
        out.append(f"struct {name}Stub : {name} {{")
        for result, function, rest in re.findall(
            r"\bvirtual\s+([^;{}()~]*?)(\w+)(\([^;{}]*?)\s*=\s*0;", body.group(1)
        ):
            out.append(f'  {result}{function}{rest} override {{ unexpected("{function}"); }}')
        out += ["};", "}"]
    file.write_text("\n".join(out) + "\n")


def build_double(folder: Path, headers: Path, onnxruntime: Path, *flags: str) -> tuple[Path, Path]:
    """The stand-ins (libnvinfer.so, libcudart.so), with `flags` of the compiler."""
    folder.mkdir(parents=True)
    write_stubs(headers, folder / "stubs.h")
    double = SOURCE / "tests" / "double"
    common = ["c++", "-std=c++17", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", *flags]
    common += ["-isystem", cuda_headers()]
    call(*common, double / "cudart.cpp", "-o", folder / "libcudart.so")
    includes = ["-I", folder, "-isystem", headers, "-isystem", include_folder()]
    libraries = [folder / "libcudart.so", onnxruntime, f"-Wl,-rpath,{folder}:{onnxruntime.parent}", "-ldl"]
    # Names of arguments that no stub uses, and a test's own copy of deprecated functions.
    quiet = ["-Wno-unused-parameter", "-Wno-deprecated-declarations", "-Wno-overloaded-virtual"]
    call(*common, *quiet, *includes, double / "nvinfer.cpp", *libraries, "-o", folder / "libnvinfer.so")
    return folder / "libnvinfer.so", folder / "libcudart.so"


def write_engines(bundle: Path, out: Path, built_with: str, recipe: str = "", plugin: bool = False) -> Path:
    """What `skipvision build` writes, with the stand-in's files in the place of engines.

    recipe: TOML; plugin: as if prefill had KVPrune layers.
    """
    manifest = Manifest.load(bundle)
    recipe_file = out.with_suffix(".toml")
    recipe_file.write_text(recipe)
    planned = plan(bundle, Recipe.load(recipe_file))
    out.mkdir()
    engines = {}
    for graph, info in manifest.graphs.items():
        profiles = [
            {name: [list(s) for s in found] for name, found in p.items()} for p in planned.profiles(graph)
        ]
        layers = 3 if plugin and graph == "decoder_prefill" else 0
        data: dict[str, Any] = {"onnx": str(bundle / info.file), "profiles": profiles, "plugin": layers > 0}
        file = out / f"{graph}.engine"
        file.write_text(json.dumps(data))
        engines[graph] = EngineInfo(
            file=file.name,
            bytes=file.stat().st_size,
            sha256=sha256_of(file),
            seconds=0.0,
            builder="TensorRT",
            builder_version=built_with,
            layers=1,
            plugin_layers=layers,
            inputs=_tensors(info.inputs),
            outputs=_tensors(info.outputs),
            profiles=profiles,
        )
    made = EnginesManifest(
        bundle=BundleRef(
            name=bundle.name,
            sha256=sha256_of(bundle / MANIFEST),
            preset=manifest.preset,
            dtype=manifest.dtype,
        ),
        route="tensorrt",
        platform="double",
        kv_prune="library" if plugin else "function",
        recipe=planned.recipe.model_dump(mode="json"),
        engines=engines,
    )
    made.write(out / ENGINES)
    return out


def _tensors(tensors: Any) -> list[EngineTensor]:
    return [
        EngineTensor(
            name=t.name, dtype=_TYPES[t.dtype], shape=[n if isinstance(n, int) else -1 for n in t.shape]
        )
        for t in tensors
    ]


def never_ends(folder: Path) -> None:
    """Give a bundle an end token that does not come; its hashes are no longer right."""
    file = folder / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": 279}))
    manifest = json.loads((folder / "skipvision.json").read_text())
    manifest["files"][file.name]["bytes"] = file.stat().st_size  # checked in any case
    (folder / "skipvision.json").write_text(seal(manifest))


def tensorrt_options(headers: Path, nvinfer: Path, cudart: Path) -> tuple[str, ...]:
    """Options of CMake that build the backend against these."""
    return (
        "-GUnix Makefiles",
        "-DSKIPVISION_TENSORRT=ON",
        f"-DTensorRT_ROOT={headers.parent}",
        f"-DTensorRT_LIBRARY={nvinfer}",
        f"-DTensorRT_CUDA_LIBRARY={cudart}",
    )


def twin_of(program: Path, folder: Path, source: str, right: str, wrong: str) -> Path:
    """A program of a build with Makefiles and compile_commands.json, with `right` in one file broken."""
    text = (SOURCE / "src" / source).read_text()
    assert text.count(right) == 1, right
    broken, result = folder / source, folder / "twin.o"
    broken.write_text(text.replace(right, wrong))
    top = next(parent for parent in program.parents if (parent / "compile_commands.json").is_file())
    entries = json.loads((top / "compile_commands.json").read_text())
    entry = next(e for e in entries if Path(e["file"]).name == source)
    command = shlex.split(entry["command"])
    command[command.index("-o") + 1], command[command.index("-c") + 1] = str(result), str(broken)
    call(*command, cwd=entry["directory"])
    link = shlex.split((program.parent / "CMakeFiles" / f"{program.name}.dir" / "link.txt").read_text())
    link[link.index("-o") + 1] = str(folder / "twin")
    # Before the library, which then has nothing to add of this file.
    call(*link[:1], result, *link[1:], cwd=program.parent)
    return folder / "twin"


def run(
    program: Path, *arguments: object, words: str = "", report: str | Path = "", **options: Any
) -> subprocess.CompletedProcess[str]:
    """Run a program; words: what the stand-in for CUDA refuses; report: where it counts what it did."""
    environment = os.environ | {"CUDA_DOUBLE": words, "CUDA_DOUBLE_REPORT": str(report)}
    command = [str(part) for part in (program, *arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, **options)


def answers(
    program: Path, bundle: Path, *arguments: object, n: int = 12, **options: Any
) -> list[dict[str, Any]]:
    """Of the first n held-out questions, without their times."""
    lines = request_lines(n)
    done = run(program, bundle, "--lines", "--no-hashes", *arguments, input=lines, **options)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == n
    return [
        {key: value for key, value in each.items() if not key.endswith(("_ms", "_token"))} for each in found
    ]
