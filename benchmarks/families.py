"""Every model family: parity with PyTorch dense and skipping, twelve decode steps, and broken twins.

Each is a tiny random checkpoint whose weights make mistakes visible (tests/families.py). Run from the
repository's root, about ten minutes on two cores:

python benchmarks/families.py --json benchmarks/results/families.json
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from skipvision_export.benchmark.timing import machine

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from families import FAMILIES
from family_check import LIMIT, PARITY, Subject

STEPS = 13  # one of prefill, twelve of decode


def _pictures(family: Any) -> str:
    """How a picture comes to the decoder."""
    kinds = {"any shape": family.dynamic, "tiles": family.tiled, "crops": family.cropped}
    return next((kind for kind, so in kinds.items() if so), "whole")


def check(name: str, folder: Path) -> dict[str, Any]:
    """One row of the table: largest absolute differences, each against its limit."""
    subject = Subject.make(FAMILIES[name], folder)
    source = subject.traced.source
    dense = subject.dense(folder / "dense")
    reports = {
        kind: subject.measure(bundle, (*PARITY, "method"), STEPS)
        for kind, bundle in (("dense", dense), ("skip", subject.skip))
        if bundle is not None
    }
    transcripts = reports["skip"].transcripts["ort"]
    twins = subject.twins(folder / "twins", STEPS)
    return {
        "name": name,
        "family": source.family.name,
        "architecture": source.architecture,
        "text_model": source.config.text_config.model_type,
        "vision_tower": source.config.vision_config.model_type,
        "pictures": _pictures(source.family),
        "sees": source.family.sees,
        "preset": subject.skip.config.name,
        "passed": all(report.passed for report in reports.values()),
        "gaps": {
            kind: {gap.name: gap.overall.max_abs for gap in report.gaps.values()}
            for kind, report in reports.items()
        },
        "greedy_match": min(report.gaps["rewrite"].greedy_match for report in reports.values()),
        "decode_steps": max(len(done.token_ids) for done in transcripts) - 1,
        "own_pipeline": subject.own_pipeline(STEPS),
        "twins": {twin: {"max_abs": gap, "over_limit": gap / LIMIT} for twin, gap in twins.items()},
    }


def main() -> None:
    """Write the JSON; exit 1 if one is over a limit or a twin is not caught by 100 times the limit."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    arguments = parser.parse_args()
    rows = []
    for name in arguments.only:
        start = time.perf_counter()
        with TemporaryDirectory() as scratch:
            rows.append(check(name, Path(scratch)))
        row = rows[-1]
        worst = max(row["gaps"]["skip"][gap] for gap in PARITY)
        caught = min(twin["over_limit"] for twin in row["twins"].values())
        seconds = time.perf_counter() - start
        print(f"{name:<24} max_abs {worst:.1e}, twins {caught:.0f} times the limit, {seconds:.0f} s")
    result = {
        "machine": machine(),
        "limit": LIMIT,
        "families": rows,
    }
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    caught = all(twin["over_limit"] > 100 for row in rows for twin in row["twins"].values())
    sys.exit(not (caught and all(row["passed"] for row in rows)))


if __name__ == "__main__":
    main()
