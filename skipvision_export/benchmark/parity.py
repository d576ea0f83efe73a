"""Running the contenders of the four gaps on the same prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from skipvision_export.benchmark.accuracy import normalize
from skipvision_export.benchmark.raster import RasterEncoder
from skipvision_export.layout import TokenLayout
from skipvision_export.runtime.data import Sample
from skipvision_export.runtime.generation import Generator, Transcript
from skipvision_export.runtime.ort import OrtBackend
from skipvision_export.runtime.pipeline import Bundle
from skipvision_export.runtime.prompt import PromptInputs
from skipvision_export.runtime.torch_reference import TorchReference
from skipvision_export.validation import LIMITS, Gap, compare_steps, layer_rows

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Prompt:
    """A picture (a path or a PIL image), a question, and the expected answer where there is one."""

    image: Any
    question: str
    answer: str | None = None


@dataclass
class ParityReport:
    """The four gaps, the layers of the rewrite gap, and every contender's transcripts."""

    gaps: dict[str, Gap]
    transcripts: dict[str, list[Transcript]]
    orders: list[list[int]]
    accuracy: dict[str, float]

    @property
    def passed(self) -> bool:
        """No gap is over its limit."""
        return all(gap.passed for gap in self.gaps.values())

    def to_json(self) -> dict[str, Any]:
        """The contract's keys."""
        return {
            "passed": self.passed,
            "gaps": {name: gap.to_json() for name, gap in self.gaps.items()},
            "layers": layer_rows(self.gaps["rewrite"]),
            "greedy_match": self.gaps["rewrite"].greedy_match,
            "accuracy": self.accuracy,
        }


def prompts_from(samples: Sequence[Sample]) -> list[Prompt]:
    """Prompts of a data folder."""
    return [Prompt(s.image, s.question, s.answer) for s in samples]


def synthetic_prompts(n: int, size: int) -> list[Prompt]:
    """Pictures of random blocks and plain questions, for models that come without data."""
    rng = np.random.default_rng(0)
    asked = ["What is in the picture?", "Describe the image.", "Which colours are there?"]
    prompts = []
    for i in range(n):
        blocks = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        image = Image.fromarray(blocks).resize((size, size), Image.Resampling.BICUBIC)
        prompts.append(Prompt(image, asked[i % len(asked)]))
    return prompts


def measure_gaps(
    bundle: Bundle,
    reference: TorchReference,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int = 16,
    progress: Progress = lambda _: None,
) -> ParityReport:
    """Compare a bundle with the model it came from, on each prompt.

    export    dense PyTorch against the bundle's graphs with every visual token as it comes out of
              the projector, every row and every K/V kept
    rewrite   patched PyTorch against the bundle as it runs
    backend   the bundle with every ONNX Runtime optimization off against the bundle as it runs
    method    patched PyTorch against dense PyTorch; only reported
    """
    config, manifest = bundle.config, bundle.manifest
    plain = OrtBackend(bundle.folder, manifest, optimize=False)
    runners = {"ort": bundle.generator, "plain": Generator(plain, manifest)}
    raster = RasterEncoder(bundle)
    layers = manifest.layout.layer_tiers
    whole = TokenLayout((("retained", reference.visual_tokens),), (0,) if layers else (), layers)
    everything = Generator(bundle.backend, manifest, whole)
    names = ("dense", "patched", "ort", "plain", "ort_all")
    made: dict[str, list[Transcript]] = {name: [] for name in names}
    orders = []
    for i, prompt in enumerate(prompts):
        progress(f"prompt {i + 1} of {len(prompts)}")
        inputs = reference.prepare(prompt.image, prompt.question)
        laid_out = bundle.prepare(prompt.image, prompt.question)
        dense, _ = reference.run(inputs, max_new_tokens, keep_kv=True)
        patched, state = reference.run(inputs, max_new_tokens, config, keep_kv=True)
        assert state is not None and state.order is not None
        orders.append(state.order[0].tolist())
        made["dense"].append(dense)
        made["patched"].append(patched)
        for name, generator in runners.items():
            made[name].append(_run(bundle, generator, laid_out, max_new_tokens))
        features = raster(inputs.pixel_values)
        made["ort_all"].append(_run(bundle, everything, inputs, max_new_tokens, features=features))
    limit = LIMITS[manifest.dtype]

    def gap(name: str, expected: str, actual: str, limit: float | None, note: str = "") -> Gap:
        pairs = list(zip(made[expected], made[actual], strict=True))
        return compare_steps(name, pairs, limit, note)

    gaps = {
        "export": gap("export", "dense", "ort_all", limit),
        "rewrite": gap("rewrite", "patched", "ort", limit),
        "backend": gap("backend", "plain", "ort", limit, "ONNX Runtime CPU, all optimizations against none"),
        "method": _without_kv(gap("method", "dense", "patched", None, "reported, not limited")),
    }
    return ParityReport(gaps, made, orders, _accuracy(reference, prompts, made))


def _run(
    bundle: Bundle, generator: Generator, inputs: PromptInputs, max_new_tokens: int, **more: Any
) -> Transcript:
    return generator.generate(
        inputs.input_ids,
        inputs.pixel_values,
        max_new_tokens=max_new_tokens,
        eos=bundle.eos,
        keep_logits=True,
        keep_kv=True,
        **more,
    )


def _without_kv(gap: Gap) -> Gap:
    """The method gap compares caches of different lengths on purpose: only logits mean anything."""
    gap.outputs = {name: value for name, value in gap.outputs.items() if name == "logits"}
    return gap


def _accuracy(
    reference: TorchReference, prompts: Sequence[Prompt], made: dict[str, list[Transcript]]
) -> dict[str, float]:
    """Exact match of dense, patched and exported answers, where answers are known."""
    if any(prompt.answer is None for prompt in prompts):
        return {}
    return {
        name: float(
            np.mean(
                [
                    normalize(reference.decode_text(t.token_ids)) == normalize(str(p.answer))
                    for t, p in zip(made[name], prompts, strict=True)
                ]
            )
        )
        for name in ("dense", "patched", "ort")
    }
