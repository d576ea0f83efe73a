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
import onnx

from skipvision_export.benchmark.flops import count_flops, kv_bytes
from skipvision_export.errors import SkipVisionError
from skipvision_export.graph.passes.names import PREFILL, ffn_dim_name
from skipvision_export.models import DecoderDims
from skipvision_export.runtime.pipeline import Bundle
from skipvision_export.runtime.prompt import PromptInputs
from skipvision_export.runtime.varying import Patches

Progress = Callable[[str], None]


@dataclass(frozen=True)
class BenchSettings:
    """text_tokens beside the visual ones; new_tokens decoded; rounds timed after the warm-up."""

    text_tokens: int = 64
    new_tokens: int = 16
    rounds: int = 15
    warmup: int = 2
    threads: int = 0


@dataclass
class BenchRun:
    """One bundle's times in milliseconds, medians, and [10th, 90th percentile] beside them."""

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

    def to_json(self) -> dict[str, Any]:
        """The fields as a JSON object."""
        return asdict(self)


def bench_inputs(bundle: Bundle, text_tokens: int) -> PromptInputs:
    """Random pixels and ids with the bundle's number of visual tokens; the same for every bundle."""
    rng = np.random.default_rng(0)
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

    Returns {"machine", "settings", "runs", "ratios", "ratio_spread"}; ratios are the second bundle
    over the first (above 1: the first is faster, or smaller), the median over rounds.
    """
    inputs = [bench_inputs(bundle, settings.text_tokens) for bundle in bundles]
    samples: list[list[tuple[float, float, float]]] = [[] for _ in bundles]
    kv_tokens = [0] * len(bundles)
    for turn in range(settings.warmup + settings.rounds):
        progress(f"round {turn + 1} of {settings.warmup + settings.rounds}")
        # Back and forth, so that no bundle always runs right after the same other one.
        order = range(len(bundles)) if turn % 2 else reversed(range(len(bundles)))
        for i in order:
            done = bundles[i].generator.generate(
                inputs[i].input_ids, inputs[i].pixel_values, max_new_tokens=settings.new_tokens
            )
            kv_tokens[i] = done.kv_tokens_after_prefill
            if turn >= settings.warmup:
                samples[i].append((done.vision_ms, done.prefill_ms, done.decode_ms_per_token))
    runs = [
        _run(bundle, np.array(times), tokens, settings, progress)
        for bundle, times, tokens in zip(bundles, samples, kv_tokens, strict=True)
    ]
    result: dict[str, Any] = {
        "machine": machine(),
        "settings": asdict(settings),
        "runs": [run.to_json() for run in runs],
        "ratios": {},
        "ratio_spread": {},
    }
    if len(runs) == 2:
        first, second = (np.array(times) for times in samples)
        for name, column in (("prefill", 1), ("decode", 2)):
            each = second[:, column] / np.maximum(first[:, column], 1e-9)
            result["ratios"][name] = float(np.median(each))
            result["ratio_spread"][name] = _spread(each)
        ttft = second[:, :2].sum(1) / np.maximum(first[:, :2].sum(1), 1e-9)
        result["ratios"]["ttft"] = float(np.median(ttft))
        result["ratio_spread"]["ttft"] = _spread(ttft)
        for name in ("flops", "kv_bytes", "peak_rss_mb"):
            result["ratios"][name] = getattr(runs[1], name) / getattr(runs[0], name)
    return result


def _run(bundle: Bundle, times: Any, kv_tokens: int, settings: BenchSettings, progress: Progress) -> BenchRun:
    manifest = bundle.manifest
    progress(f"memory of {bundle.folder.name}")
    vision, prefill, decode = (float(v) for v in np.median(times, axis=0))
    return BenchRun(
        bundle=bundle.folder.name,
        preset=manifest.preset,
        backend=bundle.backend.name,
        dtype=manifest.dtype,
        weights=manifest.weights,
        vision_ms=vision,
        prefill_ms=prefill,
        prefill_ms_spread=_spread(times[:, 1]),
        ttft_ms=float(np.median(times[:, :2].sum(1))),
        decode_ms_per_token=decode,
        decode_ms_spread=_spread(times[:, 2]),
        peak_rss_mb=peak_rss_mb(bundle, settings),
        kv_tokens=kv_tokens,
        kv_bytes=kv_bytes(decoder_dims(bundle), kv_tokens, manifest.dtype),
        flops=graph_flops(bundle, settings.text_tokens),
    )


def decoder_dims(bundle: Bundle) -> DecoderDims:
    """The decoder's sizes out of the manifest."""
    values = bundle.manifest.model.model_dump()
    return DecoderDims(**{name: values[name] for name in DecoderDims.__dataclass_fields__})


def graph_flops(bundle: Bundle, text_tokens: int) -> int:
    """Operations of the decoder's prefill, counted over the exported graph's nodes."""
    layout = bundle.manifest.layout
    file = bundle.folder / bundle.manifest.graphs[PREFILL].file
    sizes = {"batch": 1, "sequence": text_tokens + layout.total, "kept": text_tokens + layout.kept_kv}
    for tier in layout.used_tiers():
        sizes[ffn_dim_name(tier)] = text_tokens + sum(layout.ffn_mask(tier))
    dims = decoder_dims(bundle)
    share = dims.experts_per_token / dims.experts if dims.experts else 1.0
    return count_flops(onnx.load(file, load_external_data=False), sizes, share)


def peak_rss_mb(bundle: Bundle, settings: BenchSettings) -> float:
    """Peak resident memory of a process of its own that runs the bundle once."""
    command = [sys.executable, "-m", "skipvision_export.benchmark.memory"]
    command += [str(bundle.folder), str(settings.text_tokens), str(settings.new_tokens)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
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


def _spread(values: Any) -> tuple[float, float]:
    return float(np.percentile(values, 10)), float(np.percentile(values, 90))
