"""LLaVA-OneVision: LLaVA-NeXT with a SigLIP tower, whose tiles are shrunk where they are many."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from skipvision_export.models.llava_next import LlavaNext
from skipvision_export.models.registry import register

if TYPE_CHECKING:
    from torch import Tensor


@register
class LlavaOnevision(LlavaNext):
    """`LlavaOnevisionForConditionalGeneration` of transformers, for pictures."""

    name = "llava_onevision"
    architectures = ("LlavaOnevisionForConditionalGeneration",)

    def pack(self, model: Any, crops: Tensor, image_sizes: Tensor) -> Tensor:
        """As LLaVA-NeXT, and interpolated to a number of tokens that the configuration bounds."""
        inner, most = model.model, model.config.vision_aspect_ratio
        packed: Tensor = inner.pack_image_features([crops], image_sizes, inner.image_newline, most)[0][0]
        return packed
