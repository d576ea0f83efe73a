"""Questions with their answers as token ids, for teacher forcing."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from skipvision_export.errors import InputError
from skipvision_export.models.loading import ModelSource
from skipvision_export.runtime.data import Sample, load_imagefolder
from skipvision_export.runtime.prompt import PromptInputs, prepare, prompt_text

ANSWER_LIMIT = 32  # tokens of an answer that are compared


@dataclass(frozen=True)
class ForcedSample:
    """A prompt and the answer that is fed whatever the model would say.

    answer: [1, A] int64, A >= 1, an end token last; the logits that predict its A tokens are compared.
    """

    image: Path
    prompt: PromptInputs
    answer: npt.NDArray[np.int64]


def draw(folder: Path, count: int, seed: int) -> list[Sample]:
    """`count` samples of an imagefolder (all, where it has fewer), drawn without repetition."""
    samples = load_imagefolder(folder)
    picked = random.Random(seed).sample(range(len(samples)), min(count, len(samples)))
    return [samples[i] for i in sorted(picked)]


def encode(source: ModelSource, processor: Any, samples: Sequence[Sample], end: int) -> list[ForcedSample]:
    """Tokenize prompt and answer as one text, and split them.

    end: id of the end token that closes an answer. Raises InputError for a picture or prompt that
    cannot be used, and where a sample does not fit the model's context.
    """
    visual = source.family.visual_tokens(source.config)
    text = getattr(source.config, "text_config", source.config)
    limit = getattr(text, "max_position_embeddings", None)
    encoded = []
    for sample in samples:
        prompt = prepare(processor, sample.image, sample.question, visual)
        answer = np.array([*_answer(processor, sample)[: ANSWER_LIMIT - 1], end], np.int64)
        length = prompt.input_ids.shape[1] + len(answer)
        if limit is not None and length > limit:
            raise InputError(
                f"question {sample.question[:40]!r} about {sample.image.name} takes {length} tokens with its "
                f"answer, the model's context has {limit}; shorten it or leave it out"
            )
        encoded.append(ForcedSample(sample.image, prompt, answer[None]))
    return encoded


def _answer(processor: Any, sample: Sample) -> list[int]:
    """Ids of the answer as it stands behind the prompt."""
    text = prompt_text(processor, sample.question)
    space = "" if text[-1].isspace() else " "
    head = processor.tokenizer(text).input_ids
    whole = processor.tokenizer(text + space + sample.answer.strip()).input_ids
    # A tokenizer may close a text with a token, or join the answer's first letters to the prompt.
    pairs = enumerate(zip(head, whole, strict=False))
    return list(whole[next((i for i, (a, b) in pairs if a != b), len(head)) :])
