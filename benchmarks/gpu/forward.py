"""A prompt through the modules of a Hugging Face LLaVA, with nothing that waits for the device.

transformers' own forward and the hooks of `apply_skip_vision` ask the device how many rows there are, so
they cannot become a CUDA graph, and at batch 1 their host part takes longer than the GPU. Here the roles are
known before the prompt comes, as in an exported graph: indices are made once. inference.py first proves this
equal to the patched model. Shapes: B batch, S sequence, M rows that go through an FFN, K kept positions.
"""

from __future__ import annotations

from typing import Any

import torch
from shapes import PRUNE_AT, TEXT, TEXT_BEFORE, Contender, Shape, layout_of
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from skipvision_export.method import SkipVisionState, SummaryTokens, lay_out
from skipvision_export.tokens import TorchImage, selector


class Cache:
    """K and V of all layers in one buffer, written in place; what a layer's attention calls `update` of.

    lengths: positions that each layer keeps of the prompt; room: more for what is generated.
    """

    def __init__(self, shape: Shape, batch: int, lengths: list[int], room: int, memory: Tensor) -> None:
        """memory: of at least `numbers(...)`; contenders that run one after the other share it."""
        self.lengths, self.step, at = lengths, -1, 0
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.keep: Tensor | None = None
        size = shape.hidden // shape.heads
        for length in lengths:
            for into in (self.keys, self.values):
                sizes = (batch, shape.kv_heads, length + room, size)
                count = batch * shape.kv_heads * (length + room) * size
                into.append(memory[at : at + count].view(sizes))
                at += count

    @staticmethod
    def numbers(shape: Shape, batch: int, lengths: list[int], room: int) -> int:
        """Of a buffer."""
        return int(
            2 * batch * shape.kv_heads * (shape.hidden // shape.heads) * sum(n + room for n in lengths)
        )

    def update(
        self, key: Tensor, value: Tensor, layer: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """[B, H, S, Dh] each; prefill keeps what `keep` names, a decode step adds one position."""
        seen = []
        for new, buffers in ((key, self.keys), (value, self.values)):
            buffer, length = buffers[layer], self.lengths[layer]
            if self.step >= 0:
                at = length + self.step
                buffer[:, :, at : at + 1].copy_(new)
                seen.append(buffer[:, :, : at + 1])
            else:
                if self.keep is None:
                    buffer[:, :, :length].copy_(new)
                else:
                    torch.index_select(new, 2, self.keep, out=buffer[:, :, :length])
                seen.append(new)
        return seen[0], seen[1]


def cache_lengths(shape: Shape, contender: Contender) -> list[int]:
    """Cached positions of each layer behind the prompt."""
    layout, n = layout_of(shape, contender), shape.layers
    if contender.prune:
        return [TEXT + layout.total] * PRUNE_AT + [TEXT + contender.kept] * (n - PRUNE_AT)
    return [TEXT + layout.kept_kv] * n


class Runner:
    """One contender at one batch size; every tensor that outlives a call is allocated here, once."""

    def __init__(
        self,
        model: Any,
        shape: Shape,
        contender: Contender,
        batch: int,
        room: int,
        memory: Tensor | None = None,
    ) -> None:
        """room: new tokens that are decoded at most; memory: for K and V, see Cache."""
        self.model, self.shape, self.contender, self.batch = model, shape, contender, batch
        self.device, self.dtype = model.device, model.dtype
        self.decoder, self.head = shape.family.language_model(model), model.lm_head
        self.layout = layout_of(shape, contender)
        self.length = TEXT + self.layout.total
        self.ids = shape.ids(batch, self.device, self.layout.total)
        self.pixels = shape.pixels(batch, self.device, self.dtype)
        self.token = torch.zeros(batch, 1, dtype=torch.int64, device=self.device)
        self.logits = torch.empty(batch, shape.vocab, dtype=self.dtype, device=self.device)
        self.place = slice(TEXT_BEFORE, TEXT_BEFORE + self.layout.total)
        self.rows = self._rows()
        self.lengths = cache_lengths(shape, contender)
        if memory is None:
            needed = Cache.numbers(shape, batch, self.lengths, room)
            memory = torch.empty(needed, dtype=self.dtype, device=self.device)
        self.cache = Cache(shape, batch, self.lengths, room, memory)
        self.cache.keep = self._keep()
        positions = torch.arange(self.length + room, device=self.device)[None]
        embeds = torch.empty(1, 1, shape.hidden, dtype=self.dtype, device=self.device)
        self.cos, self.sin = self.decoder.rotary_emb(embeds, positions)
        self.index: Any = None  # [B, K], of what was left in front of layer PRUNE_AT
        self.state: Any = None
        if contender.config is not None:
            summary = SummaryTokens(shape.hidden).to(self.device, self.dtype)
            config = shape.family.fitted(shape.config, contender.config)
            self.state = SkipVisionState(shape.family, shape.config, config, self.layout, summary)

    def _spread(self, flags: list[bool]) -> Tensor:
        """One flag for each visual token -> [S] bool, text True."""
        return torch.tensor([True] * TEXT_BEFORE + flags + [True] * (TEXT - TEXT_BEFORE), device=self.device)

    def _rows(self) -> Tensor | None:
        """[M] int64 of the flattened [B*S]; None where every row goes through the FFNs."""
        through = self._spread(self.layout.ffn_mask()).repeat(self.batch)
        return None if bool(through.all()) else through.nonzero().squeeze(1)

    def _keep(self) -> Tensor | None:
        """[K] int64; None where all K and V stay."""
        kept = self._spread(self.layout.kv_mask())
        return None if bool(kept.all()) else kept.nonzero().squeeze(1)

    # -- prefill --

    @torch.no_grad()
    def features(self) -> Tensor:
        """The visual tokens in layout order, [B, total, D]."""
        family, config = self.shape.family, self.shape.config
        tower, projector = family.vision_tower(self.model), family.projector(self.model)
        hooks = []
        if self.state is not None and family.vision_dims(config).cls_chooses:
            attention: Any = family.vision_layers(self.model)[
                family.vision_dims(config).feature_layer
            ].self_attn
            hooks = [
                attention.q_proj.register_forward_hook(self.state.on_query),
                attention.k_proj.register_forward_hook(self.state.on_key(attention)),
            ]
        try:
            found = family.image_features(config, tower, projector, self.pixels.flatten(0, -4))
        finally:
            for hook in hooks:
                hook.remove()
        found = found.unflatten(0, (self.batch, -1)).flatten(1, 2)
        if self.state is None:
            return found
        image = TorchImage(found, self.state.cls_attention)
        return lay_out(image, self.layout, self.state.config, self.state.summary)[0]

    @torch.no_grad()
    def prefill(self, features: Tensor) -> Tensor:
        """Logits [B, vocab] of the last position; K and V go to the cache, the next token to `token`."""
        h = self.decoder.embed_tokens(self.ids)
        h[:, self.place] = features.to(h.dtype)
        cos, sin = self.cos[:, : self.length], self.sin[:, : self.length]
        self.cache.step, last = -1, None
        for i, layer in enumerate(self.decoder.layers):
            if self.contender.prune and i == PRUNE_AT:
                index = self.index = self._pruned(self.decoder.layers[i - 1], i - 1, last)
                h = h.gather(1, index[..., None].expand(-1, -1, h.shape[-1]))
                wide = index[..., None].expand(-1, -1, cos.shape[-1])
                cos, sin = (x.expand(self.batch, -1, -1).gather(1, wide) for x in (cos, sin))
            normed = layer.input_layernorm(h)
            last = normed[:, -1:]
            h = h + self._attention(layer, normed, cos, sin)
            self._ffn(layer, h)
        return self._head(h)

    def _attention(self, layer: Any, normed: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """[B, S, D] -> the same, the residual apart."""
        out: Tensor = layer.self_attn(
            hidden_states=normed,
            position_embeddings=(cos, sin),
            attention_mask=None,
            past_key_values=self.cache,
        )[0]
        return out

    def _ffn(self, layer: Any, h: Tensor) -> None:
        """Add a layer's FFN to the rows that go through it, in place; the others are not touched."""
        flat = h.view(-1, h.shape[-1])
        if self.rows is None or self.cache.step >= 0:
            flat += layer.mlp(layer.post_attention_layernorm(flat))
            return
        x = flat.index_select(0, self.rows)
        flat.index_copy_(0, self.rows, x + layer.mlp(layer.post_attention_layernorm(x)))

    def _head(self, h: Tensor) -> Tensor:
        logits: Tensor = self.head(self.decoder.norm(h[:, -1]))
        self.logits.copy_(logits)
        self.token.copy_(logits.argmax(-1, keepdim=True))
        return logits

    def _pruned(self, layer: Any, i: int, last: Any) -> Tensor:
        """Positions that stay, [B, K] ascending: all text, and the visual tokens with the best scores.

        fastv: attention of the last token in the layer before, the mean over heads (arXiv 2403.06764); dart:
        keys there that least duplicate those of the pivots (arXiv 2502.11494), by this project's `dart`.
        """
        keys = self.cache.keys[i][:, :, : self.length]  # rotated
        if self.contender.prune == "fastv":
            size = keys.shape[-1]
            query = layer.self_attn.q_proj(last).unflatten(-1, (-1, size)).transpose(1, 2)
            at = slice(self.length - 1, self.length)
            query = apply_rotary_pos_emb(query, query, self.cos[:, at], self.sin[:, at])[0]
            grouped = query.view(self.batch, keys.shape[1], -1, size)
            weights = (grouped @ keys.transpose(-1, -2) * size**-0.5).float().softmax(-1)
            scores = weights.mean((1, 2))[:, self.place]
        else:
            flat = keys[:, :, self.place].transpose(1, 2).flatten(2)
            scores = selector("dart").scores(TorchImage(flat, self._no_scores))
        visual = scores.topk(self.contender.kept, dim=1).indices.sort(dim=1).values + TEXT_BEFORE
        ends = torch.arange(self.length, device=self.device).expand(self.batch, -1)
        return torch.cat([ends[:, :TEXT_BEFORE], visual, ends[:, self.place.stop :]], 1)

    @staticmethod
    def _no_scores() -> Tensor:
        raise RuntimeError("dart looks at features only")

    def first_token(self) -> None:
        """Everything up to the first new token."""
        self.prefill(self.features())

    # -- decode --

    @torch.no_grad()
    def decode(self, step: int) -> Tensor:
        """Logits [B, vocab] behind the `step`-th new token, at the position that it has without pruning."""
        h = self.decoder.embed_tokens(self.token)
        at = slice(self.length + step, self.length + step + 1)
        self.cache.step = step
        for layer in self.decoder.layers:
            h = h + self._attention(layer, layer.input_layernorm(h), self.cos[:, at], self.sin[:, at])
            self._ffn(layer, h)
        return self._head(h)
