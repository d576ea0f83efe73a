"""The pip-only route to a TensorRT compiler: NVIDIA's Python bindings on top of TensorRT-RTX's libraries.

`pip install "skipvision-export[trt-rtx]"` brings both as wheels, under NVIDIA's licence. The bindings
want TensorRT's own libraries; small forwarding libraries, compiled from forward.c at first use, stand
in for them. Linux only.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from skipvision_export.errors import CompilerError

_SOURCE = Path(__file__).with_name("forward.c")
_WANTED_BY_BINDINGS = ("libnvinfer.so.11", "libnvonnxparser.so.11", "libnvinfer_plugin.so.11")
# The parser opens the library under this name, without a version.
_ALIAS = "libtensorrt_rtx.so"
_LIBRARIES_PACKAGE = "onnxruntime_ep_nv_tensorrt_rtx"


@cache
def load() -> tuple[Any, str]:
    """The bindings' module on TensorRT-RTX, and the library's version.

    Raises ImportError where the extra is not installed, and CompilerError where it is but cannot be
    used.
    """
    for module in ("tensorrt_bindings", _LIBRARIES_PACKAGE):
        if importlib.util.find_spec(module) is None:
            raise ImportError(f"no module {module}")
    if "tensorrt_bindings" in sys.modules:
        raise CompilerError("TensorRT's own libraries are loaded already; start a new process")
    core, parser = (_wheel_file(f"{name}.so.*") for name in ("libtensorrt_rtx", "libtensorrt_onnxparser_rtx"))
    folder = _forwarding_libraries(core)
    loaded = [
        ctypes.CDLL(str(file), mode=ctypes.RTLD_GLOBAL)
        for file in (core, folder / _ALIAS, parser, *(folder / name for name in _WANTED_BY_BINDINGS))
    ]
    parts = [getattr(loaded[0], f"getInferLib{part}Version")() for part in ("Major", "Minor", "Patch")]
    return importlib.import_module("tensorrt_bindings"), ".".join(map(str, parts))


def _wheel_file(pattern: str) -> Path:
    spec = importlib.util.find_spec(_LIBRARIES_PACKAGE)
    assert spec is not None and spec.submodule_search_locations
    folder = Path(next(iter(spec.submodule_search_locations)))
    found = sorted(folder.glob(pattern))
    if not found:
        raise CompilerError(f"{folder} has no {pattern}; install skipvision-export[trt-rtx] again")
    return found[0]


def cache_folder() -> Path:
    """Where compiled helpers and timing caches are kept between runs."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "skipvision_export"


def _forwarding_libraries(core: Path) -> Path:
    """Folder with the compiled forwarding libraries; compiled once for a source and a library version."""
    source = _SOURCE.read_bytes()
    key = hashlib.sha256(source + str(core).encode() + version("tensorrt-cu13-bindings").encode())
    folder = cache_folder() / f"trt-rtx-{key.hexdigest()[:16]}"
    names = (*_WANTED_BY_BINDINGS, _ALIAS)
    if all((folder / name).is_file() for name in names):
        return folder
    compiler = os.environ.get("CC") or next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None:
        raise CompilerError("the trt-rtx route compiles a small C file at first use: install gcc, or set CC")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        for name in names:
            what = [str(_SOURCE), "-ldl"]
            if name == _ALIAS:
                what = ["-x", "c", os.devnull, "-x", "none", "-Wl,--no-as-needed", str(core)]
            command = [compiler, "-shared", "-fPIC", "-O2", f"-Wl,-soname,{name}", *what]
            done = subprocess.run(
                [*command, "-o", str(Path(scratch) / name)], capture_output=True, text=True, check=False
            )
            if done.returncode:
                raise CompilerError(f"{compiler} cannot compile {_SOURCE.name}: {done.stderr.strip()[:300]}")
        folder.mkdir(exist_ok=True)
        for name in names:  # each of them atomic, so that two processes may do this at once
            os.replace(Path(scratch) / name, folder / name)
    return folder
