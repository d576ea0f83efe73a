"""Commands on a Hugging Face model: inspect, export."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from skipvision_export.cli.common import (
    DenseOption,
    ForceOption,
    JsonOption,
    ModelArgument,
    MostRetainedOption,
    PassThroughOption,
    PolicyOption,
    PresetOption,
    Progress,
    RetainedOption,
    RevisionOption,
    SelectorOption,
    SkippedOption,
    StrictOption,
    SummariesOption,
    choose_config,
    finish,
    si,
)
from skipvision_export.config import PRESETS, SkipVisionConfig
from skipvision_export.errors import ConfigError
from skipvision_export.layout import TokenLayout

TextTokens = Annotated[int, typer.Option(min=1, help="Text tokens beside the visual ones.")]
ImagesOption = Annotated[int, typer.Option(min=0, help="Images of the prompt that memory is stated for.")]
PromptTokensOption = Annotated[
    int | None,
    typer.Option(min=1, help="Its tokens in all, visual ones included; by default text and images."),
]


def inspect(
    model: ModelArgument,
    text_tokens: TextTokens = 64,
    prompt_tokens: PromptTokensOption = None,
    images: ImagesOption = 1,
    policy: PolicyOption = None,
    retained: RetainedOption = None,
    skipped: SkippedOption = None,
    revision: RevisionOption = None,
    json: JsonOption = None,
) -> None:
    """Show what skipping would save on MODEL: FLOPs and K/V bytes, dense and for each preset.

    Reads the configuration only, no weights. FLOPs are those of the decoder's prefill of one prompt
    with one image; K/V bytes are what stays cached after it, in float32; the visual share is what is
    left of the visual tokens' FLOPs in linear layers; memory is the peak of a process that prefills one
    prompt (--images, --prompt-tokens) in ONNX Runtime on the CPU in float32. A policy, counts, or the
    preset that a fine-tuned MODEL carries get a line of their own.
    """
    from skipvision_export.models.loading import resolve_model

    chosen = None
    if policy is not None or retained is not None or skipped is not None:
        chosen = choose_config(policy=policy, retained=retained, skipped=skipped)
    result = inspection(resolve_model(model, revision), text_tokens, chosen, prompt_tokens, images)
    dense = result["dense"]
    print(
        f"{result['architecture']}: family {result['family']}, {result['num_layers']} decoder layers, "
        f"{result['visual_tokens']} visual tokens{' for each crop' if result['cropped'] else ''}"
        f"{' of a square picture (other pictures have others)' if result['dynamic'] else ''}, "
        f"counted with {text_tokens} text tokens"
        + (f", sequences of up to {result['max_positions']:,}" if result["max_positions"] else "")
    )
    rows = {"dense": dense, **result["presets"]}
    width = max(map(len, rows)) + 2
    columns = {
        "retained": 9,
        "skipped": 9,
        "visual": 8,
        "prefill FLOPs": 15,
        "": 6,
        "K/V bytes": 12,
        "memory": 10,
    }
    numbers = "".join(f"{name:>{size}}" for name, size in columns.items())
    print(f"{'preset':<{width}}{numbers}")
    for name, row in rows.items():
        share = row["prefill_flops"] / dense["prefill_flops"]
        print(
            f"{name:<{width}}{row['retained']:>9}{row['skipped']:>9}{row['visual_flops_share']:>8.1%}"
            f"{si(row['prefill_flops']):>15}{share:>6.0%}{si(row['kv_bytes'], 'B'):>12}"
            f"{si(row['memory_bytes'], 'B'):>10}"
        )
    print("FLOPs and bytes are counted, not timed: what they save in time, `skipvision bench` measures")
    for why, names in _grouped(result["unsupported"]).items():
        print(f"{', '.join(names)}: {why}")
    finish(result, json)


def _grouped(unsupported: dict[str, str]) -> dict[str, list[str]]:
    """Presets by the reason why they do not fit, which is said once."""
    groups: dict[str, list[str]] = {}
    for name, why in unsupported.items():
        groups.setdefault(why.replace(f"preset {name!r} is", "made"), []).append(name)
    return groups


def inspection(
    source: Any,
    text_tokens: int,
    chosen: SkipVisionConfig | None = None,
    prompt_tokens: int | None = None,
    images: int = 1,
) -> dict[str, Any]:
    """What `inspect` prints, as the contract's JSON object.

    prompt_tokens and images: the prompt that memory is stated for. Raises ConfigError if `chosen` does
    not fit, or the images do not fit the prompt.
    """
    from skipvision_export.benchmark.flops import prefill_cost, visual_flops_share
    from skipvision_export.benchmark.prediction import peak_memory
    from skipvision_export.method.saved import saved_config

    family, config = source.family, source.config
    dims, visual = family.decoder_dims(config), family.most_visual_tokens(config)
    if prompt_tokens is not None and prompt_tokens < images * visual:
        raise ConfigError(
            f"a prompt of {prompt_tokens} tokens cannot hold {images} images of up to {visual} tokens; "
            f"give --prompt-tokens {images * visual} or more, or fewer --images"
        )

    def row(choice: SkipVisionConfig) -> dict[str, float]:
        return counted(family.layout(config, choice))

    def counted(layout: TokenLayout) -> dict[str, float]:
        cost = prefill_cost(dims, layout, text_tokens)
        return {
            "retained": layout.retained,
            "skipped": layout.skipped,
            "prefill_flops": cost.prefill_flops,
            "kv_bytes": cost.kv_bytes,
            "memory_bytes": peak_memory(
                dims,
                family.vision_dims(config),
                layout,
                prompt_tokens or text_tokens + images * layout.total,
                images,
            ),
            "visual_flops_share": visual_flops_share(dims, layout, visual),
        }

    presets, unsupported = {}, {}
    for name, preset in PRESETS.items():
        try:
            presets[name] = row(preset)
        except ConfigError as error:
            unsupported[name] = str(error)
    for own in (saved_config(source.folder), chosen):
        if own is not None:
            presets[own.name] = row(own)
    return {
        "family": family.name,
        "architecture": (config.architectures or ["?"])[0],
        "num_layers": dims.num_layers,
        "visual_tokens": visual,
        "cropped": family.cropped,
        "dynamic": family.dynamic,
        "max_positions": family.max_positions(config),
        "text_tokens": text_tokens,
        "images": images,
        "dense": counted(TokenLayout((("retained", visual),))),
        "presets": presets,
        "unsupported": unsupported,
    }


def export(
    model: ModelArgument,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="BUNDLE", help="Output folder.")],
    preset: PresetOption = None,
    policy: PolicyOption = None,
    retained: RetainedOption = None,
    skipped: SkippedOption = None,
    dense: DenseOption = False,
    selector: SelectorOption = None,
    strict: StrictOption = False,
    summaries: SummariesOption = None,
    pass_through: PassThroughOption = None,
    most_retained: MostRetainedOption = None,
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16.")] = "float32",
    weights: Annotated[
        str | None,
        typer.Option(
            metavar="KIND", help="int4: the decoder's matrices in 4 bits, for ONNX Runtime; else as --dtype."
        ),
    ] = None,
    reference_weights: Annotated[
        bool,
        typer.Option(
            "--reference-weights",
            help="Leave weights that are of --dtype already in MODEL's files: the bundle holds hard links to "
            "them, on the same file system. MODEL may be moved or deleted, but not changed.",
        ),
    ] = False,
    target: Annotated[
        str,
        typer.Option(
            help="What will run it: onnxruntime; genai or transformers.js add what those want of --dense."
        ),
    ] = "onnxruntime",
    revision: RevisionOption = None,
    force: ForceOption = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, say what would be written, stop.")
    ] = False,
    json: JsonOption = None,
) -> None:
    """Trace MODEL, split its FFNs, prune its K/V, and write a bundle that ONNX Runtime runs.

    A model that `finetune` wrote carries its own preset, which is taken where none is named.

    Example: skipvision export llava-hf/llava-1.5-7b-hf -o bundle --preset skip-75
    """
    from skipvision_export.bundle import check_output, check_reference, check_room
    from skipvision_export.exporter import DTYPES, check_target, is_mixture, trace_skeleton
    from skipvision_export.graph.int4 import check_weights
    from skipvision_export.method.saved import saved_config
    from skipvision_export.models.loading import check_full, resolve_model

    if dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    check_weights(weights, dtype, reference_weights)
    check_output(output, force)
    source = resolve_model(model, revision)
    config = choose_config(
        preset=preset,
        policy=policy,
        retained=retained,
        skipped=skipped,
        dense=dense,
        selector=selector,
        strict=strict,
        summaries=summaries,
        pass_through=pass_through,
        most_retained=most_retained,
        saved=saved_config(source.folder),
    )
    layout = check_target(source, config, dtype, target, weights, reference_weights)
    checkpoint = check_full(source)
    if reference_weights:
        check_reference(checkpoint, dtype)
    check_room(checkpoint, dtype, output, reference_weights, is_mixture(source))
    result: dict[str, Any] = {
        "bundle": str(output),
        "preset": config.name,
        "retained": layout.retained,
        "skipped": layout.skipped,
        "layout": [list(run) for run in layout.runs],
        "dtype": dtype,
        "weights": weights,
    }
    what = f"{config.name}: {result['retained']} visual tokens retained, {result['skipped']} skipped"
    if source.family.dynamic:
        what += f" of a square picture's {source.family.visual_tokens(source.config)}"
    if config.layer_shares is not None:
        shares = ", ".join(f"{share:.0%}" for share in config.layer_shares)
        what = f"{config.name}: by layer, {shares} of the visual tokens skip"
    if dry_run:
        print(f"would write {output}: {what}")
    else:
        progress = Progress()
        traced = trace_skeleton(source, dtype, progress)
        bundle = traced.write(output, config, force, weights, reference_weights, target)
        progress("")
        result["bytes"] = bundle.manifest.own_bytes
        result["referenced"] = bundle.manifest.referenced
        beside = " beside the model's own files" if reference_weights else ""
        print(f"wrote {output} ({si(result['bytes'], 'B')}{beside}): {what}")
        print(f"next: skipvision validate {output} --model {model}")
    finish(result, json)
