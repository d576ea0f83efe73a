"""A model that holds the numbers of a half type, or of int4 weights, and computes in float32."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from skipvision_export.graph.int4 import rounded_to_int4
from skipvision_export.models.loading import ModelSource, load_model


class RoundedQuickGELU(nn.Module):
    """x * sigmoid(c x) on any shape, c being 1.702 rounded to a half type.

    Graphs hold that constant as a tensor of their own type, so it is rounded like a weight, while
    PyTorch takes it as a Python number. Left alone it moves a bfloat16 model's features by 1e-3.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        """dtype: what 1.702 is rounded to."""
        super().__init__()
        self.factor = float(torch.tensor(1.702, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """In the type of x."""
        return x * torch.sigmoid(self.factor * x)


def load_in_int4(source: ModelSource, dtype: str) -> Any:
    """The model in `dtype` with the numbers of int4 weights in the decoder's matrices.

    Raises ModelError as load_model does.
    """
    return _in_int4(load_model(source, dtype), source, dtype)


def _in_int4(model: Any, source: ModelSource, dtype: str) -> Any:
    """`model` itself, its matrices quantized from `dtype`; they keep the type that they have.

    A head that shares the embedding table gets a matrix of its own: embeddings stay as they are.
    """
    decoder, head = source.family.language_model(model), model.get_output_embeddings()
    with torch.no_grad():
        for linear in [m for m in (*decoder.modules(), head) if isinstance(m, nn.Linear)]:
            # Linear holds [N, K].
            matrix = linear.weight.to(getattr(torch, dtype)).numpy().T
            numbers = torch.from_numpy(rounded_to_int4(matrix)).T
            linear.weight = nn.Parameter(numbers.to(linear.weight.dtype).contiguous())
    return model


def load_rounded(source: ModelSource, dtype: str, weights: str | None = None) -> Any:
    """The model with its weights rounded to `dtype`, and to int4 as `weights` says, then widened.

    It computes in float32. Raises ModelError as load_model does, also for weights that overflow the
    type.
    """
    from transformers.activations import QuickGELUActivation

    model = load_model(source, dtype).float()
    if weights:
        model = _in_int4(model, source, dtype)
    if dtype == "float32":
        return model
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, QuickGELUActivation):
                setattr(module, name, RoundedQuickGELU(getattr(torch, dtype)))
    return model
