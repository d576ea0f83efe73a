"""LLaVA 1.5: CLIP or SigLIP tower, two-layer projector, a text decoder of Llama's build."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from skipvision_export.errors import ModelError
from skipvision_export.models.registry import (
    DecoderDims,
    ModelFamily,
    VisionDims,
    check_text,
    register,
    text_dims,
)

if TYPE_CHECKING:
    from torch import nn


# Vision towers, and how their rows are to be selected: CLIP's CLS row is dropped, SigLIP has none.
_TOWERS = {"clip_vision_model": "default", "siglip_vision_model": "full"}


@register
class Llava(ModelFamily):
    """`LlavaForConditionalGeneration` of transformers, one feature layer, without a CLS row."""

    name = "llava"
    architectures = ("LlavaForConditionalGeneration",)

    def check(self, config: Any) -> None:
        """CLIP and SigLIP towers, and text models whose layers stand as Llama's do."""
        vision = config.vision_config.model_type
        if vision not in _TOWERS:
            raise ModelError(f"the vision tower is {vision!r}; supported: {', '.join(_TOWERS)}")
        check_text(config.text_config)
        if not isinstance(config.vision_feature_layer, int):
            raise ModelError(
                f"vision_feature_layer={config.vision_feature_layer} is a list; supported: one layer"
            )
        if config.vision_feature_select_strategy != _TOWERS[vision]:
            raise ModelError(
                f"vision_feature_select_strategy={config.vision_feature_select_strategy!r}; supported with "
                f"{vision}: {_TOWERS[vision]!r}"
            )

    def image_token_id(self, config: Any) -> int:
        """`image_token_index` in files, `image_token_id` in transformers 5."""
        return int(config.image_token_id)

    def visual_tokens(self, config: Any) -> int:
        """One token for each patch; a CLS row is dropped."""
        vision = config.vision_config
        return int((vision.image_size // vision.patch_size) ** 2)

    def decoder_dims(self, config: Any) -> DecoderDims:
        """Sizes of the text decoder."""
        return text_dims(config.text_config)

    def vision_dims(self, config: Any) -> VisionDims:
        """Layers past the feature layer are dead and not counted."""
        vision = config.vision_config
        layer = config.vision_feature_layer
        # hidden_states[0] is the embedding, so hidden_states[i] comes out of i layers.
        used = layer if layer >= 0 else vision.num_hidden_layers + 1 + layer
        return VisionDims(
            num_layers=used,
            hidden_size=vision.hidden_size,
            intermediate_size=vision.intermediate_size,
            image_size=vision.image_size,
            patch_size=vision.patch_size,
            projector_hidden=config.text_config.hidden_size,
            feature_layer=used - 1,
            has_cls=vision.model_type == "clip_vision_model",
        )

    def vision_tower(self, model: nn.Module) -> nn.Module:
        """CLIPVisionModel or SiglipVisionModel."""
        return model.model.vision_tower  # type: ignore[union-attr,return-value]

    def projector(self, model: nn.Module) -> nn.Module:
        """LlavaMultiModalProjector."""
        return model.model.multi_modal_projector  # type: ignore[union-attr,return-value]

    def vision_layers(self, model: nn.Module) -> nn.ModuleList:
        """Layers of the encoder; transformers 4 and 5 differ in the nesting."""
        tower = model.model.vision_tower  # type: ignore[union-attr]
        return getattr(tower, "vision_model", tower).encoder.layers  # type: ignore[no-any-return,union-attr,return-value]

    def language_model(self, model: nn.Module) -> nn.Module:
        """LlamaModel or its like."""
        return model.model.language_model  # type: ignore[union-attr,return-value]

    def decoder_layers(self, model: nn.Module) -> nn.ModuleList:
        """The decoder's layers."""
        return model.model.language_model.layers  # type: ignore[union-attr,return-value]

    def ffn(self, layer: nn.Module) -> tuple[nn.Module, nn.Module]:
        """RMSNorm and gated MLP."""
        return layer.post_attention_layernorm, layer.mlp  # type: ignore[return-value]
