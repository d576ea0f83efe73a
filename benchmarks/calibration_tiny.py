"""Calibrated policies of the tiny VLM against the same share in all layers and against random layers.

Writes benchmarks/results/calibration_tiny.json and docs/calibration.svg. Calibration sees 128 freshly
drawn questions with digits of the validation split, never a test question; accuracy and divergence
are measured on the test questions. At each budget both baselines take at least as many operations as
the calibrated policy, so that none loses for having saved more.

Dropping K/V saves no operation of the prefill, so its share is fixed: none, then half of the visual
tokens, for the calibrated policy and the baselines alike. With K/V kept the calibrated policies are ahead
of both in divergence, and not behind in accuracy, at every budget; the smallest leaves little to choose, as
the last layer is computed for one row anyhow and three layers must skip nearly everything. Dropping half of
the K/V diverges by 2e-2 on its own, beside which the FFNs' part can hardly be told: there all are level.

Run from the repository's root, about ten minutes of one core:

python benchmarks/calibration_tiny.py
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples" / "tiny_vlm"))

from evaluate import exact_match, generate_answers, read_imagefolder, write_imagefolder
from scenes import held_out, load_digit_banks
from train import VALIDATION

from skipvision_export import SkipVisionConfig, apply_skip_vision
from skipvision_export.benchmark.flops import prefill_cost
from skipvision_export.benchmark.timing import machine
from skipvision_export.bundle import write_text
from skipvision_export.calibration import Budget, Settings, calibrate, plan
from skipvision_export.calibration.calibrate import Plan
from skipvision_export.calibration.probe import Probe
from skipvision_export.calibration.samples import encode
from skipvision_export.calibration.search import Point, Shares
from skipvision_export.models.loading import load_model, load_processor, resolve_model
from skipvision_export.report.charts import COLOURS, drawing
from skipvision_export.runtime.data import load_imagefolder
from skipvision_export.runtime.pipeline import eos_tokens

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "examples" / "tiny_vlm"
BUDGETS = (0.85, 0.75, 0.65, 0.58, 0.53)  # shares of the dense prefill's FLOPs
SHARES = (0.25, 0.375, 0.5, 0.625, 0.75, 0.8125, 0.875, 0.9375, 1.0)
# The answers are short and nearly always certain: a rare doubt makes most of the mean divergence.
SAMPLES = 128
SEEDS = range(4)


class Bench:
    """The model and the questions on which every policy is measured, once each."""

    def __init__(self, test: Path) -> None:
        """test: an imagefolder."""
        self.source = resolve_model(TINY / "checkpoint")
        self.model = load_model(self.source)
        self.processor = load_processor(self.source.folder)
        self.pixels, self.questions = read_imagefolder(test)
        end = eos_tokens(self.source.folder, self.processor)[0]
        samples = encode(self.source, self.processor, load_imagefolder(test)[::4], end)
        self.probe = Probe(self.source, self.model, samples)
        self.known: dict[Any, dict[str, Any]] = {}

    def measure(self, made: Plan, shares: Shares) -> dict[str, Any]:
        """Accuracy on all test questions, divergence on a quarter of them, FLOPs."""
        config = made.config(shares)
        if config not in self.known:
            with apply_skip_vision(self.model, config):
                match = exact_match(generate_answers(self.model, self.processor, self.pixels, self.questions))
            layout = self.source.family.layout(self.source.config, config)
            dims = self.source.family.decoder_dims(self.source.config)
            self.known[config] = {
                "layer_shares": list(shares),
                "flops_share": made.flops(shares) / made.flops((0.0,) * made.layers),
                "kv_bytes": prefill_cost(dims, layout, made.text_tokens).kv_bytes,
                "accuracy": match["all"],
                "by_type": match,
                "divergence": self.divergence(config),
            }
        return self.known[config]

    def divergence(self, config: SkipVisionConfig) -> float:
        """On a quarter of the test questions."""
        with self.probe.cached_vision():
            return self.probe.divergence(config)


def draw_calibration(folder: Path, pictures: int = 64, seed: int = 0) -> Path:
    """Pictures and questions of the validation split, in a stream of their own, as an imagefolder."""
    rng = np.random.default_rng([seed, VALIDATION, 1])
    write_imagefolder(folder, *held_out(rng, load_digit_banks(seed)["validation"], pictures))
    return folder


def all_layers(made: Plan, least: int) -> Shares:
    """The highest share in all layers alike that takes at least so many operations."""
    visual = made.source.family.visual_tokens(made.source.config)
    fits = [n for n in range(visual + 1) if made.flops((n / visual,) * made.layers) >= least]
    return (fits[-1] / visual,) * made.layers


def random_layers(made: Plan, least: int, seed: int) -> Shares:
    """Random moves out of the calibration's own, as long as at least so many operations are left."""
    rng = np.random.default_rng(seed)
    shares = [0.0] * made.layers
    steps = (0.0, *made.settings.shares)
    for layer in rng.permutation(np.repeat(np.arange(made.layers), len(made.settings.shares))):
        moved = list(shares)
        moved[layer] = steps[steps.index(shares[layer]) + 1]
        if made.flops(tuple(moved)) < least:
            break
        shares = moved
    return tuple(shares)


