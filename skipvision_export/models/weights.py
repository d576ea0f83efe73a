"""Weights that stay in their checkpoint until they are written: read, cast, transposed, dropped."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from skipvision_export.errors import ModelError
from skipvision_export.models.checkpoint import StoredTensor

if TYPE_CHECKING:
    import torch

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
    def as_stored(self) -> bool:
        """Whether its bytes are the checkpoint's, at a place where its type may lie."""
        same = self.stored.dtype == self.torch_dtype and not self.transposed
        return same and self.stored.offset % self.dtype.itemsize == 0

    def transpose(self) -> WeightTensor:
        """The same weight, rows for columns; a matrix only."""
        return WeightTensor(self.parameter, self.stored, self.torch_dtype, not self.transposed)

    def blocks(self, data: npt.NDArray[np.uint8]) -> Iterator[npt.NDArray[np.uint8]]:
        """The tensor's bytes in order, a part at a time, out of the checkpoint's bytes `data`.

        Raises ModelError at the first part that holds NaN or infinity.
        """
        import torch

        source = torch.from_numpy(data).view(getattr(torch, self.stored.dtype)).view(self.stored.shape)
        dtype = getattr(torch, self.torch_dtype)
        for part in _parts(source.t() if self.transposed else source, dtype.itemsize):
            # Cast before the rows are turned: PyTorch turns a compact matrix ten times as fast.
            if self.transposed:
                part = part.t().to(dtype).contiguous().t()
            part = part.to(dtype).contiguous()
            self._check(part)
            yield part.view(-1).view(torch.uint8).numpy()

    def _check(self, part: torch.Tensor) -> None:
        import torch

        if part.numel() and not all(map(torch.isfinite, torch.aminmax(part))):
            raise not_finite(self.parameter, self.stored.file.parent, self.torch_dtype)

    def _whole(self) -> ir.TensorProtocol:
        with self.stored.file.open("rb") as stream:
            stream.seek(self.stored.offset)
            data = np.fromfile(stream, np.uint8, self.stored.nbytes)
        array = np.concatenate(list(self.blocks(data))).view(self.dtype.numpy())
        return ir.tensor(array.reshape(self.shape.numpy()), name=self.name)


_ONNX = {"float32": "FLOAT", "float16": "FLOAT16", "bfloat16": "BFLOAT16", "float64": "DOUBLE"}


def not_finite(parameter: str, folder: Path, dtype: str) -> ModelError:
    """The error for a weight that holds NaN or infinity in `dtype`."""
    return ModelError(
        f"weight {parameter} in {folder} holds NaN or infinity in {dtype}; export would only "
        f"hide it{' (numbers over 65504 need bfloat16)' if dtype == 'float16' else ''}"
    )


def _parts(tensor: torch.Tensor, itemsize: int) -> Iterator[torch.Tensor]:
    """Slices along the first axis, each at most _BLOCK_BYTES, or one row."""
    if tensor.ndim == 0:
        yield tensor
        return
    row = max(1, tensor[:1].numel() * itemsize)
    yield from tensor.split(max(1, _BLOCK_BYTES // row))
