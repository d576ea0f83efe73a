"""Pictures with their retained and skipped patches drawn over them."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

from PIL import Image, ImageDraw

from skipvision_export.runtime.prompt import load_image

_SIDE = 288
_RETAINED = (255, 176, 0)
_VEIL = 190  # of 255, over a patch that skips every layer's FFN


def draw_grid(image: Any, grid: int, retained: Sequence[int]) -> Image.Image:
    """`draw_shares` where a patch is retained, or skips everywhere; retained: raster indices."""
    kept = set(map(int, retained))
    return draw_shares(image, grid, [float(index not in kept) for index in range(grid * grid)])


def draw_shares(image: Any, grid: int, skipped: Sequence[float]) -> Image.Image:
    """A square picture with a grid x grid raster of patches over it.

    image: a path or a PIL image; skipped: of each patch in raster order, the share of layers whose FFN it
    skips, 0 to 1. Patches are paled by that; those that skip nowhere keep their colours inside a frame.
    """
    side = _SIDE // grid
    picture = load_image(image).resize((side * grid, side * grid), Image.Resampling.NEAREST)
    veil = Image.new("RGBA", picture.size, (0, 0, 0, 0))
    pen = ImageDraw.Draw(veil)
    for index, share in enumerate(skipped):
        row, column = divmod(index, grid)
        box = (column * side, row * side, (column + 1) * side - 1, (row + 1) * side - 1)
        if share:
            pen.rectangle(box, fill=(90, 98, 110, round(_VEIL * share)))
        else:
            pen.rectangle(box, outline=(*_RETAINED, 255), width=2)
    return Image.alpha_composite(picture.convert("RGBA"), veil).convert("RGB")


def data_uri(image: Image.Image) -> str:
    """A PNG inside a URL, for HTML that needs no other file."""
    stream = io.BytesIO()
    image.save(stream, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()
