"""The reference: Skip-Vision on a Hugging Face model, by hooks that are taken off again.

It is the specification that exported graphs are compared with, so it shares nothing with the
graph passes but the token counts of `TokenLayout`. Shapes: B batch, S sequence, V visual tokens of
an image, N images, K kept positions, M rows that go through the FFN, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from skipvision_export.config import SkipVisionConfig, TokenLayout
from skipvision_export.errors import InputError
from skipvision_export.method.selection import cls_attention_scores, layout_order
from skipvision_export.models import ModelFamily, family_of


class SkipVisionState:
    """What a patched model is doing; the handle that `apply_skip_vision` yields.

    order: [N, V] int64, patch index of each visual token in layout order, for the last images.
    skipped: [B, S] bool in prefill, None in decode.
    keep_index, keep_mask: [B, K], positions whose K/V outlived prefill, and which of them count.
    """

    def __init__(self, family: ModelFamily, config: Any, layout: TokenLayout) -> None:
        """Facts of the model; the rest is filled in by the hooks."""
        self.family = family
        self.layout = layout
        self.image_token = family.image_token_id(config)
        self.order: Tensor | None = None
        self.skipped: Tensor | None = None
        self.rows: Tensor | None = None
        self.keep_index: Tensor | None = None
        self.keep_mask: Tensor | None = None
        self.prompt_length = 0
        self.next_position: Tensor | None = None
        self._cls_query: Tensor | None = None
        self._scores: Tensor | None = None

    # -- choice of tokens ------------------------------------------------------------------------

    def on_query(self, module: nn.Module, args: Any, query: Tensor) -> None:
        """Hook on q_proj of the feature layer: query [N, 1+V, H*Dh]."""
        self._cls_query = query[:, :1]

    def on_key(self, attention: nn.Module) -> Callable[..., None]:
        """Hook on k_proj of the feature layer (called after q_proj): key [N, 1+V, H*Dh]."""

        def hook(module: nn.Module, args: Any, key: Tensor) -> None:
            query = self._cls_query
            if query is None:
                raise RuntimeError("the vision tower computed keys before queries")
            facts: Any = attention
            heads, dim, scale = facts.num_heads, facts.head_dim, facts.scale

            def split(x: Tensor) -> Tensor:
                return x.unflatten(-1, (heads, dim)).transpose(1, 2)  # [N, H, rows, Dh]

            weights = split(query) @ split(key).transpose(-1, -2) * scale
            # float32 whatever the model's dtype: in bfloat16 too few scores stay distinct.
            self._scores = cls_attention_scores(weights.float().softmax(-1)).detach()

        return hook

    def on_features(self, module: nn.Module, args: Any, features: Tensor) -> Tensor:
        """Hook on the projector: [N, V, D] in raster order -> layout order."""
        if self._scores is None:
            raise RuntimeError("the projector ran without the vision tower")
        self.order = layout_order(self._scores, self.layout.count("retained"))
        return features.gather(1, self.order.unsqueeze(-1).expand(-1, -1, features.shape[-1]))

    # -- decoder ---------------------------------------------------------------------------------

    def on_model(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Pre-hook on the multimodal model: find the skipped positions of a prefill."""
        ids = kwargs.get("input_ids", args[0] if args else None)
        cache = kwargs.get("past_key_values")
        past = cache.get_seq_length() if cache is not None else 0
        if kwargs.get("pixel_values") is not None and past:
            raise InputError("pictures must come with the first call, before anything is cached")
        self.skipped = self.rows = None
        if past:
            return
        self.keep_index = self.keep_mask = self.next_position = None
        if ids is None:
            raise InputError("apply_skip_vision needs input_ids to find the visual tokens")
        is_image = ids == self.image_token
        flags = torch.tensor(self.layout.skipped_mask(), device=ids.device)
        # The i-th placeholder of a row is token i mod V of an image.
        rank = (is_image.cumsum(1) - 1).clamp(min=0) % self.layout.total
        self.skipped = is_image & flags[rank]
        self.rows = (~self.skipped).flatten().nonzero().squeeze(1)

    def on_norm(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        """Pre-hook on the FFN's norm: [B, S, D] -> the rows of unskipped tokens [1, M, D]."""
        if self.rows is None:
            return None
        return (args[0].flatten(0, 1)[self.rows].unsqueeze(0), *args[1:])

    def on_mlp(self, module: nn.Module, args: Any, out: Tensor) -> Tensor | None:
        """Hook on the MLP: [1, M, D] -> [B, S, D], zero where the residual stream passes by."""
        if self.rows is None or self.skipped is None:
            return None
        full = out.new_zeros(self.skipped.numel(), out.shape[-1])
        full = full.index_copy(0, self.rows, out.squeeze(0))
        return full.unflatten(0, tuple(self.skipped.shape))

    def on_decoder(self, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        """Pre-hook on the decoder: in decode, drop the mask's pruned columns, go on in positions."""
        if self.skipped is not None or self.keep_index is None or self.keep_mask is None:
            return None
        mask = kwargs.get("attention_mask")
        kept = self.keep_index.shape[1]
        new = kwargs["inputs_embeds"].shape[1]
        generated = kwargs["past_key_values"].get_seq_length() - kept + new
        if mask is not None and mask.dim() == 2 and mask.shape[1] != kept + generated:
            mask = torch.cat([mask.gather(1, self.keep_index), mask[:, self.prompt_length :]], 1)
        elif mask is None:
            mask = self.keep_mask.new_ones(self.keep_mask.shape[0], kept + generated)
        mask = mask.clone()
        mask[:, :kept] *= self.keep_mask
        kwargs["attention_mask"] = mask
        if kwargs.get("position_ids") is None and self.next_position is not None:
            steps = torch.arange(generated - new, generated, device=mask.device)
            kwargs["position_ids"] = self.next_position[:, None] + steps
        return args, kwargs

    def after_decoder(self, module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        """Hook on the decoder: after prefill, drop the K/V of skipped tokens in every layer."""
        cache = getattr(out, "past_key_values", None)
        if self.skipped is None or cache is None or not self.skipped.any():
            return
        positions = kwargs.get("position_ids")
        length = self.skipped.shape[1]
        if positions is None:
            positions = torch.arange(length, device=self.skipped.device).expand(self.skipped.shape)
        self.next_position = positions[:, -1] + 1
        self.prompt_length = length
        self.keep_index, self.keep_mask = kept_positions(self.skipped)
        index = self.keep_index[:, None, :, None]  # [B, 1, K, 1]
        for layer in cache.layers:
            shape = (-1, layer.keys.shape[1], -1, layer.keys.shape[3])
            layer.keys = layer.keys.gather(2, index.expand(shape))
            layer.values = layer.values.gather(2, index.expand(shape))


def kept_positions(skipped: Tensor) -> tuple[Tensor, Tensor]:
    """Positions that keep their K/V, as a rectangle.

    skipped: [B, S] bool -> index [B, K] int64 ascending, and mask [B, K] int64 that is 0 where a
    row keeps fewer than the longest row and was filled up with skipped positions.
    """
    kept = int((~skipped).sum(1).max())
    # Stable: a row's kept positions first, ascending, then its skipped ones as filling.
    index = torch.sort(skipped.to(torch.int8), dim=1, stable=True).indices[:, :kept]
    index = index.sort(dim=1).values
    return index, (~skipped).gather(1, index).long()


@contextmanager
def apply_skip_vision(model: nn.Module, config: SkipVisionConfig) -> Iterator[SkipVisionState]:
    """Skip-FFN and Skip-KV on a Hugging Face VLM; `generate()` works inside, restored on exit.

    In prefill the features of each image are put in layout order (retained, then skipped), skipped
    tokens pass by every FFN, and their keys and values are dropped once prefill is over; decode
    goes on at the original positions. Source: Skip-Vision, sections on Skip-FFN and Skip KV-cache.

    Raises ModelError for an unsupported architecture, ConfigError where `config` does not fit it.
    """
    family = family_of([type(model).__name__], "the model's class")
    hf_config: Any = model.config
    family.check(hf_config)
    layout = config.layout(family.visual_tokens(hf_config))
    state = SkipVisionState(family, hf_config, layout)
    attention = family.vision_layers(model)[family.vision_dims(hf_config).feature_layer].self_attn
    decoder = family.language_model(model)
    multimodal: nn.Module = model.model  # type: ignore[assignment]
    handles = [
        attention.q_proj.register_forward_hook(state.on_query),  # type: ignore[union-attr]
        attention.k_proj.register_forward_hook(state.on_key(attention)),  # type: ignore[union-attr,arg-type]
        family.projector(model).register_forward_hook(state.on_features),
        multimodal.register_forward_pre_hook(state.on_model, with_kwargs=True),
        decoder.register_forward_pre_hook(state.on_decoder, with_kwargs=True),
        decoder.register_forward_hook(state.after_decoder, with_kwargs=True),
    ]
    for layer in family.decoder_layers(model):
        norm, mlp = family.ffn(layer)
        handles += [
            norm.register_forward_pre_hook(state.on_norm),
            mlp.register_forward_hook(state.on_mlp),
        ]
    try:
        yield state
    finally:
        for handle in handles:
            handle.remove()
