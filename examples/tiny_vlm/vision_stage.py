"""Stage A: train the vision tower alone on per-patch labels and on where CLS attends."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from common import Log, build_optimizer, learning_rate, save_state, take_step
from modeling import to_pixel_values, tower_features
from scenes import COLOURS, GRID, KINDS, Batch
from torch import Tensor, nn

SIZES = {"kind": len(KINDS) + 1, "colour": len(COLOURS) + 1, "row": GRID, "col": GRID}


class PatchHeads(nn.Module):
    """Linear read-outs of every patch feature; used in training only, never saved in the model."""

    def __init__(self, width: int) -> None:
        """width: size of a patch feature."""
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.out = nn.Linear(width, sum(SIZES.values()))

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        """[n, 64, width] to logits [n, 64, classes] for each of SIZES."""
        parts = self.out(self.norm(features)).split(list(SIZES.values()), dim=-1)
        return dict(zip(SIZES, parts, strict=True))


def attention_target(coverage: Tensor, kind: Tensor) -> Tensor:
    """Where CLS should look: [n, 64], each object with the same share, by covered area.

    Equal shares matter: the top-K patches of a picture then hold every object, large or small.
    """
    n = coverage.shape[0]
    half = GRID // 2
    cells = (coverage * (kind >= 0)).view(n, 2, half, 2, half).sqrt()
    total = cells.sum((2, 4), keepdim=True)
    cells = cells / total.clamp_min(1e-6)
    target = cells.reshape(n, GRID * GRID)
    return target / target.sum(1, keepdim=True).clamp_min(1e-6)


def vision_loss(
    tower: nn.Module, heads: PatchHeads, pool: Batch, ids: np.ndarray
) -> tuple[Tensor, dict[str, float]]:
    """Training loss on pictures `ids` of the pool, and accuracies."""
    device = next(tower.parameters()).device
    features, log_attention = tower_features(tower, to_pixel_values(pool.pixels[ids]).to(device))
    logits = heads(features)
    kind = torch.from_numpy(pool.kind[ids]).to(device)
    colour = torch.from_numpy(pool.colour[ids]).to(device)
    place = torch.arange(GRID * GRID, device=device).expand(len(ids), -1)
    labels = {
        "kind": kind.where(kind >= 0, len(KINDS)),
        "colour": colour.where(colour >= 0, len(COLOURS)),
        "row": place // GRID,
        "col": place % GRID,
    }
    weights = {"kind": 2.0, "colour": 1.0, "row": 0.3, "col": 0.3}
    loss = torch.zeros((), device=device)
    for name, label in labels.items():
        loss = loss + weights[name] * F.cross_entropy(logits[name].flatten(0, 1), label.flatten())
    target = attention_target(torch.from_numpy(pool.coverage[ids]).to(device), kind)
    attention = log_attention.logsumexp(1) - np.log(log_attention.shape[1])
    loss = loss - 0.3 * (target * attention).sum(1).mean()
    there = kind >= 0
    hits = {name: (logits[name].argmax(-1) == label) for name, label in labels.items()}
    kept = torch.zeros_like(target).scatter_(1, attention.topk(32, dim=1).indices, 1.0)
    measured = {
        "kind": hits["kind"][there].float().mean().item(),
        "colour": hits["colour"][there].float().mean().item(),
        "row": hits["row"].float().mean().item(),
        "empty": hits["kind"][~there].float().mean().item(),
        "kept_in_32": (kept * target).sum(1).mean().item(),
    }
    return loss, {name: round(value, 4) for name, value in measured.items()}


def train_vision(
    tower: nn.Module,
    pool: Batch,
    validation: Batch,
    *,
    steps: int,
    batch: int,
    peak: float,
    seed: int,
    state_path: Path,
    log: Log,
) -> None:
    """Train the tower's layers up to the feature layer, or go on from `state_path`."""
    heads = PatchHeads(tower.config.hidden_size).to(next(tower.parameters()).device)
    optimizer = build_optimizer([tower, heads])
    first = 0
    if state_path.exists():
        state = torch.load(state_path, weights_only=True, map_location="cpu")
        tower.load_state_dict(state["tower"])
        heads.load_state_dict(state["heads"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    for step in range(first, steps):
        ids = np.random.default_rng([seed, 10, step]).integers(len(pool.pixels), size=batch)
        loss, measured = vision_loss(tower, heads, pool, ids)
        take_step(loss, optimizer, learning_rate(step, steps, peak))
        if (step + 1) % 50 == 0:
            log.write(stage="vision", step=step + 1, loss=round(loss.item(), 4), **measured)
        if (step + 1) % 250 == 0 or step + 1 == steps:
            with torch.no_grad():
                loss, measured = vision_loss(tower, heads, validation, np.arange(len(validation.pixels)))
            log.write(stage="vision-validation", step=step + 1, loss=round(loss.item(), 4), **measured)
            save_state(
                state_path,
                {
                    "tower": tower.state_dict(),
                    "heads": heads.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "step": step + 1,
                },
            )


@torch.no_grad()
def cache_features(tower: nn.Module, pixels: np.ndarray, batch: int = 250) -> tuple[Tensor, Tensor]:
    """Features float16 [n, 64, width], on the tower's device, and CLS attention float32 [n, 64], summed over
    heads, on the host."""
    device = next(tower.parameters()).device
    features, attention = [], []
    for start in range(0, len(pixels), batch):
        part, log_attention = tower_features(tower, to_pixel_values(pixels[start : start + batch]).to(device))
        features.append(part.half())
        attention.append(log_attention.exp().sum(1).cpu())
    return torch.cat(features), torch.cat(attention)
