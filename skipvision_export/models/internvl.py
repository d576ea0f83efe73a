"""InternVL: its own tower, a pixel shuffle, a two-layer projector, and pictures in one or more tiles."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from skipvision_export.errors import ModelError
from skipvision_export.models.registry import ModelFamily, VisionDims, check_text, register

if TYPE_CHECKING:
    from torch import Tensor, nn


@register
class InternVL(ModelFamily):
    """`InternVLForConditionalGeneration` of transformers; each tile is an image of its own to the decoder."""

    name = "internvl"
    architectures = ("InternVLForConditionalGeneration",)
    cropped = True

    def check(self, config: Any) -> None:
        """Text models of Llama's build, and the tower's last layer without its CLS row."""
        check_text(config.text_config)
        found = config.vision_feature_layer, config.vision_feature_select_strategy
        if found != (-1, "default"):
            raise ModelError(
                f"vision_feature_layer={found[0]} and vision_feature_select_strategy={found[1]!r}; "
                "supported: -1 and 'default'"
            )

    def vision_dims(self, config: Any) -> VisionDims:
        """The pixel shuffle makes one token of a square of patches."""
        vision, out, side = config.vision_config, config.text_config.hidden_size, _side(config)
        return VisionDims(
            num_layers=vision.num_hidden_layers,
            hidden_size=vision.hidden_size,
            intermediate_size=vision.intermediate_size,
            image_size=vision.image_size[0],
            patch_size=vision.patch_size[0],
            projector=((vision.hidden_size * side**2, out), (out, out)),
            has_cls=True,
            token_patches=side**2,
        )

    def image_features(self, config: Any, tower: Any, projector: Any, pixel_values: Tensor) -> Tensor:
        """Features without the CLS row, those of a square of patches side by side, projected."""
        x = tower(pixel_values, return_dict=True).last_hidden_state[:, 1:]
        side = _side(config)
        rows = config.vision_config.image_size[0] // config.vision_config.patch_size[0] // side
        # [N, rows, side, rows, side, D]: the second and fourth axis go to the features.
        x = x.unflatten(1, (rows, side, rows, side)).permute(0, 1, 3, 2, 4, 5)
        return projector(x.flatten(3).flatten(1, 2))  # type: ignore[no-any-return]

    def vision_layers(self, model: nn.Module) -> nn.ModuleList:
        """Layers of the encoder."""
        return self.vision_tower(model).encoder.layer  # type: ignore[union-attr,return-value]


def _side(config: Any) -> int:
    """Patches along each side of what becomes one token."""
    return round(1 / config.downsample_ratio)
