"""Builds the C++ runtime for tests, against the headers at hand and the pip wheel's library."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import pytest

from skipvision_export.bundle import seal

SOURCE = Path(__file__).parents[1] / "engines" / "runtime"
EXAMPLE = Path(__file__).parents[1] / "examples" / "tiny_vlm"
HEADERS = (
    "onnxruntime_cxx_api.h",
    "nlohmann/json.hpp",
    "CLI/CLI.hpp",
    "png.h",
    "turbojpeg.h",
    "pcre2.h",
    "utf8proc.h",
)


def include_folder() -> str:
    """ONNX Runtime's headers: ONNXRUNTIME_INCLUDE_DIR, as for any user, or Debian's."""
    return os.environ.get("ONNXRUNTIME_INCLUDE_DIR", "/usr/include/onnxruntime")


def need_tools() -> None:
    """Skip, with the reason, where something to build with is missing."""
    for tool in ("cmake", "c++", "pkg-config"):
        if shutil.which(tool) is None:
            pytest.skip(f"needs {tool}")
    code = "#define PCRE2_CODE_UNIT_WIDTH 8\n" + "".join(f"#include <{header}>\n" for header in HEADERS)
    command = ["c++", "-std=c++17", "-E", "-x", "c++", "-I", include_folder(), "-o", os.devnull, "-"]
    done = subprocess.run(command, input=code, capture_output=True, text=True)
    if done.returncode:
        missing = [line for line in done.stderr.splitlines() if "error" in line]
        pytest.skip(f"needs the C++ runtime's headers: {missing[0] if missing else done.stderr}")


def wheel_library(folder: Path) -> Path:
    """The wheel's library under the names that linkers and loaders look for."""
    found = sorted((Path(onnxruntime.__file__).parent / "capi").glob("libonnxruntime.so.*"))
    if not found:
        pytest.skip("needs a wheel of ONNX Runtime with libonnxruntime.so")
    folder.mkdir()
    for name in ("libonnxruntime.so", "libonnxruntime.so.1"):
        (folder / name).symlink_to(found[0])
    return folder / "libonnxruntime.so"


def configure_and_build(build: Path, library: Path, *options: str, targets: tuple[str, ...] = ()) -> Path:
    """A build folder; every warning is an error. Without TensorRT, unless `options` say otherwise."""
    definitions = [
        f"-DONNXRUNTIME_INCLUDE_DIR={include_folder()}",
        f"-DONNXRUNTIME_LIBRARY={library}",
        "-DSKIPVISION_WERROR=ON",
        "-DSKIPVISION_TESTS=ON",
        "-DSKIPVISION_TENSORRT=OFF",
    ]
    call("cmake", "-S", SOURCE, "-B", build, *definitions, *options)
    call("cmake", "--build", build, "-j2", *(("--target", *targets) if targets else ()))
    return build


def call(*command: Any, **options: Any) -> str:
    """Run a command that must succeed; returns what it printed."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def ask(probe: Path, what: str, **request: Any) -> Any:
    """An answer of tests/probe.cpp."""
    return json.loads(call(probe, input=json.dumps({"what": what} | request)))


def run(build: Path, *arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """skipvision-run, whatever it returns."""
    command = [str(part) for part in (build / "skipvision-run", *arguments)]
    return subprocess.run(command, capture_output=True, text=True, **options)


def questions(n: int) -> list[dict[str, str]]:
    """The tiny VLM's first held-out questions."""
    return [json.loads(line) for line in (EXAMPLE / "test" / "metadata.jsonl").open()][:n]


def request_lines(n: int) -> str:
    """Held-out questions as `skipvision-run --lines` takes them."""
    return "\n".join(
        json.dumps({"image": str(EXAMPLE / "test" / q["file_name"]), "prompt": q["question"]})
        for q in questions(n)
    )


def alter(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a bundle's manifest."""
    manifest = json.loads((folder / "skipvision.json").read_text())
    change(manifest)
    (folder / "skipvision.json").write_text(seal(manifest))
