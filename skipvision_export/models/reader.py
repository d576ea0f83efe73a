"""One pass over a checkpoint's files: every byte is hashed, the wanted tensors come out on the way."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from skipvision_export.errors import ModelError
from skipvision_export.models.checkpoint import StoredTensor

Bytes = npt.NDArray[np.uint8]

# While one tensor is written the next one is read, unless both together are larger.
_AHEAD_BYTES = 512 << 20
_CHUNK = 1 << 24


class SourceReader:
    """The weights of a model folder, read once and hashed as they are read.

    The hash covers config.json and every *.safetensors, in order of their names, one after the other.
    """

    def __init__(self, folder: Path) -> None:
        """Nothing is read yet."""
        self.folder = folder
        self._digest: str | None = None

    @property
    def sha256(self) -> str:
        """The hash; reads the files if no `tensors` has."""
        if self._digest is None:
            for _ in self.tensors(()):
                pass
        assert self._digest is not None
        return self._digest

    def tensors(self, wanted: Collection[StoredTensor]) -> Iterator[tuple[StoredTensor, Bytes]]:
        """Each wanted tensor and its bytes [nbytes], in the order in which they are stored."""
        digest = hashlib.sha256((self.folder / "config.json").read_bytes())
        with ThreadPoolExecutor(1) as thread:
            for file in sorted(self.folder.glob("*.safetensors")):
                inside = sorted((t for t in wanted if t.file == file), key=lambda t: t.offset)
                with file.open("rb") as stream:
                    yield from _read(stream, inside, digest, thread)
                    _skip(stream, None, digest)
        self._digest = digest.hexdigest()


def _read(
    stream: Any, tensors: list[StoredTensor], digest: Any, thread: ThreadPoolExecutor
) -> Iterator[tuple[StoredTensor, Bytes]]:
    def read(tensor: StoredTensor) -> Bytes:
        _skip(stream, tensor.offset, digest)
        data = np.empty(tensor.nbytes, np.uint8)
        if tensor.nbytes and stream.readinto(data) != tensor.nbytes:
            raise ModelError(f"{tensor.file} was truncated while it was read; export again")
        digest.update(data)
        return data

    ahead: Future[Bytes] | None = None
    for i, tensor in enumerate(tensors):
        data = ahead.result() if ahead is not None else thread.submit(read, tensor).result()
        after = tensors[i + 1] if i + 1 < len(tensors) else None
        both = tensor.nbytes + after.nbytes if after is not None else 0
        ahead = thread.submit(read, after) if after is not None and both <= _AHEAD_BYTES else None
        yield tensor, data
        del data


def _skip(stream: Any, end: int | None, digest: Any) -> None:
    """Hash what lies between the stream's place and `end`, or the end of the file."""
    while end is None or stream.tell() < end:
        block = stream.read(_CHUNK if end is None else min(_CHUNK, end - stream.tell()))
        if not block:
            return
        digest.update(block)
