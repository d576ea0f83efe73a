"""The KVPrune kernel as a shared library, built by nvcc and called with torch tensors through ctypes."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import torch
from where import ROOT

SOURCE = ROOT / "plugins" / "kv_prune"


class Params(ctypes.Structure):
    """skipvision_kv_prune_params of kernel/kv_prune.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("struct_bytes", "batch", "heads", "sequence", "kept")),
        *((name, ctypes.c_int64) for name in ("row_bytes", "element_bytes", "output_head_rows")),
        *((name, ctypes.c_void_p) for name in ("key", "value", "keep_index", "key_out", "value_out")),
    ]


def nvcc(*arguments: object) -> None:
    """Run nvcc; raises RuntimeError with what it said."""
    compiler = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    done = subprocess.run(
        [compiler, *map(str, arguments)], capture_output=True, text=True, check=False, timeout=300
    )
    if done.returncode:
        raise RuntimeError(f"nvcc: {done.stderr.strip()[-2000:]}")


def build(folder: Path, capability: str = "9.0") -> Path:
    """The library for one compute capability, in `folder`."""
    arch = capability.replace(".", "")
    out = folder / f"libskipvision_kv_prune_kernel_{arch}.so"
    target = f"-gencode=arch=compute_{arch},code=sm_{arch}"
    host = "-Wall,-Wextra,-fPIC,-fvisibility=hidden"
    exports = f"-Xlinker=--version-script={SOURCE / 'cmake' / 'kernel.map'},--no-undefined"
    nvcc(
        *("-shared", "-std=c++17", "-O3", target, "-Xcompiler", host, exports),
        *(SOURCE / "kernel" / "kv_prune.cu", "-o", out),
    )
    return out


def build_test(folder: Path, library: Path) -> Path:
    """The kernel's own test program, linked to the library."""
    out = folder / "kernel_test"
    link = (library, "-Xlinker", f"-rpath={library.parent}")
    nvcc("-std=c++17", "-lineinfo", SOURCE / "tests" / "kernel_test.cu", *link, "-o", out)
    return out


class KVPrune:
    """The library's function; launches are on torch's current stream, and can be captured in a CUDA graph."""

    def __init__(self, library: Path) -> None:
        """Load it."""
        self._library = ctypes.CDLL(str(library))
        self._library.skipvision_kv_prune_error.restype = ctypes.c_char_p
        self._library.skipvision_kv_prune_version.restype = ctypes.c_char_p

    @property
    def version(self) -> str:
        """Of the op and the package."""
        return str(self._library.skipvision_kv_prune_version().decode())

    def __call__(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        keep: torch.Tensor,
        key_out: torch.Tensor,
        value_out: torch.Tensor,
        head_rows: int | None = None,
    ) -> None:
        """key, value [B, H, S, Dh], keep [B, K] int64; outputs with `head_rows` (K) rows for each head.

        An output may be its input where head_rows is S or K. Raises RuntimeError for a status that is not 0.
        """
        batch, heads, sequence, size = key.shape
        params = Params(
            struct_bytes=ctypes.sizeof(Params),
            batch=batch,
            heads=heads,
            sequence=sequence,
            kept=keep.shape[1],
            row_bytes=size * key.element_size(),
            element_bytes=key.element_size(),
            output_head_rows=keep.shape[1] if head_rows is None else head_rows,
            key=key.data_ptr(),
            value=value.data_ptr(),
            keep_index=keep.data_ptr(),
            key_out=key_out.data_ptr(),
            value_out=value_out.data_ptr(),
        )
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream if key.is_cuda else None)
        status = self._library.skipvision_kv_prune(ctypes.byref(params), stream)
        if status:
            raise RuntimeError(f"KVPrune: {self._library.skipvision_kv_prune_error(status).decode()}")
