"""Weights of a graph that stand in files beside it: are they there, and copying them to one file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import onnx
from onnx.external_data_helper import ExternalDataInfo, uses_external_data

from skipvision_export.errors import ModelError

_ALIGNMENT = 4096  # of a tensor that is mapped into memory
_BLOCK = 16 << 20


def external_tensors(proto: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Every tensor whose numbers stand in another file, those of inner graphs and attributes too."""
    for node in (node for function in proto.functions for node in function.node):
        yield from _of_node(node)
    yield from _of_graph(proto.graph)


def check_external(proto: onnx.ModelProto, folder: Path) -> None:
    """Raise ModelError for a file that is missing, too short, or not in the graph's own folder."""
    sizes: dict[str, int] = {}
    for tensor in external_tensors(proto):
        info = ExternalDataInfo(tensor)
        place = Path(info.location)
        if place.is_absolute() or ".." in place.parts:
            raise ModelError(f"{tensor.name} stands in {info.location}, which is not beside the graph")
        if info.location not in sizes:
            file = folder / place
            if not file.is_file():
                raise ModelError(
                    f"{file} is missing: the graph's weights stand in it; put it beside the graph"
                )
            sizes[info.location] = file.stat().st_size
        end = (info.offset or 0) + (info.length or 0)
        if end > sizes[info.location]:
            raise ModelError(
                f"{folder / place} is cut off at {sizes[info.location]} bytes, {tensor.name} ends at {end}; "
                "copy it again"
            )


def copy_external(protos: Sequence[onnx.ModelProto], folder: Path, file: Path, name: str) -> int:
    """Copy the bytes of all external tensors to `file`, a block at a time, and refer to them as `name`.

    What graphs, or tensors of one graph, share they go on sharing. Returns how many bytes there are.
    """
    spans: dict[tuple[str, int, int], int] = {}
    with file.open("wb") as out:
        for tensor in (tensor for proto in protos for tensor in external_tensors(proto)):
            info = ExternalDataInfo(tensor)
            source = folder / info.location
            start = info.offset or 0
            length = info.length or source.stat().st_size - start
            span = (info.location, start, length)
            if span not in spans:
                out.write(b"\0" * (-out.tell() % _ALIGNMENT))
                spans[span] = out.tell()
                with source.open("rb") as stream:
                    stream.seek(start)
                    _copy(stream, out, length)
            del tensor.external_data[:]
            place = {"location": name, "offset": str(spans[span]), "length": str(length)}
            tensor.external_data.extend(onnx.StringStringEntryProto(key=k, value=v) for k, v in place.items())
        return out.tell()


def _copy(source: BinaryIO, out: BinaryIO, length: int) -> None:
    while length:
        block = source.read(min(_BLOCK, length))
        if not block:
            raise OSError("the file of weights ended while it was copied")
        out.write(block)
        length -= len(block)


def _of_graph(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from filter(uses_external_data, graph.initializer)
    for node in graph.node:
        yield from _of_node(node)


def _of_node(node: onnx.NodeProto) -> Iterator[onnx.TensorProto]:
    for attribute in node.attribute:
        if attribute.HasField("t"):
            yield from filter(uses_external_data, [attribute.t])
        yield from filter(uses_external_data, attribute.tensors)
        for graph in [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]:
            yield from _of_graph(graph)
