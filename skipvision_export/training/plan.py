"""What a training run is, checked before any weights are loaded."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from skipvision_export.config import SkipVisionConfig
from skipvision_export.errors import InputError, ModelError
from skipvision_export.layout import TokenLayout
from skipvision_export.models.loading import ModelSource, load_processor
from skipvision_export.runtime.data import (
    TABLE,
    Broken,
    broken_pictures,
    read_imagefolder,
    refuse_broken,
)
from skipvision_export.training.encoding import Encoded, Encoder
from skipvision_export.training.settings import FinetuneSettings

Progress = Callable[[str], None]


@dataclass(frozen=True)
class TrainingData:
    """Encoded samples of a folder, and the broken rows that were left out."""

    samples: list[Encoded]
    broken: list[Broken]
    digest: str

    @property
    def images(self) -> int:
        """Pictures, each as often as a sample has it."""
        return sum(len(sample.images) for sample in self.samples)

    def answer_tokens(self) -> int:
        """Labels that count."""
        return sum(len(sample.ids) - sample.answer_from for sample in self.samples)


@dataclass(frozen=True)
class Plan:
    """All that is checked before weights are loaded."""

    source: ModelSource
    config: SkipVisionConfig
    layout: TokenLayout
    settings: FinetuneSettings
    processor: Any
    data: TrainingData
    eval_data: TrainingData | None
    processes: int

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run."""
        if self.settings.max_steps is not None:
            return self.settings.max_steps
        batches = math.ceil(len(self.data.samples) / (self.settings.batch_size * self.processes))
        return math.ceil(self.settings.epochs * math.ceil(batches / self.settings.accumulate))

    def tokens(self) -> int:
        """Tokens of one epoch in the decoder's sequence, padding apart."""
        return sum(sample.length(self.layout.total) for sample in self.data.samples)

    def identity(self) -> dict[str, Any]:
        """What makes two runs the same run: one may go on only as what it began."""
        return {
            "model": _fingerprint(self.source.folder),
            "configuration": self.config.to_json(),
            "data": self.data.digest,
            "processes": self.processes,
            **self.settings.to_json(),
        }


def plan(
    source: ModelSource,
    config: SkipVisionConfig,
    settings: FinetuneSettings,
    data: Path,
    eval_data: Path | None = None,
    *,
    skip_broken: bool = False,
    progress: Progress = lambda _: None,
) -> Plan:
    """Check configuration and data; raises ConfigError, ModelError or InputError, loads no weights."""
    from skipvision_export.runtime.pipeline import eos_tokens

    layout = source.family.layout(source.config, config)
    if not source.family.plain:
        raise ModelError(
            f"training of {source.family.name} models is not supported, only of those with one crop of "
            "one size for each picture whose tokens see those before them"
        )
    processor = load_processor(source.folder)
    encoder = Encoder(
        processor,
        eos_tokens(source.folder, processor),
        layout.total,
        source.config.text_config.max_position_embeddings,
    )
    read = [
        None if folder is None else _read(folder, encoder, skip_broken, progress)
        for folder in (data, eval_data)
    ]
    assert read[0] is not None
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    return Plan(source, config, layout, settings, processor, read[0], read[1], processes)


def _read(folder: Path, encoder: Encoder, skip_broken: bool, progress: Progress) -> TrainingData:
    progress(f"checking {folder}")
    rows, broken = read_imagefolder(folder)
    unreadable = broken_pictures(rows)
    gone = {row.line for row in unreadable}
    samples, unusable = encoder.encode([row for row in rows if row.line not in gone])
    broken = sorted([*broken, *unreadable, *unusable], key=lambda row: row.line)
    if not skip_broken:
        refuse_broken(folder, broken, "mend them, or leave them out with --skip-broken")
    if not samples:
        raise InputError(
            f"{folder / TABLE} has no row that can be used; line {broken[0].line}: {broken[0].reason}"
        )
    digest = hashlib.sha256((folder / TABLE).read_bytes()).hexdigest()
    return TrainingData(samples, broken, digest)


def _fingerprint(folder: Path) -> str:
    """Of config.json's text, and the names and sizes of the weights: what can be had at once."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for file in sorted(folder.glob("*.safetensors")):
        digest.update(f"{file.name} {file.stat().st_size}".encode())
    return digest.hexdigest()
