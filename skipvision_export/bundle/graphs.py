"""Writing the graphs of a bundle; the decoder's weights stand once for both of its graphs."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import onnx
import onnx_ir as ir

from skipvision_export.bundle.manifest import FileInfo, GraphInfo, TensorInfo
from skipvision_export.bundle.references import Links
from skipvision_export.models.checkpoint import StoredTensor
from skipvision_export.models.reader import SourceReader
from skipvision_export.models.weights import Bytes, PackedWeight, WeightTensor

# Smaller tensors stay inside the .onnx file, where shape inference can read them.
_INLINE_BYTES = 1024
_ALIGNMENT = 64
# A protobuf file ends at 2 GiB, and is held in memory several times while it is written.
_MAX_INLINE_TOTAL = 64 << 20


@dataclass(frozen=True)
class Written:
    """Graphs by name, and size and hash of their data files, by path in the bundle.

    referenced: those of them that are links, and the name of the checkpoint's file.
    """

    graphs: dict[str, GraphInfo]
    files: dict[str, FileInfo]
    referenced: dict[str, str]


def write_graphs(
    graphs: dict[str, ir.Model],
    folder: Path,
    shared: tuple[str, ...],
    data_name: str,
    source: SourceReader | None = None,
    reference: bool = False,
    stems: Mapping[str, str] | None = None,
) -> Written:
    """Save `graphs` as folder/onnx/NAME.onnx, or STEM.onnx where `stems` says so.

    Tensors of the graphs named in `shared` go to one file `data_name`, equal ones once; other graphs
    hold their weights unless they are too large for a protobuf, then they go to one file for a graph
    and its forms (NAME.RUNTIME). source: where WeightTensors come from,
    in one pass. reference: those that are as they are stored stay there, linked. Raises ModelError for
    weights that are not finite, and OutputError where files cannot be linked.
    """
    target = folder / "onnx"
    target.mkdir()
    files: dict[str, FileInfo] = {}
    links = Links(target) if reference else None
    with ExitStack() as stack:
        places: list[tuple[ir.Model, _DataFile | None]] = []
        common = stack.enter_context(_data_file(target / data_name, files))
        own: dict[str, _DataFile] = {}
        for name, model in graphs.items():
            if name in shared:
                places.append((model, common))
            elif _copied_bytes(model, links) > _MAX_INLINE_TOTAL:
                base = name.split(".")[0]
                if base not in own:
                    own[base] = stack.enter_context(_data_file(target / f"{base}.onnx_data", files))
                places.append((model, own[base]))
            elif links is not None:
                places.append((model, None))
        _externalize(places, source, links)
    if links is not None and source is not None:
        files |= links.table(source)
    at = {name: f"{target.name}/{(stems or {}).get(name, name)}.onnx" for name in graphs}
    for name, model in graphs.items():
        file = folder / at[name]
        ir.save(model, file)
        _check(file, linked=links is not None)
    return Written(
        {name: describe(model, at[name]) for name, model in graphs.items()},
        files,
        {f"{target.name}/{name}": source.name for source, name in links.names.items()} if links else {},
    )


def load_graph(file: Path) -> ir.Model:
    """A graph of a bundle, with tensors that can be read even where their file is a hard link.

    onnx_ir refuses such files wherever it got a path from a model; here the manifest vouches for them.
    """
    model = ir.load(file)
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor):
            value.const_value = ir.ExternalTensor(
                file.parent / tensor.location,
                tensor.offset,
                tensor.length,
                tensor.dtype,
                shape=tensor.shape,
                name=tensor.name,
            )
    return model


def _check(file: Path, linked: bool) -> None:
    if not linked:
        # By path: the checker then finds external data, and a proto in memory ends at 2 GiB.
        onnx.checker.check_model(str(file), full_check=True)
        return
    # It refuses data files with more than one name, so those weights are shown to it as inputs.
    model = onnx.load(file, load_external_data=False)
    held = []
    for tensor in model.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            model.graph.input.append(
                onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
            )
        else:
            held.append(tensor)
    del model.graph.initializer[:]
    model.graph.initializer.extend(held)
    onnx.checker.check_model(model, full_check=True)


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


def _copied_bytes(model: ir.Model, links: Links | None) -> int:
    tensors = (value.const_value for value in model.graph.initializers.values())
    return sum(t.nbytes for t in tensors if t is not None and (links is None or not links.takes(t)))


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
    if not size:
        path.unlink()
        return
    files[f"{path.parent.name}/{path.name}"] = FileInfo(bytes=size, sha256=data.digest.hexdigest())


def _externalize(
    places: list[tuple[ir.Model, _DataFile | None]], source: SourceReader | None, links: Links | None
) -> None:
    """Move the tensors of each graph to its file, those of a checkpoint in the order it stores them.

    Without a file a graph keeps them, but for those that `links` takes.
    """
    waiting: dict[StoredTensor, list[tuple[WeightTensor | PackedWeight, _DataFile | Links]]]
    waiting = defaultdict(list)
    later: list[tuple[ir.Value, Hashable, _DataFile | Links]] = []
    for model, own in places:
        for value in model.graph.initializers.values():
            tensor = value.const_value
            if tensor is None or tensor.nbytes < _INLINE_BYTES:
                continue
            if isinstance(tensor, (WeightTensor, PackedWeight)):
                data = links if links is not None and links.takes(tensor) else own
                if data is not None:
                    for stored in tensor.sources:
                        waiting[stored].append((tensor, data))
                    later.append((value, tensor.identity, data))
            elif own is not None:
                content = tensor.tobytes()
                key = hashlib.sha256(content).hexdigest()
                own.append(key, iter([content]))
                own.refer(value, key)
    if waiting:
        assert source is not None
        # Parts of packed weights wait for the others; they stand side by side in a checkpoint, or nearly.
        begun: dict[Hashable, dict[StoredTensor, Bytes]] = defaultdict(dict)
        for stored, stored_bytes in source.tensors(waiting.keys(), links.names if links else ()):
            for weight, data in waiting[stored]:
                parts = begun[weight.identity]
                parts[stored] = stored_bytes
                if len(parts) == len(weight.sources):
                    data.append(weight.identity, weight.blocks(parts))
            for weight, _ in waiting[stored]:
                if len(begun[weight.identity]) == len(weight.sources):
                    del begun[weight.identity]
    for value, identity, data in later:
        data.refer(value, identity)
