"""Weights that a bundle reads where they lie: hard links to the model's own safetensors files.

A symbolic link, an absolute path or one through `..` would do where hard links do not, but ONNX Runtime
refuses external data outside of the graph's folder, whichever way it is named.
"""

from __future__ import annotations

import os
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx_ir as ir

from skipvision_export.bundle.manifest import FileInfo
from skipvision_export.errors import ConfigError, OutputError
from skipvision_export.models.checkpoint import Checkpoint
from skipvision_export.models.reader import SourceReader
from skipvision_export.models.weights import WeightTensor


def check_reference(checkpoint: Checkpoint, dtype: str) -> None:
    """Raise ConfigError for a checkpoint that has no weights of `dtype`, so none to refer to."""
    found = sorted({tensor.dtype for tensor in checkpoint.tensors.values() if tensor.is_float})
    if dtype not in found:
        raise ConfigError(
            f"no weight can be referenced: the bundle is {dtype}, the model's weights are "
            f"{' and '.join(found)}; give --dtype {found[0] if found else 'of the weights'}, or leave "
            "--reference-weights out"
        )


@dataclass
class Links:
    """Hard links in `folder` to the files of a checkpoint, made as weights are found in them."""

    folder: Path
    names: dict[Path, str] = field(default_factory=dict)
    _checked: set[Hashable] = field(default_factory=set)

    def takes(self, tensor: ir.TensorProtocol) -> bool:
        """Whether a tensor can stay where it is; its file is linked then.

        Raises OutputError where the file system cannot.
        """
        if not isinstance(tensor, WeightTensor) or not tensor.as_stored:
            return False
        if tensor.stored.file not in self.names:
            self._link(tensor.stored.file)
        return True

    def _link(self, file: Path) -> None:
        try:
            # A model of the Hub's cache consists of symbolic links.
            os.link(file.resolve(), self.folder / file.name)
        except OSError as error:
            raise OutputError(
                f"{file} cannot be linked into the bundle ({error.strerror or error}): a hard link needs the "
                "same file system and the right to it; choose another output folder, or export without "
                "--reference-weights"
            ) from None
        self.names[file] = file.name

    def append(self, key: Hashable, blocks: Iterator[Any]) -> None:
        """Write nothing, but look at the numbers as a copy would."""
        if key not in self._checked:
            self._checked.add(key)
            for _ in blocks:
                pass

    def refer(self, value: ir.Value, key: Hashable) -> None:
        """Let a value's tensor be the bytes in the linked file."""
        weight = value.const_value
        assert isinstance(weight, WeightTensor) and weight.identity == key
        value.const_value = ir.ExternalTensor(
            self.names[weight.stored.file],
            weight.stored.offset,
            weight.stored.nbytes,
            weight.dtype,
            shape=weight.shape,
            name=value.name or "",
            base_dir=str(self.folder),
        )

    def table(self, source: SourceReader) -> dict[str, FileInfo]:
        """Size and hash of the links, by path in the bundle; the reader must have read the checkpoint."""
        return {
            f"{self.folder.name}/{name}": FileInfo(
                bytes=(self.folder / name).stat().st_size, sha256=source.file_sha256[file]
            )
            for file, name in self.names.items()
        }
