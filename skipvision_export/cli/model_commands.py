"""Commands on a Hugging Face model: inspect, export."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from skipvision_export.cli.common import (
    ForceOption,
    JsonOption,
    ModelArgument,
    Progress,
    RevisionOption,
    choose_config,
    finish,
    si,
)
from skipvision_export.config import PRESETS
from skipvision_export.errors import ConfigError

TextTokens = Annotated[int, typer.Option(min=1, help="Text tokens beside the visual ones.")]


def inspect(
    model: ModelArgument,
    text_tokens: TextTokens = 64,
    revision: RevisionOption = None,
    json: JsonOption = None,
) -> None:
    """Show what skipping would save on MODEL: FLOPs and K/V bytes, dense and for each preset.

    Reads the configuration only, no weights. FLOPs are those of the decoder's prefill of one prompt
    with one image; K/V bytes are what stays cached after it, in float32.
    """
    from skipvision_export.models.loading import resolve_model

    result = inspection(resolve_model(model, revision), text_tokens)
    dense = result["dense"]
    print(
        f"{result['architecture']}: family {result['family']}, {result['num_layers']} decoder layers, "
        f"{result['visual_tokens']} visual tokens, counted with {text_tokens} text tokens"
    )
    head = f"{'preset':<16}{'retained':>9}{'skipped':>9}{'prefill FLOPs':>15}{'':>7}{'K/V bytes':>12}"
    print(head)
    for name, row in {"dense": dense, **result["presets"]}.items():
        share = row["prefill_flops"] / dense["prefill_flops"]
        print(
            f"{name:<16}{row['retained']:>9}{row['skipped']:>9}{si(row['prefill_flops']):>15}"
            f"{share:>7.0%}{si(row['kv_bytes'], 'B'):>12}"
        )
    for name, why in result["unsupported"].items():
        print(f"{name}: {why}")
    finish(result, json)


def inspection(source: Any, text_tokens: int) -> dict[str, Any]:
    """What `inspect` prints, as the contract's JSON object."""
    from skipvision_export.benchmark.flops import prefill_cost
    from skipvision_export.config import SkipVisionConfig

    family, config = source.family, source.config
    dims, visual = family.decoder_dims(config), family.visual_tokens(config)

    def row(choice: SkipVisionConfig) -> dict[str, int]:
        layout = family.layout(config, choice)
        cost = prefill_cost(dims, layout, text_tokens)
        return {
            "retained": layout.retained,
            "skipped": layout.skipped,
            "prefill_flops": cost.prefill_flops,
            "kv_bytes": cost.kv_bytes,
        }

    presets, unsupported = {}, {}
    for name, preset in PRESETS.items():
        try:
            presets[name] = row(preset)
        except ConfigError as error:
            unsupported[name] = str(error)
    return {
        "family": family.name,
        "architecture": (config.architectures or ["?"])[0],
        "num_layers": dims.num_layers,
        "visual_tokens": visual,
        "text_tokens": text_tokens,
        "dense": row(SkipVisionConfig.dense()),
        "presets": presets,
        "unsupported": unsupported,
    }


def export(
    model: ModelArgument,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="BUNDLE", help="Output folder.")],
    preset: Annotated[
        str | None, typer.Option(help=f"One of {', '.join(PRESETS)}; `inspect` tells which fit.")
    ] = None,
    retained: Annotated[int | None, typer.Option(help="Visual tokens that stay whole.")] = None,
    skipped: Annotated[int | None, typer.Option(help="Visual tokens that skip the FFN.")] = None,
    dense: Annotated[bool, typer.Option("--dense", help="Skip nothing: the baseline.")] = False,
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16.")] = "float32",
    target: Annotated[str, typer.Option(help="What will run it: onnxruntime.")] = "onnxruntime",
    revision: RevisionOption = None,
    force: ForceOption = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, say what would be written, stop.")
    ] = False,
    json: JsonOption = None,
) -> None:
    """Trace MODEL, split its FFNs, prune its K/V, and write a bundle that ONNX Runtime runs.

    Example: skipvision export llava-hf/llava-1.5-7b-hf -o bundle --preset skip-75
    """
    from skipvision_export.bundle import check_output
    from skipvision_export.exporter import DTYPES, trace_model
    from skipvision_export.models.loading import resolve_model

    config = choose_config(preset, retained, skipped, dense)
    if target != "onnxruntime":
        raise ConfigError(f"target {target!r} is not supported; supported: onnxruntime")
    if dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    check_output(output, force)
    source = resolve_model(model, revision)
    layout = source.family.layout(source.config, config)
    result: dict[str, Any] = {
        "bundle": str(output),
        "preset": config.name,
        "retained": layout.retained,
        "skipped": layout.skipped,
        "layout": [list(run) for run in layout.runs],
        "dtype": dtype,
    }
    what = f"{config.name}: {result['retained']} visual tokens retained, {result['skipped']} skipped"
    if dry_run:
        print(f"would write {output}: {what}")
    else:
        progress = Progress()
        bundle = trace_model(source, dtype, progress).write(output, config, force)
        progress("")
        result["bytes"] = sum(info.bytes for info in bundle.manifest.files.values())
        print(f"wrote {output} ({si(result['bytes'], 'B')}): {what}")
        print(f"next: skipvision validate {output} --model {model}")
    finish(result, json)
