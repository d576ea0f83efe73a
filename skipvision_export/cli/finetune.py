"""Training: finetune."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from skipvision_export.cli.common import (
    DenseOption,
    ForceOption,
    JsonOption,
    ModelArgument,
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


def finetune(
    model: ModelArgument,
    data: Annotated[
        Path,
        typer.Option(metavar="DIR", help="Imagefolder: metadata.jsonl with file_name, question, answer."),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="OUT", help="Output folder.")],
    preset: PresetOption = None,
    policy: PolicyOption = None,
    retained: RetainedOption = None,
    skipped: SkippedOption = None,
    dense: DenseOption = False,
    selector: SelectorOption = None,
    strict: StrictOption = False,
    summaries: SummariesOption = None,
    pass_through: PassThroughOption = None,
    eval_data: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Held-out data: loss and exact match while training.")
    ] = None,
    epochs: Annotated[float, typer.Option(help="Passes over the data.")] = 1.0,
    max_steps: Annotated[int | None, typer.Option(help="Optimizer steps, in place of --epochs.")] = None,
    batch_size: Annotated[int, typer.Option(help="Samples of one process at a time.")] = 8,
    accumulate: Annotated[int, typer.Option(help="Batches of each optimizer step.")] = 1,
    lr: Annotated[float, typer.Option(help="Peak learning rate; cosine after the warm-up.")] = 1e-5,
    warmup: Annotated[float, typer.Option(help="Share of the steps that warm up.")] = 0.03,
    lora_rank: Annotated[
        int, typer.Option(help="Train adapters of this rank on the decoder, merged at the end; 0: all.")
    ] = 0,
    dtype: Annotated[str, typer.Option(help="float32, or bfloat16 under autocast.")] = "float32",
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Recompute layers in backward: less memory.")
    ] = False,
    train_vision: Annotated[
        bool, typer.Option("--train-vision", help="Train the vision tower as well.")
    ] = False,
    train_skip_kv: Annotated[
        bool, typer.Option("--train-skip-kv", help="Answers do not see skipped tokens, as in decode.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Order of the data and beginnings of adapters.")] = 0,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints; 0: a tenth of the run.")] = 0,
    workers: Annotated[int, typer.Option(help="Processes that load pictures.")] = 0,
    skip_broken: Annotated[
        bool, typer.Option("--skip-broken", help="Leave broken rows of the data out.")
    ] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run.")] = False,
    keep_checkpoints: Annotated[
        bool, typer.Option("--keep-checkpoints", help="Leave OUT/checkpoints there at the end.")
    ] = False,
    revision: RevisionOption = None,
    force: ForceOption = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check all data, say what would be trained, stop.")
    ] = False,
    json: JsonOption = None,
) -> None:
    """Train MODEL with Skip-Vision on questions about pictures, and write OUT, a model to `export`.

    Decoder, projector and summary tokens train; skipped tokens' FFNs are not computed, forward or
    backward. Runs under `accelerate launch -m skipvision_export finetune ...` as well. Interrupted,
    it goes on with --resume as if it had not been.

    Example: skipvision finetune llava-hf/llava-1.5-7b-hf --data train -o tuned --preset quarter
    """
    from skipvision_export.method.saved import saved_config
    from skipvision_export.models.loading import resolve_model
    from skipvision_export.training import run
    from skipvision_export.training.settings import FinetuneSettings

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
        saved=saved_config(source.folder),
    )
    settings = FinetuneSettings(
        learning_rate=lr,
        epochs=epochs,
        max_steps=max_steps,
        batch_size=batch_size,
        accumulate=accumulate,
        warmup=warmup,
        lora_rank=lora_rank,
        dtype=dtype,
        gradient_checkpointing=gradient_checkpointing,
        train_vision=train_vision,
        train_skip_kv=train_skip_kv,
        seed=seed,
        save_every=save_every,
        workers=workers,
    )
    main = os.environ.get("RANK", "0") == "0"
    progress = Progress() if main else _silent
    plan = run.plan(
        source,
        config,
        settings,
        data,
        eval_data,
        skip_broken=skip_broken,
        progress=progress,
    )
    run.check_output(plan, output, resume=resume, force=force)
    result = summary(plan)
    say = print if main else _silent
    if plan.data.broken:
        say(f"left out {len(plan.data.broken)} broken rows, the first is line {plan.data.broken[0].line}")
    say(("would train: " if dry_run else "training: ") + summary_line(result))
    if not dry_run:
        result |= run.finetune(
            plan,
            output,
            resume=resume,
            force=force,
            keep_checkpoints=keep_checkpoints,
            progress=progress,
        )
        result["output"] = str(output)
        progress("")
        say(f"wrote {output}: {result['steps']} steps, loss {result['train_loss']:.4f}")
        if "eval_loss" in result:
            say(
                f"held-out: loss {result['eval_loss']:.4f}, exact match {result['eval_exact_match']:.1%} "
                f"of {result['eval_n']}"
            )
        say(f"next: skipvision export {output} -o BUNDLE")
    if main:
        finish(result, json)


def summary(plan: Any) -> dict[str, Any]:
    """What a plan amounts to, as JSON."""
    from skipvision_export.benchmark.training_flops import flops_share

    samples = len(plan.data.samples)
    return {
        "preset": plan.config.name,
        "retained": plan.layout.retained,
        "skipped": plan.layout.skipped,
        "samples": samples,
        "images": plan.data.images,
        "broken": [{"line": row.line, "reason": row.reason} for row in plan.data.broken],
        "steps": plan.steps,
        "processes": plan.processes,
        "tokens": plan.tokens(),
        "answer_tokens": plan.data.answer_tokens(),
        "flops_share": flops_share(plan),
    }


def summary_line(result: dict[str, Any]) -> str:
    """The same for people."""
    return (
        f"{result['preset']}, {result['samples']} questions about {result['images']} pictures, "
        f"{result['steps']} steps, {si(result['tokens'])} tokens an epoch, "
        f"{result['flops_share']:.0%} of a dense step's FLOPs"
    )


def _silent(*_: Any) -> None:
    """What the other processes of a run say."""
