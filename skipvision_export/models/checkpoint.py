"""A checkpoint's safetensors files as their headers describe them; no weight is read."""

from __future__ import annotations

import json
import operator
import struct
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from skipvision_export.errors import ModelError

WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
# safetensors' names of the types that weights come in, as torch and ONNX call them.
_TYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
# Bytes of a number, of the types that graphs come in.
DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
# The format's own limit on a header, in bytes.
_MAX_HEADER = 100_000_000


@dataclass(frozen=True)
class StoredTensor:
    """One tensor: `nbytes` bytes at `offset` of `file`, of `dtype` (torch's name) and `shape`."""

    file: Path
    key: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int

    @property
    def is_float(self) -> bool:
        """Whether it is of a type that weights come in."""
        return self.dtype in _TYPES.values()


@dataclass(frozen=True)
class Checkpoint:
    """Every tensor by its key, and `files`, in which they lie, in order of their names."""

    files: tuple[Path, ...]
    tensors: dict[str, StoredTensor]

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        """Read the headers of a model folder's model.safetensors, or of the files its index names.

        Raises ModelError for a file that the index names and that is missing, for one that is
        truncated or no safetensors file, and for a type that no graph has.
        """
        whole = folder / WEIGHTS
        files = (whole,) if whole.is_file() else _indexed(folder)
        tensors: dict[str, StoredTensor] = {}
        for file in files:
            tensors |= _read_header(file)
        return cls(files, tensors)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def _indexed(folder: Path) -> tuple[Path, ...]:
    index = folder / INDEX
    if not index.is_file():
        raise ModelError(f"{folder} has no *.safetensors weights; expected {WEIGHTS} or {INDEX}")
    try:
        named = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        files = tuple(folder / name for name in named)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index} is no index of a checkpoint ({error}); download it again") from None
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise ModelError(
            f"{missing[0]} is missing: {INDEX} names {len(files)} files, {len(missing)} of them "
            "are not there; download the model again"
        )
    return files


def _read_header(file: Path) -> dict[str, StoredTensor]:
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= _MAX_HEADER:
            raise ModelError(f"{file} is truncated or no safetensors file; download the model again")
        text = stream.read(length)
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        entries = {}
        for key, entry in header.items():
            begin, stop = map(operator.index, entry["data_offsets"])
            entries[key] = str(entry["dtype"]), tuple(entry["shape"]), begin, stop
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ModelError(f"{file} is truncated or no safetensors file; download the model again") from None
    data = 8 + length
    end = data + max((entry[3] for entry in entries.values()), default=0)
    if size < end:
        raise ModelError(
            f"{file} is truncated: {size} bytes, its header says {end}; download the model again"
        )
    for key, (dtype, *_) in entries.items():
        if dtype not in _TYPES and not dtype.startswith(("I", "U", "BOOL")):
            raise ModelError(
                f"weight {key} in {file} is of type {dtype}; expected one of {', '.join(_TYPES)}"
            )
    try:
        # Its own reader checks shapes and offsets against each other.
        with safe_open(file, "numpy"):
            pass
    except SafetensorError as error:
        raise ModelError(f"{file} contradicts itself ({error}); download the model again") from None
    return {
        key: StoredTensor(file, key, _TYPES.get(dtype, dtype), shape, data + begin, stop - begin)
        for key, (dtype, shape, begin, stop) in entries.items()
    }
