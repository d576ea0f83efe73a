"""Commands on a bundle: validate, generate, evaluate."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from skipvision_export.bundle import MANIFEST
from skipvision_export.cli.common import (
    BundleArgument,
    DenseOption,
    DeviceOption,
    EnginesOption,
    JsonOption,
    PluginOption,
    PolicyOption,
    PresetOption,
    Progress,
    RevisionOption,
    ThreadsOption,
    choose_config,
    finish,
)
from skipvision_export.config import SkipVisionConfig
from skipvision_export.errors import BundleError, CheckFailed, ConfigError

if TYPE_CHECKING:
    from skipvision_export.benchmark.contenders import Prompt
    from skipvision_export.models.loading import ModelSource
    from skipvision_export.runtime.torch_reference import TorchReference
    from skipvision_export.runtime.trt import TrtRunner
    from skipvision_export.validation import Gap

DataOption = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Imagefolder: metadata.jsonl with file_name, question, answer."),
]
NewTokens = Annotated[int, typer.Option(min=1, help="Where an answer is cut.")]


def validate(
    bundle: BundleArgument,
    model: Annotated[str, typer.Option(metavar="MODEL", help="What it was exported from.")],
    data: DataOption = None,
    samples: Annotated[int, typer.Option(min=1, help="Prompts to compare.")] = 8,
    max_new_tokens: NewTokens = 16,
    device: DeviceOption = "cpu",
    engines: EnginesOption = None,
    plugin: PluginOption = None,
    revision: RevisionOption = None,
    json: JsonOption = None,
) -> None:
    """Prove BUNDLE equal to PyTorch: the export, rewrite, backend and method gaps, layer by layer.

    Greedy tokens must be equal and logits, keys and values within 1e-4; the method gap (what
    skipping itself changes) is reported only. A float16 or bfloat16 bundle is compared like that
    with its graphs widened to float32 and the model's weights rounded; what the type itself costs is
    the precision gap in PyTorch and the backend gap in ONNX Runtime, as signal to noise: 40 dB or
    more for float16, 22 dB for bfloat16. So is a bundle with int4 weights: there the precision gap is
    reported, and the backend gap, activations in 8 bits, is 20 dB or more. Without --data the pictures
    are random blocks.

    Then every layer is compared by itself on the first prompt, in prefill and in a step of decode: the
    residual stream behind attention and FFN, K and V, logits, the vision tower's layers. The first tensor
    that breaks is named with its module and nodes; or, if each is right alone, that rounding adds up.
    Exit 1 if a gap or a layer is over its limit.

    With --engines, those of `skipvision build --taps`, the layers are those of the engines; the gaps are of
    ONNX Runtime in any case, on the CPU or with --device cuda.

    BUNDLE may be another exporter's decoder of MODEL, an .onnx file: its layers are found by structure and
    compared with the model's, nothing skipped.
    """
    from skipvision_export.benchmark.blame import compare_layers
    from skipvision_export.benchmark.blame_engines import compare_engines
    from skipvision_export.benchmark.parity import measure_gaps
    from skipvision_export.exporter import source_hash
    from skipvision_export.models.loading import resolve_model
    from skipvision_export.runtime.ort import check_providers
    from skipvision_export.runtime.pipeline import Bundle
    from skipvision_export.runtime.torch_reference import TorchReference

    progress = Progress()
    providers = check_providers(device)
    if engines is None and plugin is not None:
        raise ConfigError("--plugin is for engines; give --engines too")
    if bundle.suffix == ".onnx":
        if engines is not None:
            raise ConfigError(f"{bundle} is a graph; --engines belongs to the bundle of the engines")
        reference = TorchReference(resolve_model(model, revision))
        return _validate_decoder(bundle, reference, data, json, providers)
    loaded = Bundle.load(bundle, providers=providers)
    runner = _runner(engines, bundle, plugin)
    source = resolve_model(model, revision)
    if source_hash(source) != loaded.manifest.source.sha256:
        raise BundleError(
            f"{bundle} was exported from another model than {model} (their weights or configurations "
            "differ); give the model it came from, or export again"
        )
    progress("loading weights")
    reference = TorchReference(source)
    prompts = _prompts(source, data, samples)
    report = measure_gaps(loaded, reference, prompts, max_new_tokens=max_new_tokens, progress=progress)
    progress("layer by layer")
    if runner is None:
        report.by_layer = compare_layers(loaded, reference, prompts[0])
    else:
        report.by_layer = compare_engines(loaded, runner, reference, prompts[0])
    progress("")
    for gap in report.gaps.values():
        print(gap_line(gap))
    print(report.by_layer.line())
    finish(report.to_json(), json)
    failed = {name: gap.failures() for name, gap in report.gaps.items() if gap.failures()}
    if failed:
        reasons = "; ".join(f"{name}: {found[0]}" for name, found in failed.items())
        raise CheckFailed(
            f"{bundle} is not equal to {model}: over the limit: {', '.join(failed)} ({reasons})"
        )
    if not report.passed:
        raise CheckFailed(f"{bundle} is not equal to {model}: a layer breaks, see above")


def _runner(engines: Path | None, bundle: Path, plugin: Path | None) -> TrtRunner | None:
    """What runs engines; asked for before the long work."""
    from skipvision_export.runtime.trt import TrtRunner

    return None if engines is None else TrtRunner(engines, bundle, plugin)


def _validate_decoder(
    file: Path, reference: TorchReference, data: Path | None, json: Path | None, providers: tuple[str, ...]
) -> None:
    """The layers of a decoder that another program exported."""
    from skipvision_export.benchmark.blame_decoder import compare_decoder

    report = compare_decoder(file, reference, _prompts(reference.source, data, 1)[0], providers)
    print(report.line())
    passed = report.verdict is None
    finish({"passed": passed, "gaps": {}, "layers": [], **report.to_json()}, json)
    if not passed:
        raise CheckFailed(f"{file} is not equal to {reference.source.name}: a layer breaks, see above")


def _prompts(source: ModelSource, data: Path | None, samples: int) -> list[Prompt]:
    """Of a data folder, or pictures of random blocks."""
    from skipvision_export.benchmark.parity import prompts_from, synthetic_prompts
    from skipvision_export.runtime.data import load_imagefolder

    if data is not None:
        return prompts_from(load_imagefolder(data, samples))
    size, family = source.family.vision_dims(source.config).image_size, source.family
    return synthetic_prompts(samples, size, family.cropped or family.tiled or family.dynamic)


def gap_line(gap: Gap) -> str:
    """One gap's numbers in a line."""
    if gap.not_run:
        return f"{gap.name:<9} not run: {gap.not_run}"
    worst = gap.overall
    limit = "reported" if gap.limit is None else f"limit {gap.limit:.0e}"
    if gap.min_db is not None:
        limit = f"limit {gap.min_db:.0f} dB"
    choice = "" if gap.choice is None else f"  same tokens chosen {gap.choice.tokens:.1%}"
    return (
        f"{gap.name:<9} {'FAILED' if gap.failures() else 'ok':<7} max_abs {worst.max_abs:.2e} ({limit})  "
        f"cosine {worst.cosine:.8f}  sqnr {worst.sqnr_db:.1f} dB  "
        f"greedy tokens equal {gap.greedy_match:.1%} of {gap.n}{choice}"
    )


