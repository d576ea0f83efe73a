"""A model without its weights, for tracing, and where each of them stands in the checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from skipvision_export.errors import ModelError
from skipvision_export.models.checkpoint import Checkpoint, StoredTensor
from skipvision_export.models.loading import ModelSource, load_state
from skipvision_export.models.weights import WeightTensor

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Skeleton:
    """A model whose parameters hold no numbers, and the weights by parameter name.

    Buffers, such as the frequencies of the rotation, are real.
    """

    model: Any
    weights: dict[str, WeightTensor]
    checkpoint: Checkpoint


def load_skeleton(source: ModelSource, dtype: str) -> Skeleton:
    """Lay out the model with transformers' own loader, on stand-ins of no size.

    Every key of the checkpoint gets a tensor of one number that is repeated over its shape. The loader
    renames, ties and checks keys as ever, and the memory that a parameter ends up with tells its key.
    Raises ModelError as load_model does, but for non-finite weights, which show when they are read.
    """
    import torch

    checkpoint = Checkpoint.open(source.folder)
    kind = getattr(torch, dtype)
    stored: dict[int, StoredTensor] = {}
    state = {}
    for number, (key, tensor) in enumerate(checkpoint.tensors.items()):
        if not tensor.is_float:  # a buffer, such as positions
            state[key] = _read(tensor)
            continue
        state[key] = _stand_in(number, kind, len(tensor.shape)).expand(tensor.shape)
        stored[state[key].data_ptr()] = tensor
    model = load_state(source, dtype, state)
    for _, buffer in model.named_buffers():
        if buffer.data_ptr() in stored:
            buffer.set_(_read(stored[buffer.data_ptr()]).to(buffer.dtype))
    weights = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        found = stored.get(parameter.data_ptr())
        if found is None:
            raise ModelError(
                f"weight {name} is no single tensor of numbers in {source.folder}, which export cannot "
                "stream; expected a checkpoint in float32, float16 or bfloat16 as transformers saves it"
            )
        weights[name] = WeightTensor(name, found, dtype)
    return Skeleton(model, weights, checkpoint)


def _stand_in(number: int, kind: torch.dtype, rank: int) -> torch.Tensor:
    """One number of a type, another one for each tensor: the loader ties parameters that it finds equal."""
    import torch

    bits = {2: torch.int16, 4: torch.int32}[kind.itemsize]
    # Below the bits of infinity in float16, the smallest of them.
    return torch.full([1] * rank, number % 0x7C00, dtype=bits).view(kind)


def _read(tensor: StoredTensor) -> torch.Tensor:
    from safetensors import safe_open

    with safe_open(tensor.file, "pt") as file:
        return file.get_tensor(tensor.key)  # type: ignore[no-any-return]
