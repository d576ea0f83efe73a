"""How much each FFN changes visual, summary and text tokens: the paper's motivating measurement.

Source: Skip-Vision (arXiv 2503.21817), the observation that visual tokens gain little from FFNs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from skipvision_export.calibration.probe import Probe
from skipvision_export.config import SkipVisionConfig
from skipvision_export.method import SummaryTokens, apply_skip_vision
from skipvision_export.runtime.prompt import resize_placeholders

KINDS = ("visual", "summary", "text")


@torch.no_grad()
def ffn_update(
    probe: Probe, saved: SkipVisionConfig | None = None, summary: SummaryTokens | None = None
) -> list[dict[str, float | None]]:
    """For each layer and kind of token, the mean of |FFN's update| / |its input, the residual stream|.

    Over all prompt tokens of all samples, Euclidean norms. saved, summary: what a fine-tuned
    checkpoint was trained with; it is measured as it runs, tokens that skip an FFN left out. None
    where there is no such token.
    """
    config = saved or SkipVisionConfig.dense()
    family, hf_config = probe.source.family, probe.source.config
    layout = family.layout(hf_config, config)
    layers = list(family.decoder_layers(probe.model))
    token, visual_tokens = family.image_token_id(hf_config), family.visual_tokens(hf_config)
    is_summary = torch.tensor([role == "summary" for role, n in layout.runs for _ in range(n)])
    sums = torch.zeros(len(layers), len(KINDS), dtype=torch.float64)
    counts = torch.zeros_like(sums)
    with _recording(probe, config, summary) as ratios:
        for sample in probe.samples:
            prompt = resize_placeholders(sample.prompt, token, visual_tokens, layout.total)
            inputs = probe.prompt(replace(sample, prompt=prompt))
            ids = inputs["input_ids"]
            probe.model(**inputs)
            kinds = torch.full(ids.shape[1:], 2)
            visual = ids[0].cpu() == token
            kinds[visual] = is_summary.long()
            for i in range(len(layers)):
                passed = torch.ones(ids.shape[1], dtype=torch.bool)
                passed[visual] = torch.tensor(layout.ffn_mask(layout.layer_tier(i)))
                for kind in range(len(KINDS)):
                    here = ratios[i][passed & (kinds == kind)]
                    sums[i, kind] += here.sum()
                    counts[i, kind] += here.numel()
    return [
        {name: float(s / n) if n else None for name, s, n in zip(KINDS, row, count, strict=True)}
        for row, count in zip(sums, counts, strict=True)
    ]


@contextmanager
def _recording(
    probe: Probe, config: SkipVisionConfig, summary: SummaryTokens | None
) -> Iterator[dict[int, Tensor]]:
    """Ratios [S] float64 of each layer in the last call, under the patch where there is something to it."""
    before: dict[int, Tensor] = {}
    ratios: dict[int, Tensor] = {}
    parts = [probe.source.family.ffn(layer) for layer in probe.source.family.decoder_layers(probe.model)]

    def on_norm(i: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            before[i] = args[0][0].double().norm(dim=-1)

        return hook

    def on_mlp(i: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, out: Tensor) -> None:
            update = out[0].double().norm(dim=-1)
            ratios[i] = (update / before[i].clamp(min=1e-12)).cpu()

        return hook

    with ExitStack() as stack:
        # Around the patch's own hooks, which pass a part of the rows on: both see whole sequences.
        for i, (norm, _) in enumerate(parts):
            stack.callback(norm.register_forward_pre_hook(on_norm(i)).remove)
        stack.enter_context(apply_skip_vision(probe.model, config, summary=summary))
        for i, (_, mlp) in enumerate(parts):
            stack.callback(mlp.register_forward_hook(on_mlp(i)).remove)
        yield ratios
