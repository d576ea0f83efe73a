"""From a model, a data folder and a budget to a policy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from skipvision_export.benchmark.flops import prefill_cost
from skipvision_export.calibration.samples import ForcedSample, draw, encode
from skipvision_export.calibration.search import Budget, Point, Search, Shares, lazy_greedy
from skipvision_export.config import POLICY_KIND, POLICY_VERSION, SkipVisionConfig
from skipvision_export.errors import ConfigError, ModelError
from skipvision_export.exporter import source_hash
from skipvision_export.models.loading import ModelSource, load_model, load_processor
from skipvision_export.runtime.pipeline import eos_tokens
from skipvision_export.tokens import selector

_TOOLS = ("skipvision-export", "torch", "transformers")

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Settings:
    """What is searched, and on how many samples.

    shares: candidates of a layer's share of skipped visual tokens, in (0, 1], put in ascending order;
    selector: a name in `skipvision_export.tokens`; one that does not look at the picture leaves
    tokens where they are (order "raster"), others group them; kv_share: share of the visual tokens
    whose K/V are dropped after prefill, the same for every policy that is tried; seed: of the
    draw of samples. Raises ConfigError.
    """

    samples: int = 32
    shares: tuple[float, ...] = (0.5, 0.75, 0.9, 1.0)
    selector: str = "uniform"
    kv_share: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse shares out of range; the rest is refused by the configuration."""
        if not self.shares or not all(0 < share <= 1 for share in self.shares):
            raise ConfigError(
                f"--shares {','.join(map(str, self.shares))}: give shares in (0, 1], such as 0.5,1.0"
            )
        object.__setattr__(self, "shares", tuple(sorted(set(self.shares))))

    def config(self, shares: Shares, visual_tokens: int) -> SkipVisionConfig:
        """A policy's configuration, for a model of so many visual tokens."""
        order: Any = "raster" if selector(self.selector).static else "grouped"
        return SkipVisionConfig(
            name="calibrated",
            layer_shares=shares,
            selector=self.selector,
            order=order,
            kv_share=self.kv_share,
            visual_tokens=visual_tokens,
        )


@dataclass(frozen=True)
class Plan:
    """What can be told before any weights are loaded."""

    source: ModelSource
    samples: list[ForcedSample]
    budget: Budget
    settings: Settings
    text_tokens: int

    @property
    def layers(self) -> int:
        """Decoder layers."""
        return self.source.family.decoder_dims(self.source.config).num_layers

    def config(self, shares: Shares) -> SkipVisionConfig:
        """A policy's configuration."""
        return self.settings.config(shares, self.source.family.visual_tokens(self.source.config))

    def flops(self, shares: Shares) -> int:
        """Operations of the decoder's prefill of a mean prompt with one picture."""
        family, config = self.source.family, self.source.config
        layout = family.layout(config, self.config(shares))
        return prefill_cost(family.decoder_dims(config), layout, self.text_tokens).prefill_flops


@dataclass(frozen=True)
class Calibration:
    """A policy and how it was found; `to_json` is the policy file."""

    plan: Plan
    search: Search
    ffn_update: list[dict[str, float | None]]

    @property
    def best(self) -> Point:
        """The policy itself: the last of the path."""
        return self.search.path[-1]

    @property
    def config(self) -> SkipVisionConfig:
        """What `apply_skip_vision` and `export` take."""
        return self.plan.config(self.best.shares)

    def curve(self) -> list[dict[str, Any]]:
        """The path from dense to the policy: flops, their share of dense, divergence, layer_shares."""
        dense = self.search.path[0].flops
        return [
            {
                "flops": point.flops,
                "flops_share": point.flops / dense,
                "divergence": point.divergence,
                "layer_shares": list(point.shares),
            }
            for point in self.search.path
        ]

    def to_json(self) -> dict[str, Any]:
        """The policy file, readable from the top."""
        plan, best, source = self.plan, self.best, self.plan.source
        visual = source.family.visual_tokens(source.config)
        layout = source.family.layout(source.config, self.config)
        dense = self.search.path[0].flops
        return {
            "version": POLICY_VERSION,
            "kind": POLICY_KIND,
            "config": self.config.to_json(),
            "model": {
                "name": source.name,
                "sha256": source_hash(source),
                "num_layers": plan.layers,
                "visual_tokens": visual,
            },
            "layers": [
                {
                    "layer": i,
                    "skip": share > 0,
                    "share": share,
                    "skipped_tokens": visual - layout.ffn_tokens(i),
                    "ffn_update": self.ffn_update[i],
                }
                for i, share in enumerate(best.shares)
            ],
            "budget": {"flops": plan.budget.flops, "max_divergence": plan.budget.divergence},
            "flops": {
                "dense": dense,
                "policy": best.flops,
                "share": best.flops / dense,
                "text_tokens": plan.text_tokens,
            },
            "divergence": best.divergence,
            "samples": {
                "count": len(plan.samples),
                "answer_tokens": sum(sample.answer.size for sample in plan.samples),
                "seed": plan.settings.seed,
                "policies_measured": len(self.search.tried),
            },
            "curve": self.curve(),
            "tools": {tool: version(tool) for tool in _TOOLS},
        }


