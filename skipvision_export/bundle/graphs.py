"""Writing the graphs of a bundle; the decoder's weights stand once for both of its graphs."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Hashable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import onnx
import onnx_ir as ir

from skipvision_export.bundle.manifest import FileInfo, GraphInfo, TensorInfo
from skipvision_export.models.checkpoint import StoredTensor
from skipvision_export.models.reader import SourceReader
from skipvision_export.models.weights import WeightTensor

# Smaller tensors stay inside the .onnx file, where shape inference can read them.
_INLINE_BYTES = 1024
_ALIGNMENT = 64
# A protobuf file ends at 2 GiB, and is held in memory several times while it is written.
_MAX_INLINE_TOTAL = 64 << 20


@dataclass(frozen=True)
class Written:
    """Graphs by name, and size and hash of their data files, by path in the bundle."""

    graphs: dict[str, GraphInfo]
    files: dict[str, FileInfo]


def write_graphs(
    graphs: dict[str, ir.Model],
    folder: Path,
    shared: tuple[str, ...],
    data_name: str,
    source: SourceReader | None = None,
) -> Written:
    """Save `graphs` as folder/onnx/NAME.onnx.

    Tensors of the graphs named in `shared` go to one file `data_name`, equal ones once; other graphs
    hold their weights unless they are too large for a protobuf. source: where WeightTensors come from,
    in one pass. Raises ModelError for weights that are not finite.
    """
    target = folder / "onnx"
    target.mkdir()
    files: dict[str, FileInfo] = {}
    with ExitStack() as stack:
        places = []
        common = stack.enter_context(_data_file(target / data_name, files))
        for name, model in graphs.items():
            if name in shared:
                places.append((model, common))
            elif _nbytes(model) > _MAX_INLINE_TOTAL:
                own = stack.enter_context(_data_file(target / f"{name}.onnx_data", files))
                places.append((model, own))
        _externalize(places, source)
    for name, model in graphs.items():
        file = target / f"{name}.onnx"
        ir.save(model, file)
        # By path: the checker then finds external data, and a proto in memory ends at 2 GiB.
        onnx.checker.check_model(str(file), full_check=True)
    return Written({name: describe(model, f"onnx/{name}.onnx") for name, model in graphs.items()}, files)


def describe(model: ir.Model, file: str) -> GraphInfo:
    """Names, types and shapes of a graph's inputs and outputs."""

    def info(value: ir.Value) -> TensorInfo:
        assert value.name is not None and value.shape is not None and value.dtype is not None
        shape = [size if isinstance(size, int) else str(size) for size in value.shape]
        return TensorInfo(name=value.name, dtype=value.dtype.name.lower(), shape=shape)

    return GraphInfo(
        file=file,
        inputs=[info(value) for value in model.graph.inputs],
        outputs=[info(value) for value in model.graph.outputs],
    )


def _nbytes(model: ir.Model) -> int:
    tensors = (value.const_value for value in model.graph.initializers.values())
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


@dataclass
class _DataFile:
    """External data, written front to back and hashed on the way; equal tensors once."""

    path: Path
    stream: BinaryIO
    digest: Any = field(default_factory=hashlib.sha256)
    spans: dict[Hashable, tuple[int, int]] = field(default_factory=dict)

    def append(self, key: Hashable, blocks: Iterator[Any]) -> None:
        """Write a tensor's bytes, a part at a time, unless one of this key is there."""
        if key in self.spans:
            return
        self._write(b"\0" * (-self.stream.tell() % _ALIGNMENT))
        start = self.stream.tell()
        for block in blocks:
            self._write(block)
        self.spans[key] = (start, self.stream.tell() - start)

    def refer(self, value: ir.Value, key: Hashable) -> None:
        """Let a value's tensor be the one of this key."""
        tensor = value.const_value
        assert tensor is not None
        value.const_value = ir.ExternalTensor(
            self.path.name,
            *self.spans[key],
            tensor.dtype,
            shape=tensor.shape,  # type: ignore[arg-type]
            name=value.name or "",
            base_dir=str(self.path.parent),
        )

    def _write(self, data: Any) -> None:
        self.stream.write(data)
        self.digest.update(data)


@contextmanager
def _data_file(path: Path, files: dict[str, FileInfo]) -> Iterator[_DataFile]:
    with path.open("wb") as stream:
        data = _DataFile(path, stream)
        yield data
        size = stream.tell()
    files[f"{path.parent.name}/{path.name}"] = FileInfo(bytes=size, sha256=data.digest.hexdigest())


def _externalize(places: list[tuple[ir.Model, _DataFile]], source: SourceReader | None) -> None:
    """Move the tensors of each graph to its file, those of a checkpoint in the order it stores them."""
    waiting: dict[StoredTensor, list[tuple[WeightTensor, _DataFile]]] = defaultdict(list)
    later: list[tuple[ir.Value, Hashable, _DataFile]] = []
    for model, data in places:
        for value in model.graph.initializers.values():
            tensor = value.const_value
            if tensor is None or tensor.nbytes < _INLINE_BYTES:
                continue
            if isinstance(tensor, WeightTensor):
                waiting[tensor.stored].append((tensor, data))
                later.append((value, tensor.identity, data))
            else:
                content = tensor.tobytes()
                key = hashlib.sha256(content).hexdigest()
                data.append(key, iter([content]))
                data.refer(value, key)
    if waiting:
        assert source is not None
        for stored, stored_bytes in source.tensors(waiting.keys()):
            for weight, data in waiting[stored]:
                data.append(weight.identity, weight.blocks(stored_bytes))
    for value, identity, data in later:
        data.refer(value, identity)
