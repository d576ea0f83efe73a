"""A model without its weights, for tracing, and where each of them stands in the checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from skipvision_export.errors import ModelError
from skipvision_export.models.checkpoint import Checkpoint, StoredTensor
from skipvision_export.models.loading import ModelSource, load_state
from skipvision_export.models.weights import WeightTensor


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
    for key, tensor in checkpoint.tensors.items():
        state[key] = torch.empty([1] * len(tensor.shape), dtype=kind).expand(tensor.shape)
        stored[state[key].data_ptr()] = tensor
    model = load_state(source, dtype, state)
    weights = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        found = stored.get(parameter.data_ptr())
        if found is None:
            raise ModelError(
                f"weight {name} is no single tensor of {source.folder}, which this version cannot stream"
            )
        weights[name] = WeightTensor(name, found, dtype)
    return Skeleton(model, weights, checkpoint)
