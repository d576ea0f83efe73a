"""Qwen3-VL: learned positions in the tower, whose earlier layers give features to the decoder's first."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from skipvision_export.errors import ModelError
from skipvision_export.models.qwen2_vl import Qwen2VL, embed_patches, places, rotation, through
from skipvision_export.models.registry import PatchInput, register

if TYPE_CHECKING:
    from torch import Tensor


@register
class Qwen3VL(Qwen2VL):
    """`Qwen3VLForConditionalGeneration` of transformers, for pictures.

    The features of earlier layers ("deepstack") go through every choice and merge beside the main ones,
    so that a token keeps its own.
    """

    name = "qwen3_vl"
    architectures = ("Qwen3VLForConditionalGeneration",)
    text_model = "qwen3_vl_text"

    def check(self, config: Any) -> None:
        """As Qwen2-VL, and a decoder with more layers than get features."""
        super().check(config)
        levels, layers = self.deepstack_layers(config), config.text_config.num_hidden_layers
        if levels >= layers:
            raise ModelError(
                f"deepstack_visual_indexes names {levels} layers of the tower, the decoder has {layers}; "
                "supported: fewer than the decoder's layers"
            )

    def deepstack_layers(self, config: Any) -> int:
        """One for each layer of the tower that is read."""
        return len(config.vision_config.deepstack_visual_indexes)

    def equal_vision_layers(self, config: Any) -> bool:
        """Some are read by the decoder's first layers."""
        return not self.deepstack_layers(config)

    def _widths(self, vision: Any) -> tuple[int, int]:
        return vision.hidden_size, vision.out_hidden_size

    def _intermediate(self, vision: Any) -> int:
        return int(vision.intermediate_size)

    def patch_features(self, config: Any, tower: Any, projector: Any, picture: PatchInput) -> Tensor:
        """The main features, and behind them those of each layer in `deepstack_visual_indexes`."""
        import torch

        row, column = places(picture, self.merge_size(config))
        x = embed_patches(tower, picture.patches)
        _, height, width = picture.grid[0]
        x = x + _learned_positions(tower, row, height, column, width).to(x.dtype)
        angles = rotation(tower, x, row, column)
        levels: dict[int, Tensor] = {}
        read = list(config.vision_config.deepstack_visual_indexes)
        for i, block in enumerate(tower.blocks):
            x = through(block, x, angles)
            if i in read:
                levels[i] = tower.deepstack_merger_list[read.index(i)](x)
        # In the order of the tower's layers, in which its own code hands them on.
        return torch.cat([projector(x), *levels.values()], dim=-1)[None]


def _learned_positions(tower: Any, row: Tensor, height: Tensor, column: Tensor, width: Tensor) -> Tensor:
    """[P, D]: the tower's square table of positions, stretched to the grid so that corners meet."""
    side = tower.num_grid_per_side
    total = 0
    for y, share in _taps(row, height, side):
        for x, other in _taps(column, width, side):
            total = total + tower.pos_embed(y * side + x) * (share * other)[:, None]
    return total  # type: ignore[return-value]


def _taps(place: Tensor, size: Tensor, side: int) -> list[tuple[Tensor, Tensor]]:
    """The two entries of a table of `side` that a place in `size` lies between, and the share of each."""
    # In float32 as transformers does it, product first.
    at = place.float() * (side - 1) / (size - 1).clamp(min=1)
    low = at.floor()
    share = at - low
    first = low.long()
    return [(first, 1 - share), ((first + 1).clamp(max=side - 1), share)]
