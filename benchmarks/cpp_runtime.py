"""The C++ runtime against Python's loop: equal answers, time, memory.

    cmake -S engines/runtime -B build && cmake --build build
    python benchmarks/cpp_runtime.py --program build/skipvision-run --json benchmarks/results/cpp_runtime.json

Answers are those of 200 held-out questions of the tiny VLM, skip and dense. Times and memory are of its
sibling with random weights (hidden 512, 117 MB of decoder weights in float32), in rounds that alternate
between the two programs; one thread each. Exit 1 where an answer differs, or where a decode step spends 3 %
or more of its time outside of ONNX Runtime.
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
BATCHES = (1, 4, 8)
# Time outside of ONNX Runtime, of that of a decode step.
OUTSIDE_LIMIT = 0.03


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
    bundle = Bundle.load(folder)
    expected = [bundle.generate(file, row["question"]) for file, row in zip(files, rows, strict=True)]

    def equal(batch: int) -> int:
        command = [program, str(folder), "--lines", "--batch", str(batch)]
        done = subprocess.run(command, input="\n".join(lines), capture_output=True, text=True, check=True)
        found = [json.loads(printed) for printed in done.stdout.splitlines()]
        pairs = zip(found, expected, strict=True)
        return sum((f["token_ids"], f["text"]) == (e.token_ids, e.text) for f, e in pairs)

    return {"questions": len(rows), "equal": equal(1), "equal_in_batches_of_8": equal(8)}


def bench(program: str, folder: Path, batch: int = 1) -> dict[str, Any]:
    """One run of --bench: a generation after a warm one."""
    command = [program, str(folder), "--image", str(PICTURE), "--prompt", QUESTION, "--bench", "--threads"]
    command += ["1", "--no-hashes", "--rounds", "1", "--max-new-tokens", str(NEW_TOKENS)]
    done = subprocess.run([*command, "--batch", str(batch)], capture_output=True, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def times(program: str, folder: Path, rounds: int) -> dict[str, Any]:
    """Medians over rounds that alternate, and what C++ spends outside of the graphs in a step."""
    bundle = Bundle.load(folder, threads=1)
    inputs = bundle.prepare(PICTURE, QUESTION)
    bundle.run(inputs, NEW_TOKENS)
    keys = ("ttft_ms", "decode_ms_per_token")
    found: dict[str, list[dict[str, float]]] = {"cpp": [], "python": []}
    for _ in range(rounds):
        found["cpp"].append(bench(program, folder))
        own = bundle.run(inputs, NEW_TOKENS)
        found["python"].append({key: getattr(own, key) for key in keys})
    more = {"cpp": ("outside_ms_per_token", "peak_rss_mb"), "python": ()}
    medians = {
        name: {
            key: round(statistics.median(one[key] for one in runs), 3) for key in (*keys, *more.get(name, ()))
        }
        for name, runs in found.items()
    }
    share = statistics.median(
        one["outside_ms_per_token"] / one["decode_ms_per_token"] for one in found["cpp"]
    )
    weights = (folder / "onnx" / "decoder.onnx_data").stat().st_size / 1e6
    return medians | {
        "rounds": rounds,
        "outside_share_of_decode": round(share, 4),
        "decoder_weights_mb": round(weights, 1),
    }


def batches(program: str, folder: Path, rounds: int) -> dict[str, Any]:
    """Medians of as many equal prompts at once: milliseconds of the batch's prefill and of its steps."""
    found: dict[int, list[dict[str, float]]] = {batch: [] for batch in BATCHES}
    for _ in range(rounds):
        for batch, runs in found.items():
            runs.append(bench(program, folder, batch))
    keys = ("ttft_ms", "decode_ms_per_token", "outside_ms_per_token", "peak_rss_mb")
    return {
        str(batch): {key: round(statistics.median(one[key] for one in runs), 3) for key in keys}
        for batch, runs in found.items()
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
        sibling = sibling_bundle(folder)
        result["sibling"] = times(arguments.program, sibling, arguments.rounds)
        result["sibling"]["batches"] = batches(arguments.program, sibling, min(arguments.rounds, 3))
    text = json.dumps(result, indent=1)
    print(text)
    if arguments.json:
        arguments.json.write_text(text + "\n")
    share = result["sibling"]["outside_share_of_decode"]
    if share >= OUTSIDE_LIMIT:
        raise SystemExit(
            f"{share:.1%} of a decode step is outside of ONNX Runtime, not below {OUTSIDE_LIMIT:.0%}"
        )
    for name, counts in result["answers"].items():
        if len(set(counts.values())) != 1:
            raise SystemExit(f"{name}: answers differ: {counts}")


if __name__ == "__main__":
    main()