def generate(
    bundle: BundleArgument,
    prompt: Annotated[str, typer.Option(help="A question, or a whole prompt with its placeholder.")],
    image: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="A picture; again for each more, in order.")
    ] = None,
    max_new_tokens: NewTokens = 64,
    threads: ThreadsOption = 0,
    engines: EnginesOption = None,
    plugin: PluginOption = None,
    json: JsonOption = None,
) -> None:
    """Answer a question about a picture, about several, or without any, greedily.

    Example: skipvision generate bundle --image photo.png --prompt "What is in the picture?"

    Pictures come before the question, unless the prompt says where: --prompt "USER: <image> or <image>?"
    """
    from skipvision_export.runtime.pipeline import Bundle

    loaded = Bundle.load(bundle, **backend_options(engines, plugin, threads))
    answer = loaded.generate(image, prompt, max_new_tokens)
    print(answer.text)
    finish(answer.to_json(), json)


def backend_options(engines: Path | None, plugin: Path | None, threads: int = 0) -> dict[str, Any]:
    """Arguments of Bundle.load; raises ConfigError for a plugin without engines."""
    if engines is not None:
        return {"engines": engines, "library": plugin}
    if plugin is not None:
        raise ConfigError("--plugin is for engines; give --engines too")
    return {"threads": threads}


