"""Accuracy against time: what a configuration costs in one, and saves in the other."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

from skipvision_export.benchmark.accuracy import Accuracy, BundleAnswerer, Progress, evaluate
from skipvision_export.benchmark.load import measure_load
from skipvision_export.benchmark.timing import BenchSettings, bench
from skipvision_export.config import SkipVisionConfig
from skipvision_export.runtime.data import Sample
from skipvision_export.runtime.pipeline import Bundle

BASELINES = ("random", "uniform")
_TIMED = (
    *("vision_ms", "prefill_ms", "prefill_ms_spread", "ttft_ms", "decode_ms_per_token", "decode_ms_spread"),
    *("end_to_end", "peak_rss_mb", "kv_bytes", "flops", "floor", "preset", "backend", "dtype", "weights"),
)


def measure_pareto(
    bundles: dict[str, Bundle],
    samples: Sequence[Sample],
    settings: BenchSettings,
    *,
    max_new_tokens: int = 32,
    batch: int = 1,
    asked: Mapping[str, Accuracy] = MappingProxyType({}),
    progress: Progress = lambda _: None,
) -> dict[str, Any]:
    """Ask every bundle all questions, and time all of them in turn, by the code of `evaluate` and `bench`.

    bundles: by name; batch: prompts timed in one run, so that calls weigh less against computing; asked: what
    some bundles are known to answer to these samples. Returns {"machine", "rates", "settings", "questions",
    "batch", "points"}; a point has `name`, `kind` (see kind_of), `config`, `accuracy` with its standard
    error `accuracy_error`, `by_type`, `ms` and `ms_spread` (an answer's end-to-end time, of a batch its
    share), a run's times and sizes as `bench` gives them for one prompt, and `front`: no other is at least
    as accurate and at least as fast.
    """
    timed = bench(list(bundles.values()), settings, progress)
    if batch == 1:
        times = [(run["end_to_end"][-1]["ms"], run["end_to_end"][-1]["spread"]) for run in timed["runs"]]
    else:
        (load,) = measure_load(list(bundles.values()), [(batch, 1)], settings, progress)
        times = [_of_rate(run) for run in load["runs"]]
    points = []
    for (name, bundle), run, (ms, spread) in zip(bundles.items(), timed["runs"], times, strict=True):
        found = asked.get(name) or evaluate(
            BundleAnswerer(bundle, max_new_tokens), samples, partial(_tell, progress, name)
        )
        points.append(
            {
                "name": name,
                "kind": kind_of(bundle.config),
                "config": bundle.config.to_json(),
                "accuracy": found.accuracy,
                "accuracy_error": math.sqrt(found.accuracy * (1 - found.accuracy) / found.n),
                "by_type": found.by_type,
                "ms": ms,
                "ms_spread": spread,
                **{key: run[key] for key in _TIMED},
            }
        )
    for point, front in zip(points, on_front([(p["accuracy"], p["ms"]) for p in points]), strict=True):
        point["front"] = front
    kept = {key: timed[key] for key in ("machine", "rates", "settings")}
    return {**kept, "questions": len(samples), "batch": batch, "points": points}


def kind_of(config: SkipVisionConfig) -> str:
    """`dense`, `policy` (shares by layer), or the selector's name: which points belong together."""
    if config.is_dense:
        return "dense"
    return "policy" if config.layer_shares is not None else config.selector


def _of_rate(run: dict[str, Any]) -> tuple[float, tuple[float, float]]:
    """Milliseconds a request, of requests per second, with their spread."""
    slow, fast = run["requests_per_s_spread"]
    return 1e3 / run["requests_per_s"], (1e3 / fast, 1e3 / slow)


def on_front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Of (accuracy, milliseconds): is there no other as good in both and better in one?"""
    return [
        not any(a >= accuracy and ms <= time and (a, ms) != (accuracy, time) for a, ms in points)
        for accuracy, time in points
    ]


def _tell(progress: Progress, part: str, text: str) -> None:
    progress(f"{part}: {text}")
