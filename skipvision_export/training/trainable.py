"""What of a model trains, and the whole model's weights after training."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from skipvision_export.errors import SkipVisionError
from skipvision_export.method.patch import SUMMARY
from skipvision_export.models import ModelFamily

_LORA_SCALE = 2
_BASE, _A, _B = ".base_layer.", ".lora_A.default.", ".lora_B.default."


def choose_trainable(
    model: Any, family: ModelFamily, *, lora_rank: int = 0, train_vision: bool = False
) -> None:
    """Let the decoder, its head, the projector and attached summary tokens train, in place.

    With `lora_rank` the decoder's layers get adapters on their linear layers instead, scaled by 2,
    and its other weights stay. The vision tower stays frozen unless `train_vision`, and always
    behind the layer whose features are used.
    """
    model.requires_grad_(False)
    if lora_rank:
        _add_lora(model, family, lora_rank)
    else:
        family.language_model(model).requires_grad_(True)
        model.get_output_embeddings().requires_grad_(True)
    if train_vision:
        _unfreeze_tower(model, family)
    family.projector(model).requires_grad_(True)
    summary = getattr(model, SUMMARY, None)
    if summary is not None:
        summary.requires_grad_(True)


def trainable_state(model: nn.Module) -> dict[str, Tensor]:
    """The weights that train, by name."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def merge_lora(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with its adapters added to the weights they belong to: plain names, plain layers."""
    merged = {}
    for name, tensor in state.items():
        if _A in name or _B in name:
            continue
        if _BASE in name:
            a, b = (state.get(name.replace(_BASE, part)) for part in (_A, _B))
            name = name.replace(_BASE, ".")
            if a is not None and b is not None:
                tensor = (tensor.float() + _LORA_SCALE * (b.float() @ a.float())).to(tensor.dtype)
        merged[name] = tensor
    return merged


def split_summary(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The model's own weights, and the attached summary tokens' under their own names."""
    prefix = f"{SUMMARY}."
    own = {name: tensor for name, tensor in state.items() if not name.startswith(prefix)}
    summary = {n.removeprefix(prefix): tensor for n, tensor in state.items() if n.startswith(prefix)}
    return own, summary


def _add_lora(model: nn.Module, family: ModelFamily, rank: int) -> None:
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise SkipVisionError("LoRA needs peft; install skipvision-export[train]") from None
    linear = {id(m) for m in family.decoder_layers(model).modules() if isinstance(m, nn.Linear)}
    names = [name for name, module in model.named_modules() if id(module) in linear]
    config = LoraConfig(r=rank, lora_alpha=_LORA_SCALE * rank, target_modules=names)
    # In place, without peft's wrapper: the model stays one of transformers, for the patch and for FSDP.
    inject_adapter_in_model(config, model)


def _unfreeze_tower(model: nn.Module, family: ModelFamily) -> None:
    """Up to the layer whose features are used: what is behind it gets no gradient."""
    config: Any = model.config
    used = family.vision_dims(config).num_layers
    layers = family.vision_layers(model)
    family.vision_tower(model).requires_grad_(True)
    layers[used:].requires_grad_(False)
    for name, parameter in family.vision_tower(model).named_parameters():
        if "post_layernorm" in name:
            parameter.requires_grad_(False)
