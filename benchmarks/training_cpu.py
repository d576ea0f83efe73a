"""Time training steps with text-only FFN paths against dense ones, beside the analytic saving.

Run from the repository's root on an idle machine, about six minutes on two cores:

python benchmarks/training_cpu.py --json benchmarks/results/training_cpu.json

Sizes that the file holds already, taken on the same machine with the same settings, are kept: --sizes
measures some of them. At width 512 attention over 640 tokens is 15 % of the operations and slower for
each of them than a product, which the FFN's saving cannot make up for; wider decoders have less of it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from skipvision_export.benchmark.memory import own_peak_mb
from skipvision_export.benchmark.sibling import TEXT_TOKENS, SiblingSizes, sibling_model
from skipvision_export.benchmark.timing import machine
from skipvision_export.benchmark.training_flops import training_cost
from skipvision_export.config import SkipVisionConfig
from skipvision_export.method import apply_skip_vision, attach_summary
from skipvision_export.models import family_of
from skipvision_export.training.answers import answers_only
from skipvision_export.training.trainable import choose_trainable

FAMILY = family_of(["LlavaForConditionalGeneration"], "the benchmark")
SIZES = {
    "512x8": SiblingSizes(heads=4),  # heads of 128, as in the models it stands for
    "768x6": SiblingSizes(768, 2688, 6, 6, vision_hidden=256, vision_layers=4),
    "1024x5": SiblingSizes(1024, 3072, 5, 8, vision_hidden=256, vision_layers=5),
    "tiny": SiblingSizes(64, 192, 2, 4, vision_hidden=32, vision_layers=2),  # to try the script
}
VARIANTS = {
    "dense": SkipVisionConfig.dense(),
    **{name: SkipVisionConfig.preset(name) for name in ("skip-50", "skip-75", "skip-90", "quarter")},
}
ANSWER_TOKENS = 16
# A step's batch. The optimizer's pass over the weights does not shrink with the tokens: with one picture
# in a step it is a tenth of the time, which no training would pay.
PICTURES = 4


class Steps:
    """Full training steps of one model: forward, backward, AdamW; the tower is frozen."""

    def __init__(self, size: str) -> None:
        """size: a key of SIZES."""
        self.model = sibling_model(SIZES[size]).train()
        attach_summary(self.model)
        choose_trainable(self.model, FAMILY)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-5, weight_decay=0.0, fused=True)

    def batch(self, config: SkipVisionConfig) -> dict[str, torch.Tensor]:
        """PICTURES samples of one picture and 64 text tokens, the last 16 of them labels."""
        generator = torch.Generator().manual_seed(0)
        text = torch.randint(4, 2000, (PICTURES, TEXT_TOKENS), generator=generator)
        visual = torch.full((PICTURES, FAMILY.layout(self.model.config, config).total), 3)
        ids = torch.cat([text[:, :16], visual, text[:, 16:]], 1)
        labels = torch.full_like(ids, -100)
        labels[:, -ANSWER_TOKENS:] = ids[:, -ANSWER_TOKENS:]
        pixels = torch.randn(PICTURES, 3, 336, 336, generator=generator)
        mask = torch.ones_like(ids)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels, "pixel_values": pixels}

    def step(self, config: SkipVisionConfig, batch: dict[str, torch.Tensor]) -> float:
        """Seconds of one step."""
        with apply_skip_vision(self.model, config), answers_only(self.model):
            start = time.perf_counter()
            self.model(**batch, use_cache=False).loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            return time.perf_counter() - start

    def cost(self, config: SkipVisionConfig) -> Any:
        """Operations of one sample in a step, the optimizer apart."""
        hf_config = self.model.config
        return training_cost(
            FAMILY.decoder_dims(hf_config),
            FAMILY.vision_dims(hf_config),
            FAMILY.layout(hf_config, config),
            TEXT_TOKENS,
            ANSWER_TOKENS,
        )


def measure(size: str, rounds: int, warmup: int) -> dict[str, Any]:
    """Interleaved rounds over all variants, the order turned around every time."""
    steps = Steps(size)
    batches = {name: steps.batch(config) for name, config in VARIANTS.items()}
    times: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for turn in range(warmup + rounds):
        print(f"{size}: round {turn + 1} of {warmup + rounds}", file=sys.stderr)
        for name in list(VARIANTS)[:: 1 if turn % 2 else -1]:
            seconds = steps.step(VARIANTS[name], batches[name])
            if turn >= warmup:
                times[name].append(seconds)
    dense_cost, dense = steps.cost(VARIANTS["dense"]).total, np.array(times["dense"])
    runs = {}
    for name, config in VARIANTS.items():
        each, cost = np.array(times[name]), steps.cost(config)
        ratios = each / dense
        saved, analytic = 1 - float(np.median(ratios)), 1 - cost.total / dense_cost
        runs[name] = {
            "step_ms": 1e3 * float(np.median(each)),
            "step_ms_spread": [1e3 * float(np.percentile(each, p)) for p in (10, 90)],
            "ratio": float(np.median(ratios)),
            "ratio_spread": [float(np.percentile(ratios, p)) for p in (10, 90)],
            "ratios": [round(float(ratio), 4) for ratio in ratios],
            "flops": cost.total,
            "flops_by_part": vars(cost),
            "measured_saving": saved,
            "analytic_saving": analytic,
            "measured_over_analytic": saved / analytic if analytic else None,
            "peak_rss_mb": peak_memory(size, name),
        }
    parameters = sum(p.numel() for p in steps.model.parameters())
    return {"sizes": vars(SIZES[size]), "parameters": parameters, "runs": runs}


def peak_memory(size: str, variant: str) -> float:
    """Peak resident memory in MiB of a process of its own that takes two steps."""
    command = [sys.executable, __file__, "--memory", size, variant]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout)["peak_rss_mb"])


def one_variant(size: str, variant: str) -> dict[str, float]:
    """What `peak_memory` runs."""
    steps, config = Steps(size), VARIANTS[variant]
    for _ in range(2):
        steps.step(config, steps.batch(config))
    return {"peak_rss_mb": own_peak_mb()}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["512x8", "768x6", "1024x5"])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--memory", nargs=2, metavar=("SIZE", "VARIANT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory:
        print(json.dumps(one_variant(*args.memory)))
        return
    results = {size: measure(size, args.rounds, args.warmup) for size in args.sizes}
    for size, result in results.items():
        for name, row in result["runs"].items():
            share = row["measured_over_analytic"]
            print(
                f"{size} {name:<8} {row['step_ms']:7.0f} ms  saved {row['measured_saving']:6.1%} of "
                f"{row['analytic_saving']:6.1%}  {'' if share is None else f'= {share:.2f}'}  "
                f"peak {row['peak_rss_mb']:.0f} MB"
            )
    whole = {
        "machine": {**machine(), "threads": torch.get_num_threads()},
        "settings": {
            "text_tokens": TEXT_TOKENS,
            "visual_tokens": 576,
            "answer_tokens": ANSWER_TOKENS,
            "pictures": PICTURES,
            "rounds": args.rounds,
            "warmup": args.warmup,
        },
    }
    if args.json and args.json.is_file():
        before = json.loads(args.json.read_text(encoding="utf-8"))
        if all(before[key] == whole[key] for key in whole):
            results = before["sizes"] | results
    whole["sizes"] = {size: results[size] for size in SIZES if size in results}
    whole["least_measured_over_analytic"] = {
        size: min(row["measured_over_analytic"] or 1.0 for row in result["runs"].values())
        for size, result in whole["sizes"].items()
    }
    if args.json:
        args.json.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
