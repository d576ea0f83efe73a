"""Weights that stay in their checkpoint until they are written: read, cast, transposed, packed, dropped."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from skipvision_export.errors import ModelError
from skipvision_export.models.checkpoint import StoredTensor

if TYPE_CHECKING:
    import torch

Bytes = npt.NDArray[np.uint8]

# What is held beside a tensor that is being written, in bytes of its result.
_BLOCK_BYTES = 32 << 20


class WeightTensor(ir.LazyTensor):
    """A tensor of a checkpoint, in `dtype`, transposed where a graph wants it so.

    Two of the same `identity` have the same bytes. Whatever asks for numbers reads them anew.
    """

    def __init__(self, name: str, stored: StoredTensor, dtype: str, transposed: bool = False) -> None:
        """name: the parameter's in the model, which errors tell; dtype: torch's name."""
        shape = stored.shape[::-1] if transposed else stored.shape
        super().__init__(self._whole, ir.DataType[_ONNX[dtype]], ir.Shape(shape), name=name)
        self.parameter, self.stored, self.torch_dtype = name, stored, dtype
        self.transposed = transposed

    @property
    def identity(self) -> tuple[Any, ...]:
        """What its bytes follow from."""
        return (self.stored, self.torch_dtype, self.transposed)

    @property
    def sources(self) -> tuple[StoredTensor, ...]:
        """What of the checkpoint its bytes are made of."""
        return (self.stored,)

    @property
    def as_stored(self) -> bool:
        """Whether its bytes are the checkpoint's, at a place where its type may lie."""
        same = self.stored.dtype == self.torch_dtype and not self.transposed
        return same and self.stored.offset % self.dtype.itemsize == 0

    def transpose(self) -> WeightTensor:
        """The same weight, rows for columns; a matrix only."""
        return WeightTensor(self.parameter, self.stored, self.torch_dtype, not self.transposed)

    def blocks(self, data: Mapping[StoredTensor, Bytes]) -> Iterator[Bytes]:
        """The tensor's bytes in order, a part at a time, out of the checkpoint's bytes of its sources.

        Raises ModelError at the first part that holds NaN or infinity.
        """
        import torch

        for part in self.parts(data, _BLOCK_BYTES):
            yield part.view(-1).view(torch.uint8).numpy()

    def parts(self, data: Mapping[StoredTensor, Bytes], block_bytes: int) -> Iterator[torch.Tensor]:
        """The same as contiguous tensors of whole rows, each of at most `block_bytes`, or one row."""
        import torch

        stored = torch.from_numpy(data[self.stored]).view(getattr(torch, self.stored.dtype))
        source = stored.view(self.stored.shape)
        dtype = getattr(torch, self.torch_dtype)
        for part in _parts(source.t() if self.transposed else source, dtype.itemsize, block_bytes):
            # Cast before the rows are turned: PyTorch turns a compact matrix ten times as fast.
            if self.transposed:
                part = part.t().to(dtype).contiguous().t()
            part = part.to(dtype).contiguous()
            self._check(part)
            yield part

    def _check(self, part: torch.Tensor) -> None:
        import torch

        if part.numel() and not all(map(torch.isfinite, torch.aminmax(part))):
            raise not_finite(self.parameter, self.stored.file.parent, self.torch_dtype)

    def _whole(self) -> ir.TensorProtocol:
        return _read(self)


class PackedWeight(ir.LazyTensor):
    """Matrices [K, N_i] of a checkpoint side by side: [K, sum N_i]."""

    def __init__(self, weights: Sequence[WeightTensor]) -> None:
        """weights: of equal K and type."""
        first, self.columns = weights[0], [weight.shape.numpy()[1] for weight in weights]
        name, shape = f"{first.name}.packed", ir.Shape([first.shape[0], sum(self.columns)])
        super().__init__(self._whole, first.dtype, shape, name=name)
        self.weights = tuple(weights)

    @property
    def identity(self) -> tuple[Any, ...]:
        """What its bytes follow from."""
        return tuple(weight.identity for weight in self.weights)

    @property
    def sources(self) -> tuple[StoredTensor, ...]:
        """What of the checkpoint its bytes are made of."""
        return tuple(weight.stored for weight in self.weights)

    def blocks(self, data: Mapping[StoredTensor, Bytes]) -> Iterator[Bytes]:
        """As WeightTensor's: all parts of some rows, then the next ones."""
        import torch

        size = int(self.dtype.itemsize)
        rows = max(1, _BLOCK_BYTES // (sum(self.columns) * size))
        each = [
            weight.parts(data, rows * columns * size)
            for weight, columns in zip(self.weights, self.columns, strict=True)
        ]
        for parts in zip(*each, strict=True):
            yield torch.cat(parts, dim=1).view(-1).view(torch.uint8).numpy()

    def _whole(self) -> ir.TensorProtocol:
        return _read(self)


def pack(tensors: Sequence[ir.TensorProtocol]) -> ir.TensorProtocol:
    """Matrices [K, N_i] side by side, read when they are written, those of a checkpoint in its one pass."""
    weights = [tensor for tensor in tensors if isinstance(tensor, WeightTensor)]
    if len(weights) == len(tensors):
        return PackedWeight(weights)
    first = tensors[0]
    name = f"{first.name}.packed"
    sizes = [tensor.shape.numpy() for tensor in tensors]  # type: ignore[union-attr]
    shape = ir.Shape([sizes[0][0], sum(columns for _, columns in sizes)])

    def joined() -> ir.TensorProtocol:
        return ir.tensor(np.concatenate([tensor.numpy() for tensor in tensors], axis=1), name=name)

    return ir.LazyTensor(joined, first.dtype, shape, name=name)


def _read(weight: WeightTensor | PackedWeight) -> ir.TensorProtocol:
    data = {}
    for stored in weight.sources:
        with stored.file.open("rb") as stream:
            stream.seek(stored.offset)
            data[stored] = np.fromfile(stream, np.uint8, stored.nbytes)
    array = np.concatenate(list(weight.blocks(data))).view(weight.dtype.numpy())
    return ir.tensor(array.reshape(weight.shape.numpy()), name=weight.name)


_ONNX = {"float32": "FLOAT", "float16": "FLOAT16", "bfloat16": "BFLOAT16", "float64": "DOUBLE"}


def not_finite(parameter: str, folder: Path, dtype: str) -> ModelError:
    """The error for a weight that holds NaN or infinity in `dtype`."""
    return ModelError(
        f"weight {parameter} in {folder} holds NaN or infinity in {dtype}; export would only "
        f"hide it{' (numbers over 65504 need bfloat16)' if dtype == 'float16' else ''}"
    )


def _parts(tensor: torch.Tensor, itemsize: int, block_bytes: int) -> Iterator[torch.Tensor]:
    """Slices along the first axis, each at most `block_bytes`, or one row."""
    if tensor.ndim == 0:
        yield tensor
        return
    row = max(1, tensor[:1].numel() * itemsize)
    yield from tensor.split(max(1, block_bytes // row))
