"""Whether the machine has room for an export, asked before any long work."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import psutil

from skipvision_export.bundle.output import nearest_folder
from skipvision_export.errors import RoomError
from skipvision_export.models.checkpoint import DTYPE_BYTES, Checkpoint

# Measured: Python, PyTorch, transformers and the trace, whatever the model's size.
_BASE_MEMORY = 600 << 20
# What is read ahead and what is being written, see SourceReader and WeightTensor.
_STREAM_MEMORY = 640 << 20


def check_room(
    checkpoint: Checkpoint, dtype: str, out: Path, reference: bool = False, whole: bool = False
) -> None:
    """Raise RoomError where the disk of `out` or the free memory is too small for an export to `dtype`.

    The estimate takes every weight of the checkpoint as written, with `reference` those of another type,
    and the largest one as held in memory; whole: all of them, and once more as they are turned around.
    """
    written = [t for t in checkpoint.tensors.values() if not (reference and t.dtype == dtype)]
    disk = sum(math.prod(t.shape) for t in written) * DTYPE_BYTES[dtype]
    above = nearest_folder(out)
    free = shutil.disk_usage(above).free
    if disk > free:
        raise RoomError(
            f"the bundle takes about {_gb(disk)} in {dtype}, but {above} has {_gb(free)} left; "
            "free some, choose another output folder, or a smaller --dtype"
        )
    memory = memory_needed(checkpoint) + (2 * disk if whole else 0)
    available = psutil.virtual_memory().available
    if memory > available:
        raise RoomError(
            f"the export takes about {_gb(memory)} of memory, but {_gb(available)} are available; "
            "close other programs, or export on a larger machine"
        )


def memory_needed(checkpoint: Checkpoint) -> int:
    """Peak bytes of an export: a base, and the largest weight beside what is read ahead or written."""
    sizes = [tensor.nbytes for tensor in checkpoint.tensors.values()]
    return _BASE_MEMORY + max(sizes, default=0) + min(sum(sizes), _STREAM_MEMORY)


def _gb(count: int) -> str:
    return f"{count / 1e9:.1f} GB"
