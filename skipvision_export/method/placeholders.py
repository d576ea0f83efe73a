"""Giving each picture as many placeholders in `input_ids` as it has tokens in the layout."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from skipvision_export.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor


def resize_placeholders(
    ids: Tensor,
    others: dict[str, tuple[Tensor, int]],
    *,
    image_token: int,
    per_image: int | Sequence[int] | None,
    total: int | Sequence[int],
    pad_token: int,
    images: int,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Replace each picture's run of placeholders by one of `total`, and keep the batch a rectangle.

    ids: [B, S]; others: tensors [B, S] that go along ("attention_mask" must be one of them) with the
    value that fills their padding; per_image: placeholders of a picture before, None where each run
    is one picture's (tiled models, where it varies); images: pictures in the batch. Where the model has
    pictures of any shape, per_image and total are lists, one number for each picture of the batch.
    Where every picture has `total` placeholders already, the tensors come back as they are. Padding
    stays on the side on which it was; with none, it goes to the right. Raises InputError where the
    placeholders do not fit the pictures.
    """
    is_image = ids == image_token
    count = int(is_image.sum())
    if isinstance(total, int):
        assert per_image is None or isinstance(per_image, int)
        there = count == images * total and (per_image is not None or _runs(is_image) == images)
        counted = _equal(per_image, total)
    else:
        assert isinstance(per_image, Sequence)
        there = count == sum(total)
        counted = _one_by_one(iter(zip(per_image, total, strict=True)))
    if there:
        return ids, {name: tensor for name, (tensor, _) in others.items()}
    mask = others["attention_mask"][0].bool()
    rows = [_row(flags, use, counted) for flags, use in zip(is_image, mask, strict=True)]
    found = sum(pictures for _, pictures in rows)
    if found != images:
        raise InputError(
            f"the prompts have placeholders for {found} pictures ({count} tokens), but {images} pictures "
            "were given"
        )
    length = max(source.numel() for source, _ in rows)
    left = bool((~mask[:, 0]).any())

    def rebuild(tensor: Tensor, fill: int) -> Tensor:
        out = tensor.new_full((len(rows), length), fill)
        for i, (source, _) in enumerate(rows):
            at = slice(length - source.numel(), length) if left else slice(source.numel())
            out[i, at] = tensor[i, source]
        return out

    return rebuild(ids, pad_token), {name: rebuild(*pair) for name, pair in others.items()}


def _runs(is_image: Tensor) -> int:
    """Runs of placeholders in [B, S], rows apart."""
    before = torch.nn.functional.pad(is_image[:, :-1], (1, 0))
    return int((is_image & ~before).sum())


# Of a run of placeholders: the pictures that it is of, and the placeholders that they get.
_Counted = Callable[[int], tuple[int, int]]


def _equal(per_image: int | None, total: int) -> _Counted:
    def counted(run: int) -> tuple[int, int]:
        pictures, left = (1, 0) if per_image is None else divmod(run, per_image)
        if left:
            raise InputError(
                f"a prompt has {run} placeholders in a row, which is not a multiple of the "
                f"model's {per_image} tokens for each picture"
            )
        return pictures, pictures * total

    return counted


def _one_by_one(sizes: Iterator[tuple[int, int]]) -> _Counted:
    def counted(run: int) -> tuple[int, int]:
        pictures = before = after = 0
        while before < run:
            per_image, total = next(sizes, (0, 0))
            if not per_image or before + per_image > run:
                raise InputError(
                    f"a prompt has {run} placeholders in a row, which are not those of the pictures given"
                )
            pictures, before, after = pictures + 1, before + per_image, after + total
        return pictures, after

    return counted


def _row(flags: Tensor, use: Tensor, counted: _Counted) -> tuple[Tensor, int]:
    """Source position of each token of the new row, [L] int64, and its number of pictures."""
    source: list[int] = []
    pictures = 0
    at, end = 0, flags.numel()
    is_image, used = flags.tolist(), use.tolist()
    while at < end:
        if not is_image[at]:
            if used[at]:
                source.append(at)
            at += 1
            continue
        start = at
        while at < end and is_image[at]:
            at += 1
        here, placeholders = counted(at - start)
        pictures += here
        source += [start] * placeholders  # every placeholder is the same token
    return torch.tensor(source, dtype=torch.int64, device=flags.device), pictures
