"""Timing bundles against each other: interleaved, with spread."""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
import numpy.typing as npt

from skipvision_export.benchmark.floor import Rates, decoder_dims, phase_work
from skipvision_export.benchmark.flops import kv_bytes
from skipvision_export.errors import SkipVisionError
from skipvision_export.runtime.pipeline import Bundle
from skipvision_export.runtime.prompt import PromptInputs
from skipvision_export.runtime.transcript import Transcript
from skipvision_export.runtime.varying import Patches

Progress = Callable[[str], None]


@dataclass(frozen=True)
class BenchSettings:
    """text_tokens beside the visual ones; new_tokens decoded; rounds timed after the warm-up.

    lengths: answers whose end-to-end time is told, of at most new_tokens; by default of new_tokens.
    """

    text_tokens: int = 64
    new_tokens: int = 16
    rounds: int = 15
    warmup: int = 2
    threads: int = 0
    lengths: tuple[int, ...] = ()

    def end_to_end(self) -> dict[int, str]:
        """Lengths of answers whose time is told, and what that time is called among the ratios."""
        return {n: f"end_to_end_{n}" for n in self.lengths or (self.new_tokens,)}


@dataclass
class BenchRun:
    """One bundle's times in milliseconds, medians, and [10th, 90th percentile] beside them.

    end_to_end: from pixels to the last token, {"new_tokens", "ms", "spread"} for each length; floor: what
    each phase cannot be faster than, and its time as a multiple of that, see `floor.Rates.floor`.
    """

    bundle: str
    preset: str
    backend: str
    dtype: str
    weights: str | None
    vision_ms: float
    prefill_ms: float
    prefill_ms_spread: tuple[float, float]
    ttft_ms: float
    decode_ms_per_token: float
    decode_ms_spread: tuple[float, float]
    peak_rss_mb: float
    kv_tokens: int
    kv_bytes: int
    flops: int
    end_to_end: list[dict[str, Any]]
    floor: dict[str, dict[str, Any]]

    def to_json(self) -> dict[str, Any]:
        """The fields as a JSON object."""
        return asdict(self)


def bench_inputs(bundle: Bundle, text_tokens: int, seed: int = 0) -> PromptInputs:
    """Random pixels and ids with the bundle's number of visual tokens; the same for every bundle."""
    rng = np.random.default_rng(seed)
    model = bundle.manifest.model
    pixels: Any = next(t for t in bundle.manifest.graphs["vision_encoder"].inputs).shape[1:]
    others = np.setdiff1d(np.arange(model.vocab_size), [model.image_token_id])
    before = text_tokens // 4
    pictures: Any
    if model.merge_size is not None:  # a square picture
        side = math.isqrt(model.visual_tokens) * model.merge_size
        patches = rng.standard_normal((side**2, pixels[0])).astype(np.float32)
        pictures = Patches(patches, np.array([[1, side, side]], np.int64))
    else:
        # A dynamic size here is the number of crops of a tiled image: a thumbnail and four tiles.
        shape = [n if isinstance(n, int) else 5 for n in pixels]
        pictures = rng.standard_normal((1, *shape)).astype(np.float32)
    ids = np.concatenate(
        [
            rng.choice(others, before),
            np.full(bundle.manifest.layout.total, model.image_token_id),
            rng.choice(others, text_tokens - before),
        ]
    )
    return PromptInputs(ids[None].astype(np.int64), pictures)


