"""What int4 weights cost the trained tiny VLM in accuracy, with and without Skip-FFN.

Run from the repository's root, about five minutes on two cores:

python benchmarks/int4_tiny.py --json benchmarks/results/int4_tiny.json

Dense is the committed checkpoint, quarter its fine-tune, both on the test set; times of int4 weights are in
decoder_cpu.py.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from skipvision_export import Bundle, SkipVisionConfig
from skipvision_export.benchmark.accuracy import BundleAnswerer, evaluate
from skipvision_export.benchmark.parity import measure_gaps, prompts_from
from skipvision_export.benchmark.timing import machine
from skipvision_export.exporter import trace_model
from skipvision_export.models.loading import resolve_model
from skipvision_export.runtime.data import load_imagefolder
from skipvision_export.runtime.torch_reference import TorchReference

EXAMPLE = Path("examples/tiny_vlm")
MODELS = {"dense": "checkpoint", "quarter": "finetuned"}
FULL, INT4 = "float32", "int4"


def accuracy(samples: int, compared: int) -> dict[str, Any]:
    """By preset: exact match of full and int4 bundles, and the gaps of the int4 one."""
    asked = load_imagefolder(EXAMPLE / "test", samples)
    found: dict[str, Any] = {}
    with TemporaryDirectory() as scratch:
        for preset, name in MODELS.items():
            traced = trace_model(resolve_model(EXAMPLE / name))
            config = SkipVisionConfig.dense() if preset == "dense" else SkipVisionConfig.preset(preset)
            bundles = {
                kind: traced.write(Path(scratch) / preset / kind, config, weights=weights)
                for kind, weights in ((FULL, None), (INT4, "int4"))
            }
            answers = {kind: evaluate(BundleAnswerer(b), asked) for kind, b in bundles.items()}
            pairs = zip(answers[FULL].answers, answers[INT4].answers, strict=True)
            reference = TorchReference(traced.source, traced.model)
            report = measure_gaps(bundles[INT4], reference, prompts_from(asked[:compared])).to_json()
            found[preset] = {
                "model": f"{EXAMPLE.as_posix()}/{name}",
                "questions": len(asked),
                "accuracy": {kind: each.to_json() for kind, each in answers.items()},
                "same_answers": float(np.mean([a == b for a, b in pairs])),
                "gaps": {
                    kind: {key: gap[key] for key in ("passed", "n", "max_abs", "sqnr_db", "greedy_match")}
                    for kind, gap in report["gaps"].items()
                },
                "decoder_bytes": {kind: decoder_bytes(b) for kind, b in bundles.items()},
            }
            print(preset, {kind: each.accuracy for kind, each in answers.items()})
    return found


def decoder_bytes(bundle: Bundle) -> int:
    """Of both decoder graphs and their weights."""
    files = bundle.manifest.files.items()
    return sum(info.bytes for name, info in files if Path(name).name.startswith("decoder"))


def main() -> None:
    """Write the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--compared", type=int, default=50, help="questions of the gaps")
    arguments = parser.parse_args()
    result = {"machine": machine(), "presets": accuracy(arguments.samples, arguments.compared)}
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
