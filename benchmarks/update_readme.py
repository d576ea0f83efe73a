"""Write the README's results out of benchmarks/results/*.json, and its picture.

Run from the repository's root after a new benchmark, such as:

skipvision demo -o demo --json benchmarks/results/demo_cpu.json
skipvision bench demo/sibling-skip --against demo/sibling-dense --rounds 5 --batch 1,8,32 \\
    --concurrency 8,32 --json benchmarks/results/load_cpu.json
python benchmarks/update_readme.py
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from statistics import mean
from typing import Any

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "benchmarks"))  # where a test loads this file

from readme_decoders import custom_op_rows, decoder_rows, export_rows, int4_rows, others_rows  # noqa: E402
from readme_gpu import gpu_rows, load_gpu  # noqa: E402

SOURCES = {
    name: ROOT / "benchmarks" / "results" / f"{name}.json"
    for name in (
        "demo_cpu",
        "load_cpu",
        "accuracy_tiny",
        "training_cpu",
        "calibration_tiny",
        "half_types",
        "kv_prune_ort",
        "decoder_cpu",
        "others_cpu",
        "int4_tiny",
        "export_size",
        "families",
        "pareto_tiny",
    )
}
PICTURE = ROOT / "docs" / "retained.png"
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"


def load() -> dict[str, Any]:
    """Every benchmark's JSON, by name."""
    found = {name: json.loads(file.read_text()) for name, file in SOURCES.items()}
    return found | {"gpu": load_gpu(ROOT / "benchmarks" / "results")}


def demo_rows(result: dict[str, Any]) -> list[str]:
    """Accuracy, gaps and speed of the demo."""
    accuracy, gaps, sibling = result["accuracy"], result["gaps"], result["sibling"]
    skip, dense = sibling["runs"]

    def ratio(name: str) -> str:
        spread = result["ratio_spread"].get(name)
        tail = f" [{spread[0]:.2f}, {spread[1]:.2f}]" if spread else ""
        return f"{result['ratios'][name]:.2f}{tail}"

    return [
        f"**Accuracy.** Trained tiny VLM, fine-tuned with `{result['preset']}`, {result['questions']:,} "
        "held-out questions, ONNX Runtime:",
        "",
        "| | dense | skip | shuffled pictures (the floor) |",
        "|---|---|---|---|",
        f"| exact match | {accuracy['dense']:.1%} | {accuracy['skip']:.1%} | {accuracy['shuffled']:.1%} |",
        "",
        f"**Parity.** {gaps['rewrite']['n']} of them, every step's logits and every layer's K and V:",
        "",
        "| gap | between | max abs | greedy tokens equal |",
        "|---|---|---|---|",
        *(
            f"| {name} | {between} | {gaps[name]['max_abs']:.1e} | {gaps[name]['greedy_match']:.1%} |"
            for name, between in (
                ("export", "dense PyTorch, dense ONNX"),
                ("rewrite", "patched PyTorch, rewritten ONNX"),
                ("backend", "ONNX Runtime without and with its optimizations"),
                ("method", "dense PyTorch, patched PyTorch: what skipping itself changes"),
            )
        ),
        "",
        f"**Speed** of a sibling with random weights ({sibling['parameters'] / 1e6:.0f} M parameters, "
        f"576 visual and {sibling['settings']['text_tokens']} text tokens), "
        f"{sibling['settings']['rounds']} interleaved rounds, median [10th, 90th percentile]:",
        "",
        "| | dense | skip | dense / skip |",
        "|---|---|---|---|",
        f"| prefill | {dense['prefill_ms']:.0f} ms | {skip['prefill_ms']:.0f} ms | {ratio('prefill')} |",
        f"| decode, a token | {dense['decode_ms_per_token']:.1f} ms | {skip['decode_ms_per_token']:.1f} ms "
        f"| {ratio('decode')} |",
        f"| prefill FLOPs | {dense['flops'] / 1e9:.1f} G | {skip['flops'] / 1e9:.1f} G | {ratio('flops')} |",
        f"| K/V after prefill | {dense['kv_bytes'] / 1e6:.2f} MB | {skip['kv_bytes'] / 1e6:.2f} MB "
        f"| {ratio('kv_bytes')} |",
        "",
    ]


def load_rows(result: dict[str, Any]) -> list[str]:
    """Throughput and latency of the sibling by batch and by concurrency."""
    tokens = result["settings"]["new_tokens"]
    rows = [
        f"**Under load**, the same sibling, answers of {tokens} tokens, {result['settings']['rounds']} "
        "interleaved rounds; latency of a request, median and 95th percentile:",
        "",
        "| | dense, tokens/s | skip, tokens/s | skip / dense | dense, ms | skip, ms | peak MB, both |",
        "|---|---|---|---|---|---|---|",
    ]
    for point in result["load"]:
        skip, dense = point["runs"]
        n, alone = point["concurrency"], point["concurrency"] == 1
        name = f"{point['batch']} in one run" if alone else f"{n} requests at once"
        low, high = point["ratio_spread"]["tokens_per_s"]
        rows.append(
            f"| {name} | {dense['tokens_per_s']:.0f} | {skip['tokens_per_s']:.0f} "
            f"| {point['ratios']['tokens_per_s']:.2f} [{low:.2f}, {high:.2f}] "
            f"| {dense['latency_ms']:.0f}, {dense['latency_p95_ms']:.0f} "
            f"| {skip['latency_ms']:.0f}, {skip['latency_p95_ms']:.0f} "
            f"| {dense['peak_rss_mb']:.0f}, {skip['peak_rss_mb']:.0f} |"
        )
    return [*rows, ""]


