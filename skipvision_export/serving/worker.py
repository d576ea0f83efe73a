"""One thread that answers, and the bounded queue before it."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import AsyncIterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from skipvision_export.errors import SkipVisionError
from skipvision_export.runtime.pipeline import Bundle
from skipvision_export.runtime.sampling import sampler
from skipvision_export.runtime.text_stream import stream_answer
from skipvision_export.serving.protocol import ApiError, ChatRequest, read_chat


@dataclass(frozen=True)
class Piece:
    """A part of the answer's text, maybe empty: a token may not show yet."""

    text: str


@dataclass(frozen=True)
class End:
    """How an answer ended, and its numbers of tokens."""

    finish_reason: str
    prompt_tokens: int
    completion_tokens: int


class _LeftError(Exception):
    """Nobody waits for the answer any more."""


class Job:
    """One request on its way through the thread.

    Its events come in this order: pieces, then the end; or an ApiError, first of all or instead of the end.
    """

    def __init__(self, request: ChatRequest, loop: asyncio.AbstractEventLoop) -> None:
        """loop: where the events are waited for."""
        self.request = request
        self._loop = loop
        self._events: asyncio.Queue[Piece | End | ApiError] = asyncio.Queue()
        self._left = threading.Event()
        self._ended = False
        self.future: Future[None] | None = None

    async def events(self) -> AsyncIterator[Piece | End]:
        """Pieces as they come, the last one is the End; raises ApiError."""
        while True:
            event = await self._events.get()
            self._ended = not isinstance(event, Piece)
            if isinstance(event, ApiError):
                raise event
            yield event
            if self._ended:
                return

    def leave(self) -> None:
        """Nobody waits any more: stop at the next token, or do not begin; nothing where it has ended."""
        if self._ended:
            return
        self._left.set()
        if self.future is not None:
            self.future.cancel()

    @property
    def left(self) -> bool:
        """Was it left?"""
        return self._left.is_set()

    def post(self, event: Piece | End | ApiError) -> None:
        """From the thread."""
        # The loop may be closed already where the server was ended.
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)


class Worker:
    """Answers one request at a time; others wait in order, up to a number of them."""

    def __init__(self, bundle: Bundle, waiting: int, new_tokens: int) -> None:
        """waiting: requests that may wait behind the one that runs; new_tokens: of an answer by default."""
        self.bundle, self.waiting, self.new_tokens = bundle, waiting, new_tokens
        self._thread = ThreadPoolExecutor(1, "generate")
        self._jobs: set[Job] = set()
        self.answered = self.left = 0

    @property
    def unfinished(self) -> int:
        """Requests that run or wait."""
        return len(self._jobs)

    def submit(self, request: ChatRequest) -> Job:
        """Take a request in; raises ApiError where the queue is full. Only from the event loop."""
        if self.unfinished > self.waiting:
            raise ApiError(
                429,
                f"the queue is full: one request runs and {self.waiting} wait; try again later",
                code="queue_full",
                kind="rate_limit_error",
            )
        loop = asyncio.get_running_loop()
        job = Job(request, loop)
        self._jobs.add(job)
        job.future = self._thread.submit(self._run, job)
        job.future.add_done_callback(lambda _: loop.is_closed() or loop.call_soon_threadsafe(self._done, job))
        return job

    def warm_up(self) -> None:
        """Load the decoder's graphs; raises BackendError and BundleError as they do."""
        word = int(self.bundle.manifest.model.image_token_id == 0)  # any id but the picture's
        ids = np.full((1, 2), word, np.int64)
        # In the thread: what runs engines belongs to the one that it was made in.
        self._thread.submit(lambda: self.bundle.generator.generate(ids, None, max_new_tokens=2)).result()

    def close(self) -> None:
        """Leave what is unfinished, and wait for the thread."""
        for job in list(self._jobs):
            job.leave()
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _done(self, job: Job) -> None:
        self._jobs.discard(job)
        self.left += job.left
        self.answered += not job.left

    def _run(self, job: Job) -> None:
        try:
            if not job.left:
                job.post(self._answer(job))
        except _LeftError:
            pass
        except ApiError as error:
            job.post(error)
        except SkipVisionError as error:
            job.post(ApiError(400, str(error)))
        except Exception as error:  # one broken answer must not end the server, nor show its insides
            print(f"skipvision: an answer failed: {type(error).__name__}: {error}", file=sys.stderr)
            job.post(ApiError(500, "the answer failed; the server's log says why", kind="server_error"))

    def _answer(self, job: Job) -> End:
        bundle, request = self.bundle, job.request
        chat = read_chat(request.messages)
        inputs = bundle.prepare_turns(chat.turns, chat.pictures)

        def show(text: str) -> None:
            if job.left:
                raise _LeftError
            job.post(Piece(text))

        choose = sampler(request.temperature, request.top_p, request.seed)
        new = request.new_tokens or self._room(inputs.input_ids.shape[1])
        ended = stream_answer(bundle, inputs, new, choose, show, request.stop)
        return End("stop" if ended.stopped else "length", ended.prompt_tokens, ended.new_tokens)

    def _room(self, length: int) -> int:
        """New tokens where the request leaves it open: no more than there are positions for."""
        most = self.bundle.manifest.model.max_positions
        return self.new_tokens if most is None else max(1, min(self.new_tokens, most - length))
