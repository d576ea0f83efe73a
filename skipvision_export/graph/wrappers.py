"""Flat-tensor views of an unpatched Hugging Face VLM, one for each graph of a bundle.

Shapes: B batch, S new positions, P cached positions, N images, V visual tokens of an image, D
hidden size, L layers, H key/value heads, Dh head size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from skipvision_export.models import ModelFamily, PatchInput


class VisionEncoder(nn.Module):
    """pixel_values [N, 3, height, width] -> image_features [N, V, D] in raster order.

    Tiled: pixel_values [N, T, 3, height, width] -> [N, T*V, D], crop by crop, the thumbnail first.
    """

    def __init__(self, model: nn.Module, family: ModelFamily) -> None:
        """Keep the parts that the picture goes through."""
        super().__init__()
        self.family, self.config = family, model.config
        self.tower = family.vision_tower(model)
        self.projector = family.projector(model)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """As the family encodes crops."""
        if self.family.tiled:
            crops = self._encode(pixel_values.flatten(0, 1))
            return crops.unflatten(0, pixel_values.shape[:2]).flatten(1, 2)
        return self._encode(pixel_values)

    def _encode(self, pixel_values: Tensor) -> Tensor:
        return self.family.image_features(self.config, self.tower, self.projector, pixel_values)


class PatchEncoder(nn.Module):
    """Of a `dynamic` family: pixel_values [P, C], image_grid_thw [1, 3] -> image_features [1, V, W].

    One picture: P patches in the order in which the processor gives them, V tokens in raster order, W as in
    `ModelFamily.patch_features`; where the family has a window_side, with a third input.
    """

    def __init__(self, model: nn.Module, family: ModelFamily) -> None:
        """Keep the parts that the picture goes through."""
        super().__init__()
        self.family, self.config = family, model.config
        self.tower = family.vision_tower(model)
        self.projector = family.projector(model)

    def forward(
        self, pixel_values: Tensor, image_grid_thw: Tensor, window_index: Tensor | None = None
    ) -> Tensor:
        """As the family encodes a picture."""
        picture = PatchInput(pixel_values, image_grid_thw, window_index)
        return self.family.patch_features(self.config, self.tower, self.projector, picture)


class EmbedTokens(nn.Module):
    """input_ids [B, S], image_features [N, V, D] -> inputs_embeds [B, S, D].

    The i-th placeholder of the batch takes the i-th feature row; one past the last row is a token as any
    other, such as one that was generated. N may be 0, and decode uses the same graph.

    Where the features are wider, [N, V, W], what is behind the first D comes out beside:
    deepstack_embeds [B, S, W - D], zero at text.
    """

    def __init__(self, model: nn.Module, image_token: int) -> None:
        """Share the embedding table."""
        super().__init__()
        self.embed: Any = model.get_input_embeddings()  # type: ignore[operator]
        self.image_token = image_token
        # Gemma 3's may lie behind the table; its row is read and not used.
        self.outside = image_token >= self.embed.num_embeddings

    def forward(self, input_ids: Tensor, image_features: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        """Gather by running count; a row of zeros behind the features makes N = 0 safe."""
        is_image = input_ids == self.image_token
        embeds = self.embed(input_ids.masked_fill(is_image, 0) if self.outside else input_ids)
        rows = image_features.flatten(0, 1)
        rows = torch.cat([rows, rows.new_zeros(1, rows.shape[-1])])
        last = rows.shape[0] - 1
        index = is_image.flatten().to(torch.int64).cumsum(0) - 1
        takes = is_image.flatten() & (index < last)
        features = rows[torch.where(takes, index, last)]
        shape = (input_ids.shape[0], input_ids.shape[1])
        takes, features = takes.unflatten(0, shape).unsqueeze(-1), features.unflatten(0, shape)
        width = embeds.shape[-1]
        if features.shape[-1] == width:
            return torch.where(takes, features, embeds)
        # The row of zeros is what text takes.
        return torch.where(takes, features[..., :width], embeds), features[..., width:]


class Decoder(nn.Module):
    """One pass of the text decoder over S new positions with P cached ones.

    inputs_embeds [B, S, D], attention_mask [B, P+S] int64, position_ids [B, S] int64 from 0 ([3, B, S]
    where positions have three axes: time, row, column), then past keys and values [B, H, P, Dh] of each
    layer in turn (none in prefill) -> logits [B, 1, vocab] of the last position, then keys and values
    [B, H, P+S, Dh] of each layer in turn.
    """

    def __init__(self, model: nn.Module, family: ModelFamily) -> None:
        """Keep the decoder and its head."""
        super().__init__()
        self.decoder, self.first = family.language_model(model), family.first_position
        self.head: Any = model.get_output_embeddings()  # type: ignore[operator]

    def forward(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        past: list[Tensor],
    ) -> tuple[Tensor, ...]:
        """Through a DynamicCache built here: passing one in cannot be exported."""
        from transformers import DynamicCache

        cache: Any = DynamicCache()
        for layer in range(len(past) // 2):
            cache.update(past[2 * layer], past[2 * layer + 1], layer)
        out = self.decoder(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids + self.first if self.first else position_ids,
            past_key_values=cache,
            use_cache=True,
        )
        logits = self.head(out.last_hidden_state[:, -1:])
        present = [t for layer in cache.layers for t in (layer.keys, layer.values)]
        return (logits, *present)
