"""LLaVA-NeXT (1.6): LLaVA whose picture comes as a thumbnail and tiles."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from skipvision_export.models.llava import Llava
from skipvision_export.models.registry import register

if TYPE_CHECKING:
    from torch import Tensor


@register
class LlavaNext(Llava):
    """`LlavaNextForConditionalGeneration` of transformers; the parts stand where LLaVA's do.

    `visual_tokens` are those of one crop. Its own packing of the tiles (unpadded, with a newline
    token for each row) makes a number of tokens that depends on the picture's size; a tiled preset
    replaces it.
    """

    name = "llava_next"
    architectures = ("LlavaNextForConditionalGeneration",)
    tiled = True

    def most_visual_tokens(self, config: Any) -> int:
        """Those of the largest grid and the thumbnail; padding and newline tokens are not counted."""
        side = config.vision_config.image_size
        tiles = max((height // side) * (width // side) for height, width in config.image_grid_pinpoints)
        return (1 + tiles) * self.visual_tokens(config)

    def pack(self, model: Any, crops: Tensor, image_sizes: Tensor) -> Tensor:
        """The thumbnail, then the tiles' rows without padding, each with a newline token behind it."""
        strategy, inner = model.config.vision_feature_select_strategy, model.model
        packed: Tensor = inner.pack_image_features([crops], image_sizes, strategy, inner.image_newline)[0][0]
        return packed
