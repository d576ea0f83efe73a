"""Question-answer data: Hugging Face imagefolders with a metadata.jsonl."""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from skipvision_export.errors import InputError
from skipvision_export.runtime.prompt import load_image

TABLE = "metadata.jsonl"


@dataclass(frozen=True)
class Sample:
    """One question about pictures, usually one; `type` groups questions in reports.

    line: where it stands in its metadata.jsonl, from 1; 0 where it does not come from one.
    """

    images: tuple[Path, ...]
    question: str
    answer: str
    type: str = "all"
    line: int = field(default=0, compare=False)

    @property
    def image(self) -> Path:
        """The one picture; raises InputError where there is none or more than one."""
        if len(self.images) != 1:
            raise InputError(
                f"the question {self.question!r} has {len(self.images)} pictures; expected exactly one here"
            )
        return self.images[0]


@dataclass(frozen=True)
class Broken:
    """A row that cannot be used, and why."""

    line: int
    reason: str


def load_imagefolder(folder: Path, limit: int | None = None) -> list[Sample]:
    """Read DIR/metadata.jsonl; `limit`: only the first rows.

    Raises InputError that names the file, the first line at fault and the number of them.
    """
    samples, broken = read_imagefolder(folder, limit)
    refuse_broken(folder, broken)
    return samples


def read_imagefolder(folder: Path, limit: int | None = None) -> tuple[list[Sample], list[Broken]]:
    """Samples and broken rows of DIR/metadata.jsonl; pictures are looked for, not opened.

    A row has `question`, `answer` and `file_name` (a string) or `file_names` (a list); null or [] there
    is a question without a picture on purpose. `type` is optional. Raises InputError for a folder
    without rows.
    """
    table = folder / TABLE
    if not table.is_file():
        raise InputError(f"{folder} is no imagefolder: it has no {TABLE}")
    samples: list[Sample] = []
    broken: list[Broken] = []
    for number, line in enumerate(_lines(table), 1):
        if not line.strip():
            continue
        try:
            samples.append(_sample(folder, line, number))
        except (ValueError, RecursionError) as error:
            broken.append(Broken(number, str(error)))
        if limit is not None and len(samples) + len(broken) >= limit:
            break
    if not samples and not broken:
        raise InputError(f"{table} holds no questions")
    return samples, broken


def broken_pictures(samples: Sequence[Sample]) -> list[Broken]:
    """Rows with a picture that cannot be decoded; each picture is decoded once, on all cores."""
    files = list(dict.fromkeys(file for sample in samples for file in sample.images))

    def reason(file: Path) -> str | None:
        try:
            load_image(file)
        except InputError as error:
            return str(error)
        return None

    with ThreadPoolExecutor() as pool:
        reasons = {file: why for file, why in zip(files, pool.map(reason, files), strict=True) if why}
    return [
        Broken(sample.line, reasons[bad[0]])
        for sample in samples
        if (bad := [file for file in sample.images if file in reasons])
    ]


def refuse_broken(folder: Path, broken: Sequence[Broken], what_to_do: str = "mend them") -> None:
    """Raise InputError where there are broken rows; it names the first and their number."""
    if not broken:
        return
    first = min(broken, key=lambda row: row.line)
    rows = "1 broken row" if len(broken) == 1 else f"{len(broken)} broken rows"
    raise InputError(
        f"{folder / TABLE} has {rows}, the first is line {first.line}: {first.reason}; {what_to_do}"
    )


def _lines(table: Path) -> list[str]:
    try:
        # Not splitlines(): JSON strings may hold line separators other than \n.
        return table.read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise InputError(f"{table} cannot be read as UTF-8 text: {error}") from None


def _sample(folder: Path, line: str, number: int) -> Sample:
    """One row; raises ValueError with what is wrong."""
    try:
        row = json.loads(line, object_pairs_hook=_without_duplicates)
    except json.JSONDecodeError as error:
        raise ValueError(f"no JSON ({error})") from None
    if not isinstance(row, dict):
        raise ValueError("no JSON object; expected file_name, question and answer")
    images = tuple(folder / name for name in _file_names(row))
    for image in images:
        if not _is_file(image):
            raise ValueError(f"picture {image} does not exist")
    kind = row.get("type", "all")
    return Sample(images, _text(row, "question"), _text(row, "answer"), str(kind), number)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that is too long
        return False


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(k for k in keys if keys.count(k) > 1)!r} stands there twice")
    return row


def _file_names(row: dict[str, Any]) -> list[str]:
    given = [key for key in ("file_name", "file_names") if key in row]
    if len(given) != 1:
        raise ValueError(
            "expected file_name or file_names, "
            + ("not both" if given else "null for a question without a picture")
        )
    names = row[given[0]]
    if names is None:
        return []
    names = [names] if given == ["file_name"] else names
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"{given[0]} is {row[given[0]]!r}; expected the names of picture files, or null")
    return names


def _text(row: dict[str, Any], key: str) -> str:
    if key not in row:
        raise ValueError(f"no {key}; expected file_name, question and answer")
    value = row[key]
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"{key} is {value!r}; expected text")
    if not str(value).strip():
        raise ValueError(f"the {key} is empty")
    return str(value)
