"""Train the tiny VLM on a GPU, longer than a CPU has time for, and say whether the result is better.

python benchmarks/gpu/tiny_vlm.py --output out              # on a GPU
python benchmarks/gpu/tiny_vlm.py --small                   # a few steps on a CPU

Runs examples/tiny_vlm/train.py with three times the pictures and steps; a run that --budget stopped goes on
from `out`. The 1,000 test questions are asked once, when training is done. Checkpoint, log and results are
packed beside the JSON as gpu_tiny_vlm.tar; they replace the committed ones by hand, if they are better and of
the same size.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tarfile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from common import Bench, Results, arguments, begin
from where import ROOT

EXAMPLE = ROOT / "examples" / "tiny_vlm"
LONGER = {"pictures": 60000, "vision-steps": 4200, "decoder-steps": 16800, "align-steps": 2000}
FEW = {"pictures": 60, "vision-steps": 3, "decoder-steps": 3, "align-steps": 3, "decoder-batch": 2}
SHARE = 0.6  # of the budget for the decoder's steps; the rest is for drawing, the tower and the test


def train(output: Path, bench: Bench) -> dict[str, Any]:
    """One call of the training script; {"finished": ...} and what it measured."""
    options = FEW if bench.small else LONGER
    command = [
        sys.executable,
        str(EXAMPLE / "train.py"),
        "--output",
        str(output),
        "--device",
        bench.device.type,
    ]
    for name, number in options.items():
        command += [f"--{name}", str(number)]
    if bench.deadline is not None:
        command += ["--minutes", str(max(0.1, SHARE * bench.left() / 60))]
    if bench.small:
        command += ["--no-test"]
    subprocess.run(command, check=True, stdout=sys.stderr)
    rows = [json.loads(line) for line in (output / "train_log.jsonl").read_text().splitlines()]
    last = [row for row in rows if row["stage"] == "decoder-validation"][-1]
    weights = output / "checkpoint" / "model.safetensors"
    found: dict[str, Any] = {
        "settings": options,
        "finished": rows[-1]["stage"] != "stopped",
        "validation": {key: value for key, value in last.items() if key not in ("stage", "seconds")},
        "weights_bytes": weights.stat().st_size,
        "committed_bytes": (EXAMPLE / "checkpoint" / "model.safetensors").stat().st_size,
    }
    results = output / "results.json"
    if results.is_file():
        found["test"] = json.loads(results.read_text())
        before = json.loads((EXAMPLE / "results.json").read_text())["exact_match"]["all"]
        found["committed"], found["better"] = before, found["test"]["exact_match"]["all"] > before
    if bench.file is not None:
        with tarfile.open(bench.file.with_suffix(".tar"), "w") as tar:
            for file in (output / "checkpoint", output / "train_log.jsonl", results):
                if file.exists():
                    tar.add(file, file.name)
    return found


def table(whole: dict[str, Any]) -> list[str]:
    """For people."""
    return [f"{name}: {cell}" for name, cell in whole["cells"].items()]


def main() -> int:
    """Command line."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--output", type=Path, help="folder of the run, kept for going on")
    args = parser.parse_args()
    bench = begin("tiny_vlm", args)
    results = Results(bench)
    with TemporaryDirectory() as scratch:
        output = args.output or Path(scratch)
        if not results.cells.get("training", {}).get("finished"):
            results.cells.pop("training", None)
            results.cell("training", lambda: train(output, bench), needs=60)
    if results.cells.get("training", {}).get("finished") is False:
        results.left_out.append("training")
    return results.end(table)


if __name__ == "__main__":
    sys.exit(main())
