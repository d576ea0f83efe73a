"""Text as its tokens come: what is sure of it, and where a stop string ends it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from skipvision_export.runtime.generation import Choose
    from skipvision_export.runtime.pipeline import Bundle
    from skipvision_export.runtime.prompt import PromptInputs

# What a decoder gives for bytes that are no whole character yet.
_INCOMPLETE = "\ufffd"


class TextStream:
    """An answer's text in pieces, which together are the whole text without spaces around it.

    Held back until more is known: half of a character, spaces at the end, and what a stop string may
    begin with.
    """

    def __init__(self, decode: Callable[[list[int]], str], stops: Sequence[str] = ()) -> None:
        """decode: text of generated ids; stops: strings of which the first ends the text, itself left out."""
        self._decode, self._stops = decode, [stop for stop in stops if stop]
        self._ids: list[int] = []
        self._sent = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """One more token; returns what of the text is sure now and was not before."""
        self._ids.append(token)
        text = self._decode(self._ids)
        found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            return self._new(text[: min(found)])
        text = text.rstrip(_INCOMPLETE)
        return self._new(text[: len(text) - self._unsure(text)])

    def end(self) -> str:
        """The rest of a text that no stop string ended."""
        return "" if self.stopped else self._new(self._decode(self._ids))

    def _new(self, text: str) -> str:
        text = text.strip()
        # A decoder that takes something back again: wait until it goes on from what was sent.
        if not text.startswith(self._sent):
            return ""
        new, self._sent = text[len(self._sent) :], text
        return new

    def _unsure(self, text: str) -> int:
        """How many of the last characters may begin a stop string."""
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        sizes = range(min(longest, len(text)), 0, -1)
        return next((n for n in sizes if any(stop.startswith(text[-n:]) for stop in self._stops)), 0)


@dataclass(frozen=True)
class Ended:
    """How an answer ended: by an end token or stop string, or for its length; and its numbers of tokens."""

    stopped: bool
    prompt_tokens: int
    new_tokens: int


class _StopError(Exception):
    """A stop string came: out of the generation."""


def stream_answer(
    bundle: Bundle,
    inputs: PromptInputs,
    max_new_tokens: int,
    choose: Choose,
    show: Callable[[str], object],
    stops: Sequence[str] = (),
) -> Ended:
    """Answer, and show the text in pieces as its tokens come, some of them empty.

    choose: the next token of logits [vocab]; show: what it raises ends the generation; stops: see
    TextStream. Raises InputError as Bundle.run does.
    """
    tokenizer = bundle.processor.tokenizer
    stream = TextStream(lambda ids: str(tokenizer.decode(ids, skip_special_tokens=True)), stops)
    tokens: list[int] = []

    def shown(logits: Any) -> int:
        tokens.append(choose(logits))
        show(stream.push(tokens[-1]))
        if stream.stopped:
            raise _StopError
        return tokens[-1]

    try:
        bundle.run(inputs, max_new_tokens, choose=shown)
    except _StopError:
        pass
    else:
        show(stream.end())
    return Ended(stream.stopped or tokens[-1] in bundle.eos, inputs.input_ids.shape[1], len(tokens))
