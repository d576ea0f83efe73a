"""Where the experts of a mixture stand in a Hugging Face model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


def experts_of(model: nn.Module) -> list[Any]:
    """A layer's experts each: `gate_up_proj` [E, 2*F, D], `down_proj` [E, D, F], `num_experts`, `config`."""
    return [
        module
        for module in model.modules()
        if hasattr(module, "num_experts") and getattr(getattr(module, "gate_up_proj", None), "ndim", 0) == 3
    ]
