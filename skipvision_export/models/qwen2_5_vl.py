"""Qwen2.5-VL: Qwen2-VL whose tower attends within windows in most of its layers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from skipvision_export.models.qwen2_vl import Qwen2VL, embed_patches, places, rotation, through
from skipvision_export.models.registry import PatchInput, register

if TYPE_CHECKING:
    from torch import Tensor


@register
class Qwen25VL(Qwen2VL):
    """`Qwen2_5_VLForConditionalGeneration` of transformers, for pictures.

    Its code puts patches in the order of their windows and turns that back at the end; here they stay
    in their order and are gathered for each attention, which gives the same.
    """

    name = "qwen2_5_vl"
    architectures = ("Qwen2_5_VLForConditionalGeneration",)
    text_model = "qwen2_5_vl_text"

    def _widths(self, vision: Any) -> tuple[int, int]:
        return vision.hidden_size, vision.out_hidden_size

    def _intermediate(self, vision: Any) -> int:
        return int(vision.intermediate_size)

    def window_side(self, config: Any) -> int:
        """A window has whole tokens: of a size that is no multiple, the rest is left out."""
        vision, side = config.vision_config, self.merge_size(config)
        return int(vision.window_size // side // vision.patch_size * side)

    def equal_vision_layers(self, config: Any) -> bool:
        """Some attend to all, the others to their window."""
        vision = config.vision_config
        return len(set(vision.fullatt_block_indexes) & set(range(vision.depth))) in (0, vision.depth)

    def patch_features(self, config: Any, tower: Any, projector: Any, picture: PatchInput) -> Tensor:
        """Patches see their window, in some layers all."""
        row, column = places(picture, self.merge_size(config))
        x = embed_patches(tower, picture.patches)
        angles = rotation(tower, x, row, column)
        for i, block in enumerate(tower.blocks):
            whole = i in config.vision_config.fullatt_block_indexes
            x = through(block, x, angles, None if whole else picture.windows)
        return projector(x)[None]  # type: ignore[no-any-return]
