"""Idefics3 and SmolVLM: a SigLIP-like tower, a pixel shuffle in the connector, pictures split in crops."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from skipvision_export.errors import ModelError
from skipvision_export.models.registry import ModelFamily, VisionDims, check_text, register, siglip_dims

if TYPE_CHECKING:
    from torch import Tensor, nn


@register
class Idefics3(ModelFamily):
    """`Idefics3ForConditionalGeneration` and `SmolVLMForConditionalGeneration` of transformers.

    Every crop is an image of its own to the decoder, with text around it that tells its row and column. The
    processor resizes pictures to whole crops, so no pixel is masked.
    """

    name = "idefics3"
    architectures = ("Idefics3ForConditionalGeneration", "SmolVLMForConditionalGeneration")
    cropped = True

    def check(self, config: Any) -> None:
        """Text models of Llama's build, and towers whose patches have their positions in order."""
        check_text(config.text_config)
        vision = config.vision_config
        side = vision.image_size // vision.patch_size
        if not _in_order(side):
            raise ModelError(
                f"the vision tower has {side} patches in a row; its code rounds their positions to others "
                "than 0, 1, 2, ..., which the exported graph has; supported are 26, 27, 32 and others"
            )

    def inputs(self, config: Any, ids: Tensor, pixel_values: Tensor) -> dict[str, Tensor]:
        """Crops behind an axis of prompts."""
        return {"pixel_values": pixel_values[None]}

    def images(self, pixel_values: Tensor) -> int:
        """Crops of all prompts [B, N, 3, h, w] but those of zeros, which pad the number of crops."""
        return int(pixel_values.flatten(0, 1).flatten(1).any(1).sum())

    def vision_dims(self, config: Any) -> VisionDims:
        """The connector makes one token of a square of patches."""
        vision, out, patches = config.vision_config, config.text_config.hidden_size, config.scale_factor**2
        dims = siglip_dims(vision, out)
        return replace(dims, projector=((vision.hidden_size * patches, out),), token_patches=patches)

    def image_features(self, config: Any, tower: Any, projector: Any, pixel_values: Tensor) -> Tensor:
        """The tower without its masks: where no pixel is masked, the i-th patch has the i-th position."""
        x = tower.embeddings.patch_embedding(pixel_values).flatten(2).transpose(1, 2)
        x = x + tower.embeddings.position_embedding.weight
        x = tower.encoder(inputs_embeds=x, attention_mask=None).last_hidden_state
        return projector(tower.post_layernorm(x))  # type: ignore[no-any-return]

    def vision_tower(self, model: nn.Module) -> nn.Module:
        """Idefics3VisionTransformer."""
        return model.model.vision_model  # type: ignore[union-attr,return-value]

    def projector(self, model: nn.Module) -> nn.Module:
        """Idefics3Connector."""
        return model.model.connector  # type: ignore[union-attr,return-value]

    def language_model(self, model: nn.Module) -> nn.Module:
        """LlamaModel."""
        return model.model.text_model  # type: ignore[union-attr,return-value]


def _in_order(side: int) -> bool:
    """Does Idefics3VisionEmbeddings give a row of patches the positions 0, 1, 2, ...? Its float32 may not."""
    import torch

    places = torch.arange(side, dtype=torch.float32) * (1.0 / torch.tensor(side))
    borders = torch.arange(1 / side, 1.0, 1 / side)
    return torch.bucketize(places.clamp(max=1.0 - 1e-6), borders, right=True).tolist() == list(range(side))
