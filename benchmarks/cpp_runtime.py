"""The C++ runtime against Python's loop: equal answers, time, memory.

    cmake -S engines/runtime -B build && cmake --build build
    python benchmarks/cpp_runtime.py --program build/skipvision-run --json benchmarks/results/cpp_runtime.json

Answers are those of 200 held-out questions of the tiny VLM, skip and dense. Times and memory are of its
sibling with random weights (hidden 512, 117 MB of decoder weights in float32), in rounds that alternate
between the two programs; one thread each.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from skipvision_export.benchmark.sibling import SiblingSizes, sibling_model
from skipvision_export.benchmark.timing import machine
from skipvision_export.config import SkipVisionConfig
from skipvision_export.exporter import trace_model
from skipvision_export.models.loading import resolve_model
from skipvision_export.runtime.pipeline import Bundle

EXAMPLE = Path(__file__).parents[1] / "examples" / "tiny_vlm"
PICTURE = EXAMPLE / "test" / "000.png"
QUESTION = "what is in the bottom right?"
NEW_TOKENS = 48


def sibling_bundle(folder: Path) -> Path:
    """A bundle of the sibling with the tiny VLM's tokenizer, whose answers do not end early."""
    model = sibling_model(SiblingSizes())
    model.config.image_token_id = 2
    model.generation_config.eos_token_id = SiblingSizes().vocab - 1
    model.save_pretrained(folder / "model")
    for file in ("chat_template.jinja", "tokenizer.json", "tokenizer_config.json", "processor_config.json"):
        shutil.copy(EXAMPLE / "checkpoint" / file, folder / "model")
    file = folder / "model" / "processor_config.json"
    config = json.loads(file.read_text())
    config["patch_size"] = 14
    config["image_processor"] |= {
        "size": {"shortest_edge": 336},
        "crop_size": {"height": 336, "width": 336},
    }
    file.write_text(json.dumps(config))
    traced = trace_model(resolve_model(folder / "model"))
    return traced.write(folder / "sibling", SkipVisionConfig.preset("skip-75")).folder


def equal_answers(program: str, folder: Path, count: int) -> dict[str, int]:
    """How many answers have the same text and ids as Python's."""
    rows = [json.loads(line) for line in (EXAMPLE / "test" / "metadata.jsonl").open()][:count]
    files = [str(EXAMPLE / "test" / row["file_name"]) for row in rows]
    lines = [
        json.dumps({"image": file, "prompt": row["question"]}) for file, row in zip(files, rows, strict=True)
    ]
    command = [program, str(folder), "--lines"]
    done = subprocess.run(command, input="\n".join(lines), capture_output=True, text=True, check=True)
    bundle = Bundle.load(folder)
    equal = 0
    for file, row, printed in zip(files, rows, done.stdout.splitlines(), strict=True):
        expected, found = bundle.generate(file, row["question"]), json.loads(printed)
        equal += found["token_ids"] == expected.token_ids and found["text"] == expected.text
    return {"questions": len(rows), "equal": equal}


def times(program: str, folder: Path, rounds: int) -> dict[str, Any]:
    """Medians over rounds that alternate; C++ counts one generation of each run after a warm one."""
    bundle = Bundle.load(folder, threads=1)
    inputs = bundle.prepare(PICTURE, QUESTION)
    bundle.run(inputs, NEW_TOKENS)
    command = [program, str(folder), "--image", str(PICTURE), "--prompt", QUESTION, "--bench", "--threads"]
    command += ["1", "--no-hashes", "--rounds", "1", "--max-new-tokens", str(NEW_TOKENS)]
    found: dict[str, dict[str, list[float]]] = {"cpp": {}, "python": {}}
    peak = 0.0
    for _ in range(rounds):
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        result = json.loads(done.stdout)
        peak = max(peak, result["peak_rss_mb"])
        own = bundle.run(inputs, NEW_TOKENS)
        python = {"ttft_ms": own.ttft_ms, "decode_ms_per_token": own.decode_ms_per_token}
        for name, values in (("cpp", result), ("python", python)):
            for key in python:
                found[name].setdefault(key, []).append(values[key])
    medians = {
        name: {key: round(statistics.median(values), 3) for key, values in own.items()}
        for name, own in found.items()
    }
    weights = (folder / "onnx" / "decoder.onnx_data").stat().st_size / 1e6
    return medians | {
        "rounds": rounds,
        "peak_rss_mb": round(peak, 1),
        "decoder_weights_mb": round(weights, 1),
    }


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--program", required=True, help="skipvision-run")
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    presets = {"finetuned": SkipVisionConfig.preset("quarter"), "checkpoint": SkipVisionConfig.dense()}
    result: dict[str, Any] = {"machine": machine(), "answers": {}}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for model, config in presets.items():
            bundle = trace_model(resolve_model(EXAMPLE / model)).write(folder / model, config).folder
            result["answers"][config.name] = equal_answers(arguments.program, bundle, arguments.questions)
        result["sibling"] = times(arguments.program, sibling_bundle(folder), arguments.rounds)
    text = json.dumps(result, indent=1)
    print(text)
    if arguments.json:
        arguments.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
