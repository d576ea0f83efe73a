"""LLaVA 1.5: CLIP tower, two-layer projector, Llama decoder."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from skipvision_export.errors import ModelError
from skipvision_export.models.registry import DecoderDims, ModelFamily, VisionDims, register

if TYPE_CHECKING:
    from torch import nn


@register
class Llava(ModelFamily):
    """`LlavaForConditionalGeneration` of transformers, one feature layer, CLS dropped."""

    name = "llava"
    architectures = ("LlavaForConditionalGeneration",)

    def check(self, config: Any) -> None:
        """Only CLIP towers (they have a CLS row to choose by) under a Llama decoder."""
        vision, text = config.vision_config.model_type, config.text_config.model_type
        if vision != "clip_vision_model":
            raise ModelError(f"the vision tower is {vision!r}; supported: clip_vision_model")
        if text != "llama":
            raise ModelError(f"the text model is {text!r}; supported: llama")
        if not isinstance(config.vision_feature_layer, int):
            raise ModelError(
                f"vision_feature_layer={config.vision_feature_layer} is a list; supported: one layer"
            )
        if config.vision_feature_select_strategy != "default":
            raise ModelError(
                f"vision_feature_select_strategy={config.vision_feature_select_strategy!r}; "
                "supported: 'default'"
            )

    def image_token_id(self, config: Any) -> int:
        """`image_token_index` in files, `image_token_id` in transformers 5."""
        return int(config.image_token_id)

    def visual_tokens(self, config: Any) -> int:
        """One token for each patch; the CLS row is dropped."""
        vision = config.vision_config
        return int((vision.image_size // vision.patch_size) ** 2)

    def decoder_dims(self, config: Any) -> DecoderDims:
        """Sizes of the Llama decoder."""
        text = config.text_config
        heads = text.num_attention_heads
        return DecoderDims(
            num_layers=text.num_hidden_layers,
            hidden_size=text.hidden_size,
            num_heads=heads,
            num_kv_heads=text.num_key_value_heads or heads,
            head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
            intermediate_size=text.intermediate_size,
            vocab_size=text.vocab_size,
        )

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
            has_cls=True,
        )

    def vision_tower(self, model: nn.Module) -> nn.Module:
        """CLIPVisionModel."""
        return model.model.vision_tower  # type: ignore[union-attr,return-value]

    def projector(self, model: nn.Module) -> nn.Module:
        """LlavaMultiModalProjector."""
        return model.model.multi_modal_projector  # type: ignore[union-attr,return-value]

    def vision_layers(self, model: nn.Module) -> nn.ModuleList:
        """CLIPEncoderLayer list; transformers 4 and 5 differ in the nesting."""
        tower = model.model.vision_tower  # type: ignore[union-attr]
        return getattr(tower, "vision_model", tower).encoder.layers  # type: ignore[no-any-return,union-attr,return-value]

    def language_model(self, model: nn.Module) -> nn.Module:
        """LlamaModel."""
        return model.model.language_model  # type: ignore[union-attr,return-value]

    def decoder_layers(self, model: nn.Module) -> nn.ModuleList:
        """LlamaDecoderLayer list."""
        return model.model.language_model.layers  # type: ignore[union-attr,return-value]

    def ffn(self, layer: nn.Module) -> tuple[nn.Module, nn.Module]:
        """RMSNorm and gated MLP."""
        return layer.post_attention_layernorm, layer.mlp  # type: ignore[return-value]
