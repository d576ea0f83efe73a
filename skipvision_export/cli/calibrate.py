"""The command `calibrate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from skipvision_export.bundle import check_output_file, write_text
from skipvision_export.cli.common import (
    JsonOption,
    ModelArgument,
    Progress,
    RevisionOption,
    finish,
    to_json,
)
from skipvision_export.errors import ConfigError


def calibrate(
    model: ModelArgument,
    data: Annotated[Path, typer.Option(metavar="DIR", help="Imagefolder with metadata.jsonl.")],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="POLICY", help="Policy file, JSON.")],
    flops: Annotated[
        float | None, typer.Option(metavar="SHARE", help="Budget: share of the dense prefill's FLOPs.")
    ] = None,
    max_divergence: Annotated[
        float | None, typer.Option(metavar="KL", help="Budget: mean KL of next-token logits, in nats.")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Questions to draw from the data.")] = 64,
    shares: Annotated[str, typer.Option(help="Shares to try in a layer.")] = "0.5,0.75,0.9,1.0",
    selector: Annotated[str, typer.Option(help="Which tokens are retained; uniform or another.")] = "uniform",
    kv_share: Annotated[
        float, typer.Option(help="Share of visual tokens whose K/V are dropped after prefill.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the draw of questions.")] = 0,
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16.")] = "float32",
    device: Annotated[str, typer.Option(help="Where PyTorch runs: cpu, cuda, cuda:1.")] = "cpu",
    revision: RevisionOption = None,
    force: Annotated[bool, typer.Option("--force", help="Replace POLICY if it exists.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, say what would be done, stop.")
    ] = False,
    json: JsonOption = None,
) -> None:
    """Find which layers of MODEL may let which share of visual tokens skip, without training.

    Layers are scored by what skipping does to the output on a few dozen questions. POLICY goes to
    `apply_skip_vision` and `export`; a picture of it, with each FFN's effect on visual and text
    tokens, is written beside it as SVG.

    Example: skipvision calibrate llava-hf/llava-1.5-7b-hf --data DIR -o policy.json --flops 0.8
    """
    from skipvision_export.calibration import Budget, Settings, plan
    from skipvision_export.calibration import calibrate as search
    from skipvision_export.models.loading import load_model, resolve_model

    budget = Budget(flops, max_divergence)
    settings = Settings(samples, _numbers(shares), selector, kv_share, seed)
    _check_choices(dtype, device)
    picture = output.with_suffix(".svg")
    if picture == output:
        raise ConfigError(f"{output}: the policy is JSON; its picture takes the suffix .svg")
    for file in (output, picture):
        check_output_file(file, force)
    source = resolve_model(model, revision)
    progress = Progress()
    progress("reading questions")
    made = plan(source, data, budget, settings)
    result: dict[str, Any] = {"policy": str(output), "picture": str(picture), "samples": len(made.samples)}
    if dry_run:
        progress("")
        moves = made.layers * len(settings.shares)
        print(f"would write {output}: {len(made.samples)} questions, up to {moves} moves")
        finish(result | {"curve": []}, json)
        return
    progress("loading weights")
    found = search(made, load_model(source, dtype).to(device), progress)
    progress("")
    policy = found.to_json()

    from skipvision_export.report.calibration_chart import calibration_chart

    write_text(picture, calibration_chart(policy))
    write_text(output, to_json(policy))
    for row in policy["layers"]:
        print(f"layer {row['layer']:<3} {row['share']:>5.0%} of visual tokens skip")
    print(
        f"wrote {output}: {policy['flops']['share']:.1%} of the dense prefill's FLOPs, divergence "
        f"{policy['divergence']:.2e}, {policy['samples']['policies_measured']} policies measured"
    )
    kept = ("flops", "divergence", "layers", "curve")
    finish(result | {name: policy[name] for name in kept}, json)


def _numbers(shares: str) -> tuple[float, ...]:
    try:
        return tuple(float(share) for share in shares.split(","))
    except ValueError:
        raise ConfigError(f"--shares {shares!r} is no list of numbers such as 0.5,0.75,1.0") from None


def _check_choices(dtype: str, device: str) -> None:
    import torch

    from skipvision_export.exporter import DTYPES

    if dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        first = str(error).strip().splitlines()[0]
        raise ConfigError(f"device {device!r} cannot be used: {first}; use cpu") from None