def plan(source: ModelSource, data: Path, budget: Budget, settings: Settings | None = None) -> Plan:
    """Draw and encode the samples, and check that the budget can be met; no weights are loaded.

    Raises InputError for the data, ConfigError for settings that do not fit the model and for
    a FLOPs budget below what every layer at its highest share takes.
    """
    settings = settings or Settings()
    if not source.family.plain:
        raise ModelError(
            "calibration is for models with one crop of one size for each image whose tokens see those "
            f"before them, not {source.family.name}"
        )
    processor = load_processor(source.folder)
    ends = eos_tokens(source.folder, processor)
    if not ends:
        raise ModelError(f"{source.name} names no end token; set eos_token_id in generation_config.json")
    samples = encode(source, processor, draw(data, settings.samples, settings.seed), ends[0])
    visual = source.family.visual_tokens(source.config)
    lengths = [sample.prompt.input_ids.shape[1] - visual for sample in samples]
    made = Plan(source, samples, budget, settings, round(sum(lengths) / len(lengths)))
    if budget.flops is not None:
        top = settings.shares[-1]
        least = made.flops((top,) * made.layers) / made.flops((0.0,) * made.layers)
        if least > budget.flops:
            raise ConfigError(
                f"--flops {budget.flops} cannot be met: with share {top} in all {made.layers} layers "
                f"{least:.4f} of the dense prefill is left; give at least that, or higher --shares"
            )
    return made


def calibrate(made: Plan, model: Any = None, progress: Progress = lambda _: None) -> Calibration:
    """Search a policy within the budget, by measured divergence; see `lazy_greedy` for its cost.

    model: already loaded, where it shall run; else the weights are loaded in float32 on the CPU.
    Raises ConfigError where not even one move stays within a divergence budget.
    """
    from skipvision_export.calibration.ffn_update import ffn_update
    from skipvision_export.calibration.probe import Probe
    from skipvision_export.method import saved_config, saved_summary

    if model is None:
        progress("loading weights")
        model = load_model(made.source)
    probe = Probe(made.source, model, made.samples)
    dense = made.flops((0.0,) * made.layers)
    count = 0

    def tell(point: Point) -> None:
        nonlocal count
        count += 1
        progress(f"policy {count}: {point.flops / dense:.1%} of FLOPs, divergence {point.divergence:.2e}")

    with probe.cached_vision():
        progress("measuring FFN updates")
        summary = saved_summary(made.source.folder)
        if summary is not None:
            summary = summary.to(probe.device, probe.dtype)
        updates = ffn_update(probe, saved_config(made.source.folder), summary)
        search = lazy_greedy(
            made.layers,
            made.settings.shares,
            lambda shares: probe.divergence(made.config(shares)),
            made.flops,
            made.budget,
            tell,
        )
    if len(search.path) == 1:
        raise ConfigError(_unreachable(made, search))
    return Calibration(made, search, updates)


def _unreachable(made: Plan, search: Search) -> str:
    if not search.tried:
        return f"--shares {made.settings.shares} skip no whole token; give higher shares"
    best = min(search.tried, key=lambda point: point.divergence)
    layer = next(i for i, share in enumerate(best.shares) if share)
    return (
        f"--max-divergence {made.budget.divergence} cannot be met: the least that any move costs is "
        f"{best.divergence:.3e} (layer {layer}, share {best.shares[layer]}); give more, or lower --shares"
    )
