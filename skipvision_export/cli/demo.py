"""The whole job on the shipped tiny VLM, and its report."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from skipvision_export.bundle import atomic_folder
from skipvision_export.cli.common import ForceOption, JsonOption, Progress, finish, to_json
from skipvision_export.config import SkipVisionConfig
from skipvision_export.errors import CheckFailed, ConfigError, InputError

_EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "tiny_vlm"


def demo(
    output: Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="Output folder.")],
    checkpoint: Annotated[
        Path, typer.Option(metavar="MODEL", help="The dense model.", show_default=False)
    ] = _EXAMPLE / "checkpoint",
    finetuned: Annotated[
        Path | None,
        typer.Option(metavar="MODEL", help="The same after `finetune`, with its configuration."),
    ] = None,
    data: Annotated[
        Path, typer.Option(metavar="DIR", help="Its held-out questions.", show_default=False)
    ] = _EXAMPLE / "test",
    preset: Annotated[
        str | None,
        typer.Option(help="Compare with this preset on the dense checkpoint instead, without training."),
    ] = None,
    questions: Annotated[int | None, typer.Option(min=8, help="Only the first N held-out questions.")] = None,
    parity_questions: Annotated[
        int, typer.Option(min=1, help="Questions on which the gaps are measured.")
    ] = 200,
    rounds: Annotated[int, typer.Option(min=1, help="Timed rounds of the sibling.")] = 11,
    force: ForceOption = False,
    json: JsonOption = None,
) -> None:
    """Show the whole idea on the shipped tiny VLM: export, prove, measure; writes DIR/report.html.

    Exports a trained model dense, and its Skip-Vision fine-tune with the preset that it carries;
    compares both with PyTorch, asks 1,000 held-out questions about pictures, and times a larger
    sibling with random weights. About four minutes on two cores.
    """
    if finetuned is None and preset is None:
        finetuned = _EXAMPLE / "finetuned"
    elif finetuned is not None and preset is not None:
        raise ConfigError("choose --finetuned MODEL or --preset NAME, not both")
    chosen = checkpoint if finetuned is None else finetuned
    if not (checkpoint.is_dir() and chosen.is_dir() and data.is_dir()):
        raise InputError(
            f"the demo needs the tiny VLM at {checkpoint} and {chosen} and its questions at {data}; run it "
            "from a clone of the repository, or give --checkpoint, --finetuned and --data"
        )
    config = SkipVisionConfig.preset(preset) if preset is not None else _saved(chosen)
    progress = Progress()
    with atomic_folder(output, force) as folder:
        result, passed = run_demo(
            folder, checkpoint, chosen, data, config, questions, parity_questions, rounds, progress
        )
        result = {
            "report": _from_here(output / "report.html"),
            "checkpoint": _from_here(checkpoint),
            "finetuned": _from_here(chosen),
            **result,
        }
        (folder / "demo.json").write_text(to_json(result), encoding="utf-8")
    progress("")
    accuracy, ratios = result["accuracy"], result["ratios"]
    print(
        f"accuracy: dense {accuracy['dense']:.1%}, skip {accuracy['skip']:.1%}, shuffled pictures "
        f"{accuracy['shuffled']:.1%}"
    )
    rewrite = result["gaps"]["rewrite"]
    print(
        f"rewritten ONNX against patched PyTorch: max_abs {rewrite['max_abs']:.1e}, greedy tokens "
        f"equal for {rewrite['greedy_match']:.1%} of {rewrite['n']} questions"
    )
    print(
        f"sibling, dense / skip: prefill {ratios['prefill']:.2f} x, decode {ratios['decode']:.2f} x, "
        f"FLOPs {ratios['flops']:.2f} x, K/V bytes {ratios['kv_bytes']:.2f} x"
    )
    print(f"report: {result['report']}")
    finish(result, json)
    if not passed:
        raise CheckFailed(f"a gap is over its limit; see {result['report']}")


def run_demo(
    folder: Path,
    checkpoint: Path,
    finetuned: Path,
    data: Path,
    config: SkipVisionConfig,
    questions: int | None,
    parity_questions: int,
    rounds: int,
    progress: Progress,
) -> tuple[dict[str, Any], bool]:
    """Fill `folder` with bundles and the report; returns the result and whether all gaps passed.

    checkpoint: what the dense bundle is made of; finetuned: what the skipping one is, maybe the same.
    """
    from skipvision_export.benchmark import accuracy, sibling
    from skipvision_export.benchmark.blame import compare_layers
    from skipvision_export.benchmark.pareto import BASELINES, measure_pareto
    from skipvision_export.benchmark.parity import measure_gaps, prompts_from
    from skipvision_export.benchmark.timing import BenchSettings, bench
    from skipvision_export.exporter import trace_model
    from skipvision_export.models.loading import resolve_model
    from skipvision_export.report import picture_cards, render_report
    from skipvision_export.runtime.data import load_imagefolder
    from skipvision_export.runtime.pipeline import Bundle
    from skipvision_export.runtime.torch_reference import TorchReference

    samples = load_imagefolder(data, questions)
    traced = trace_model(resolve_model(checkpoint), progress=progress)
    dense = traced.write(folder / "dense", SkipVisionConfig.dense())
    if finetuned != checkpoint:
        traced = trace_model(resolve_model(finetuned), progress=partial(_tell, progress, "fine-tuned"))
    skip = traced.write(folder / "skip", config)

    reference = TorchReference(traced.source, traced.model)
    parity = measure_gaps(
        skip,
        reference,
        prompts_from(samples[:parity_questions]),
        progress=partial(_tell, progress, "parity"),
    )
    parity.by_layer = compare_layers(skip, reference, prompts_from(samples[:1])[0])
    accuracies = {
        name: accuracy.evaluate(accuracy.BundleAnswerer(bundle), asked, partial(_tell, progress, name))
        for name, bundle, asked in (
            ("dense", dense, samples),
            ("skip", skip, samples),
            ("shuffled", dense, accuracy.shuffled(samples)),
        )
    }
    with tempfile.TemporaryDirectory() as scratch:
        baselines = {
            name: traced.write(Path(scratch) / name, replace(config, name=name, selector=name))
            for name in BASELINES
        }
        # On one thread: of a model so small two wait for each other, unless nothing else runs.
        quick = BenchSettings(new_tokens=8, rounds=rounds, threads=1)
        against_time = measure_pareto(
            {
                name: Bundle.load(bundle.folder, verify=False, threads=1)
                for name, bundle in ({"dense": dense, "skip": skip} | baselines).items()
            },
            samples,
            quick,
            asked=accuracies,
            progress=partial(_tell, progress, "against time"),
        )
        progress("sibling: random weights")
        parameters = sibling.write_sibling(Path(scratch) / "sibling")
        larger = trace_model(
            resolve_model(Path(scratch) / "sibling"),
            progress=partial(_tell, progress, "sibling"),
        )
        pair = [
            larger.write(folder / "sibling-skip", config),
            larger.write(folder / "sibling-dense", SkipVisionConfig.dense()),
        ]
    settings = BenchSettings(text_tokens=sibling.TEXT_TOKENS, rounds=rounds)
    times = bench(pair, settings, partial(_tell, progress, "sibling"))
    html = render_report(
        title="a tiny VLM, end to end",
        manifest=skip.manifest,
        machine=times["machine"],
        cards=picture_cards(skip, samples, {name: accuracies[name].answers for name in ("dense", "skip")}, 6),
        accuracies=accuracies,
        validated=parity.to_json(),
        bench=times,
        bench_names=("skip", "dense"),
        bench_note=f"On a sibling with random weights, {parameters / 1e6:.0f} M parameters: a model as small "
        "as the trained one says little about time.",
        pareto=against_time,
    )
    (folder / "report.html").write_text(html, encoding="utf-8")
    result = {
        "preset": config.name,
        "accuracy": {name: a.accuracy for name, a in accuracies.items()},
        "questions": len(samples),
        "gaps": parity.to_json()["gaps"],
        "ratios": times["ratios"],
        "ratio_spread": times["ratio_spread"],
        "sibling": {"parameters": parameters, **times},
        "pareto": against_time,
    }
    return result, parity.passed


def _saved(folder: Path) -> SkipVisionConfig:
    """The configuration that a fine-tuned checkpoint carries; raises ConfigError where it has none."""
    from skipvision_export.method import saved_config

    config = saved_config(folder)
    if config is None:
        raise ConfigError(f"{folder} carries no Skip-Vision configuration; give --preset NAME")
    return config


def _from_here(path: Path) -> str:
    """A path relative to the working directory where it is below it: results travel."""
    path, here = path.resolve(), Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


def _tell(progress: Progress, part: str, text: str) -> None:
    progress(f"{part}: {text}")