def accuracy_rows(result: dict[str, Any]) -> list[str]:
    """Fine-tunes beside their baselines."""
    settings = result["settings"]
    rows = [
        f"**Fine-tuning** the tiny VLM from its dense checkpoint ({result['dense_checkpoint']:.1%}; "
        f"pictures shuffled {result['shuffled_images']:.1%}), {settings['steps']} steps of "
        f"{settings['batch']}, the same {settings['questions']:,} questions, in PyTorch; by seed:",
        "",
        "| variant | visual FLOPs | exact match, mean | by seed |",
        "|---|---|---|---|",
    ]
    for name, row in result["variants"].items():
        each = ", ".join(f"{100 * one:.1f}" for one in row["accuracy"])
        rows.append(f"| {name} | {row['visual_flops']:.0%} | {mean(row['accuracy']):.1%} | {each} |")
    return [*rows, ""]


def training_rows(result: dict[str, Any]) -> list[str]:
    """Time of a training step beside what its operations promise."""
    settings = result["settings"]
    rows = [
        "**Training steps** (forward, backward, AdamW, frozen vision tower; "
        f"{settings['pictures']} samples of {settings['visual_tokens']} visual and "
        f"{settings['text_tokens']} text tokens; width x layers of the decoder), {settings['rounds']} "
        "interleaved rounds, time saved against dense as a share of what the operations promise:",
        "",
        "| decoder | visual tokens | time saved | FLOPs saved | measured / promised | peak memory |",
        "|---|---|---|---|---|---|",
    ]
    for size, measured in result["sizes"].items():
        for name, row in measured["runs"].items():
            share = row["measured_over_analytic"]
            rows.append(
                f"| {size} | {name} | {row['measured_saving']:.1%} | {row['analytic_saving']:.1%} | "
                f"{'' if share is None else f'{share:.2f}'} | {row['peak_rss_mb']:.0f} MB |"
            )
    return [*rows, ""]


def calibration_rows(result: dict[str, Any]) -> list[str]:
    """Calibrated policies without training, K/V kept."""
    mode = result["modes"]["K/V kept"]
    rows = [
        "**Calibration** of the dense checkpoint, without training, K/V kept: exact match (and KL from "
        f"dense) at equal FLOPs, {result['questions']:,} questions:",
        "",
        "| prefill FLOPs | calibrated | the same share in all layers | random layers, mean of "
        f"{len(result['seeds'])} |",
        "|---|---|---|---|",
    ]

    def cell(*runs: dict[str, Any]) -> str:
        accuracy, divergence = (mean(run[key] for run in runs) for key in ("accuracy", "divergence"))
        return f"{accuracy:.1%} ({divergence:.1e})"

    for row in mode["rows"]:
        rows.append(
            f"| {row['calibrated']['flops_share']:.0%} | {cell(row['calibrated'])} | "
            f"{cell(row['all_layers'])} | {cell(*row['random_layers'])} |"
        )
    return [*rows, ""]


def pareto_rows(result: dict[str, Any]) -> list[str]:
    """Accuracy against time of the tiny VLM, the fastest first."""
    settings = result["settings"]
    rows = [
        f"**Accuracy against time** of the dense checkpoint without training (`-tuned`: the fine-tune), "
        f"{result['questions']:,} questions; ms an answer of {settings['new_tokens']} tokens from the pixels "
        f"on, {result['batch']} prompts together on {result['rates']['threads']} thread, median of "
        f"{settings['rounds']} interleaved rounds [10th, 90th percentile]; exact match with tokens chosen by "
        "CLS attention (policies: evenly), and by the same preset at random and evenly; bold: no other is at "
        "least as good in both:",
        "",
        "| | ms | prefill FLOPs | exact match | random | uniform |",
        "|---|---|---|---|---|---|",
    ]
    points = {point["name"]: point for point in result["points"]}

    def accuracy(name: str) -> str:
        if name not in points:
            return ""
        text = f"{points[name]['accuracy']:.1%}"
        return f"**{text}**" if points[name]["front"] else text

    shown = [point for point in points.values() if point["kind"] not in ("random", "uniform")]
    for point in sorted(shown, key=lambda point: point["ms"]):
        name, (low, high) = point["name"], point["ms_spread"]
        rows.append(
            f"| {name} | {point['ms']:.2f} [{low:.2f}, {high:.2f}] | {point['flops'] / 1e6:.0f} M "
            f"| {accuracy(name)} | {accuracy(f'{name}-random')} | {accuracy(f'{name}-uniform')} |"
        )
    return [*rows, ""]


