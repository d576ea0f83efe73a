"""`skipvision pareto`: accuracy against time."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from skipvision_export.bundle import write_text
from skipvision_export.cli.common import JsonOption, Progress, RevisionOption, ThreadsOption, finish, si
from skipvision_export.config import PRESETS, SkipVisionConfig
from skipvision_export.errors import ConfigError

if TYPE_CHECKING:
    from skipvision_export.runtime.pipeline import Bundle


def pareto(
    data: Annotated[Path, typer.Option(metavar="DIR", help="Imagefolder with metadata.jsonl.")],
    bundle: Annotated[
        list[Path] | None, typer.Argument(metavar="[BUNDLE]...", help="What `skipvision export` wrote.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Export this one as well, dense and as below.")
    ] = None,
    preset: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help=f"Of MODEL; again for each: {', '.join(PRESETS)}."),
    ] = None,
    policy: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="Of MODEL; again for each policy.")
    ] = None,
    baselines: Annotated[
        bool, typer.Option(help="Each preset with tokens chosen at random and evenly, too.")
    ] = True,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first N questions.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Where an answer is cut.")] = 32,
    text_tokens: Annotated[int, typer.Option(min=4, help="Text tokens of the timed prompt.")] = 64,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens of the timed answer.")] = 16,
    rounds: Annotated[int, typer.Option(min=1, help="Timed rounds.")] = 15,
    batch: Annotated[
        int, typer.Option(min=1, help="Prompts timed in one run: of a small model, calls weigh less.")
    ] = 1,
    threads: ThreadsOption = 0,
    chart: Annotated[Path | None, typer.Option(metavar="FILE.svg", help="Also draw it.")] = None,
    revision: RevisionOption = None,
    json: JsonOption = None,
) -> None:
    """Accuracy against time of several bundles, or of MODEL with presets, policies and baselines.

    Each answers the questions of DIR as `evaluate` asks them, and all are timed in turn as by `bench`. A
    star marks those that no other beats in both. Bundles of MODEL are made for this and thrown away.

    Example: skipvision pareto --model MODEL --preset skip-50 --preset quarter --data DIR --chart pareto.svg
    """
    from skipvision_export.benchmark.pareto import measure_pareto
    from skipvision_export.benchmark.timing import BenchSettings
    from skipvision_export.report.pareto_chart import pareto_chart
    from skipvision_export.runtime.data import load_imagefolder
    from skipvision_export.runtime.pipeline import Bundle

    if model is None and (preset or policy):
        raise ConfigError("--preset and --policy are of a model; give --model MODEL too")
    if model is None and len(bundle or []) < 2:
        raise ConfigError("give two bundles or more to compare, or --model MODEL with --preset NAME")
    samples = load_imagefolder(data, limit)
    bundles = {_name(folder, bundle or []): Bundle.load(folder, threads=threads) for folder in bundle or []}
    configs = configurations(preset or [], policy or [], baselines)
    settings = BenchSettings(text_tokens, new_tokens, rounds, threads=threads)
    progress = Progress()
    with tempfile.TemporaryDirectory(prefix="skipvision-pareto-") as scratch:
        if model is not None:
            bundles |= _export(model, revision, configs, Path(scratch), threads, progress)
        result = measure_pareto(
            bundles, samples, settings, max_new_tokens=max_new_tokens, batch=batch, progress=progress
        )
    progress("")
    for line in pareto_lines(result):
        print(line)
    if chart is not None:
        write_text(chart, pareto_chart(result) + "\n")
    finish(result, json)


def configurations(
    presets: Sequence[str], policies: Sequence[Path], baselines: bool = True
) -> list[SkipVisionConfig]:
    """Dense, the presets, each followed by its baselines, the policies; raises ConfigError."""
    from skipvision_export.benchmark.pareto import BASELINES

    found = [SkipVisionConfig.dense()]
    for name in presets:
        config = SkipVisionConfig.preset(name)
        found.append(config)
        if baselines and not config.tiled:
            found += [replace(config, name=f"{name}-{one}", selector=one) for one in BASELINES]
    return found + [SkipVisionConfig.load(file).renamed(file.stem) for file in policies]


def pareto_lines(result: dict[str, Any]) -> list[str]:
    """The fastest first, each in a line."""
    lines = []
    for point in sorted(result["points"], key=lambda point: point["ms"]):
        low, high = point["ms_spread"]
        lines.append(
            f"{'*' if point['front'] else ' '} {point['name']:<24} {point['accuracy']:6.1%} "
            f"±{100 * point['accuracy_error']:.1f}, {point['ms']:.2f} ms [{low:.2f}, {high:.2f}], "
            f"first token {point['ttft_ms']:.2f} ms, {si(point['flops'], 'FLOP')}, "
            f"K/V {si(point['kv_bytes'], 'B')}"
        )
    return lines


def _name(folder: Path, folders: Sequence[Path]) -> str:
    """The folder's own, where no other has that."""
    alike = [one for one in folders if one.resolve().name == folder.resolve().name]
    return folder.resolve().name if len(alike) == 1 else str(folder)


def _export(
    model: str,
    revision: str | None,
    configs: Sequence[SkipVisionConfig],
    folder: Path,
    threads: int,
    progress: Progress,
) -> dict[str, Bundle]:
    """Bundles of a model, by the configurations' names; each is checked before anything is traced."""
    from skipvision_export.exporter import trace_model
    from skipvision_export.models.loading import resolve_model
    from skipvision_export.runtime.pipeline import Bundle

    source = resolve_model(model, revision)
    for config in configs:
        source.family.layout(source.config, source.family.fitted(source.config, config))
    traced = trace_model(source, progress=progress)
    found = {}
    for number, config in enumerate(configs):
        progress(f"writing {config.name}")
        written = traced.write(folder / str(number), config)
        found[config.name] = Bundle.load(written.folder, verify=False, threads=threads)
    return found
