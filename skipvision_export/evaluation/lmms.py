"""A bundle as a model of lmms-eval: `lmms-eval --model skipvision --model_args bundle=BUNDLE --tasks ...`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lmms_eval.api.instance import GenerationResult, Instance, TokenCounts
from lmms_eval.api.model import lmms
from lmms_eval.protocol import ChatMessages

from skipvision_export.errors import ConfigError, InputError
from skipvision_export.runtime.pipeline import Bundle
from skipvision_export.runtime.prompt import Picture
from skipvision_export.runtime.sampling import sampler
from skipvision_export.runtime.text_stream import stream_answer

# Where lmms-eval's own models cut an answer, if the task says nothing.
_NEW_TOKENS = 1024


class SkipVision(lmms):  # type: ignore[misc]
    """Answers a task's chat messages with a bundle in ONNX Runtime, or on engines, one by one."""

    is_simple = False

    def __init__(
        self,
        bundle: str,
        engines: str | None = None,
        plugin: str | None = None,
        threads: int = 0,
        batch_size: int | str = 1,
        device: str | None = None,
    ) -> None:
        """bundle: what `skipvision export` wrote; engines, plugin, threads: as for `skipvision generate`.

        batch_size, device: what lmms-eval gives every model; 1, and the device of the engines or the CPU.
        Raises BundleError, and ConfigError for a batch.
        """
        super().__init__()
        if str(batch_size) != "1":
            raise ConfigError(f"batch_size is {batch_size}; this model answers one by one, give 1")
        backend: dict[str, Any] = {"threads": int(threads)}
        if engines is not None:
            backend = {"engines": Path(engines), "library": Path(plugin) if plugin else None}
        self.bundle = Bundle.load(bundle, **backend)

    def generate_until(self, requests: Sequence[Instance]) -> list[GenerationResult]:
        """An answer to each request's messages; raises InputError for what is neither words nor pictures."""
        from tqdm import tqdm

        results = []
        for request in tqdm(requests, desc="Model Responding", disable=self.rank != 0):
            context, messages_of, options, doc_id, task, split = request.args
            messages = ChatMessages(messages=messages_of(self.task_dict[task][split][doc_id]))
            results.append(self._answer(messages, dict(options)))
            self.cache_hook.add_partial("generate_until", (context, options), results[-1].text)
        return results

    def _answer(self, messages: ChatMessages, options: dict[str, Any]) -> GenerationResult:
        turns, pictures = read_messages(messages)
        until = options.get("until") or ()
        pieces: list[str] = []
        ended = stream_answer(
            self.bundle,
            self.bundle.prepare_turns(turns, pictures),
            int(options.get("max_new_tokens") or _NEW_TOKENS),
            _choice(options),
            pieces.append,
            [until] if isinstance(until, str) else list(until),
        )
        counts = TokenCounts(input_tokens=ended.prompt_tokens, output_tokens=ended.new_tokens)
        return GenerationResult(text="".join(pieces), token_counts=counts)

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """Not there: a bundle's prefill gives the logits of the last position alone."""
        raise NotImplementedError(
            "a bundle gives the logits of a prompt's last position alone, so there is no log-likelihood of "
            "given answers; choose tasks of type generate_until"
        )

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        """Not there."""
        raise NotImplementedError("multi-round tasks are not supported; choose tasks of type generate_until")


def read_messages(messages: ChatMessages) -> tuple[list[dict[str, Any]], list[Picture]]:
    """Turns as chat templates take them, and their pictures in order."""
    turns: list[dict[str, Any]] = []
    pictures: list[Picture] = []
    for message in messages.messages:
        parts: list[dict[str, Any]] = []
        for content in message.content:
            if content.type == "text":
                parts.append({"type": "text", "text": content.text})
            elif content.type == "image":
                parts.append({"type": "image"})
                pictures.append(content.url)
            else:
                raise InputError(f"a message holds {content.type}; the model takes words and pictures")
        turns.append({"role": message.role, "content": parts})
    return turns, pictures


def _choice(options: dict[str, Any]) -> Any:
    """Greedy unless a task asks for a temperature."""
    if int(options.get("num_beams") or 1) != 1:
        raise ConfigError(
            f"the task wants {options['num_beams']} beams; there is one (--gen_kwargs num_beams=1)"
        )
    drawn = options.get("do_sample", True)
    return sampler(
        float(options.get("temperature") or 0) if drawn else 0, float(options.get("top_p") or 1), 0
    )
