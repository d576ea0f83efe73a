"""The command on decoders that other programs exported."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from skipvision_export.cli.common import JsonOption, PolicyOption, Progress, finish, si


def rewrite(
    decoder: Annotated[
        Path, typer.Argument(metavar="DECODER", help="An ONNX decoder, its weights beside it.")
    ],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="ONNX file to write.")],
    policy: PolicyOption = None,
    visual_tokens: Annotated[
        int, typer.Option(min=1, help="Of an image: turns a policy's shares into counts.")
    ] = 576,
    keep_kv: Annotated[
        bool, typer.Option("--keep-kv", help="Leave keys and values whole: Skip-FFN only.")
    ] = False,
    decode: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Also write a graph for decode alone, in the same folder."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the output files.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List what was found and prove it; write nothing.")
    ] = False,
    json: JsonOption = None,
) -> None:
    """Give a DECODER that another program exported what `export` gives ours: Skip-FFN and Skip-KV.

    Example: skipvision rewrite genai/model.onnx -o skip.onnx --dry-run

    FFNs are found by structure alone: norm, products with constant weights, residual add, also where
    ONNX Runtime's operators fuse them (onnxruntime-genai's builder, fp32 and int4; optimum-onnx). What
    is not proved to act on each token alone is refused, with the node's name. Weights are copied to
    FILE_data; DECODER's files stay as they are.

    FILE takes, beside its own inputs: ffn_index [M], the rows of [batch*sequence] that go through the
    FFNs (a policy: one index for each tier); kv_keep_index [batch, K], the positions, past and new,
    whose keys and values come out; and position_ids [batch, sequence] where GroupQueryAttention
    counted cached tokens. All int64, ascending. One graph serves prefill and decode: in decode give
    every row and every position, and let position_ids go on from the whole prompt's length;
    attention_mask covers what is cached and what is new. --decode writes a graph for decode alone, on the
    same weights, that takes no index and copies no cache: faster, most of all in int4.

    Keys and values need buffers of their own: with one buffer shared by past and present, as genai's
    past_present_share_buffer wants it, they cannot be pruned in the graph; use --keep-kv there.
    """
    from skipvision_export.config import SkipVisionConfig
    from skipvision_export.rewriting import rewrite_decoder, tier_input

    config = SkipVisionConfig.load(policy) if policy is not None else None
    progress = Progress()
    made = rewrite_decoder(
        decoder,
        output,
        config,
        visual_tokens=visual_tokens,
        keep_kv=keep_kv,
        decode=decode,
        force=force,
        dry_run=dry_run,
        progress=progress,
    )
    progress("")
    for layer, (ffn, tier) in enumerate(zip(made.ffns, made.tiers, strict=True)):
        takes = tier_input(tier) or "left whole"
        print(f"layer {layer:>3}  {ffn.name}: {ffn.form}; residual {ffn.node}; {takes}")
    for tier, count in made.skipped.items():
        print(f"{tier_input(tier)}: {count} of an image's visual tokens skip")
    kv = f"{len(made.kv_names)} keys and values pruned" if made.kv_names else "keys and values left whole"
    what = f"{len(made.ffns)} FFNs, {kv}; new inputs: {', '.join(made.inputs)}"
    print(f"would write {output}: {what}" if dry_run else f"wrote {output} ({si(made.bytes, 'B')}): {what}")
    finish({"file": str(output), "dry_run": dry_run, "layers": len(made.ffns)} | asdict(made), json)
