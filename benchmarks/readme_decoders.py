"""The README's rows about decoders beside their peers, int4 weights, and exports."""

from __future__ import annotations

from typing import Any

# Of others_cpu.json, what the README shows.
PREFILLS = ("as exported", "rewritten, every row", "rewritten, skipping")
DECODES = ("as exported, all cached", "rewritten, all cached", "rewritten, pruned cache")


def custom_op_rows(result: dict[str, Any]) -> list[str]:
    """Why there is no custom op for ONNX Runtime."""
    shares = " and ".join(f"{run['share']:.1%} (`{run['preset']}`)" for run in result["runs"])
    verdict = "may" if result["custom_op_may_pay"] else "does not"
    return [
        f"**KVPrune in ONNX Runtime** is its function body: all layers together take {shares} of the "
        f"sibling's prefill, so a custom op {verdict} pay.",
        "",
    ]


def decoder_rows(result: dict[str, Any]) -> list[str]:
    """A decoder beside the graphs that peers make of it."""
    sizes, rounds = result["sizes"], result["rounds"]
    dense, merged = (result["prefill"][tokens] for tokens in ("1088", "640"))
    names = list(dict.fromkeys((*dense["ms"], *merged["ms"])))
    cached = list(result["decode"])

    def cell(times: dict[str, Any], name: str) -> str:
        return f"{times[name]['median']:.{0 if times[name]['median'] > 100 else 1}f}" if name in times else ""

    def against(found: dict[str, Any], name: str) -> str:
        ratio = found["speedup"]
        text = f"{name} {ratio['median']:.2f}x [{ratio['p10']:.2f}, {ratio['p90']:.2f}] of {found['peer']}"
        if "promised" in found:
            text += f" ({found['of_promise']:.0%} of the {found['promised']:.2f}x that its FLOPs promise)"
        return text

    rows = [
        f"**A decoder beside its peers**: Llama, hidden {sizes['hidden']}, {sizes['layers']} layers, "
        f"float32, random weights, {rounds} interleaved rounds, median ms. skip: "
        f"{dense['tokens_in_ffn']['skip']} of 1,088 tokens in the FFN; merged: 640 tokens to "
        f"{merged['tokens']['merged']}, of which {merged['tokens_in_ffn']['merged']} in the FFN:",
        "",
        "| | prefill 1,088 | prefill 640 |",
        "|---|---|---|",
        *(f"| {name} | {cell(dense['ms'], name)} | {cell(merged['ms'], name)} |" for name in names),
        "",
        "Prefill against the fastest peer, per round: "
        + "; ".join(
            (
                against(dense["dense"], "dense"),
                against(dense["skip"], "skip"),
                against(merged["merged"], "merged"),
            )
        )
        + ". Decode, ms a token:",
        "",
        "| tokens cached | " + " | ".join(f"{int(count):,}" for count in cached) + " |",
        "|---" * (len(cached) + 1) + "|",
    ]
    contenders = list(result["decode"][cached[0]]["ms"])
    for name in contenders:
        times = (cell(result["decode"][count]["ms"], name) for count in cached)
        rows.append(f"| {name} | " + " | ".join(times) + " |")
    return [*rows, ""]


def others_rows(result: dict[str, Any]) -> list[str]:
    """Decoders of onnxruntime-genai's builder before and after `skipvision rewrite`."""
    steps = {kind: result[kind]["decode_steps"] for kind in ("fp32", "int4")}

    def cells(kind: str) -> str:
        prefill, decode = result[kind]["prefill_ms"], result[kind]["decode_ms"]
        columns = [prefill[name]["median"] for name in PREFILLS]
        columns += [decode[name]["median"] / steps[kind] for name in DECODES]
        return " | ".join(f"{ms:.{0 if ms > 100 else 1}f}" for ms in columns)

    return [
        "**That decoder as genai's builder writes it**, before and after `skipvision rewrite` "
        f"({result['kept']} of {result['tokens']:,} tokens in the FFN and kept), median ms of prefill and of "
        "a token of decode; of another run than the table above, so compare within a row:",
        "",
        "| | prefill, " + " | prefill, ".join(PREFILLS) + " | decode, " + " | decode, ".join(DECODES) + " |",
        "|---" * (1 + len(PREFILLS) + len(DECODES)) + "|",
        *(f"| {kind} | {cells(kind)} |" for kind in steps),
        "",
    ]


def int4_rows(results: dict[str, Any]) -> list[str]:
    """Accuracy, bytes and speed of 4-bit weights."""
    tiny, decoder = results["int4_tiny"]["presets"], results["decoder_cpu"]
    accuracy = "; ".join(
        f"{name} {run['accuracy']['float32']['accuracy']:.1%} to {run['accuracy']['int4']['accuracy']:.1%}"
        for name, run in tiny.items()
    )
    speed = decoder["decode"]["192"]["int4 over float32"]
    size = decoder["int4"]["decoder_bytes"]
    dense, skip = (decoder["int4"][name] for name in ("dense", "skip"))
    return [
        f"**int4 weights**, {tiny['dense']['questions']:,} questions to the tiny VLM, exact match float32 "
        f"to int4: {accuracy}. The decoder above: {size['dense'] / 1e6:.0f} to "
        f"{size['int4 dense'] / 1e6:.0f} MB, decode at 192 cached {speed['median']:.2f}x "
        f"[{speed['p10']:.2f}, {speed['p90']:.2f}] as fast; prefill {dense['speedup']['median']:.2f}x of "
        f"{dense['peer']}, skip {skip['speedup']['median']:.2f}x.",
        "",
    ]


def export_rows(result: dict[str, Any]) -> list[str]:
    """Time and memory of an export by size of the model."""
    rows = [
        "**Exports** of random LLaVAs, from safetensors to a verified bundle:",
        "",
        "| model | type | weights | bundle | time | peak memory |",
        "|---|---|---|---|---|---|",
    ]
    for name, run in result["models"].items():
        rows.append(
            f"| {name} | {run['dtype']} | {run['weights_bytes'] / 1e9:.2f} GB | "
            f"{run['bundle_bytes'] / 1e9:.2f} GB | {run['seconds']:.0f} s | "
            f"{run['peak_rss_mb'] / 1e3:.2f} GB |"
        )
    return [*rows, ""]
