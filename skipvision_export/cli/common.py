"""What every command shares: progress on standard error, results as JSON, choice of tokens."""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from skipvision_export.bundle import write_text
from skipvision_export.config import PRESETS, SkipVisionConfig
from skipvision_export.errors import ConfigError

JsonOption = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="Also write the result as JSON.")
]
ForceOption = Annotated[bool, typer.Option("--force", help="Replace the output folder if it is not empty.")]
ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="A local Hugging Face folder, or a Hub id.")
]
BundleArgument = Annotated[
    Path, typer.Argument(metavar="BUNDLE", help="A folder that `skipvision export` wrote.")
]
RevisionOption = Annotated[str | None, typer.Option(help="Branch, tag or commit, where MODEL is a Hub id.")]
ThreadsOption = Annotated[int, typer.Option(min=0, help="CPU threads; 0 lets the runtime choose.")]


class Progress:
    """One line on standard error that says what is going on; a call with "" ends it."""

    def __init__(self) -> None:
        """Quiet lines at most every two seconds where nobody watches."""
        self.live = sys.stderr.isatty()
        self.last = time.monotonic()

    def __call__(self, message: str) -> None:
        """Show a message."""
        if self.live:
            sys.stderr.write(f"\r\x1b[K{message}")
            sys.stderr.flush()
        elif message and time.monotonic() - self.last > 2:
            self.last = time.monotonic()
            print(message, file=sys.stderr)


def finish(result: dict[str, Any], file: Path | None) -> None:
    """Write a command's result where --json asks for it."""
    if file is not None:
        write_text(file, to_json(result))


def to_json(result: dict[str, Any]) -> str:
    """Strict JSON: what is not finite becomes null."""

    def strict(value: Any) -> Any:
        if isinstance(value, dict):
            return {str(key): strict(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [strict(item) for item in value]
        if isinstance(value, float) and not math.isfinite(value):
            return None
        return value

    return json.dumps(strict(result), indent=1, allow_nan=False) + "\n"


def choose_config(
    preset: str | None, retained: int | None, skipped: int | None, dense: bool
) -> SkipVisionConfig:
    """The configuration that the options name; raises ConfigError unless it is exactly one."""
    by_counts = retained is not None or skipped is not None
    if (preset is not None) + by_counts + dense != 1:
        raise ConfigError(
            "choose exactly one of --preset NAME, --retained N --skipped N, and --dense; presets: "
            + ", ".join(PRESETS)
        )
    if dense:
        return SkipVisionConfig.dense()
    if preset is not None:
        return SkipVisionConfig.preset(preset)
    if retained is None or skipped is None:
        raise ConfigError("--retained and --skipped belong together; give both numbers of tokens")
    return SkipVisionConfig.counts(retained, skipped)


def si(value: float, unit: str = "") -> str:
    """A number with three digits and a prefix, such as 1.23 G."""
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}".rstrip()
