"""Write the README's results out of benchmarks/results/demo_cpu.json; run after a new benchmark.

skipvision demo -o demo --json benchmarks/results/demo_cpu.json && python benchmarks/update_readme.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "demo_cpu.json"
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"


def table(result: dict[str, Any]) -> str:
    """The README's results section."""
    accuracy, gaps, sibling = result["accuracy"], result["gaps"], result["sibling"]
    machine = sibling["machine"]
    skip, dense = sibling["runs"]

    def ratio(name: str) -> str:
        spread = result["ratio_spread"].get(name)
        tail = f" [{spread[0]:.2f}, {spread[1]:.2f}]" if spread else ""
        return f"{result['ratios'][name]:.2f}{tail}"

    rows = [
        f"Trained tiny VLM, `{result['preset']}`, {result['questions']:,} held-out questions, ONNX Runtime:",
        "",
        "| | dense | skip | shuffled pictures (the floor) |",
        "|---|---|---|---|",
        f"| exact match | {accuracy['dense']:.1%} | {accuracy['skip']:.1%} | {accuracy['shuffled']:.1%} |",
        "",
        f"Gaps on {gaps['rewrite']['n']} of them, every step's logits and every layer's K and V:",
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
        f"Speed of a sibling with random weights ({sibling['parameters'] / 1e6:.0f} M parameters, 576 visual "
        f"and {sibling['settings']['text_tokens']} text tokens), {sibling['settings']['rounds']} interleaved "
        "rounds, median [10th, 90th percentile]:",
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
        f"{machine['cpu']}, {machine['cores']} cores; Python {machine['python']}, torch {machine['torch']}, "
        f"transformers {machine['transformers']}, onnxruntime {machine['onnxruntime']}. The machine was "
        "shared: trust the ratios, not the times. Source: `benchmarks/results/demo_cpu.json`.",
    ]
    return "\n".join(rows)


def updated(readme: str, result: dict[str, Any]) -> str:
    """The README with its results replaced."""
    before, rest = readme.split(BEGIN)
    return f"{before}{BEGIN}\n{table(result)}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    file = ROOT / "README.md"
    file.write_text(updated(file.read_text(), json.loads(RESULTS.read_text())))
