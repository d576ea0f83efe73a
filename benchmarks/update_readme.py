"""Write the README's results out of benchmarks/results/demo_cpu.json, and its picture.

Run from the repository's root after a new benchmark:

skipvision demo -o demo --json benchmarks/results/demo_cpu.json && python benchmarks/update_readme.py
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "demo_cpu.json"
PICTURE = ROOT / "docs" / "retained.png"
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


def picture(folder: Path, data: Path, preset: str, count: int = 4, gap: int = 12) -> Image.Image:
    """The first pictures of `data` with what the reference retains of them, side by side."""
    from skipvision_export import SkipVisionConfig
    from skipvision_export.models.loading import resolve_model
    from skipvision_export.report.overlay import draw_grid
    from skipvision_export.runtime.data import load_imagefolder
    from skipvision_export.runtime.torch_reference import TorchReference

    reference = TorchReference(resolve_model(folder))
    config = SkipVisionConfig.preset(preset)
    samples = {sample.image: sample for sample in load_imagefolder(data)}
    drawn = []
    for sample in list(samples.values())[:count]:
        inputs = reference.prepare(sample.image, sample.question)
        _, state = reference.run(inputs, max_new_tokens=1, config=config)
        order = state.order[0].tolist()
        retained = config.layout(len(order)).retained
        drawn.append(draw_grid(sample.image, math.isqrt(len(order)), order[:retained]))
    width, height = drawn[0].size
    strip = Image.new("RGB", (count * (width + gap) - gap, height), "white")
    for i, image in enumerate(drawn):
        strip.paste(image, (i * (width + gap), 0))
    return strip


if __name__ == "__main__":
    file = ROOT / "README.md"
    measured = json.loads(RESULTS.read_text())
    file.write_text(updated(file.read_text(), measured))
    PICTURE.parent.mkdir(exist_ok=True)
    checkpoint = ROOT / measured["checkpoint"]
    picture(checkpoint, checkpoint.parent / "test", measured["preset"]).save(PICTURE, optimize=True)
