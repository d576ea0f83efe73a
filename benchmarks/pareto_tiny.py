"""Accuracy against time of the tiny VLM: presets, baselines, calibrated policies, the fine-tune.

Writes benchmarks/results/pareto_tiny.json and docs/pareto.svg. The trained dense checkpoint, not trained
further: presets and `eighth`, half of what `quarter` leaves, each also with tokens chosen at random and
evenly; the policies that benchmarks/calibration_tiny.py found (K/V kept); and beside them the fine-tune.
All are timed in turn, prompts as long as the questions, 32 of them in one run: alone a model so small spends
its time in calls. On one thread, because two wait for each other where the machine is shared.

Run from the repository's root, about five minutes:

python benchmarks/pareto_tiny.py
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from skipvision_export import SkipVisionConfig
from skipvision_export.benchmark.accuracy import Accuracy
from skipvision_export.benchmark.pareto import BASELINES, measure_pareto
from skipvision_export.benchmark.timing import BenchSettings
from skipvision_export.bundle import write_text
from skipvision_export.cli.common import to_json
from skipvision_export.exporter import trace_model
from skipvision_export.method import saved_config
from skipvision_export.models.loading import resolve_model
from skipvision_export.report.pareto_chart import pareto_chart
from skipvision_export.runtime.data import load_imagefolder
from skipvision_export.runtime.pipeline import Bundle

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "examples" / "tiny_vlm"
PRESETS = (
    *map(SkipVisionConfig.preset, ("skip-50", "skip-75", "skip-90", "quarter")),
    SkipVisionConfig("eighth", skip_share=0.08, retained_share=0.085, summaries=True),
)


def configurations() -> list[SkipVisionConfig]:
    """What the dense checkpoint is exported with."""
    found = [SkipVisionConfig.dense()]
    for preset in PRESETS:
        found.append(preset)
        found += [replace(preset, name=f"{preset.name}-{one}", selector=one) for one in BASELINES]
    calibration = json.loads((ROOT / "benchmarks/results/calibration_tiny.json").read_text())
    mode = calibration["modes"]["K/V kept"]
    policy = SkipVisionConfig.from_json(mode["policy"]["config"])
    for row in mode["rows"]:
        one = row["calibrated"]
        shares = tuple(one["layer_shares"])
        found.append(replace(policy, name=f"policy-{one['flops_share']:.0%}", layer_shares=shares))
    return found


def main() -> None:
    """JSON and picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=41)
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks/results/pareto_tiny.json")
    parser.add_argument("--svg", type=Path, default=ROOT / "docs/pareto.svg")
    parser.add_argument("--known", type=Path, help="an earlier result: take its accuracies, only time again")
    args = parser.parse_args()
    known = {}
    if args.known is not None:
        earlier = json.loads(args.known.read_text())
        for point in earlier["points"]:
            found = point["accuracy"], earlier["questions"], point["by_type"], []
            known[point["name"]] = Accuracy(*found)
    traced = trace_model(resolve_model(TINY / "checkpoint"))
    tuned = trace_model(resolve_model(TINY / "finetuned"))
    samples = load_imagefolder(TINY / "test")
    with tempfile.TemporaryDirectory() as scratch:
        made = [traced.write(Path(scratch) / config.name, config) for config in configurations()]
        own = saved_config(TINY / "finetuned")
        assert own is not None
        made.append(tuned.write(Path(scratch) / f"{own.name}-tuned", own))
        bundles = {one.folder.name: Bundle.load(one.folder, verify=False, threads=1) for one in made}
        settings = BenchSettings(text_tokens=16, new_tokens=8, rounds=args.rounds, threads=1, lengths=(1, 8))
        progress = lambda text: print(text, file=sys.stderr, flush=True)  # noqa: E731
        result = measure_pareto(bundles, samples, settings, batch=32, asked=known, progress=progress)
    write_text(args.json, to_json(result))
    write_text(args.svg, pareto_chart(result) + "\n")


if __name__ == "__main__":
    main()
