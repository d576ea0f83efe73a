"""LLaVA 1.5: CLIP or SigLIP tower, two-layer projector, a text decoder of Llama's build."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from skipvision_export.errors import ModelError
from skipvision_export.models.registry import ModelFamily, VisionDims, check_text, register

if TYPE_CHECKING:
    from torch import Tensor


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

    def vision_dims(self, config: Any) -> VisionDims:
        """Layers past the feature layer are dead and not counted."""
        vision, out = config.vision_config, config.text_config.hidden_size
        layer = config.vision_feature_layer
        # hidden_states[0] is the embedding, so hidden_states[i] comes out of i layers.
        used = layer if layer >= 0 else vision.num_hidden_layers + 1 + layer
        return VisionDims(
            num_layers=used,
            hidden_size=vision.hidden_size,
            intermediate_size=vision.intermediate_size,
            image_size=vision.image_size,
            patch_size=vision.patch_size,
            projector=((vision.hidden_size, out), (out, out)),
            has_cls=vision.model_type == "clip_vision_model",
        )

    def image_features(self, config: Any, tower: Any, projector: Any, pixel_values: Tensor) -> Tensor:
        """Hidden states of the feature layer, a CLS row dropped, projected."""
        dims = self.vision_dims(config)
        hidden = tower(pixel_values, output_hidden_states=True, return_dict=True).hidden_states
        # From the end, which stays right where layers in the middle are left out.
        layer = dims.num_layers - config.vision_config.num_hidden_layers - 1
        return projector(hidden[layer][:, int(dims.has_cls) :])  # type: ignore[no-any-return]
