"""What every command shares: progress on standard error, results as JSON, choice of tokens."""

from __future__ import annotations

import json
import math
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from skipvision_export.bundle import write_text
from skipvision_export.config import PRESETS, SkipVisionConfig
from skipvision_export.errors import ConfigError
from skipvision_export.tokens import selector_names

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
EnginesOption = Annotated[
    Path | None,
    typer.Option(metavar="ENGINES", help="Run what `skipvision build` wrote of BUNDLE, on a GPU."),
]
DeviceOption = Annotated[
    str, typer.Option(metavar="DEVICE", help="What ONNX Runtime runs on: cpu, or cuda (its CUDA provider).")
]
PluginOption = Annotated[
    Path | None,
    typer.Option(metavar="LIBRARY", help="The KVPrune plugin, built from plugins/kv_prune."),
]
ThreadsOption = Annotated[int, typer.Option(min=0, help="CPU threads; 0 lets the runtime choose.")]

PresetOption = Annotated[
    str | None, typer.Option(help=f"One of {', '.join(PRESETS)}; `inspect` tells which fit.")
]
PolicyOption = Annotated[
    Path | None, typer.Option(metavar="FILE", help="A policy or configuration file (JSON).")
]
RetainedOption = Annotated[int | None, typer.Option(help="Visual tokens that stay whole.")]
SkippedOption = Annotated[int | None, typer.Option(help="Visual tokens that skip the FFN.")]
DenseOption = Annotated[bool, typer.Option("--dense", help="Skip nothing: the baseline.")]
SelectorOption = Annotated[
    str | None, typer.Option(metavar="NAME", help=f"What chooses tokens: {', '.join(selector_names())}.")
]
StrictOption = Annotated[
    bool, typer.Option("--strict", help="Hide skipped tokens from the text after them in prefill too.")
]
SummariesOption = Annotated[
    bool | None,
    typer.Option("--summaries/--no-summaries", help="Add summary tokens, or leave them out."),
]
MostRetainedOption = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="With a preset by share: retained visual tokens of a picture at most, however large.",
    ),
]
PassThroughOption = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="Skipped tokens that go through the FFN: none, last, first_last."),
]


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
    *,
    preset: str | None = None,
    policy: Path | None = None,
    retained: int | None = None,
    skipped: int | None = None,
    dense: bool = False,
    selector: str | None = None,
    strict: bool = False,
    summaries: bool | None = None,
    pass_through: str | None = None,
    most_retained: int | None = None,
    saved: SkipVisionConfig | None = None,
) -> SkipVisionConfig:
    """The configuration that the options name; raises ConfigError unless it is exactly one.

    saved: what a fine-tuned model carries, for where none is named. selector, strict, summaries,
    pass_through and most_retained change what was named, and its name.
    """
    by_counts = retained is not None or skipped is not None
    named = (preset is not None) + (policy is not None) + by_counts + dense
    if named > 1 or (named == 0 and saved is None):
        raise ConfigError(
            "choose exactly one of --preset NAME, --policy FILE, --retained N --skipped N, and --dense; "
            "presets: " + ", ".join(PRESETS)
        )
    changes: dict[str, Any] = {}
    label = []
    if selector is not None:
        changes["selector"], label = selector, [selector]
    if strict:
        changes["strict"], label = True, [*label, "strict"]
    if summaries is not None:
        changes["summaries"], label = summaries, [*label, "summaries" if summaries else "no-summaries"]
    if pass_through is not None:
        changes["pass_through"], label = pass_through, [*label, f"pass-{pass_through.replace('_', '-')}"]
    if most_retained is not None:
        changes["most_retained"], label = most_retained, [*label, f"most-{most_retained}"]
    if dense:
        if changes:
            raise ConfigError(
                "--dense skips nothing; leave out --selector, --strict, --summaries, --pass-through and "
                "--most-retained"
            )
        return SkipVisionConfig.dense()
    if preset is not None:
        config = SkipVisionConfig.preset(preset)
    elif policy is not None:
        config = SkipVisionConfig.load(policy)
    elif by_counts:
        if retained is None or skipped is None:
            raise ConfigError("--retained and --skipped belong together; give both numbers of tokens")
        config = SkipVisionConfig.counts(retained, skipped)
    else:
        assert saved is not None  # by the first check
        config = saved
    return replace(config, name="-".join([config.name, *label]), **changes)


def si(value: float, unit: str = "") -> str:
    """A number with three digits and a prefix, such as 1.23 G."""
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}".rstrip()
