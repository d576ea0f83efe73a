"""Pictures of any shape in a patched model: a layout for each, and positions of three axes.

Shapes: B batch, S sequence, N pictures, V visual tokens of one, L of them laid out.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from skipvision_export.config import SkipVisionConfig
from skipvision_export.layout import TokenLayout
from skipvision_export.method.merging import lay_out_placed
from skipvision_export.models import ModelFamily
from skipvision_export.tokens import TorchImage

Watch = Callable[[Tensor, Tensor], Tensor]


class VaryingPictures:
    """The pictures of the last prompts, in their order.

    A laid-out token stands where its patches are: a merged one at its destination's place, a summary
    token at the picture's middle, [rows // 2, columns // 2]. Text behind a picture goes on from where it
    would without skipping.

    grids: [rows, columns] of tokens of each picture; layouts: of each; order: [V] of each, as in
    SkipVisionState; places: [L, 2] of each, known once the picture was encoded.
    """

    def __init__(self, family: ModelFamily, hf_config: Any, config: SkipVisionConfig, summary: Any) -> None:
        """Nothing was seen yet."""
        side = family.merge_size(hf_config)
        assert side is not None
        self._side: int = side
        self._width = family.decoder_dims(hf_config).hidden_size
        self.config, self.summary = config, summary
        self.grids: list[tuple[int, int]] = []
        self.layouts: list[TokenLayout] = []
        self.order: list[Tensor] = []
        self.places: list[Tensor] = []

    def see(self, grids: Tensor) -> None:
        """Take up new pictures, by their grids of patches [N, 3]."""
        self.grids = [(h // self._side, w // self._side) for _, h, w in grids.tolist()]
        self.layouts = [self.config.layout(h * w, varies=True) for h, w in self.grids]

    @property
    def tokens(self) -> list[int]:
        """Visual tokens of each picture, V."""
        return [rows * columns for rows, columns in self.grids]

    @property
    def totals(self) -> list[int]:
        """Tokens of each in its layout, L."""
        return [layout.total for layout in self.layouts]

    def encoding(self, encode: Callable[..., Any], watch: Callable[[], Watch | None]) -> Callable[..., Any]:
        """The model's `get_image_features` with what it gives laid out.

        watch: gives what sees the features of all pictures, [1, sum V, W] and [1, sum L, W], and says what
        is read.
        """

        @functools.wraps(encode)
        def wrapped(pixel_values: Tensor, image_grid_thw: Tensor | None = None, **kwargs: Any) -> Any:
            out = encode(pixel_values, image_grid_thw, **kwargs)
            self.see(image_grid_thw)  # type: ignore[arg-type]
            levels = getattr(out, "deepstack_features", None) or []
            raster = [torch.cat(parts, dim=-1) for parts in zip(out.pooler_output, *levels, strict=True)]
            laid = torch.cat(self._lay_out(raster))
            if (seen := watch()) is not None:
                laid = seen(torch.cat(raster)[None], laid[None])[0]
            main, *others = (x.split(self.totals) for x in laid.split(self._width, dim=-1))
            out.pooler_output = main
            if levels:
                out.deepstack_features = others
            return out

        return wrapped

    def _lay_out(self, raster: list[Tensor]) -> list[Tensor]:
        """Features [V, W] of each picture -> [L, W]."""
        laid, self.order, self.places = [], [], []
        for x, layout, (rows, columns) in zip(raster, self.layouts, self.grids, strict=True):
            image = TorchImage(x[None, :, : self._width], _no_cls_row, self.config.seed)
            tokens, order, index = lay_out_placed(image, layout, self.config, self.summary, x[None])
            place = torch.stack([index // columns, index % columns], -1)[0]
            place[index[0] < 0] = place.new_tensor([rows // 2, columns // 2])
            laid.append(tokens[0])
            self.order.append(order[0])
            self.places.append(place)
        return laid

    def flags(self, is_image: Tensor, of: Callable[[TokenLayout], list[bool]]) -> Tensor:
        """One flag for each placeholder of [B, S], text True -> [B, S] bool."""
        flags = torch.ones_like(is_image)
        if not is_image.any():  # text only, the pictures are those of a prompt before
            return flags
        values = [flag for layout in self.layouts for flag in of(layout)]
        flags[is_image] = torch.tensor(values, dtype=torch.bool, device=is_image.device)
        return flags

    def numbers(self, is_image: Tensor) -> Tensor:
        """[B, S] int64: 0 for text, i for the tokens of the i-th picture of all."""
        found = torch.zeros_like(is_image, dtype=torch.int64)
        if not is_image.any():
            return found
        of = torch.arange(1, len(self.layouts) + 1, device=is_image.device)
        found[is_image] = of.repeat_interleave(torch.tensor(self.totals, device=is_image.device))
        return found

    def rope_index(self, image_token: int) -> Callable[..., tuple[Tensor, Tensor]]:
        """In place of `get_rope_index`: positions [3, B, S], a picture's all at its start, and deltas [B, 1].

        The choice of tokens is not known yet; `place` adds it.
        """

        def get_rope_index(
            input_ids: Tensor,
            mm_token_type_ids: Tensor | None = None,
            image_grid_thw: Tensor | None = None,
            *args: Any,
            attention_mask: Tensor | None = None,
            **kwargs: Any,
        ) -> tuple[Tensor, Tensor]:
            if image_grid_thw is not None:
                self.see(image_grid_thw)
            return self.count(input_ids, image_token, attention_mask)

        return get_rope_index

    def count(self, ids: Tensor, image_token: int, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """What `rope_index` gives for ids [B, S] and a mask [B, S], which hold the pictures last seen."""
        seen = torch.ones_like(ids) if mask is None else mask
        positions = torch.zeros_like(ids)
        ends, picture = [], 0
        for row, tokens in enumerate(ids.tolist()):
            at = i = 0
            while i < len(tokens):
                if not seen[row, i]:
                    i += 1
                elif tokens[i] != image_token:
                    positions[row, i] = at
                    at, i = at + 1, i + 1
                else:
                    length = self.totals[picture]
                    positions[row, i : i + length] = at
                    at, i = at + max(self.grids[picture]), i + length
                    picture += 1
            ends.append(at - int(seen[row].sum()))
        return positions.expand(3, -1, -1).clone(), torch.tensor(ends, device=ids.device)[:, None]

    def place(self, positions: Tensor | None, is_image: Tensor) -> Tensor | None:
        """positions [3 or 4, B, S] -> the same with rows and columns added at the placeholders."""
        if positions is None or not is_image.any():
            return positions
        positions = positions.clone()
        rows, columns = torch.cat(self.places).to(positions).unbind(-1)
        positions[-2, is_image] += rows
        positions[-1, is_image] += columns
        return positions


def _no_cls_row() -> Tensor:
    raise RuntimeError("the vision tower has no CLS row to choose by")


def patched(
    varying: VaryingPictures,
    model: nn.Module,
    image_token: int,
    watch: Callable[[], Watch | None],
    replace: Callable[..., None],
) -> None:
    """Let the multimodal model lay its pictures out and count positions as VaryingPictures does."""
    inner: Any = model.model
    replace(inner, "get_image_features", varying.encoding(inner.get_image_features, watch))
    replace(inner, "get_rope_index", varying.rope_index(image_token))
