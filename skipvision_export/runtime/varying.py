"""Pictures of any shape: how a bundle encodes them one by one, and where their tokens stand in a prompt.

Shapes: B batch, S sequence, N pictures, P patches of a picture, C numbers of a patch, V visual tokens of a
picture, L of them laid out, W features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from skipvision_export.bundle import Manifest
from skipvision_export.config import SkipVisionConfig
from skipvision_export.errors import InputError
from skipvision_export.graph.passes.names import GRID, GROUP_SIZES, PLACES, TOKEN_SCORES, VISION, WINDOWS
from skipvision_export.layout import TokenLayout
from skipvision_export.runtime.batch import Ints, PromptBatch
from skipvision_export.tokens import selector

Floats = npt.NDArray[np.float32]
# Runs a vision encoder's graph: arrays by name in and out.
Run = Callable[[dict[str, Any]], dict[str, Any]]


@dataclass(frozen=True)
class Patches:
    """Pictures of a prompt as their processor cuts them; as many as `len` says, a slice is some of them.

    pixel_values: [P of all, C] float32; grids: [N, 3] int64, time (1), rows and columns of patches.
    """

    pixel_values: Floats
    grids: Ints

    def __len__(self) -> int:
        """Pictures."""
        return len(self.grids)

    def __getitem__(self, pictures: slice) -> Patches:
        """Some of them."""
        grids = self.grids[pictures]
        ends = np.cumsum(self.grids.prod(1))
        which = np.searchsorted(ends, np.arange(len(self.pixel_values)), side="right")
        wanted = np.isin(which, np.arange(len(self.grids))[pictures])
        return Patches(self.pixel_values[wanted], grids)

    def each(self) -> Iterator[tuple[Floats, Ints]]:
        """[P, C] and [1, 3] of each picture."""
        for pixels, grid in zip(
            np.split(self.pixel_values, np.cumsum(self.grids.prod(1))[:-1]), self.grids, strict=True
        ):
            yield pixels, grid[None]


@dataclass(frozen=True)
class LaidPictures:
    """Encoded pictures: features [1, L of all, W], grids [N, 3], and of each its tokens' places, [L].

    A place is a token's index in raster order, -1 for a summary token.
    """

    features: npt.NDArray[Any]
    grids: Ints
    places: tuple[Ints, ...]

    @classmethod
    def join(cls, parts: Sequence[LaidPictures]) -> LaidPictures:
        """Several, in their order."""
        return cls(
            np.concatenate([part.features for part in parts], axis=1),
            np.concatenate([part.grids for part in parts]),
            tuple(place for part in parts for place in part.places),
        )


@dataclass(frozen=True)
class Placed:
    """One picture of a prompt: its layout, its grid of tokens, and the place of each, [L]."""

    layout: TokenLayout
    rows: int
    columns: int
    places: Ints

    @property
    def size(self) -> int:
        """Positions that it takes up: text behind it goes on so much further, whatever is skipped."""
        return max(self.rows, self.columns)

    def offsets(self) -> Ints:
        """[2, L]: row and column of each token; a summary token stands in the picture's middle."""
        found = np.stack(np.divmod(self.places, self.columns))
        middle = np.array([[self.rows // 2], [self.columns // 2]])
        return np.where(self.places < 0, middle, found)


class VaryingPictures:
    """What a bundle's configuration makes of pictures of any shape."""

    def __init__(self, manifest: Manifest, config: SkipVisionConfig | None = None) -> None:
        """config: another one than the bundle's, for comparisons."""
        side = manifest.model.merge_size
        assert side is not None
        self._side = side
        self._own, self.config = manifest.skip_config, config or manifest.skip_config
        self._inputs = {tensor.name: tensor.shape for tensor in manifest.graphs[VISION].inputs}
        self._dtype = manifest.dtype

    def tokens(self, grid: Ints) -> tuple[int, int]:
        """Rows and columns of visual tokens of a picture, by its grid of patches [3]."""
        return int(grid[1]) // self._side, int(grid[2]) // self._side

    def layout(self, grid: Ints) -> TokenLayout:
        """Of a picture, by its grid [3]; raises ConfigError where it is too small for a preset."""
        rows, columns = self.tokens(grid)
        return self.config.layout(rows * columns, varies=True)

    def encode(self, run: Run, pictures: Patches) -> LaidPictures:
        """Each picture through the vision encoder's graph."""
        features, places = [], []
        for pixels, grid in pictures.each():
            out = run(self.feeds(pixels, grid))
            found = np.asarray(out["image_features"])
            features.append(found)
            raster = np.arange(found.shape[1])[None]
            places.append(np.asarray(out.get(PLACES, raster), np.int64)[0])
        return LaidPictures(np.concatenate(features, axis=1), pictures.grids, tuple(places))

    def feeds(self, pixels: Floats, grid: Ints) -> dict[str, Any]:
        """The encoder's inputs for one picture, [P, C] and [1, 3]."""
        rows, columns = self.tokens(grid[0])
        feeds: dict[str, Any] = {"pixel_values": pixels, GRID: grid}
        if WINDOWS in self._inputs:
            feeds[WINDOWS] = windows_of(grid[0], self._side, math.isqrt(int(self._inputs[WINDOWS][1])))
        if GROUP_SIZES in self._inputs:
            layout = self._own.layout(rows * columns, varies=True)
            feeds[GROUP_SIZES] = np.array(layout.selection_sizes(), np.int64)
        if TOKEN_SCORES in self._inputs:
            scores = selector(self._own.selector).static_scores(rows * columns, self._own.seed)
            feeds[TOKEN_SCORES] = scores[None]
        return feeds

    def by_row(
        self, batch: PromptBatch, image_token: int, pictures: LaidPictures | None
    ) -> list[list[Placed]]:
        """The pictures of each row, in the order of their placeholders."""
        each = iter(() if pictures is None else zip(pictures.grids, pictures.places, strict=True))
        rows = []
        for count in (batch.input_ids == image_token).sum(1):
            own: list[Placed] = []
            while sum(one.layout.total for one in own) < count:
                grid, places = next(each)
                own.append(Placed(self.layout(grid), *self.tokens(grid), places))
            rows.append(own)
        return rows

    def sizes(self, pictures: Patches) -> list[tuple[int, int]]:
        """Of each picture: its visual tokens, and those in its layout."""
        counts = [self.tokens(grid) for grid in pictures.grids]
        return [
            (rows * columns, self.layout(grid).total)
            for (rows, columns), grid in zip(counts, pictures.grids, strict=True)
        ]


def windows_of(grid: Ints, side: int, window: int) -> Ints:
    """The patches of each window, [N, window**2], of a picture of a grid [3]; the number of patches fills up.

    Patches come in squares of `side` a side; windows are squares of `window` patches a side, cut at the
    picture's end.
    """
    _, rows, columns = grid.tolist()
    index = np.arange(rows * columns).reshape(rows // side, columns // side, side, side)
    raster = index.transpose(0, 2, 1, 3).reshape(rows, columns)
    pad = ((0, -rows % window), (0, -columns % window))
    whole = np.pad(raster, pad, constant_values=rows * columns)
    high, wide = (size // window for size in whole.shape)
    squares = whole.reshape(high, window, wide, window).transpose(0, 2, 1, 3)
    return squares.reshape(high * wide, window**2).astype(np.int64)


def positions_of(batch: PromptBatch, image_token: int, rows: Sequence[Sequence[Placed]]) -> tuple[Ints, Ints]:
    """Positions [3, B, S] (time, row, column) and [B] of each row's next token.

    As the model's own `get_rope_index` where nothing is skipped: text counts on in all three axes, a
    picture's tokens stand at its start plus their place, and what follows goes on behind its longer side.
    Padding is at 0.
    """
    found = np.zeros((3, *batch.input_ids.shape), np.int64)
    ends = np.zeros(len(batch.input_ids), np.int64)
    for row, (ids, start, own) in enumerate(zip(batch.input_ids, batch.padding, rows, strict=True)):
        at, i, pictures = 0, int(start), iter(own)
        while i < len(ids):
            if ids[i] == image_token:
                picture = next(pictures)
                part = slice(i, i + picture.layout.total)
                found[:, row, part] = at
                found[1:, row, part] += picture.offsets()
                at, i = at + picture.size, part.stop
            else:
                end = i + int(np.argmax(np.append(ids[i:] == image_token, True)))
                found[:, row, i:end] = np.arange(at, at + end - i)
                at, i = at + end - i, end
        ends[row] = at
    return found, ends


def resize(ids: Ints, image_token: int, sizes: Sequence[tuple[int, int]]) -> Ints:
    """Give each picture in ids [1, S] the second of its `sizes` placeholders in place of the first.

    Raises InputError where they are not those of the pictures.
    """
    parts, at = [], 0
    places = np.flatnonzero(ids[0] == image_token)
    if len(places) != sum(before for before, _ in sizes):
        raise InputError(
            f"the prompt has {len(places)} placeholders, its pictures {sum(before for before, _ in sizes)} "
            "visual tokens: the processor does not fit the model"
        )
    for before, after in sizes:
        start = int(places[0])
        parts += [ids[0, at:start], np.full(after, image_token, np.int64)]
        at, places = start + before, places[before:]
    return np.concatenate([*parts, ids[0, at:]])[None]