def evaluate(
    bundle_or_model: Annotated[
        str, typer.Argument(metavar="BUNDLE_OR_MODEL", help="A bundle, or a Hugging Face model.")
    ],
    data: Annotated[Path, typer.Option(metavar="DIR", help="Imagefolder with metadata.jsonl.")],
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first N questions.")] = None,
    shuffle_images: Annotated[
        bool,
        typer.Option("--shuffle-images", help="Give each question another picture: the floor."),
    ] = False,
    against: Annotated[
        Path | None,
        typer.Option(metavar="BUNDLE", help="A dense one: also the share of answers that equal its own."),
    ] = None,
    preset: PresetOption = None,
    policy: PolicyOption = None,
    dense: DenseOption = False,
    max_new_tokens: NewTokens = 32,
    batch: Annotated[int, typer.Option(min=1, help="Questions that a bundle answers in one run.")] = 1,
    engines: EnginesOption = None,
    plugin: PluginOption = None,
    json: JsonOption = None,
) -> None:
    """Task accuracy: exact match of greedy answers on question-answer data.

    A model runs in PyTorch with the configuration that it carries, if it was fine-tuned with one, or
    with --preset, --policy or --dense; a bundle runs as it was exported.

    --against a dense bundle tells loyalty as well, the share of answers that are the dense one's, right or
    wrong: what skipping changes, by type of question.
    """
    from skipvision_export.benchmark import accuracy
    from skipvision_export.method.saved import saved_config
    from skipvision_export.models.loading import resolve_model
    from skipvision_export.runtime.data import load_imagefolder
    from skipvision_export.runtime.pipeline import Bundle
    from skipvision_export.runtime.torch_reference import TorchReference

    samples = load_imagefolder(data, limit)
    if shuffle_images:
        samples = accuracy.shuffled(samples)
    answer: accuracy.Answerer
    if (Path(bundle_or_model) / MANIFEST).is_file():
        if preset is not None or policy is not None or dense:
            raise ConfigError("a bundle runs as it was exported; leave out --preset, --policy and --dense")
        loaded = Bundle.load(bundle_or_model, **backend_options(engines, plugin))
        answer = accuracy.BundleAnswerer(loaded, max_new_tokens, batch)
    elif batch > 1:
        raise ConfigError(f"{bundle_or_model} is no bundle, PyTorch answers one by one; leave out --batch")
    elif engines is not None:
        raise ConfigError(f"{bundle_or_model} is no bundle; --engines belongs to the bundle of the engines")
    else:
        source = resolve_model(bundle_or_model)
        saved = saved_config(source.folder) or SkipVisionConfig.dense()
        config = choose_config(preset=preset, policy=policy, dense=dense, saved=saved)
        if not config.is_dense:
            source.family.layout(source.config, config)  # refuse it before the weights load
        answer = accuracy.TorchAnswerer(TorchReference(source), max_new_tokens, config)
    other = None if against is None else accuracy.BundleAnswerer(Bundle.load(against), max_new_tokens)
    progress = Progress()
    result = accuracy.evaluate(answer, samples, progress)
    loyal = None
    if other is not None:
        loyal = accuracy.loyalty(result, accuracy.evaluate(other, samples, progress), samples)
    progress("")
    print(f"accuracy {result.accuracy:.1%} of {result.n}")
    if loyal is not None:
        print(f"{against}: {loyal.other.accuracy:.1%}, answers alike {loyal.share:.1%}")
    for kind, share in result.by_type.items():
        alike = (
            "" if loyal is None else f"  ({loyal.other.by_type[kind]:.1%}, alike {loyal.by_type[kind]:.1%})"
        )
        print(f"  {kind:<10} {share:.1%}{alike}")
    finish(result.to_json() | ({} if loyal is None else loyal.to_json()), json)
