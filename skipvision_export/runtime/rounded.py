"""A model that holds a half type's numbers and computes in float32."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

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


def load_rounded(source: ModelSource, dtype: str) -> Any:
    """The model with its weights rounded to `dtype`, then widened: it computes in float32.

    Raises ModelError as load_model does, also for weights that overflow the type.
    """
    from transformers.activations import QuickGELUActivation

    model = load_model(source, dtype).float()
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, QuickGELUActivation):
                setattr(module, name, RoundedQuickGELU(getattr(torch, dtype)))
    return model
