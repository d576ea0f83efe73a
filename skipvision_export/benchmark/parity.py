"""Running the contenders of the four gaps on the same prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
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


# gap -> what is expected, and what is compared with it; see measure_gaps.
GAPS = {
    "export": ("dense", "ort_all"),
    "rewrite": ("patched", "ort"),
    "backend": ("plain", "ort"),
    "method": ("dense", "patched"),
}
NOTES = {
    "backend": "ONNX Runtime CPU, all optimizations against none",
    "method": "reported, not limited",
}


def measure_gaps(
    bundle: Bundle,
    reference: TorchReference,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int = 16,
    gaps: Sequence[str] = tuple(GAPS),
    progress: Progress = lambda _: None,
) -> ParityReport:
    """Compare a bundle with the model it came from, on each prompt.

    export    dense PyTorch against the bundle's graphs with every visual token as it comes out of
              the projector, every row and every K/V kept
    rewrite   patched PyTorch against the bundle as it runs
    backend   the bundle with every ONNX Runtime optimization off against the bundle as it runs
    method    patched PyTorch against dense PyTorch; only reported

    gaps: names of those to measure; what only the others need does not run.
    """
    contenders = _Contenders(bundle, reference, max_new_tokens)
    names = [name for name in _Contenders.NAMES if any(name in GAPS[gap] for gap in gaps)]
    made: dict[str, list[Transcript]] = {name: [] for name in names}
    for i, prompt in enumerate(prompts):
        progress(f"prompt {i + 1} of {len(prompts)}")
        for name in names:
            made[name].append(getattr(contenders, name)(prompt))

    def gap(name: str) -> Gap:
        pairs = list(zip(*(made[contender] for contender in GAPS[name]), strict=True))
        limit = None if name == "method" else LIMITS[bundle.manifest.dtype]
        found = compare_steps(name, pairs, limit, NOTES.get(name, ""))
        return _without_kv(found) if name == "method" else found

    return ParityReport(
        {name: gap(name) for name in gaps}, made, contenders.orders, _accuracy(reference, prompts, made)
    )


class _Contenders:
    """What answers a prompt, each by its name in GAPS."""

    NAMES = ("dense", "patched", "ort", "plain", "ort_all")

    def __init__(self, bundle: Bundle, reference: TorchReference, max_new_tokens: int) -> None:
        self.bundle, self.reference, self.max_new_tokens = bundle, reference, max_new_tokens
        self.orders: list[list[int]] = []

    def dense(self, prompt: Prompt) -> Transcript:
        """The Hugging Face model as it is."""
        return self.reference.run(self._inputs(prompt), self.max_new_tokens, keep_kv=True)[0]

    def patched(self, prompt: Prompt) -> Transcript:
        """The Hugging Face model under apply_skip_vision."""
        inputs, config = self._inputs(prompt), self.bundle.config
        done, state = self.reference.run(inputs, self.max_new_tokens, config, keep_kv=True)
        assert state is not None and state.order is not None
        self.orders.append(state.order[0].tolist())
        return done

    def ort(self, prompt: Prompt) -> Transcript:
        """The bundle as it runs."""
        return self._run(self.bundle.generator, self.bundle.prepare(prompt.image, prompt.question))

    def plain(self, prompt: Prompt) -> Transcript:
        """The bundle with no optimization of ONNX Runtime's."""
        return self._run(self._plain, self.bundle.prepare(prompt.image, prompt.question))

    def ort_all(self, prompt: Prompt) -> Transcript:
        """The bundle with nothing chosen, merged, skipped or dropped."""
        inputs = self._inputs(prompt)
        features = self.reference.pack(self._raster(inputs.pixel_values), inputs)
        return self._run(self._everything, inputs, features=features)

    @cached_property
    def _plain(self) -> Generator:
        bundle = self.bundle
        return Generator(OrtBackend(bundle.folder, bundle.manifest, optimize=False), bundle.manifest)

    @cached_property
    def _everything(self) -> Generator:
        layers = self.bundle.manifest.layout.layer_tiers
        runs = (("retained", self.reference.visual_tokens),)
        whole = TokenLayout(runs, (0,) if layers else (), layers)  # type: ignore[arg-type]
        return Generator(self.bundle.backend, self.bundle.manifest, whole)

    @cached_property
    def _raster(self) -> RasterEncoder:
        return RasterEncoder(self.bundle)

    def _inputs(self, prompt: Prompt) -> PromptInputs:
        return self.reference.prepare(prompt.image, prompt.question)

    def _run(self, generator: Generator, inputs: PromptInputs, **more: Any) -> Transcript:
        return generator.generate(
            inputs.input_ids,
            inputs.pixel_values,
            max_new_tokens=self.max_new_tokens,
            eos=self.bundle.eos,
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
        if name in made
    }
