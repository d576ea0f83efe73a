"""What both training stages share: the picture pool, the schedule, states and the log."""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from scenes import Batch, DigitBank, draw_batch, sample_scene
from torch import Tensor


@dataclass
class Log:
    """Appends JSON lines to a file and prints them."""

    path: Path
    start: float = field(default_factory=time.monotonic)

    def write(self, **row: object) -> None:
        """Write one line, with the seconds since the start."""
        row["seconds"] = round(time.monotonic() - self.start)
        line = json.dumps(row)
        print(line, flush=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


def draw_pool(seed: int, stream: int, count: int, bank: DigitBank) -> Batch:
    """Draw `count` pictures, always the same ones for one seed and stream."""
    rng = np.random.default_rng([seed, stream])
    return draw_batch(rng, [sample_scene(rng) for _ in range(count)], bank)


def learning_rate(step: int, steps: int, peak: float, warm_up: int = 60) -> float:
    """Linear warm-up, then a cosine down to 2 % of the peak."""
    if step < warm_up:
        return peak * (step + 1) / warm_up
    done = (step - warm_up) / max(1, steps - warm_up)
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))


def build_optimizer(modules: list[torch.nn.Module]) -> torch.optim.AdamW:
    """AdamW with decay on matrices only."""
    params = [p for module in modules for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in params if p.ndim > 1], "weight_decay": 0.03},
        {"params": [p for p in params if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.98), fused=True)


def take_step(loss: Tensor, optimizer: torch.optim.AdamW, rate: float, clip: float = 1.0) -> None:
    """Backward, clip, update with learning rate `rate`."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    params = [p for group in optimizer.param_groups for p in group["params"]]
    torch.nn.utils.clip_grad_norm_(params, clip)
    optimizer.step()


def save_state(path: Path, state: dict[str, object]) -> None:
    """Write a training state so that a stop in the middle leaves the old one."""
    part = path.with_suffix(".part")
    torch.save(state, part)
    part.replace(path)
