"""Qwen2-VL: pictures of any shape in patches, positions of three axes, a text decoder of Llama's build."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from skipvision_export.errors import ModelError
from skipvision_export.models.registry import SIDE, ModelFamily, PatchInput, VisionDims, check_text, register

if TYPE_CHECKING:
    from torch import Tensor, nn


@register
class Qwen2VL(ModelFamily):
    """`Qwen2VLForConditionalGeneration` of transformers, for pictures.

    What follows from a picture's grid is computed inside the graph, of the grid and the number of patches:
    transformers' own code loops over grids in Python, which cannot be traced. One picture at a time, so
    that attention needs no borders between pictures.
    """

    name = "qwen2_vl"
    architectures = ("Qwen2VLForConditionalGeneration",)
    dynamic = True
    text_model = "qwen2_vl_text"

    def check(self, config: Any) -> None:
        """Its own text model, without sliding windows."""
        check_text(config.text_config, (self.text_model,))
        sections = (config.text_config.rope_parameters or {}).get("mrope_section")
        if not sections or len(sections) != 3:
            raise ModelError(
                f"the text model's mrope_section is {sections}; expected three numbers: time, row, column"
            )

    def inputs(self, config: Any, ids: Tensor, pixel_values: Tensor) -> dict[str, Tensor]:
        """1 for the tokens of pictures; the pictures' grids are to be added."""
        kinds = (ids == self.image_token_id(config)).to(ids.dtype)
        return {"pixel_values": pixel_values, "mm_token_type_ids": kinds}

    def merge_size(self, config: Any) -> int:
        """Patches along each side of a visual token."""
        return int(config.vision_config.spatial_merge_size)

    def vision_dims(self, config: Any) -> VisionDims:
        """Counted by a square picture of SIDE tokens a side."""
        vision, side = config.vision_config, self.merge_size(config)
        width, out = self._widths(vision)
        joined = width * side**2
        return VisionDims(
            num_layers=vision.depth,
            hidden_size=width,
            intermediate_size=self._intermediate(vision),
            image_size=SIDE * side * vision.patch_size,
            patch_size=vision.patch_size,
            projector=((joined, joined), (joined, out)),
            token_patches=side**2,
        )

    def _widths(self, vision: Any) -> tuple[int, int]:
        """Of the tower, and of what comes out of the projector."""
        return vision.embed_dim, vision.hidden_size

    def _intermediate(self, vision: Any) -> int:
        return int(vision.embed_dim * vision.mlp_ratio)

    def patch_width(self, config: Any) -> int:
        """Numbers of a patch: its pixels of each channel, as often as the tower joins frames."""
        vision = config.vision_config
        return int(vision.in_channels * vision.temporal_patch_size * vision.patch_size**2)

    def patch_features(self, config: Any, tower: Any, projector: Any, picture: PatchInput) -> Tensor:
        """Every patch sees every other one."""
        row, column = places(picture, self.merge_size(config))
        x = embed_patches(tower, picture.patches)
        angles = rotation(tower, x, row, column)
        for block in tower.blocks:
            x = through(block, x, angles)
        return projector(x)[None]  # type: ignore[no-any-return]

    def vision_tower(self, model: nn.Module) -> nn.Module:
        """The whole tower, projector included."""
        return model.model.visual  # type: ignore[union-attr,return-value]

    def projector(self, model: nn.Module) -> nn.Module:
        """PatchMerger."""
        return model.model.visual.merger  # type: ignore[union-attr,return-value]

    def vision_layers(self, model: nn.Module) -> nn.ModuleList:
        """The tower's blocks."""
        return model.model.visual.blocks  # type: ignore[union-attr,return-value]


def places(picture: PatchInput, side: int) -> tuple[Tensor, Tensor]:
    """Row and column, [P] each, of a picture's patches, which come in squares of `side` a side."""
    import torch

    index = torch.arange(picture.patches.shape[0], device=picture.patches.device)
    square, inside = index // side**2, index % side**2
    squares = picture.grid[0, 2] // side  # in a row of them
    return square // squares * side + inside // side, square % squares * side + inside % side


def embed_patches(tower: Any, patches: Tensor) -> Tensor:
    """[P, C] -> [P, D]: the convolution, whose kernel is as large as a patch, as the product that it is."""
    from torch.nn.functional import linear

    conv = tower.patch_embed.proj
    return linear(patches, conv.weight.flatten(1), conv.bias)


def rotation(tower: Any, x: Tensor, row: Tensor, column: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines [P, Dh] of the patches' places."""
    import torch

    return tower.rotary_pos_emb(x, torch.stack([row, column], dim=-1))  # type: ignore[no-any-return]


def through(block: Any, x: Tensor, angles: tuple[Tensor, Tensor], windows: Tensor | None = None) -> Tensor:
    """One block of a tower on a picture's patches [P, D]; windows: what sees each other, None for all."""

    def forward(x: Tensor) -> Tensor:
        x = x + _attend(block.attn, block.norm1(x), angles, windows)
        return x + block.mlp(block.norm2(x))  # type: ignore[no-any-return]

    # Called through the block, so that a trace knows which nodes are of which block.
    vars(block)["forward"] = forward
    try:
        return block(x)  # type: ignore[no-any-return]
    finally:
        del vars(block)["forward"]


def _attend(attention: Any, x: Tensor, angles: tuple[Tensor, Tensor], windows: Tensor | None) -> Tensor:
    """As the attention's own code, which cuts the patches at borders that it reads in Python.

    windows: see PatchInput; those of a picture become a batch.
    """
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    qkv = attention.qkv(x).unflatten(-1, (3, attention.num_heads, -1)).permute(1, 2, 0, 3)
    q, k, v = (qkv[i][None] for i in range(3))  # [1, H, P, Dh] each
    half = q.shape[-1] // 2
    cos, sin = (angle.float() for angle in angles)

    def rotated(t: Tensor) -> Tensor:
        wide = t.float()
        turned = torch.cat([-wide[..., half:], wide[..., :half]], dim=-1)
        return (wide * cos + turned * sin).to(t.dtype)

    q, k, seen = rotated(q), rotated(k), None
    if windows is not None:
        # ONNX Runtime's Attention wants a row for each query.
        seen = (windows < x.shape[0])[:, None, None, :].expand(-1, -1, windows.shape[1], -1)
        q, k, v = (_cut(t, windows) for t in (q, k, v))
    out = scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=attention.scaling)
    rows = out.transpose(1, 2).flatten(2).flatten(0, 1)  # [P, D], of windows [N * window_side**2, D]
    if windows is not None:
        # What fills windows up falls on one row more, which is cut off.
        rows = rows.new_zeros(x.shape[0] + 1, rows.shape[1]).index_put((windows.flatten(),), rows)[:-1]
    return attention.proj(rows)  # type: ignore[no-any-return]


def _cut(t: Tensor, windows: Tensor) -> Tensor:
    """[1, H, P, Dh] -> [N, H, window_side**2, Dh], zeros where a window has less patches."""
    import torch

    filled = torch.cat([t[0], t.new_zeros(t.shape[1], 1, t.shape[3])], dim=1).transpose(0, 1)
    return filled[windows].transpose(1, 2)
