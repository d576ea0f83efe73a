"""Batches: placeholders, labels and pictures; B samples, S sequence, N pictures."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from skipvision_export.method.state import IGNORED
from skipvision_export.runtime.prompt import load_image
from skipvision_export.training.encoding import Encoded

_CACHE_BYTES = 256 << 20


class Collator:
    """Makes batches of encoded samples; pictures are decoded when their batch is made.

    The prompts get `per_image` placeholders for each picture at once, the number that the layout
    has, so that the patched model has nothing to resize. A batch without any picture gets one more
    row with a blank picture and no label: projector and summary tokens then have a gradient
    (of zero) in every process of a distributed run, without which DDP and FSDP would wait for ever.
    """

    def __init__(self, processor: Any, image_token: int, pad_token: int, per_image: int) -> None:
        """per_image: visual tokens of a picture in the decoder's sequence, summaries included."""
        self.processor = processor
        self.image_token, self.pad_token, self.per_image = image_token, pad_token, per_image
        self._cache: OrderedDict[Path, Tensor] = OrderedDict()
        self._cached = 0

    def __call__(self, samples: Sequence[Encoded]) -> dict[str, Tensor]:
        """input_ids, attention_mask, labels [B, S] int64, right-padded; pixel_values [N, 3, h, w].

        Labels are the answer's tokens only. Raises InputError for a picture that cannot be decoded.
        """
        rows = [self._row(sample) for sample in samples]
        files = [file for sample in samples for file in sample.images]
        pixels = [self._pixels(file) for file in files]
        if not pixels:
            blank = np.full(self.per_image, self.image_token)
            rows.append((blank, np.full(self.per_image, IGNORED)))
            pixels.append(self._blank())
        length = max(len(ids) for ids, _ in rows)
        ids = np.full((len(rows), length), self.pad_token)
        labels = np.full((len(rows), length), IGNORED)
        mask = np.zeros((len(rows), length), dtype=np.int64)
        for i, (row, wanted) in enumerate(rows):
            ids[i, : len(row)], labels[i, : len(row)], mask[i, : len(row)] = row, wanted, 1
        return {
            "input_ids": torch.from_numpy(ids),
            "attention_mask": torch.from_numpy(mask),
            "labels": torch.from_numpy(labels),
            "pixel_values": torch.cat(pixels),
        }

    def _row(self, sample: Encoded) -> tuple[np.ndarray, np.ndarray]:
        """Ids with all placeholders, and labels."""
        ids = np.asarray(sample.ids)
        ids = np.repeat(ids, np.where(ids == self.image_token, self.per_image, 1))
        labels = ids.copy()
        labels[: len(ids) - (len(sample.ids) - sample.answer_from)] = IGNORED
        return ids, labels

    def _pixels(self, file: Path) -> Tensor:
        """[1, 3, h, w]; the last pictures are remembered, as several questions share one."""
        if file in self._cache:
            self._cache.move_to_end(file)
            return self._cache[file]
        pixels: Tensor = self.processor.image_processor(load_image(file), return_tensors="pt")["pixel_values"]
        self._cache[file] = pixels
        self._cached += pixels.nbytes
        while self._cached > _CACHE_BYTES:
            self._cached -= self._cache.popitem(last=False)[1].nbytes
        return pixels

    def _blank(self) -> Tensor:
        from PIL import Image

        blank = Image.new("RGB", (32, 32))
        pixels: Tensor = self.processor.image_processor(blank, return_tensors="pt")["pixel_values"]
        return pixels
