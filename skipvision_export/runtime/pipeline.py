"""A bundle that answers questions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from skipvision_export.bundle import Manifest
from skipvision_export.config import SkipVisionConfig
from skipvision_export.errors import InputError
from skipvision_export.models.loading import load_processor
from skipvision_export.runtime.conversation import Conversation
from skipvision_export.runtime.generation import Generator
from skipvision_export.runtime.ort import OrtBackend
from skipvision_export.runtime.prompt import (
    Picture,
    Pictures,
    PromptInputs,
    encode_prompt,
    prepare,
    resize_placeholders,
    turns_text,
)
from skipvision_export.runtime.transcript import Transcript
from skipvision_export.runtime.varying import Patches, VaryingPictures, resize


@dataclass(frozen=True)
class Answer:
    """The result of `generate`; times in milliseconds, tokens of all pictures together."""

    text: str
    token_ids: list[int]
    prompt_tokens: int
    retained_tokens: int
    skipped_tokens: int
    kv_tokens_after_prefill: int
    ttft_ms: float
    decode_ms_per_token: float

    def to_json(self) -> dict[str, Any]:
        """The fields as a JSON object."""
        return asdict(self)


class Bundle:
    """An exported model in ONNX Runtime.

    >>> Bundle.load("bundle").generate(image="photo.png", prompt="What is this?").text
    """

    def __init__(self, folder: Path, manifest: Manifest, engines: Path | None = None, **backend: Any) -> None:
        """Use `load`."""
        self.folder = folder
        self.manifest = manifest
        self._engines = engines
        self.backend_options = backend

    @classmethod
    def load(
        cls, folder: str | Path, *, verify: bool = True, engines: Path | None = None, **backend: Any
    ) -> Bundle:
        """Read and check a bundle; raises BundleError that names the file at fault.

        verify=False skips the hashes, which read every byte; engines: run these, built of the bundle by
        `skipvision build`, on a GPU; backend: arguments of OrtBackend, or of TrtRunner.
        """
        folder = Path(folder)
        manifest = Manifest.load(folder)
        if verify:
            manifest.verify(folder)
        return cls(folder, manifest, engines, **backend)

    @property
    def config(self) -> SkipVisionConfig:
        """The configuration it was exported with."""
        return self.manifest.skip_config

    @cached_property
    def backend(self) -> OrtBackend:
        """The sessions."""
        return OrtBackend(self.folder, self.manifest, **self.backend_options)

    @cached_property
    def generator(self) -> Generator:
        """The generation loop on the bundle's own layout; on engines where they were given."""
        if self._engines is None:
            return Generator(self.backend, self.manifest)
        from skipvision_export.runtime.trt import TrtRunner

        return Generator(TrtRunner(self._engines, self.folder, **self.backend_options), self.manifest)

    @cached_property
    def processor(self) -> Any:
        """Image processor and tokenizer."""
        return load_processor(self.folder)

    @cached_property
    def eos(self) -> tuple[int, ...]:
        """End tokens: generation_config.json's, else config.json's, else the tokenizer's."""
        return eos_tokens(self.folder, self.processor)

    def prepare(self, images: Pictures, prompt: str) -> PromptInputs:
        """Arrays of pictures and a prompt, with the layout's placeholders; raises InputError."""
        return self.resized(prepare(self.processor, images, prompt, self.visual_tokens))

    def prepare_turns(self, turns: Sequence[dict[str, Any]], images: Sequence[Picture]) -> PromptInputs:
        """Arrays of a conversation's turns, as chat templates take them, and its pictures in their order.

        turns: {"role", "content"} each, the content a list of {"type": "text", "text"} and {"type": "image"}.
        Raises InputError for turns that the template refuses, and as `prepare`.
        """
        text = turns_text(self.processor, turns, len(images))
        return self.resized(encode_prompt(self.processor, images, text, self.visual_tokens))

    @property
    def visual_tokens(self) -> int | None:
        """Of a picture; None where it varies."""
        model = self.manifest.model
        return None if model.tiled or model.merge_size else model.visual_tokens

    def resized(self, inputs: PromptInputs) -> PromptInputs:
        """The same with the layout's placeholders; raises InputError."""
        total, token = self.manifest.layout.total, self.manifest.model.image_token_id
        if isinstance(inputs.pixel_values, Patches):
            sizes = VaryingPictures(self.manifest).sizes(inputs.pixel_values)
            return replace(inputs, input_ids=resize(inputs.input_ids, token, sizes))
        return resize_placeholders(inputs, token, self.visual_tokens, total)

    def run(self, inputs: PromptInputs, max_new_tokens: int = 64, **options: Any) -> Transcript:
        """Generate from arrays; options: those of Generator.generate."""
        return self.generator.generate(
            inputs.input_ids,
            inputs.pixel_values,
            max_new_tokens=max_new_tokens,
            eos=self.eos,
            **options,
        )

    def run_batch(
        self, inputs: Sequence[PromptInputs], max_new_tokens: int = 64, **options: Any
    ) -> list[Transcript]:
        """Generate from the arrays of several prompts at once; options: those of Generator.generate_batch."""
        return self.generator.generate_batch(
            [one.input_ids for one in inputs],
            [one.pixel_values for one in inputs],
            max_new_tokens=max_new_tokens,
            eos=self.eos,
            **options,
        )

    def decode_text(self, token_ids: list[int]) -> str:
        """Text of generated ids, special tokens left out."""
        text: str = self.processor.tokenizer.decode(token_ids, skip_special_tokens=True)
        return text.strip()

    def generate(self, image: Pictures, prompt: str, max_new_tokens: int = 64) -> Answer:
        """Answer a prompt about a picture, several (in the order of their places) or none (None), greedily.

        Raises InputError for a picture or prompt that cannot be used.
        """
        return self.answer(self.run(self.prepare(image, prompt), max_new_tokens))

    def conversation(self) -> Conversation:
        """An empty conversation, for several turns."""
        return Conversation(self)

    def generate_batch(
        self,
        requests: Sequence[tuple[Pictures, str]],
        max_new_tokens: int = 64,
        *,
        max_batch: int = 8,
    ) -> list[Answer]:
        """Answer (pictures, prompt) pairs greedily, `max_batch` in one run; times are those of the run.

        Each has the tokens that it has alone, but for ties within rounding. Raises InputError for a
        picture or prompt that cannot be used, and for a max_batch below 1.
        """
        if max_batch < 1:
            raise InputError(f"max_batch is {max_batch}, expected 1 or more")
        answers = []
        for first in range(0, len(requests), max_batch):
            inputs = [self.prepare(*request) for request in requests[first : first + max_batch]]
            answers += [self.answer(done) for done in self.run_batch(inputs, max_new_tokens)]
        return answers

    def answer(self, done: Transcript) -> Answer:
        """A transcript in the user's terms."""
        return Answer(
            text=self.decode_text(done.token_ids),
            token_ids=done.token_ids,
            prompt_tokens=done.prompt_tokens,
            retained_tokens=done.retained_tokens,
            skipped_tokens=done.skipped_tokens,
            kv_tokens_after_prefill=done.kv_tokens_after_prefill,
            ttft_ms=done.ttft_ms,
            decode_ms_per_token=done.decode_ms_per_token,
        )


def eos_tokens(folder: Path, processor: Any) -> tuple[int, ...]:
    """End tokens of a model or bundle folder."""
    for name in ("generation_config.json", "config.json"):
        file = folder / name
        if file.is_file():
            data = json.loads(file.read_text(encoding="utf-8"))
            eos = data.get("eos_token_id", data.get("text_config", {}).get("eos_token_id"))
            if eos is not None:
                return tuple(eos) if isinstance(eos, list) else (int(eos),)
    eos = processor.tokenizer.eos_token_id
    return () if eos is None else (int(eos),)
