"""The output folder of a training run: its states, its checkpoints, the finished model.

```
OUT/checkpoints/run.json          what the run was told; there from the first moment
OUT/checkpoints/checkpoint-N/     one is whole where it holds the file `complete`
OUT/train_log.jsonl               a JSON line for each logged step
OUT/config.json and the rest      the finished model; config.json comes last
```
A folder without config.json is no model for any command, so a run that failed never looks finished.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from skipvision_export.bundle import check_output, write_text
from skipvision_export.errors import OutputError

COMPLETE = "complete"


class RunFolder:
    """OUT, and what is in it."""

    def __init__(self, folder: Path) -> None:
        """folder: OUT; nothing is written yet."""
        self.folder = folder
        self.checkpoints = folder / "checkpoints"
        self.log = folder / "train_log.jsonl"
        self._settings = self.checkpoints / "run.json"

    def check(self, force: bool, resume: bool, settings: dict[str, Any]) -> None:
        """Raise OutputError where the run must not start; call it before any long work.

        settings: what makes two runs the same run, for `resume`.
        """
        interrupted = self._settings.is_file() and not (self.folder / "config.json").exists()
        if resume:
            if not interrupted:
                raise OutputError(f"{self.folder} holds no interrupted run to resume; leave --resume out")
            self._check_same(settings)
        elif interrupted and not force:
            raise OutputError(f"{self.folder} is interrupted; --resume to go on, or --force to start anew")
        check_output(self.folder, force or resume)

    def start(self, resume: bool, settings: dict[str, Any]) -> Path | None:
        """Clear the folder for a new run, or find the checkpoint to go on from (None: none yet)."""
        if not resume:
            if self.folder.exists():
                shutil.rmtree(self.folder)
            write_text(self._settings, json.dumps(settings, indent=1) + "\n")
            return None
        last = self.last_checkpoint()
        for folder in self.checkpoints.glob("checkpoint-*"):
            if not (folder / COMPLETE).is_file():
                shutil.rmtree(folder)
        self._cut_log(_step(last) if last else 0)
        return last

    def last_checkpoint(self) -> Path | None:
        """The newest whole checkpoint."""
        whole = [f for f in self.checkpoints.glob("checkpoint-*") if (f / COMPLETE).is_file()]
        return max(whole, key=_step, default=None)

    def drop_old(self, keep: int) -> None:
        """Remove all but the `keep` newest whole checkpoints."""
        whole = [f for f in self.checkpoints.glob("checkpoint-*") if (f / COMPLETE).is_file()]
        for folder in sorted(whole, key=_step)[:-keep]:
            (folder / COMPLETE).unlink()  # first: a half removed one is not whole
            shutil.rmtree(folder)

    def append_log(self, row: dict[str, Any]) -> None:
        """One line of train_log.jsonl."""
        with self.log.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(row) + "\n")

    def finish(self, scratch: Path, keep_checkpoints: bool) -> None:
        """Move the finished model's files in, config.json last, and drop the checkpoints."""
        files = sorted(scratch.iterdir(), key=lambda file: file.name == "config.json")
        mask = os.umask(0)
        os.umask(mask)
        for file in files:
            os.chmod(file, 0o666 & ~mask)  # safetensors makes files for their owner only
            os.replace(file, self.folder / file.name)
        if not keep_checkpoints:
            shutil.rmtree(self.checkpoints)

    def scratch(self) -> tempfile.TemporaryDirectory[str]:
        """A folder on the same disk for the finished model; removed on any error."""
        return tempfile.TemporaryDirectory(prefix=".final-", dir=self.folder)

    def _check_same(self, settings: dict[str, Any]) -> None:
        try:
            before = json.loads(self._settings.read_text(encoding="utf-8"))
        except ValueError as error:
            raise OutputError(f"{self._settings} cannot be read ({error}); --force to start anew") from None
        for key in sorted({*before, *settings}):
            # Through JSON, as the other one came: tuples are lists there.
            now = json.loads(json.dumps(settings.get(key)))
            if before.get(key) != now:
                raise OutputError(
                    f"{self.folder} was started with another {key} ({before.get(key)}, now {now}); give "
                    "the same to --resume, or --force to start anew"
                )

    def _cut_log(self, step: int) -> None:
        """Leave the lines of steps that the checkpoint has; those after it are trained again."""
        if self.log.is_file():
            lines = self.log.read_text(encoding="utf-8").splitlines()
            write_text(self.log, "".join(line + "\n" for line in lines if _logged_step(line) <= step))


def _step(folder: Path) -> int:
    return int(folder.name.rsplit("-", 1)[1])


def _logged_step(line: str) -> float:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, TypeError, KeyError):
        return float("inf")  # the last line of a killed run may be cut
