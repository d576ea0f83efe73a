"""Writing the graphs of a bundle; the decoder's weights stand once for both of its graphs."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import BinaryIO

import onnx
import onnx_ir as ir

from skipvision_export.bundle.manifest import GraphInfo, TensorInfo

# Smaller tensors stay inside the .onnx file, where shape inference can read them.
_INLINE_BYTES = 1024
_ALIGNMENT = 64
# A protobuf file ends at 2 GiB.
_MAX_INLINE_TOTAL = 1 << 30


def write_graphs(
    graphs: dict[str, ir.Model], folder: Path, shared: tuple[str, ...], data_name: str
) -> dict[str, GraphInfo]:
    """Save `graphs` as folder/onnx/NAME.onnx.

    Tensors of the graphs named in `shared` go to one file `data_name`, equal ones once; other graphs
    hold their weights unless they are too large for a protobuf.
    """
    target = folder / "onnx"
    target.mkdir()
    with (target / data_name).open("wb") as stream:
        offsets: dict[str, int] = {}
        for name in shared:
            _externalize(graphs[name], stream, data_name, target, offsets)
    for name, model in graphs.items():
        if name not in shared and _nbytes(model) > _MAX_INLINE_TOTAL:
            own = f"{name}.onnx_data"
            with (target / own).open("wb") as stream:
                _externalize(model, stream, own, target, {})
        file = target / f"{name}.onnx"
        ir.save(model, file)
        # By path: the checker then finds external data, and a proto in memory ends at 2 GiB.
        onnx.checker.check_model(str(file), full_check=True)
    return {name: describe(model, f"onnx/{name}.onnx") for name, model in graphs.items()}


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


def _externalize(
    model: ir.Model, stream: BinaryIO, location: str, base: Path, offsets: dict[str, int]
) -> None:
    """Append the tensors of a graph to `stream`, each content once, and refer to them there."""
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is None or tensor.nbytes < _INLINE_BYTES:
            continue
        data = tensor.tobytes()
        key = hashlib.sha256(data).hexdigest()
        if key not in offsets:
            stream.write(b"\0" * (-stream.tell() % _ALIGNMENT))
            offsets[key] = stream.tell()
            stream.write(data)
        value.const_value = ir.ExternalTensor(
            location,
            offsets[key],
            len(data),
            tensor.dtype,
            shape=tensor.shape,  # type: ignore[arg-type]
            name=value.name or "",
            base_dir=str(base),
        )
