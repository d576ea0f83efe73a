"""Many prompts at once: rows of one run, or requests that come at the same time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from skipvision_export.benchmark.floor import decoder_dims
from skipvision_export.benchmark.flops import kv_bytes
from skipvision_export.benchmark.timing import BenchSettings, Progress, bench_inputs, peak_rss_mb, spread
from skipvision_export.runtime.pipeline import Bundle
from skipvision_export.runtime.transcript import Transcript

_WARM_UP = 1


@dataclass
class Round:
    """seconds from the first request's start to the last one's end; latencies of each request, its own
    wall clock in seconds, waiting included; done: what each prompt gave, in order.
    """

    seconds: float
    latencies: list[float]
    done: list[Transcript]


class Load:
    """`concurrency` threads with one request each to a bundle, of `batch` prompts that run together."""

    def __init__(
        self, bundle: Bundle, text_tokens: int, new_tokens: int, batch: int = 1, concurrency: int = 1
    ) -> None:
        """Every prompt has a picture and a text of its own, all of one length."""
        self.bundle, self.new_tokens = bundle, new_tokens
        seeds = iter(range(batch * concurrency))
        self.requests = [
            [bench_inputs(bundle, text_tokens, next(seeds)) for _ in range(batch)] for _ in range(concurrency)
        ]

    def _ask(self, number: int, start: Callable[[], Any]) -> tuple[float, float, list[Transcript]]:
        own = self.requests[number]
        start()
        began = time.perf_counter()
        done = self.bundle.generator.generate_batch(
            [one.input_ids for one in own],
            [one.pixel_values for one in own],
            max_new_tokens=self.new_tokens,
        )
        return began, time.perf_counter(), done

    def round(self) -> Round:
        """Each client sends its request once, all at the same moment."""
        count = len(self.requests)
        if count == 1:
            answers = [self._ask(0, lambda: None)]
        else:
            start = threading.Barrier(count).wait
            with ThreadPoolExecutor(count) as pool:
                answers = list(pool.map(self._ask, range(count), [start] * count))
        begins, ends, done = zip(*answers, strict=True)
        latencies = [end - begin for begin, end in zip(begins, ends, strict=True)]
        return Round(max(ends) - min(begins), latencies, [one for own in done for one in own])


def points(batches: Sequence[int], concurrency: Sequence[int]) -> list[tuple[int, int]]:
    """(batch, concurrency) to measure: each batch alone, then one prompt from each of so many clients."""
    return list(dict.fromkeys([*((n, 1) for n in batches), *((1, n) for n in concurrency)]))


def point_name(batch: int, concurrency: int) -> str:
    """Of one of `points`."""
    return f"batch {batch}" if concurrency == 1 else f"concurrency {concurrency}"


def measure_load(
    bundles: Sequence[Bundle],
    wanted: Sequence[tuple[int, int]],
    settings: BenchSettings,
    progress: Progress = lambda _: None,
) -> Iterator[dict[str, Any]]:
    """Measure points one after the other, at each the bundles in turn, round after round.

    Gives {"batch", "concurrency", "new_tokens", "runs"} of each point, and of two bundles "ratios" with
    "ratio_spread": throughput of the first over the second's. A run has, of all rounds, `tokens_per_s` and
    `requests_per_s` (a request is a prompt; medians, with [10th, 90th percentile] as `..._spread`),
    `latency_ms`, `latency_p95_ms` and `ttft_ms` (median and 95th percentile of all prompts),
    `peak_rss_mb` of a process of its own, and `kv_bytes` of all prompts together after prefill.
    """
    for batch, concurrency in wanted:
        name = point_name(batch, concurrency)
        loads = [
            Load(bundle, settings.text_tokens, settings.new_tokens, batch, concurrency) for bundle in bundles
        ]
        rounds: list[list[Round]] = [[] for _ in bundles]
        for turn in range(_WARM_UP + settings.rounds):
            progress(f"{name}, round {turn + 1} of {_WARM_UP + settings.rounds}")
            order = range(len(bundles)) if turn % 2 else reversed(range(len(bundles)))
            for i in order:
                found = loads[i].round()
                if turn >= _WARM_UP:
                    rounds[i].append(found)
        progress(f"{name}, memory")
        runs = [_run(load, own, batch) for load, own in zip(loads, rounds, strict=True)]
        for bundle, run in zip(bundles, runs, strict=True):
            run["peak_rss_mb"] = peak_rss_mb(bundle, settings, batch, concurrency)
        point = {"batch": batch, "concurrency": concurrency, "new_tokens": settings.new_tokens, "runs": runs}
        if len(runs) == 2:
            seconds = np.array([[one.seconds for one in own] for own in rounds])
            each = seconds[1] / seconds[0]
            point["ratios"] = {"tokens_per_s": float(np.median(each))}
            point["ratio_spread"] = {"tokens_per_s": spread(each)}
        yield point


def _run(load: Load, rounds: Sequence[Round], batch: int) -> dict[str, Any]:
    bundle, prompts = load.bundle, len(load.requests) * batch
    per_second = np.array([prompts / one.seconds for one in rounds])
    # Each prompt of a batch waits for all of it.
    latencies = np.array([latency for one in rounds for latency in one.latencies]) * 1e3
    tokens = sum(done.kv_tokens_after_prefill for done in rounds[-1].done)
    return {
        "bundle": bundle.folder.name,
        "tokens_per_s": float(np.median(per_second)) * load.new_tokens,
        "tokens_per_s_spread": [value * load.new_tokens for value in spread(per_second)],
        "requests_per_s": float(np.median(per_second)),
        "requests_per_s_spread": spread(per_second),
        "latency_ms": float(np.median(latencies)),
        "latency_p95_ms": float(np.percentile(latencies, 95)),
        "ttft_ms": float(np.median([done.ttft_ms for one in rounds for done in one.done])),
        "kv_bytes": kv_bytes(decoder_dims(bundle), tokens, bundle.manifest.dtype),
    }
