"""Task accuracy on question-answer data: exact match of the greedy answer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from skipvision_export.config import SkipVisionConfig
from skipvision_export.runtime.data import Sample
from skipvision_export.runtime.pipeline import Bundle
from skipvision_export.runtime.prompt import PromptInputs
from skipvision_export.runtime.torch_reference import TorchReference
from skipvision_export.runtime.varying import LaidPictures

Progress = Callable[[str], None]


class Answerer(Protocol):
    """Anything that answers questions about pictures."""

    def answers(self, samples: Sequence[Sample]) -> Iterator[str]:
        """The answers' texts, as they come."""


@dataclass
class Accuracy:
    """Share of answers that equal the expected one; by_type: the same for each type of question."""

    accuracy: float
    n: int
    by_type: dict[str, float]
    answers: list[str]

    def to_json(self) -> dict[str, Any]:
        """Without the answers."""
        return {"accuracy": self.accuracy, "n": self.n, "by_type": self.by_type}


def evaluate(answer: Answerer, samples: Sequence[Sample], progress: Progress = lambda _: None) -> Accuracy:
    """Ask every question; case, outer spaces and a final full stop do not count."""
    answers, right = [], []
    for i, (sample, text) in enumerate(zip(samples, answer.answers(samples), strict=True)):
        if i % 20 == 0:
            progress(f"question {i + 1} of {len(samples)}")
        answers.append(text)
        right.append(normalize(answers[-1]) == normalize(sample.answer))
    return Accuracy(float(np.mean(right)), len(samples), _by_type(right, samples), answers)


@dataclass(frozen=True)
class Loyalty:
    """Share of answers that equal another one's, right or wrong; by_type: for each type of question.

    other: how often that one is right.
    """

    share: float
    by_type: dict[str, float]
    other: Accuracy

    def to_json(self) -> dict[str, Any]:
        """`loyalty`, `loyalty_by_type` and the other's accuracy as `against`."""
        return {
            "loyalty": self.share,
            "loyalty_by_type": self.by_type,
            "against": self.other.to_json(),
        }


def loyalty(own: Accuracy, other: Accuracy, samples: Sequence[Sample]) -> Loyalty:
    """How often two answered the same questions alike."""
    alike = [normalize(a) == normalize(b) for a, b in zip(own.answers, other.answers, strict=True)]
    return Loyalty(float(np.mean(alike)), _by_type(alike, samples), other)


def _by_type(found: Sequence[bool], samples: Sequence[Sample]) -> dict[str, float]:
    """The share of each type of question."""
    return {
        kind: float(np.mean([f for f, s in zip(found, samples, strict=True) if s.type == kind]))
        for kind in sorted({sample.type for sample in samples})
    }


def normalize(text: str) -> str:
    """What exact match ignores."""
    return " ".join(text.lower().rstrip(" .").split())


def shuffled(samples: Sequence[Sample], seed: int = 0) -> list[Sample]:
    """Every question with another question's picture: what an answer owes to the words alone."""
    images = list(dict.fromkeys(sample.image for sample in samples))
    order = np.random.default_rng(seed).permutation(len(images))
    # Along one random cycle, so that no picture stays with its own questions.
    other = {images[a]: images[b] for a, b in zip(order, np.roll(order, 1), strict=True)}
    return [replace(s, images=(other[s.image],)) for s in samples]


class BundleAnswerer:
    """Answers with a bundle; a picture is encoded once for all questions in a row about it."""

    def __init__(self, bundle: Bundle, max_new_tokens: int = 32, batch: int = 1) -> None:
        """max_new_tokens: where an answer is cut; batch: questions that are answered in one run."""
        self.bundle, self.max_new_tokens, self.batch = bundle, max_new_tokens, batch
        self._features: dict[tuple[Path, ...], Any] = {}

    def answers(self, samples: Sequence[Sample]) -> Iterator[str]:
        """Greedy answers."""
        for first in range(0, len(samples), self.batch):
            asked = samples[first : first + self.batch]
            inputs = [self.bundle.prepare(sample.images, sample.question) for sample in asked]
            features = self._encode([sample.images for sample in asked], inputs)
            for done in self.bundle.run_batch(inputs, self.max_new_tokens, features=features):
                yield self.bundle.decode_text(done.token_ids)

    def _encode(self, asked: Sequence[tuple[Path, ...]], inputs: Sequence[PromptInputs]) -> Any:
        """Features of all questions' pictures, those of the last call not encoded again; None without any."""
        generator, known = self.bundle.generator, self._features
        self._features = {images: known[images] for images in asked if images in known}
        for images, own in zip(asked, inputs, strict=True):
            if images and images not in self._features:
                encoded = generator.encode(own.pixel_values)
                if not isinstance(encoded, LaidPictures):
                    # A copy: the backend's memory may be gone with its tensor.
                    encoded = generator.backend.numpy(encoded).copy()
                self._features[images] = encoded
        found = [self._features[images] for images in asked if images]
        if found and isinstance(found[0], LaidPictures):
            return LaidPictures.join(found)
        return np.concatenate(found) if found else None


class TorchAnswerer:
    """Answers with the Hugging Face model itself, patched unless the configuration is dense."""

    def __init__(
        self, reference: TorchReference, max_new_tokens: int = 32, config: SkipVisionConfig | None = None
    ) -> None:
        """max_new_tokens: where an answer is cut."""
        self.reference, self.max_new_tokens = reference, max_new_tokens
        self.config = None if config is None or config.is_dense else config

    def answers(self, samples: Sequence[Sample]) -> Iterator[str]:
        """Greedy answers."""
        for sample in samples:
            inputs = self.reference.prepare(sample.images, sample.question)
            done, _ = self.reference.run(inputs, self.max_new_tokens, self.config)
            yield self.reference.decode_text(done.token_ids)


def unique_images(samples: Iterable[Sample]) -> list[Path]:
    """Pictures in order of first appearance."""
    return list(dict.fromkeys(sample.image for sample in samples))
