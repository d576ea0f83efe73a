"""The README's rows about GPUs, of benchmarks/results/gpu_*.json; what ran on a CPU makes none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

DENSE, METHOD = "dense", "skip-ffn + skip-kv"
NAMED = 8  # goals that were missed and are named; the JSON has all
SCRIPTS = ("inference", "kv_prune", "row_gather", "training", "ort_cuda", "engines", "tiny_vlm")


def load_gpu(folder: Path) -> dict[str, Any]:
    """Results by script, those of a GPU only: small sizes on a CPU prove scripts, not claims."""
    found = {}
    for name in SCRIPTS:
        file = folder / f"gpu_{name}.json"
        if file.is_file():
            result = json.loads(file.read_text(encoding="utf-8"))
            if result["device"]["kind"] == "cuda" and not result["small"]:
                found[name] = result
    return found


def gpu_rows(results: dict[str, Any]) -> list[str]:
    """Nothing where nothing was measured on a GPU."""
    if not results:
        return []
    rows = []
    for name, build in (
        ("inference", inference_rows),
        ("training", training_rows),
        ("kv_prune", kv_prune_rows),
        ("ort_cuda", ort_rows),
        ("engines", engine_rows),
        ("tiny_vlm", tiny_rows),
    ):
        if name in results:
            rows += build(results[name]["cells"])
    first = next(iter(results.values()))
    device, ceilings = first["device"], next((r["ceilings"] for r in results.values() if r["ceilings"]), None)
    speed = ""
    if ceilings:
        speed = (
            f"; measured: {ceilings['flops_per_s'] / 1e12:.0f} TFLOP/s of a bfloat16 product, "
            f"{ceilings['bytes_per_s'] / 1e12:.2f} TB/s of a copy"
        )
    goals = [goal for result in results.values() for goal in result.get("goals", [])]
    return [
        f"**On a GPU**: {device['name']}, driver {device['driver']}, torch {first['versions']['torch']}"
        f"{speed}; random weights, sources: `benchmarks/results/gpu_*.json`.",
        "",
        *rows,
        *goal_rows(goals),
    ]


def goal_rows(goals: list[dict[str, Any]]) -> list[str]:
    """The goals that were missed by name, the others by number."""
    if not goals:
        return []
    missed = [f"{g['goal']} ({g['measured']:.2f}, wanted {g['wanted']})" for g in goals if not g["reached"]]
    more = f" and {len(missed) - NAMED} more" if len(missed) > NAMED else ""
    said = f" Missed: {'; '.join(missed[:NAMED])}{more}." if missed else ""
    return [f"Goals: {len(goals) - len(missed)} of {len(goals)} reached.{said}", ""]


def inference_rows(cells: dict[str, Any]) -> list[str]:
    """First token and 32 tokens, dense against the method, by shape and batch."""
    rows = [
        "| shape, batch | first token, dense | skip | saved | of what is promised | 32 tokens, dense | skip "
        "| saved | best pruner |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, cell in cells.items():
        found = cell.get("contenders")
        if not found:
            continue
        dense, ours = found[DENSE], found[METHOD]
        first, answer = ours["against_dense"]["ttft"], ours["against_dense"]["answer"]
        pruner = min(
            (n for n in found if n.endswith("-style")), key=lambda n: found[n]["answer_ms"]["median"]
        )
        rows.append(
            f"| {name} | {dense['ttft_ms']['median']:.1f} ms | {ours['ttft_ms']['median']:.1f} ms | "
            f"{first['saved']:.0%} | {first['share']:.0%} | {dense['answer_ms']['median']:.0f} ms | "
            f"{ours['answer_ms']['median']:.0f} ms | {answer['saved']:.0%} | "
            f"{pruner} {found[pruner]['answer_ms']['median']:.0f} ms |"
        )
    return [*rows, ""] if len(rows) > 2 else []


def training_rows(cells: dict[str, Any]) -> list[str]:
    """A training step at equal batch, and the largest batches."""
    rows = ["| training step | batch | dense | preset | saved | promised | largest batch |", "|---" * 7 + "|"]
    for name, cell in cells.items():
        if "variants" not in cell:
            continue
        shape = name.removesuffix(" step")
        preset = next(variant for variant in reversed(cell["variants"]))
        dense, ours = cell["variants"][DENSE], cell["variants"][preset]
        how = f"{shape}, LoRA" if cell["lora_rank"] else shape
        largest = [
            str(cells.get(f"{shape} largest batch, {variant}", {}).get("batch", "?"))
            for variant in (DENSE, preset)
        ]
        row = [
            how,
            str(cell["batch"]),
            f"{dense['step_ms']['median']:.0f} ms",
            f"{ours['step_ms']['median']:.0f} ms",
            f"{ours['saved']:.0%}",
            f"{ours['promised']:.0%}",
            " / ".join(largest),
        ]
        rows.append(f"| {' | '.join(row)} |")
    return [*rows, ""] if len(rows) > 2 else []


def kv_prune_rows(cells: dict[str, Any]) -> list[str]:
    """The kernel's share of a copy's speed, beside its rivals."""
    found = [cell["contenders"] for cell in cells.values() if "cuda" in cell.get("contenders", {})]
    if not found:
        return []

    def span(name: str) -> str:
        shares = [each[name]["of_copy"] for each in found if name in each]
        return f"{min(shares):.0%} to {max(shares):.0%}" if shares else "not run"

    return [
        f"KVPrune, bytes per second of a device-to-device copy, {len(found)} shapes and batches: kernel "
        f"{span('cuda')}, index_select {span('index_select')}, Triton {span('triton')}.",
        "",
    ]


def ort_rows(cells: dict[str, Any]) -> list[str]:
    """Prefill and step of ONNX Runtime's CUDA provider."""
    rows = []
    for name, cell in cells.items():
        if "prefill_ms" in cell:
            each = (
                f"{contender} {row['median']:.2f} / {cell['step_ms'][contender]['median']:.2f}"
                for contender, row in cell["prefill_ms"].items()
            )
            batch = name.removeprefix("time ")
            rows += [f"ONNX Runtime CUDA, float16, {batch}, ms of prefill / step: {'; '.join(each)}.", ""]
    return rows


def engine_rows(cells: dict[str, Any]) -> list[str]:
    """Whether engines run."""
    said = []
    for name, cell in cells.items():
        if name.endswith(": run"):
            how = f"run, error {cell['error']:.1e}" if cell.get("ran") else f"do not run: {cell['said'][-1]}"
            said.append(f"{name.removesuffix(': run')} {how}")
    return [f"TensorRT-RTX engines: {'; '.join(said)}.", ""] if said else []


def tiny_rows(cells: dict[str, Any]) -> list[str]:
    """A longer training of the tiny VLM."""
    cell = cells.get("training", {})
    if "test" not in cell:
        return []
    return [
        f"The tiny VLM trained longer: {cell['test']['exact_match']['all']:.1%} of the test questions, "
        f"committed {cell['committed']:.1%}.",
        "",
    ]