def bench(
    bundles: Sequence[Bundle], settings: BenchSettings, progress: Progress = lambda _: None
) -> dict[str, Any]:
    """Time bundles in turn, round after round, so that a busy machine slows all of them alike.

    Returns {"machine", "rates", "settings", "runs", "ratios", "ratio_spread"}; ratios are the second bundle
    over the first (above 1: the first is faster, or smaller), the median over rounds.
    """
    inputs = [bench_inputs(bundle, settings.text_tokens) for bundle in bundles]
    work = [phase_work(bundle, settings.text_tokens, settings.new_tokens) for bundle in bundles]
    rates, phases = Rates.of(settings.threads), [phase for own in work for phase in own.values()]
    progress("the machine's rates")
    rates.measure(phases)
    samples: list[list[Transcript]] = [[] for _ in bundles]
    for turn in range(settings.warmup + settings.rounds):
        progress(f"round {turn + 1} of {settings.warmup + settings.rounds}")
        # Back and forth, so that no bundle always runs right after the same other one.
        order = range(len(bundles)) if turn % 2 else reversed(range(len(bundles)))
        for i in order:
            done = bundles[i].generator.generate(
                inputs[i].input_ids, inputs[i].pixel_values, max_new_tokens=settings.new_tokens
            )
            if turn >= settings.warmup:
                samples[i].append(done)
    rates.measure(phases)
    times = [_times(own, settings) for own in samples]
    runs = []
    for bundle, own, sampled, phase in zip(bundles, times, samples, work, strict=True):
        kv_tokens = sampled[-1].kv_tokens_after_prefill
        run = _run(bundle, own, kv_tokens, phase["prefill"].flops, settings, progress)
        took = {"vision": run.vision_ms, "prefill": run.prefill_ms, "decode": run.decode_ms_per_token}
        run.floor = {name: rates.floor(phase[name], took[name]) for name in phase}
        runs.append(run)
    result: dict[str, Any] = {
        "machine": machine(),
        "rates": rates.to_json(),
        "settings": asdict(settings),
        "runs": [run.to_json() for run in runs],
        "ratios": {},
        "ratio_spread": {},
    }
    if len(runs) == 2:
        for name in [name for name in times[0] if name != "vision"]:
            each = times[1][name] / np.maximum(times[0][name], 1e-9)
            result["ratios"][name] = float(np.median(each))
            result["ratio_spread"][name] = spread(each)
        for name in ("flops", "kv_bytes", "peak_rss_mb"):
            result["ratios"][name] = getattr(runs[1], name) / getattr(runs[0], name)
    return result


def _times(samples: Sequence[Transcript], settings: BenchSettings) -> dict[str, npt.NDArray[np.float64]]:
    """Milliseconds of each round by what they are of.

    An answer of n tokens is the beginning of a longer one: its end-to-end time is that up to its last token.
    """
    found = {
        "vision": [done.vision_ms for done in samples],
        "prefill": [done.prefill_ms for done in samples],
        "decode": [done.decode_ms_per_token for done in samples],
        "ttft": [done.ttft_ms for done in samples],
    }
    for n, name in settings.end_to_end().items():
        found[name] = [done.ttft_ms + sum(done.decode_ms[: n - 1]) for done in samples]
    return {name: np.array(values) for name, values in found.items()}


def _run(
    bundle: Bundle,
    times: dict[str, npt.NDArray[np.float64]],
    kv_tokens: int,
    flops: int,
    settings: BenchSettings,
    progress: Progress,
) -> BenchRun:
    manifest = bundle.manifest
    progress(f"memory of {bundle.folder.name}")
    median = {name: float(np.median(values)) for name, values in times.items()}
    return BenchRun(
        bundle=bundle.folder.name,
        preset=manifest.preset,
        backend=bundle.backend.name,
        dtype=manifest.dtype,
        weights=manifest.weights,
        vision_ms=median["vision"],
        prefill_ms=median["prefill"],
        prefill_ms_spread=spread(times["prefill"]),
        ttft_ms=median["ttft"],
        decode_ms_per_token=median["decode"],
        decode_ms_spread=spread(times["decode"]),
        peak_rss_mb=peak_rss_mb(bundle, settings),
        kv_tokens=kv_tokens,
        kv_bytes=kv_bytes(decoder_dims(bundle), kv_tokens, manifest.dtype),
        flops=flops,
        end_to_end=[
            {"new_tokens": n, "ms": median[name], "spread": spread(times[name])}
            for n, name in settings.end_to_end().items()
        ],
        floor={},
    )


def peak_rss_mb(bundle: Bundle, settings: BenchSettings, batch: int = 1, concurrency: int = 1) -> float:
    """Peak resident memory, MiB, of a process of its own that runs so many prompts once.

    batch: prompts in one run; concurrency: runs at the same time.
    """
    command = [sys.executable, "-m", "skipvision_export.benchmark.memory", str(bundle.folder)]
    numbers = (settings.text_tokens, settings.new_tokens, settings.threads, batch, concurrency)
    done = subprocess.run([*command, *map(str, numbers)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"])[-1]
        raise SkipVisionError(f"measuring the memory of {bundle.folder} failed: {last}")
    return float(json.loads(done.stdout)["peak_rss_mb"])


def machine() -> dict[str, str | int]:
    """What the numbers were taken on."""
    cpu = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as stream:
            names = [line.split(":", 1)[1].strip() for line in stream if "model name" in line]
        cpu = names[0] if names else cpu
    except OSError:
        pass  # not Linux: the platform's own word has to do
    packages = ("torch", "transformers", "onnx", "onnxruntime")
    return {
        "cpu": cpu,
        "cores": os.cpu_count() or 0,
        "system": platform.system(),
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
    }


def spread(values: Any) -> tuple[float, float]:
    """10th and 90th percentile."""
    return float(np.percentile(values, 10)), float(np.percentile(values, 90))
