"""A small folder of questions to train on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


def write_rows(folder: Path, rows: list[Any]) -> None:
    """metadata.jsonl; strings are written as they are."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")


def write_questions(folder: Path) -> Path:
    """Ten questions: one has two pictures, one has none, the rest have one."""
    rng = np.random.default_rng(0)
    rows: list[Any] = []
    for i in range(10):
        blocks = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(blocks).resize((96, 96)).save(folder / f"{i}.png")
        rows.append({"file_name": f"{i}.png", "question": "What?" + "x" * i, "answer": "a" * (1 + i % 3)})
    rows[3] = {"file_names": ["1.png", "2.png"], "question": "Which?", "answer": "two"}
    rows[4] = {"file_names": [], "question": "No picture?", "answer": "none"}
    write_rows(folder, rows)
    return folder
