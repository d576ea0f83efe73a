"""Several turns with a bundle: each goes on from the cache that the turns before left, pruned as it is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from skipvision_export.errors import InputError
from skipvision_export.graph.passes.names import APPEND
from skipvision_export.runtime.generation import Before
from skipvision_export.runtime.prompt import Picture, Pictures, listed, user_turn
from skipvision_export.runtime.transcript import Transcript

if TYPE_CHECKING:
    from skipvision_export.runtime.batch import Ints
    from skipvision_export.runtime.generation import Generator
    from skipvision_export.runtime.kv_cache import KVCache
    from skipvision_export.runtime.pipeline import Answer, Bundle


class CachedPrompt:
    """A prompt that grows, and the cache of what of it was fed.

    ids: [S] of all tokens in the cache's order, dropped ones included, generated ones but the last.
    """

    def __init__(self, generator: Generator) -> None:
        """Nothing was fed yet."""
        self.generator = generator
        self.ids: Ints = np.zeros(0, np.int64)
        self._cache: KVCache | None = None
        # Of ids, those up to the last prefill's end, whose dropped tokens cannot come back; and its position.
        self._fixed = self._end = 0

    def shared(self, ids: Ints) -> int:
        """How many first tokens of `ids` [S] need not be fed again; at least one is left to be."""
        if self._cache is None or not self.generator.backend.has(APPEND):
            return 0
        both = min(len(ids) - 1, len(self.ids))
        differ = np.flatnonzero(ids[:both] != self.ids[:both])
        same = int(differ[0]) if len(differ) else both
        return same if same >= self._fixed else 0

    def extend(self, ids: Ints, pixel_values: Any, known: int = 0, **options: Any) -> Transcript:
        """Feed a prompt [S] but for its first `known` tokens (see `shared`), and generate.

        pixel_values: [N, 3, h, w] of the pictures among what is fed; options: those of Limits.
        """
        before = None
        if known:
            assert self._cache is not None
            left = self._cache.length - (len(self.ids) - known)
            before = Before(self._cache, left, self._end + known - self._fixed)
        done, self._cache = self.generator.turn(ids[None, known:], pixel_values, before, **options)
        self._fixed, self._end = len(ids), done.next_position
        self.ids = np.concatenate([ids, np.array(done.token_ids[:-1], np.int64)])
        return done


class Conversation:
    """Turns of a user and the model about pictures that come with any of them.

    >>> talk = Bundle.load("bundle").conversation()
    >>> talk.ask("What is this?", "one.png")
    >>> talk.ask("And this? What differs?", "two.png")

    What a turn adds is all that is fed; where the chat template writes the turns before otherwise than
    they were generated, the prompt is fed again from the start.
    """

    def __init__(self, bundle: Bundle) -> None:
        """An empty conversation."""
        self._bundle = bundle
        self._prompt = CachedPrompt(bundle.generator)
        self._turns: list[dict[str, Any]] = []
        self._pictures: list[Picture] = []
        self._rows = 0  # of pixel_values: the crops of these pictures
        self.fed_again = 0  # turns whose prompt was fed from the start, but for the first

    def ask(self, prompt: str, image: Pictures = None, max_new_tokens: int = 64) -> Answer:
        """Answer one more question, greedily; its picture, several or none.

        Raises InputError for a picture or prompt that cannot be used, and leaves the conversation as it was.
        """
        bundle, new = self._bundle, listed(image)
        if not prompt.strip():
            raise InputError("the prompt is empty; ask something")
        turns, pictures = [*self._turns, user_turn(prompt, len(new))], [*self._pictures, *new]
        inputs = bundle.prepare_turns(turns, pictures)
        ids = inputs.input_ids[0]
        known = self._prompt.shared(ids)
        pixels = inputs.pixel_values[self._rows if known else 0 :]
        done = self._prompt.extend(ids, pixels, known, max_new_tokens=max_new_tokens, eos=bundle.eos)
        answer = bundle.answer(done)
        self.fed_again += bool(self._turns) and not known
        said = {"role": "assistant", "content": [{"type": "text", "text": answer.text}]}
        self._turns, self._pictures, self._rows = [*turns, said], pictures, len(inputs.pixel_values)
        return answer
