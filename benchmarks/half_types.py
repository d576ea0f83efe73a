"""The trained tiny VLM in float16 and bfloat16: is its structure exact, and what does the type cost.

Run from the repository's root, about six minutes on two cores:

python benchmarks/half_types.py --json benchmarks/results/half_types.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from skipvision_export import export
from skipvision_export.benchmark.parity import measure_gaps, prompts_from
from skipvision_export.benchmark.timing import machine
from skipvision_export.models.loading import resolve_model
from skipvision_export.runtime.data import load_imagefolder
from skipvision_export.runtime.torch_reference import TorchReference

EXAMPLE = Path("examples/tiny_vlm")
MODEL = EXAMPLE / "finetuned"


def main() -> None:
    """Write the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--samples", type=int, default=200)
    arguments = parser.parse_args()
    prompts = prompts_from(load_imagefolder(EXAMPLE / "test", arguments.samples))
    reference = TorchReference(resolve_model(MODEL))
    types: dict[str, Any] = {}
    with TemporaryDirectory() as scratch:
        for dtype in ("float16", "bfloat16"):
            bundle = export(MODEL, Path(scratch) / dtype, dtype=dtype)
            report = measure_gaps(bundle, reference, prompts, progress=lambda line: print(line, end="\r"))
            gaps = report.to_json()["gaps"]
            for gap in gaps.values():
                gap.pop("outputs", None)
                if "not_run" in gap:  # names the bundle, in a folder of this machine
                    gap["not_run"] = gap["not_run"].replace(f"{scratch}/", "")
            types[dtype] = {"gaps": gaps, "accuracy": report.accuracy}
            print(dtype, {name: gap["passed"] for name, gap in gaps.items()})
    result = {"machine": machine(), "model": MODEL.as_posix(), "questions": len(prompts), "types": types}
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
