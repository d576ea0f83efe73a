"""Gemma 3: a SigLIP tower, pooled and projected, a decoder with norms before and behind each FFN."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from skipvision_export.errors import ModelError
from skipvision_export.models.registry import ModelFamily, VisionDims, check_text, register, siglip_dims

if TYPE_CHECKING:
    from torch import Tensor, nn


@register
class Gemma3(ModelFamily):
    """`Gemma3ForConditionalGeneration` of transformers; the tokens of an image see each other.

    Its sliding windows count cached positions, which pruning moves; a sequence within one window does not
    notice.
    """

    name = "gemma3"
    architectures = ("Gemma3ForConditionalGeneration",)
    sees = "image"

    def check(self, config: Any) -> None:
        """Gemma 3's own text model, which has no caps."""
        text = config.text_config
        check_text(text, ("gemma3_text",), windows=True)
        if text.attn_logit_softcapping or text.final_logit_softcapping or text.use_bidirectional_attention:
            raise ModelError(
                "the text model caps its logits or lets text see later tokens (attn_logit_softcapping, "
                "final_logit_softcapping, use_bidirectional_attention); supported: none of these"
            )

    def inputs(self, config: Any, ids: Tensor, pixel_values: Tensor) -> dict[str, Tensor]:
        """1 for the tokens of images."""
        kinds = (ids == self.image_token_id(config)).to(ids.dtype)
        return {"pixel_values": pixel_values, "token_type_ids": kinds}

    def max_positions(self, config: Any) -> int | None:
        """Those of one window."""
        text = config.text_config
        return min(text.max_position_embeddings, text.sliding_window)

    def vision_dims(self, config: Any) -> VisionDims:
        """One token is the mean of a square of patches."""
        dims = siglip_dims(config.vision_config, config.text_config.hidden_size)
        return replace(dims, token_patches=dims.patches // config.mm_tokens_per_image)

    def ffn(self, layer: nn.Module) -> tuple[nn.Module, nn.Module]:
        """The norm in front of the MLP, and the one behind it."""
        return layer.pre_feedforward_layernorm, layer.post_feedforward_layernorm  # type: ignore[return-value]
