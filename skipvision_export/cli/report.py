"""`skipvision report`: one page of what the other commands measured."""

from __future__ import annotations

import json as json_module
from pathlib import Path
from typing import Annotated, Any

import typer

from skipvision_export.bundle import write_text
from skipvision_export.cli.common import BundleArgument, JsonOption, Progress, finish
from skipvision_export.errors import InputError

# option: the command that writes such a file, and keys that tell it
_FILES = {
    "--gaps": ("validate", {"gaps", "layers", "passed"}),
    "--bench": ("bench", {"runs", "ratios", "machine"}),
    "--pareto": ("pareto", {"points", "questions", "machine"}),
}


def report(
    bundle: BundleArgument,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE.html", help="The page.")],
    data: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Imagefolder: its first pictures become token maps.")
    ] = None,
    gaps: Annotated[Path | None, typer.Option(metavar="FILE", help="What `validate --json` wrote.")] = None,
    bench: Annotated[Path | None, typer.Option(metavar="FILE", help="What `bench --json` wrote.")] = None,
    pareto: Annotated[Path | None, typer.Option(metavar="FILE", help="What `pareto --json` wrote.")] = None,
    pictures: Annotated[int, typer.Option(min=1, help="Token maps.")] = 6,
    title: Annotated[str | None, typer.Option(help="Of the page.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Where an answer is cut.")] = 32,
    json: JsonOption = None,
) -> None:
    """Write one HTML page about BUNDLE that needs no network: for people who would rather look.

    Token maps over pictures with the bundle's answers; and, of the JSON that is given, the table of gaps and
    the error of every layer, accuracy against time, speed and its floor, the machine.
    """
    from skipvision_export.benchmark.timing import machine
    from skipvision_export.report import render_report
    from skipvision_export.runtime.pipeline import Bundle

    read = {name: _read(file, name) for name, file in zip(_FILES, (gaps, bench, pareto), strict=True)}
    loaded = Bundle.load(bundle)
    progress = Progress()
    cards = [] if data is None else _cards(loaded, data, pictures, max_new_tokens, progress)
    timed = read["--bench"] or read["--pareto"]
    try:
        html = render_report(
            title=title or bundle.resolve().name,
            manifest=loaded.manifest,
            machine=timed["machine"] if timed else machine(),
            cards=cards,
            validated=read["--gaps"],
            bench=read["--bench"],
            pareto=read["--pareto"],
        )
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        given = ", ".join(str(file) for file in (gaps, bench, pareto) if file is not None)
        raise InputError(
            f"{given}: not as this version writes it ({type(error).__name__}: {error}); measure again"
        ) from None
    write_text(output, html)
    progress("")
    print(f"report: {output}")
    finish({"report": str(output), "pictures": len(cards)}, json)


def _cards(bundle: Any, data: Path, pictures: int, max_new_tokens: int, progress: Progress) -> Any:
    from skipvision_export.benchmark.accuracy import BundleAnswerer, evaluate
    from skipvision_export.report import picture_cards
    from skipvision_export.runtime.data import load_imagefolder

    samples = load_imagefolder(data)
    first = list(dict.fromkeys(sample.images for sample in samples if len(sample.images) == 1))[:pictures]
    shown = [sample for sample in samples if sample.images in first]
    if not shown:
        raise InputError(f"{data} has no question about exactly one picture; leave out --data")
    answers = evaluate(BundleAnswerer(bundle, max_new_tokens), shown, progress).answers
    return picture_cards(bundle, shown, {"answer": answers}, pictures)


def _read(file: Path | None, option: str) -> dict[str, Any] | None:
    """A command's JSON; raises InputError for what is none of that command."""
    if file is None:
        return None
    command, keys = _FILES[option]
    try:
        found = json_module.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{option} {file} cannot be read as JSON: {error}") from None
    if not isinstance(found, dict) or not keys <= found.keys():
        raise InputError(f"{option} {file} is not what `skipvision {command} --json` writes")
    return found
