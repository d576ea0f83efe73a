"""Whether an NVIDIA driver and a GPU are here; TensorRT itself does not say so, it crashes."""

from __future__ import annotations

import ctypes

from skipvision_export.errors import CompilerError


def require_gpu() -> int:
    """Number of CUDA devices; raises CompilerError in one line where there is none (CUDA driver API)."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        raise CompilerError(
            "no NVIDIA driver here (libcuda.so.1): TensorRT builds and runs engines on a GPU; without one, "
            "bundles run in ONNX Runtime, and TensorRT-RTX builds ahead of time"
        ) from None
    count = ctypes.c_int(0)
    for status in (cuda.cuInit(0), cuda.cuDeviceGetCount(ctypes.byref(count))):
        if status:
            raise CompilerError(f"the NVIDIA driver reports error {status}; check it with nvidia-smi")
    if not count.value:
        raise CompilerError("the NVIDIA driver sees no GPU; check it with nvidia-smi")
    return count.value
