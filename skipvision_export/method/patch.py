"""The reference: Skip-Vision on a Hugging Face model, by hooks that are taken off again.

It is the specification that exported graphs are compared with, so it shares nothing with the
graph passes but the token counts of `TokenLayout`. It also is what training runs through.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from skipvision_export.config import SkipVisionConfig
from skipvision_export.errors import ConfigError
from skipvision_export.method.state import SkipVisionState
from skipvision_export.method.summary import SummaryTokens
from skipvision_export.method.varying import patched
from skipvision_export.models import ModelFamily, check_parts, family_of


@contextmanager
def apply_skip_vision(
    model: nn.Module,
    config: SkipVisionConfig | str | Path,
    *,
    summary: SummaryTokens | None = None,
    train_skip_kv: bool = False,
) -> Iterator[SkipVisionState]:
    """Skip-FFN and Skip-KV on a Hugging Face VLM; `generate()` works inside, restored on exit.

    In prefill the features of each image are merged, summarized and put in layout order
    ([retained][q1][skipped][q2]), skipped tokens pass by every FFN, and their keys and values are
    dropped once prefill is over; decode goes on at the original positions. `input_ids` may hold the
    model's own number of placeholders for a picture or the layout's: the former are replaced, in a
    plain call (whose logits then have the layout's length) and in `generate()` (whose sequences
    begin with the given prompt). With `labels`, those of visual tokens are ignored. Source:
    Skip-Vision, sections on Skip-FFN and Skip KV-cache.

    config: a configuration, or a file of a policy or configuration.
    summary: trained summary tokens; by default those attached to the model by
        `attach_summary`, else the plain mean.
    train_skip_kv: with labels, answer tokens do not see skipped tokens, as in decode.

    Raises ModelError for an unsupported architecture, ConfigError where `config` does not fit it.
    """
    if not isinstance(config, SkipVisionConfig):
        config = SkipVisionConfig.load(config)
    family = family_of([type(model).__name__], "the model's class")
    hf_config: Any = model.config
    family.check(hf_config)
    check_parts(family, model)
    config = family.fitted(hf_config, config)
    layout = family.layout(hf_config, config)
    if layout.summaries and summary is None:
        summary = getattr(model, SUMMARY, None) or _plain_mean(model, family, hf_config)
    state = SkipVisionState(family, hf_config, config, layout, summary, train_skip_kv)
    handles: list[Any] = []
    replaced: list[tuple[nn.Module, str]] = []

    def replace(owner: nn.Module, name: str, function: Callable[..., Any]) -> None:
        if name in vars(owner):
            raise ConfigError("the model is patched already; leave the outer apply_skip_vision first")
        owner.__dict__[name] = function
        replaced.append((owner, name))

    try:
        replace(model, "generate", state.generating(model.generate))  # type: ignore[arg-type]
        _hook_vision(state, family, model, hf_config, handles, replace)
        handles.append(model.register_forward_pre_hook(state.on_call, with_kwargs=True))
        multimodal: nn.Module = model.model  # type: ignore[assignment]
        decoder = family.language_model(model)
        handles += [
            multimodal.register_forward_pre_hook(state.on_model, with_kwargs=True),
            decoder.register_forward_pre_hook(state.on_decoder, with_kwargs=True),
            decoder.register_forward_hook(state.after_decoder, with_kwargs=True),
        ]
        for i, layer in enumerate(family.decoder_layers(model)):
            tier = layout.layer_tier(i)
            if tier:
                norm, mlp = family.ffn(layer)
                handles += [
                    norm.register_forward_pre_hook(state.on_norm(tier)),
                    mlp.register_forward_hook(state.on_mlp(tier)),
                ]
        yield state
    finally:
        for handle in handles:
            handle.remove()
        for owner, name in replaced:
            del owner.__dict__[name]


# Name under which trainable summary tokens are a submodule of the Hugging Face model.
SUMMARY = "skip_vision_summary"


def attach_summary(model: nn.Module, summary: SummaryTokens | None = None) -> SummaryTokens:
    """Make summary tokens a submodule of the model, so that they train and are saved with it."""
    family = family_of([type(model).__name__], "the model's class")
    if summary is None:
        summary = _plain_mean(model, family, model.config)
    setattr(model, SUMMARY, summary)
    return summary


def _plain_mean(model: nn.Module, family: ModelFamily, hf_config: Any) -> SummaryTokens:
    """Untrained summary tokens in the model's type and place."""
    weights = next(family.projector(model).parameters())
    return SummaryTokens(family.decoder_dims(hf_config).hidden_size).to(weights.device, weights.dtype)


def _hook_vision(
    state: SkipVisionState,
    family: ModelFamily,
    model: nn.Module,
    hf_config: Any,
    handles: list[Any],
    replace: Callable[..., None],
) -> None:
    vision = family.vision_dims(hf_config)
    if vision.cls_chooses:
        attention = family.vision_layers(model)[vision.feature_layer].self_attn
        handles += [
            attention.q_proj.register_forward_hook(state.on_query),  # type: ignore[union-attr]
            attention.k_proj.register_forward_hook(state.on_key(attention)),  # type: ignore[union-attr,arg-type]
        ]
    if state.varying is not None:
        patched(state.varying, model, state.image_token, lambda: state.watch, replace)
    elif family.tiled:
        replace(model.model, "pack_image_features", state.pack_tiles)
    else:
        handles.append(family.projector(model).register_forward_hook(state.on_features))
