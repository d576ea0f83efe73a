"""What a patched model is doing: the hooks of `apply_skip_vision`.

Shapes: B batch, S sequence, V visual tokens of an image, N images, K kept positions, M rows that go
through the FFN, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from skipvision_export.config import SkipVisionConfig
from skipvision_export.errors import InputError
from skipvision_export.layout import TokenLayout
from skipvision_export.method.masks import kept_positions, prefill_mask
from skipvision_export.method.merging import lay_out
from skipvision_export.method.placeholders import resize_placeholders
from skipvision_export.method.selection import cls_attention_scores
from skipvision_export.method.varying import VaryingPictures
from skipvision_export.models import ModelFamily
from skipvision_export.tokens import TorchImage

IGNORED = -100  # a label that counts for nothing, in transformers


class SkipVisionState:
    """The handle that `apply_skip_vision` yields.

    order: [N, V] int64, patch index of each visual token before merging, retained ones first, for
        the last images; a list of [V] where V varies.
    skipped: [B, S] bool in prefill, True where K/V will be dropped; None in decode.
    keep_index, keep_mask: [B, K], positions of the whole sequence whose K/V outlived the last prefill, and
        which of them count.
    prompt_length: positions up to the end of the last prefill, placeholders resized.
    """

    def __init__(
        self,
        family: ModelFamily,
        hf_config: Any,
        config: SkipVisionConfig,
        layout: TokenLayout,
        summary: nn.Module | None,
        train_skip_kv: bool = False,
    ) -> None:
        """Facts of the model; the rest is filled in by the hooks."""
        self.family, self.hf_config = family, hf_config
        self.config, self.layout, self.summary = config, layout, summary
        self.train_skip_kv = train_skip_kv
        self.image_token = family.image_token_id(hf_config)
        self.varying: VaryingPictures | None = None
        if family.dynamic:
            self.varying = VaryingPictures(family, hf_config, config, summary)
        self._order: Tensor | None = None
        self.skipped: Tensor | None = None
        self.keep_index: Tensor | None = None
        self.keep_mask: Tensor | None = None
        self.prompt_length = 0
        self.next_position: Tensor | None = None
        self._rows: dict[int, Tensor] = {}
        # Of the cache that a prefill goes on from: keep_index and keep_mask.
        self._cached = torch.empty(0, 0, dtype=torch.int64), torch.empty(0, 0, dtype=torch.int64)
        self._shape = torch.Size()
        self._image: Tensor | None = None  # [B, S] int64: 0 for text, i for a row's i-th picture
        self._answers: Tensor | None = None
        self._cls_query: Tensor | None = None
        self._scores: Tensor | None = None
        # Sees the features before and after they are laid out and says what the decoder reads.
        self.watch: Callable[[Tensor, Tensor], Tensor] | None = None

    @property
    def order(self) -> Tensor | list[Tensor] | None:
        """As above."""
        return self._order if self.varying is None else self.varying.order

    # -- choice of tokens ------------------------------------------------------------------------

    def on_query(self, module: nn.Module, args: Any, query: Tensor) -> None:
        """Hook on q_proj of the feature layer: query [N, 1+V, H*Dh]."""
        self._cls_query = query[:, :1].detach()

    def on_key(self, attention: nn.Module) -> Callable[..., None]:
        """Hook on k_proj of the feature layer (called after q_proj): key [N, 1+V, H*Dh]."""

        @torch.no_grad()
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
            self._scores = cls_attention_scores(weights.float().softmax(-1))

        return hook

    def cls_attention(self) -> Tensor:
        """[N, V] float32 of the images just encoded."""
        if self._scores is None:
            raise RuntimeError("the projector ran without the vision tower")
        return self._scores

    def on_features(self, module: nn.Module, args: Any, features: Tensor) -> Tensor:
        """Hook on the projector: [N, V, D] in raster order -> [N, layout.total, D]."""
        return self._lay_out(features)

    def pack_tiles(self, image_features: Any, image_sizes: Any, *args: Any, **kwargs: Any) -> Any:
        """In place of LLaVA-NeXT's pack_image_features: thumbnail and tiles [1+T, V, D] of each image.

        The tiles' tokens are merged as they come, neither unpadded nor with a newline token.
        """
        packed = [self._lay_out(crops.flatten(0, 1)[None])[0] for crops in image_features]
        lengths = [p.shape[0] for p in packed]
        return packed, torch.tensor(lengths, dtype=torch.long, device=packed[0].device)

    def _lay_out(self, features: Tensor) -> Tensor:
        image = TorchImage(features, self.cls_attention, self.config.seed)
        laid, self._order = lay_out(image, self.layout, self.config, self.summary)
        return laid if self.watch is None else self.watch(features, laid)

    # -- the prompt ------------------------------------------------------------------------------

    def on_call(self, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        """Pre-hook on the whole model: resize placeholders, ignore the labels of visual tokens."""
        ids, pixels = kwargs.get("input_ids", args[0] if args else None), kwargs.get("pixel_values")
        self._answers = None
        if ids is None:
            return None
        if pixels is not None:
            changed = self._resized(ids, kwargs)
            kwargs, ids = kwargs | changed, changed["input_ids"]
            args = args[1:] if args else args
        labels = kwargs.get("labels")
        if labels is not None:
            kwargs["labels"] = labels = labels.masked_fill(ids == self.image_token, IGNORED)
            self._answers = labels != IGNORED
        return args, kwargs

    def generating(self, generate: Callable[..., Any]) -> Callable[..., Any]:
        """`generate()` that resizes placeholders first; its sequences begin with the given prompt."""

        def wrapped(inputs: Tensor | None = None, **kwargs: Any) -> Any:
            ids = kwargs.pop("input_ids", inputs)
            if ids is None or kwargs.get("pixel_values") is None:
                given = {} if ids is None else {"input_ids": ids}
                return generate(**given, **kwargs)
            changed = self._resized(ids, kwargs)
            out = generate(**kwargs | changed)
            sequences = out if isinstance(out, Tensor) else out.sequences
            if changed["input_ids"] is not ids:
                prompts = ids.repeat_interleave(sequences.shape[0] // ids.shape[0], dim=0)
                new = sequences[:, changed["input_ids"].shape[1] :]
                sequences = torch.cat([prompts, new], dim=1)
            if isinstance(out, Tensor):
                return sequences
            out.sequences = sequences
            return out

        return wrapped

    def _resized(self, ids: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        """input_ids and what goes along with them, with the layout's number of placeholders."""
        mask = kwargs.get("attention_mask")
        others = {"attention_mask": (torch.ones_like(ids) if mask is None else mask, 0)}
        if kwargs.get("labels") is not None:
            others["labels"] = (kwargs["labels"], IGNORED)
        for name in ("token_type_ids", "mm_token_type_ids"):
            if kwargs.get(name) is not None:
                others[name] = (kwargs[name], 0)
        text = getattr(self.hf_config, "text_config", self.hf_config)
        per_image: Any = None if self.family.tiled else self.family.visual_tokens(self.hf_config)
        total: Any = self.layout.total
        if self.varying is not None:
            self.varying.see(kwargs["image_grid_thw"])
            per_image, total = self.varying.tokens, self.varying.totals
            images = len(total)
        else:
            images = self.family.images(kwargs["pixel_values"])
        new, changed = resize_placeholders(
            ids,
            others,
            image_token=self.image_token,
            per_image=per_image,
            total=total,
            pad_token=text.pad_token_id or 0,
            images=images,
        )
        if new is ids:
            return {"input_ids": ids}
        if kwargs.get("position_ids") is not None:
            raise InputError("leave position_ids out where apply_skip_vision changes the prompt's length")
        return {"input_ids": new, **changed}

    # -- decoder ---------------------------------------------------------------------------------

    def on_model(self, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        """Pre-hook on the multimodal model: skipped positions in prefill, mask and positions in decode."""
        ids = kwargs.get("input_ids", args[0] if args else None)
        cache = kwargs.get("past_key_values")
        past = cache.get_seq_length() if cache is not None else 0
        self.skipped, self._rows = None, {}
        if past and kwargs.get("pixel_values") is None:
            return self._decoding(args, kwargs, past)
        if not past:
            self.keep_index = self.keep_mask = self.next_position = None
            self.prompt_length = 0
        if ids is None:
            raise InputError("apply_skip_vision needs input_ids to find the visual tokens")
        is_image = ids == self.image_token
        self._shape = ids.shape
        self._remember(past)
        self.prompt_length += ids.shape[1]
        # The i-th placeholder of a row is token i mod total of an image.
        place = (is_image.cumsum(1) - 1).clamp(min=0)
        rank = place % self.layout.total
        varying = self.varying
        self._image = is_image * (place // self.layout.total + 1)
        if varying is not None:
            self._image = varying.numbers(is_image)

        def spread(of: Callable[[TokenLayout], list[bool]]) -> Tensor:
            """One flag for each token of a layout -> [B, S] bool; text is True."""
            if varying is not None:
                return varying.flags(is_image, of)
            return ~is_image | torch.tensor(of(self.layout), device=ids.device)[rank]

        self.skipped = ~spread(TokenLayout.kv_mask)
        for tier in self.layout.used_tiers():
            rows = spread(partial(TokenLayout.ffn_mask, tier=tier)).flatten().nonzero().squeeze(1)
            if rows.numel() < ids.numel():
                self._rows[tier] = rows
        return self._go_on(ids, args, kwargs)

    def _decoding(self, args: Any, kwargs: Any, past: int) -> tuple[Any, Any] | None:
        """The mask of what is left in the cache, and the original positions."""
        if self.keep_index is None or self.keep_mask is None:
            return None
        tokens = next(
            x for x in (kwargs.get("input_ids"), *args, kwargs.get("inputs_embeds")) if x is not None
        )
        mask, new, kept = kwargs.get("attention_mask"), tokens.shape[1], self.keep_index.shape[1]
        generated = past - kept + new
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

    def _go_on(self, ids: Tensor, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        """attention_mask [B, P+S] and positions of a prompt that comes behind a cache of P positions."""
        before = self._cached[1]
        if not before.numel():
            return None
        assert self.skipped is not None
        new, mask = self.skipped.shape[1], kwargs.get("attention_mask")
        seen = torch.ones_like(self.skipped, dtype=torch.int64) if mask is None else mask[:, -new:]
        kwargs["attention_mask"] = torch.cat([before.to(seen), seen], 1)
        if kwargs.get("position_ids") is None and self.next_position is not None:
            positions = torch.arange(new, device=seen.device).expand_as(self.skipped)
            if self.varying is not None:
                positions, _ = self.varying.count(ids, self.image_token, seen)
            kwargs["position_ids"] = self.next_position[:, None] + positions
        return args, kwargs

    def _remember(self, past: int) -> None:
        """Count what was generated since the last prefill among the positions that are kept."""
        if self.keep_index is None or self.keep_mask is None:
            if past and self.varying is not None:
                raise InputError(
                    "the cache was made before apply_skip_vision, so the next position is not known; feed "
                    "the conversation from its start inside of it"
                )
            # Nothing was dropped so far: every position is in the cache.
            self.prompt_length = past
            places = torch.arange(past).expand(self._shape[0], -1)
            self._cached = places, torch.ones_like(places)
            return
        generated = past - self.keep_index.shape[1]
        more = self.prompt_length + torch.arange(generated, device=self.keep_index.device)
        more = more.expand(self._shape[0], -1)
        self._cached = (
            torch.cat([self.keep_index, more], 1),
            torch.cat([self.keep_mask, torch.ones_like(more)], 1),
        )
        self.prompt_length += generated
        if self.next_position is not None:
            self.next_position = self.next_position + generated

    def on_norm(self, tier: int) -> Callable[..., Any]:
        """Pre-hook on the FFN's norm: [B, S, D] -> the rows of unskipped tokens [1, M, D]."""

        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
            rows = self._rows.get(tier)
            if rows is None:
                return None
            return (args[0].flatten(0, 1).index_select(0, rows).unsqueeze(0), *args[1:])

        return hook

    def on_mlp(self, tier: int) -> Callable[..., Any]:
        """Hook on the MLP: [1, M, D] -> [B, S, D], zero where the residual stream passes by."""

        def hook(module: nn.Module, args: Any, out: Tensor) -> Tensor | None:
            rows = self._rows.get(tier)
            if rows is None:
                return None
            full = out.new_zeros(self._shape.numel(), out.shape[-1])
            # In place: on a GPU one more copy of all rows costs a layer what a small FFN saves.
            return full.index_copy_(0, rows, out.squeeze(0)).unflatten(0, tuple(self._shape))

        return hook

    def on_decoder(self, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        """Pre-hook on the decoder: in prefill hide skipped tokens from the text after them, or from answers.

        Only where that is asked for.
        """
        answers = self._answers if self.train_skip_kv else None
        if self.varying is not None and self.skipped is not None:
            assert self._image is not None
            kwargs["position_ids"] = self.varying.place(kwargs.get("position_ids"), self._image > 0)
        if self.skipped is None or not self.skipped.any() or (not self.config.strict and answers is None):
            return None
        assert self._image is not None
        kwargs["attention_mask"] = prefill_mask(
            kwargs.get("attention_mask"),
            self.skipped,
            self._image,
            cached=self._cached[1].shape[1],
            strict=self.config.strict,
            answers=answers,
            dtype=kwargs["inputs_embeds"].dtype,
        )
        return args, kwargs

    def after_decoder(self, module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        """Hook on the decoder: after prefill, drop the K/V of skipped tokens in every layer."""
        cache = getattr(out, "past_key_values", None)
        before, counts = self._cached
        if self.skipped is None or cache is None:
            return
        # Of pictures of any shape a cache's length does not tell the next position, even where all is kept.
        if not (self.skipped.any() or before.numel() or self.varying is not None):
            return
        positions, new = kwargs.get("position_ids"), self.skipped.shape[1]
        if positions is None:
            start = before.shape[1]
            positions = torch.arange(start, start + new, device=self.skipped.device)[None]
        if positions.dim() == 3:  # of the axes any one: a prompt ends in text, where all are equal
            positions = positions[-1]
        self.next_position = positions[:, -1].expand(self.skipped.shape[0]) + 1
        kept, mask = kept_positions(self.skipped)
        self.keep_index = torch.cat([before.to(kept), self.prompt_length - new + kept], 1)
        self.keep_mask = torch.cat([counts.to(mask), mask], 1)
        columns = torch.arange(before.shape[1], device=kept.device).expand(kept.shape[0], -1)
        index = torch.cat([columns, before.shape[1] + kept], 1)[:, None, :, None]  # [B, 1, P+K, 1]
        for layer in cache.layers:
            shape = (-1, layer.keys.shape[1], -1, layer.keys.shape[3])
            layer.keys = layer.keys.gather(2, index.expand(shape))
            layer.values = layer.values.gather(2, index.expand(shape))
            if hasattr(layer, "cumulative_length"):  # of a sliding window, which counts apart from its keys
                layer.cumulative_length = index.shape[2]
