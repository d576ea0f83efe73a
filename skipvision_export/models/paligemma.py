"""PaliGemma: a SigLIP tower, one linear layer, Gemma; a prompt's tokens all see each other."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from skipvision_export.models.registry import ModelFamily, VisionDims, check_text, register, siglip_dims

if TYPE_CHECKING:
    from torch import Tensor


@register
class PaliGemma(ModelFamily):
    """`PaliGemmaForConditionalGeneration` of transformers with Gemma 1; positions count from 1."""

    name = "paligemma"
    architectures = ("PaliGemmaForConditionalGeneration",)
    sees = "prompt"
    first_position = 1

    def check(self, config: Any) -> None:
        """Not PaliGemma 2, whose text model (Gemma 2) caps its attention's scores."""
        check_text(config.text_config)

    def inputs(self, config: Any, ids: Tensor, pixel_values: Tensor) -> dict[str, Tensor]:
        """All tokens are the prompt's."""
        return {"pixel_values": pixel_values, "token_type_ids": ids.new_zeros(ids.shape)}

    def vision_dims(self, config: Any) -> VisionDims:
        """One token for each patch."""
        return siglip_dims(config.vision_config, config.text_config.hidden_size)
