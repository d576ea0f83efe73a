"""Between the stages: teach the projector to say kind, colour and place with equal strength.

A patch's cell can be read from the tower's features without error but is 4 % of their variance, and a
decoder trained on them stalled at 43 % of the "where" questions. So the projector first learns to
map each patch to the sum of fixed orthogonal codes: one for what is there, one for its colour, one
each for the upper or lower and the left or right half of the picture.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from common import Log, build_optimizer, learning_rate, take_step
from modeling import fold_standardisation
from scenes import COLOURS, GRID, KINDS, Batch
from torch import Tensor, nn


def codes(labels: Batch, width: int, seed: int) -> Tensor:
    """Target of every patch, float32 [n, 64, width]; empty patches carry their place faintly."""
    kinds, colours = len(KINDS) + 1, len(COLOURS)
    generator = torch.Generator().manual_seed(seed)
    table = torch.linalg.qr(torch.randn(width, width, generator=generator)).Q
    table = table * 0.3 * width**0.5
    kind, colour = torch.from_numpy(labels.kind), torch.from_numpy(labels.colour)
    there = (kind >= 0)[..., None].float()
    index = torch.arange(GRID * GRID)
    lower, right = (index // GRID >= GRID // 2).long(), (index % GRID >= GRID // 2).long()
    place = table[kinds + colours + lower] + table[kinds + colours + 2 + right]
    target = table[kind.where(kind >= 0, kinds - 1)]
    target = target + there * table[kinds + colour.clamp_min(0)]
    return target + (0.3 + 0.7 * there) * place


def align_projector(
    projector: nn.Module, features: Tensor, labels: Batch, *, steps: int, seed: int, log: Log
) -> None:
    """Regress the projector on the codes; features: float16 [n, 64, width] of the same pictures."""
    sample = features[:500].float().flatten(0, 1)
    fold_standardisation(projector, sample.mean(0), sample.std(0))
    width = projector.linear_2.weight.shape[0]
    optimizer = build_optimizer([projector])
    generator = torch.Generator().manual_seed(seed)
    target = codes(labels, width, seed).half().to(features.device)
    for step in range(steps):
        rows = torch.randint(len(features), (256,), generator=generator)
        loss = F.mse_loss(projector(features[rows].float()), target[rows].float())
        take_step(loss, optimizer, learning_rate(step, steps, 4e-3))
        if (step + 1) % 200 == 0:
            explained = 1 - loss.item() / target[rows].float().var().item()
            log.write(stage="align", step=step + 1, loss=round(loss.item(), 4), explained=round(explained, 3))
