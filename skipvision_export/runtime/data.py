"""Question-answer data: Hugging Face imagefolders with a metadata.jsonl."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from skipvision_export.errors import InputError


@dataclass(frozen=True)
class Sample:
    """One question about one picture; `type` groups questions in reports."""

    image: Path
    question: str
    answer: str
    type: str


def load_imagefolder(folder: Path, limit: int | None = None) -> list[Sample]:
    """Read DIR/metadata.jsonl (file_name, question, answer, optionally type).

    Raises InputError that names the file and line at fault.
    """
    table = folder / "metadata.jsonl"
    if not table.is_file():
        raise InputError(f"{folder} is no imagefolder: it has no metadata.jsonl")
    samples = []
    for number, line in enumerate(table.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            image, question, answer = row["file_name"], row["question"], row["answer"]
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(
                f"{table} line {number}: expected JSON with file_name, question and answer ({error})"
            ) from None
        samples.append(Sample(folder / image, str(question), str(answer), str(row.get("type", "all"))))
        if limit is not None and len(samples) >= limit:
            break
    if not samples:
        raise InputError(f"{table} holds no questions")
    return samples
