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


def draw_grid(image: Any, grid: int, retained: Sequence[int]) -> Image.Image:
    """A square picture with a grid x grid raster of patches over it.

    image: a path or a PIL image; retained: raster indices of the retained patches. Skipped patches
    are paled, retained ones keep their colours inside a frame.
    """
    side = _SIDE // grid
    picture = load_image(image).resize((side * grid, side * grid), Image.Resampling.NEAREST)
    veil = Image.new("RGBA", picture.size, (90, 98, 110, 190))
    pen = ImageDraw.Draw(veil)
    for index in retained:
        row, column = divmod(int(index), grid)
        box = (column * side, row * side, (column + 1) * side - 1, (row + 1) * side - 1)
        pen.rectangle(box, fill=(0, 0, 0, 0), outline=(*_RETAINED, 255), width=2)
    return Image.alpha_composite(picture.convert("RGBA"), veil).convert("RGB")


def data_uri(image: Image.Image) -> str:
    """A PNG inside a URL, for HTML that needs no other file."""
    stream = io.BytesIO()
    image.save(stream, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()
