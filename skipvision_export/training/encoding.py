"""Questions and answers as token ids, exactly as inference builds prompts and generates answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from skipvision_export.runtime.data import Broken, Sample
from skipvision_export.runtime.prompt import chat_prompt, user_turn

_CHUNK = 512  # texts for each call of the tokenizer


@dataclass(frozen=True)
class Encoded:
    """A sample's ids with one placeholder for each picture; the answer begins at `answer_from`."""

    images: tuple[Path, ...]
    ids: list[int]
    answer_from: int

    def length(self, per_image: int) -> int:
        """Tokens in the decoder's sequence, with `per_image` of them for each picture."""
        return len(self.ids) + len(self.images) * (per_image - 1)


@dataclass(frozen=True)
class Encoder:
    """How a model writes a conversation.

    eos: end tokens of generation; an answer ends with the first of them that the chat template
        writes, else with eos[0]. per_image: tokens of a picture in the decoder; context: at most.
    """

    processor: Any
    eos: tuple[int, ...]
    per_image: int
    context: int

    def encode(self, samples: Sequence[Sample]) -> tuple[list[Encoded], list[Broken]]:
        """Token ids of all samples, and the rows that have none that can be used."""
        done: list[Encoded] = []
        broken: list[Broken] = []
        for at in range(0, len(samples), _CHUNK):
            for result in self._encode(samples[at : at + _CHUNK]):
                (broken if isinstance(result, Broken) else done).append(result)  # type: ignore[arg-type]
        return done, broken

    def _encode(self, samples: Sequence[Sample]) -> Iterator[Encoded | Broken]:
        tokenizer, token = self.processor.tokenizer, self.processor.image_token
        prompts = [chat_prompt(self.processor, s.question, len(s.images)) for s in samples]
        answers = [self._answer_text(s, p) for s, p in zip(samples, prompts, strict=True)]
        together = [p + a for p, a in zip(prompts, answers, strict=True)]
        before, whole = tokenizer(prompts).input_ids, tokenizer(together).input_ids
        for sample, prompt_ids, ids, answer in zip(samples, before, whole, answers, strict=True):
            if token in sample.question or token in sample.answer:
                yield Broken(sample.line, f"question or answer holds {token}, which stands for pictures only")
                continue
            if ids[: len(prompt_ids)] != prompt_ids:
                # The tokenizer joins the prompt's end with the answer, which generation cannot do.
                ids = prompt_ids + tokenizer(answer, add_special_tokens=False).input_ids
            one = Encoded(sample.images, self._ended(ids, len(prompt_ids)), len(prompt_ids))
            yield self._checked(one, sample)

    def _checked(self, one: Encoded, sample: Sample) -> Encoded | Broken:
        length, answer = one.length(self.per_image), len(one.ids) - one.answer_from
        if length > self.context:
            return Broken(
                sample.line,
                f"its prompt of {length - answer} tokens and its answer of {answer} are longer than the "
                f"model's context of {self.context}",
            )
        places = one.ids.count(self.processor.image_token_id)
        if places != len(sample.images):
            return Broken(
                sample.line,
                f"the chat template has {places} places for its {len(sample.images)} pictures",
            )
        return one

    def _answer_text(self, sample: Sample, prompt: str) -> str:
        """What the chat template writes behind the prompt for an assistant's turn."""
        said = {"role": "assistant", "content": [{"type": "text", "text": sample.answer}]}
        turns = [user_turn(sample.question, len(sample.images)), said]
        text: str = self.processor.apply_chat_template(turns)
        if text.startswith(prompt):
            return text[len(prompt) :].rstrip()
        # Templates without a turn for the assistant: a space, as models of this kind write it.
        return f" {sample.answer.strip()}"

    def _ended(self, ids: list[int], start: int) -> list[int]:
        """Cut behind the first end token from `start` on, or add one."""
        for i in range(start, len(ids)):
            if ids[i] in self.eos:
                return ids[: i + 1]
        return [*ids, self.eos[0]] if self.eos else ids
