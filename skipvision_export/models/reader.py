"""One pass over a checkpoint's files: every byte is hashed, the wanted tensors come out on the way."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
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
        # Of each file alone; filled where `tensors` is asked for them.
        self.file_sha256: dict[Path, str] = {}
        self._digest: str | None = None

    @property
    def sha256(self) -> str:
        """The hash; reads the files if no `tensors` has."""
        if self._digest is None:
            for _ in self.tensors(()):
                pass
        assert self._digest is not None
        return self._digest

    def tensors(
        self, wanted: Collection[StoredTensor], alone: Collection[Path] = ()
    ) -> Iterator[tuple[StoredTensor, Bytes]]:
        """Each wanted tensor and its bytes [nbytes], in the order in which they are stored.

        alone: files whose own hash `file_sha256` holds afterwards.
        """
        whole = hashlib.sha256((self.folder / "config.json").read_bytes())
        with ThreadPoolExecutor(1) as thread:
            for file in sorted(self.folder.glob("*.safetensors")):
                inside = sorted((t for t in wanted if t.file == file), key=lambda t: t.offset)
                digest = _Digest([whole, hashlib.sha256()] if file in alone else [whole])
                with file.open("rb") as stream:
                    yield from _read(stream, inside, digest, thread)
                    _skip(stream, None, digest)
                if file in alone:
                    self.file_sha256[file] = digest.parts[-1].hexdigest()
        self._digest = whole.hexdigest()


@dataclass(frozen=True)
class _Digest:
    """Hashes of the same bytes, begun at different places."""

    parts: list[Any]

    def update(self, data: Any) -> None:
        for part in self.parts:
            part.update(data)


def _read(
    stream: Any, tensors: list[StoredTensor], digest: _Digest, thread: ThreadPoolExecutor
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


def _skip(stream: Any, end: int | None, digest: _Digest) -> None:
    """Hash what lies between the stream's place and `end`, or the end of the file."""
    while end is None or stream.tell() < end:
        block = stream.read(_CHUNK if end is None else min(_CHUNK, end - stream.tell()))
        if not block:
            return
        digest.update(block)