def half_rows(result: dict[str, Any]) -> list[str]:
    """Bundles of half types: their structure, and what the type costs."""
    rows = [
        f"**Half types**, {result['questions']} of the questions. Structure: equal weights and float32 "
        "arithmetic on both sides; precision: PyTorch in float32 and in the type, worst output of any step:",
        "",
        "| type | structure, max abs | precision | greedy tokens equal | in ONNX Runtime |",
        "|---|---|---|---|---|",
    ]
    for dtype, found in result["types"].items():
        gaps = found["gaps"]
        exact = max(gaps[name]["max_abs"] for name in ("export", "rewrite"))
        backend = gaps["backend"]
        ran = "no CPU kernels" if backend["passed"] is None else f"{backend['sqnr_db']:.1f} dB"
        rows.append(
            f"| {dtype} | {exact:.1e} | {gaps['precision']['sqnr_db']:.1f} dB | "
            f"{gaps['precision']['greedy_match']:.1%} | {ran} |"
        )
    return [*rows, ""]


def family_rows(result: dict[str, Any]) -> list[str]:
    """What every model family was found to give."""
    rows = [
        f"**Families**: tiny random checkpoints, dense and with skip and prune, prefill and "
        f"{result['families'][0]['decode_steps']} decode steps against PyTorch (limit "
        f"{result['limit']:.0e}); broken twins differ by a multiple of the limit:",
        "",
        "| family: tower, text model | pictures | dense | skip | greedy tokens equal | broken twins |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["families"]:
        dense, skip = (
            f"{max(row['gaps'][kind][gap] for gap in ('export', 'rewrite', 'backend')):.1e}"
            if kind in row["gaps"]
            else "only tiled presets"
            for kind in ("dense", "skip")
        )
        caught = min(twin["over_limit"] for twin in row["twins"].values())
        rows.append(
            f"| {row['name']} | {row['pictures']} | {dense} | {skip} | {row['greedy_match']:.1%} "
            f"| {caught:,.0f}x |"
        )
    return [*rows, ""]


def table(results: dict[str, Any]) -> str:
    """The README's results section."""
    machine = results["demo_cpu"]["sibling"]["machine"]
    rows = [
        *demo_rows(results["demo_cpu"]),
        *load_rows(results["load_cpu"]),
        *accuracy_rows(results["accuracy_tiny"]),
        *training_rows(results["training_cpu"]),
        *calibration_rows(results["calibration_tiny"]),
        *pareto_rows(results["pareto_tiny"]),
        *half_rows(results["half_types"]),
        *custom_op_rows(results["kv_prune_ort"]),
        *decoder_rows(results["decoder_cpu"]),
        *others_rows(results["others_cpu"]),
        *int4_rows(results),
        *export_rows(results["export_size"]),
        *family_rows(results["families"]),
        *gpu_rows(results["gpu"]),
        f"{machine['cpu']}, {machine['cores']} cores; Python {machine['python']}, torch {machine['torch']}, "
        f"transformers {machine['transformers']}, onnxruntime {machine['onnxruntime']}. The machine was "
        "shared: trust the ratios, not the times. Sources: "
        + ", ".join(f"`benchmarks/results/{name}.json`" for name in SOURCES)
        + ".",
    ]
    return "\n".join(rows)


def updated(readme: str, results: dict[str, Any]) -> str:
    """The README with its results replaced."""
    before, rest = readme.split(BEGIN)
    return f"{before}{BEGIN}\n{table(results)}\n{END}{rest.split(END)[1]}"


def picture(folder: Path, data: Path, count: int = 4, gap: int = 12) -> Image.Image:
    """The first pictures of `data` with what a fine-tuned model retains of them, side by side."""
    from skipvision_export.method import saved_config
    from skipvision_export.models.loading import resolve_model
    from skipvision_export.report.overlay import draw_grid
    from skipvision_export.runtime.data import load_imagefolder
    from skipvision_export.runtime.torch_reference import TorchReference

    reference = TorchReference(resolve_model(folder))
    config = saved_config(folder)
    samples = {sample.image: sample for sample in load_imagefolder(data)}
    drawn = []
    for sample in list(samples.values())[:count]:
        inputs = reference.prepare(sample.image, sample.question)
        _, state = reference.run(inputs, max_new_tokens=1, config=config)
        order = state.order[0].tolist()
        drawn.append(draw_grid(sample.image, math.isqrt(len(order)), order[: state.layout.retained]))
    width, height = drawn[0].size
    strip = Image.new("RGB", (count * (width + gap) - gap, height), "white")
    for i, image in enumerate(drawn):
        strip.paste(image, (i * (width + gap), 0))
    return strip


if __name__ == "__main__":
    file = ROOT / "README.md"
    everything = load()
    file.write_text(updated(file.read_text(), everything))
    PICTURE.parent.mkdir(exist_ok=True)
    finetuned = ROOT / everything["demo_cpu"]["finetuned"]
    picture(finetuned, finetuned.parent / "test").save(PICTURE, optimize=True)