def run_mode(bench: Bench, data: Path, kv_share: float) -> dict[str, Any]:
    """All budgets, with the K/V of the same share of visual tokens dropped everywhere."""
    settings = Settings(samples=SAMPLES, shares=SHARES, kv_share=kv_share)
    made = plan(bench.source, data, Budget(flops=min(BUDGETS)), settings)
    found = calibrate(made, bench.model)
    dense = found.search.path[0]
    rows = []
    for budget in BUDGETS:
        # The search for a larger budget is the beginning of this one's path.
        point: Point = next(p for p in found.search.path if p.flops <= budget * dense.flops)
        row = {
            "budget": budget,
            "calibrated": bench.measure(made, point.shares),
            "all_layers": bench.measure(made, all_layers(made, point.flops)),
            "random_layers": [bench.measure(made, random_layers(made, point.flops, seed)) for seed in SEEDS],
        }
        rows.append(row)
        print(summary(row), flush=True)
    return {
        "dense": bench.measure(made, dense.shares),
        "rows": rows,
        "policies_measured": len(found.search.tried),
        "curve": found.curve(),
        "policy": found.to_json(),
    }


def summary(row: dict[str, Any]) -> str:
    """One budget in a line."""
    parts = [f"budget {row['budget']:.2f}"]
    for name in ("calibrated", "all_layers"):
        one = row[name]
        parts.append(
            f"{name} {one['flops_share']:.3f} {one['accuracy']:.1%} KL {one['divergence']:.1e} "
            f"{one['layer_shares'] if name == 'calibrated' else one['layer_shares'][0]}"
        )
    for key in ("flops_share", "accuracy", "divergence"):
        values = [one[key] for one in row["random_layers"]]
        parts.append(f"random {key} {np.mean(values):.3g} [{min(values):.3g}, {max(values):.3g}]")
    return "; ".join(parts)


def chart(modes: dict[str, Any]) -> str:
    """Accuracy and divergence against FLOPs, for each mode."""
    with drawing((9, 5.2), (2, len(modes))) as (axes, svg):
        for column, (mode, result) in enumerate(modes.items()):
            for line, key in enumerate(("accuracy", "divergence")):
                _panel(axes[line][column], result, key)
                axes[line][column].set_xlabel("prefill FLOPs, % of dense")
            axes[0][column].set_title(f"exact match, %, {mode}", fontsize=9)
            axes[1][column].set_title(f"KL, dense || skipped, {mode}", fontsize=9)
        axes[0][0].legend(frameon=False, fontsize=8)
    return svg()


def _panel(axis: Any, result: dict[str, Any], key: str) -> None:
    factor = 100 if key == "accuracy" else 1
    rows, dense = result["rows"], result["dense"]
    at = [100 * row["calibrated"]["flops_share"] for row in rows]
    randoms = np.array([[one[key] for one in row["random_layers"]] for row in rows]) * factor
    axis.fill_between(at, randoms.min(1), randoms.max(1), color=COLOURS[0], alpha=0.25, lw=0)
    axis.plot(at, randoms.mean(1), "s--", color=COLOURS[0], ms=3, label="random layers (mean, range)")
    axis.plot(
        at, [factor * r["all_layers"][key] for r in rows], "^-", color="#2b7a78", ms=4, label="all layers"
    )
    axis.plot(
        at, [factor * r["calibrated"][key] for r in rows], "o-", color=COLOURS[1], ms=4, label="calibrated"
    )
    if key == "accuracy":
        axis.axhline(factor * dense[key], color="black", lw=0.7, ls=":", label="dense")
    else:
        axis.set_yscale("symlog", linthresh=1e-4)
    axis.invert_xaxis()


def main() -> None:
    """Both modes, JSON and picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--test", type=Path, default=TINY / "test", help="imagefolder to measure on")
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks/results/calibration_tiny.json")
    parser.add_argument("--svg", type=Path, default=ROOT / "docs/calibration.svg")
    args = parser.parse_args()
    torch.set_num_threads(1)
    bench = Bench(args.test)
    result: dict[str, Any] = {
        "questions": sum(map(len, bench.questions)),
        "divergence_questions": len(bench.probe.samples),
        "calibration_questions": SAMPLES,
        "budgets": BUDGETS,
        "seeds": list(SEEDS),
        "modes": {},
        "machine": machine(),
    }
    with tempfile.TemporaryDirectory() as folder:
        data = draw_calibration(Path(folder) / "data")
        for mode, kv_share in (("K/V kept", 0.0), ("half of the K/V dropped", 0.5)):
            result["modes"][mode] = run_mode(bench, data, kv_share)
            write_text(args.json, json.dumps(result, indent=1) + "\n")
    write_text(args.svg, chart(result["modes"]) + "\n")


if __name__ == "__main__":
    main()
