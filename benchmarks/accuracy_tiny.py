"""Accuracy of the tiny VLM fine-tuned with Skip-Vision, beside what it has to be compared with.

Each variant is trained by `skipvision finetune` from the committed dense checkpoint, over several seeds
(of the data's order), and asked the 1,000 test questions in PyTorch, once. Runs that are in the work
folder already are not repeated.

python benchmarks/accuracy_tiny.py --work work --json benchmarks/results/accuracy_tiny.json
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "examples" / "tiny_vlm"
sys.path.insert(0, str(EXAMPLE))

from skipvision_export import SkipVisionConfig  # noqa: E402

QUARTER = SkipVisionConfig.preset("quarter")
# name: configuration, and whether answers are trained as decode sees them
VARIANTS: dict[str, tuple[SkipVisionConfig, bool]] = {
    "quarter": (QUARTER, True),
    "dense, equal time": (SkipVisionConfig.dense(), False),
    "random selection": (replace(QUARTER, name="quarter-random", selector="random"), True),
    "uniform selection": (replace(QUARTER, name="quarter-uniform", selector="uniform"), True),
    "Skip-FFN without Skip-KV": (replace(QUARTER, name="quarter-ffn", skip_kv=False), False),
    "Skip-KV without Skip-FFN": (replace(QUARTER, name="quarter-kv", skip_ffn=False), True),
    "quarter, trained with full attention": (replace(QUARTER, name="quarter-full"), False),
}


def train(name: str, seed: int, steps: int, args: argparse.Namespace, data: Path) -> Path:
    """Fine-tune one variant in a process of its own with one thread; returns its folder."""
    config, as_decode = VARIANTS[name]
    folder = args.work / f"{config.name}-{seed}"
    if (folder / "config.json").is_file():
        return folder
    chosen = args.work / f"{config.name}.json"
    chosen.write_text(json.dumps(config.to_json()))
    command = [sys.executable, "-m", "skipvision_export", "finetune", str(EXAMPLE / "checkpoint")]
    command += ["--data", str(data), "-o", str(folder), "--policy", str(chosen), "--force"]
    command += ["--max-steps", str(steps), "--batch-size", str(args.batch), "--lr", str(args.lr)]
    command += ["--seed", str(seed), "--save-every", str(steps)]
    command += ["--train-skip-kv"] if as_decode else []
    with (args.work / f"{folder.name}.log").open("w") as log:
        subprocess.run(command, check=True, stdout=log, stderr=log, env=one_thread())
    return folder


def one_thread() -> dict[str, str]:
    """The environment, with one thread for each process: two trainings run side by side."""
    import os

    return os.environ | {"OMP_NUM_THREADS": "1"}


def seconds_per_step(folder: Path) -> float:
    """Of a training, from its log, data loading included."""
    rows = [json.loads(line) for line in (folder / "train_log.jsonl").read_text().splitlines()]
    return float(next(1 / row["train_steps_per_second"] for row in rows if "train_runtime" in row))


def measure(folder: Path) -> dict[str, float]:
    """Exact match on the test questions, under the configuration that the folder carries."""
    import torch
    from evaluate import evaluate, read_imagefolder

    from skipvision_export import apply_skip_vision
    from skipvision_export.method import saved_config, saved_summary
    from skipvision_export.models.loading import load_model, load_processor, resolve_model

    torch.set_num_threads(1)
    model, processor = load_model(resolve_model(folder)), load_processor(folder)
    pixels, questions = read_imagefolder(EXAMPLE / "test")
    config = saved_config(folder) or SkipVisionConfig.dense()
    with apply_skip_vision(model, config, summary=saved_summary(folder)):
        return evaluate(model, processor, pixels, questions)


def visual_share(config: SkipVisionConfig) -> float:
    """Share of the visual tokens' linear-layer FLOPs that is left."""
    from skipvision_export.benchmark.flops import visual_flops_share
    from skipvision_export.models.loading import resolve_model

    source = resolve_model(EXAMPLE / "checkpoint")
    dims = source.family.decoder_dims(source.config)
    visual = source.family.visual_tokens(source.config)
    return visual_flops_share(dims, source.family.layout(source.config, config), visual)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Train and measure every variant and seed; returns what the JSON holds."""
    from make_data import draw

    from skipvision_export.benchmark.timing import machine

    args.work.mkdir(parents=True, exist_ok=True)
    data = args.work / "train"
    if not (data / "metadata.jsonl").is_file():
        draw(data, "train", args.pictures, 4)
    probes = {
        name: seconds_per_step(train(name, 1000, args.probe, args, data))
        for name in ("quarter", "dense, equal time")
    }
    ratio = probes["quarter"] / probes["dense, equal time"]
    steps = {name: args.steps for name in args.variants}
    if "dense, equal time" in steps:
        steps["dense, equal time"] = round(args.steps * ratio)

    def one(job: tuple[str, int]) -> tuple[str, int, dict[str, float]]:
        name, seed = job
        folder = train(name, seed, steps[name], args, data)
        result = folder / "accuracy.json"
        if not result.is_file():
            # In a process of its own: the patch is not made for threads.
            command = [sys.executable, __file__, "--measure", str(folder)]
            subprocess.run(command, check=True, env=one_thread())
        accuracy = json.loads(result.read_text())
        print(f"{name}, seed {seed}: {accuracy['all']:.1%}", file=sys.stderr, flush=True)
        return name, seed, accuracy

    jobs = [(name, seed) for seed in range(args.seeds) for name in args.variants]
    with ThreadPoolExecutor(args.parallel) as pool:
        done = list(pool.map(one, jobs))
    variants = {}
    for name in args.variants:
        rows = [accuracy for other, _, accuracy in done if other == name]
        every = [row["all"] for row in rows]
        variants[name] = {
            "steps": steps[name],
            "visual_flops": visual_share(VARIANTS[name][0]),
            "trained_as_decode_sees": VARIANTS[name][1],
            "accuracy": every,
            "mean": sum(every) / len(every),
            "by_type": {kind: sum(row[kind] for row in rows) / len(rows) for kind in rows[0]},
        }
    dense = json.loads((EXAMPLE / "results.json").read_text())
    return {
        "machine": machine(),
        "settings": {
            "steps": args.steps,
            "batch": args.batch,
            "learning_rate": args.lr,
            "pictures": args.pictures,
            "seeds": args.seeds,
            "questions": dense["questions"],
            "step_time_ratio": ratio,
        },
        "dense_checkpoint": dense["exact_match"]["all"],
        "shuffled_images": dense["exact_match_shuffled_images"]["all"],
        "variants": variants,
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/accuracy"), help="data and runs")
    parser.add_argument("--json", type=Path, help="result")
    parser.add_argument("--measure", type=Path, help="only measure one trained folder")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--probe", type=int, default=60, help="steps that find the time of a step")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--pictures", type=int, default=8000)
    parser.add_argument("--parallel", type=int, default=2, help="trainings side by side")
    args = parser.parse_args()
    if args.measure is not None:
        (args.measure / "accuracy.json").write_text(json.dumps(measure(args.measure)) + "\n")
        return
    result = json.dumps(run(args), indent=1) + "\n"
    if args.json is None:
        print(result)
    else:
        args.json.write_text(result)


if __name__ == "__main__":
    main()
