"""The HTTP side: routes, errors in OpenAI's form, streams."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from skipvision_export.serving.protocol import ApiError, ChatRequest
from skipvision_export.serving.worker import End, Job, Piece, Worker

Handler = Callable[[Request], Awaitable[Response]]


def make_app(worker: Worker, name: str, *, api_key: str | None = None, max_body: int = 20 << 20) -> Starlette:
    """The application; name: of the only model; api_key: what clients must send; max_body: bytes."""
    server = _Server(worker, name, api_key, max_body)

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(worker.close)

    routes = [
        Route("/health", server.health),
        Route("/v1/models", server.guarded(server.models)),
        Route("/v1/models/{name:path}", server.guarded(server.model)),
        Route("/v1/chat/completions", server.guarded(server.chat), methods=["POST"]),
    ]
    handlers = {
        ApiError: lambda _, error: _failed(error),
        ClientDisconnect: lambda *_: Response(status_code=499),  # nobody reads it
        404: lambda request, _: _failed(ApiError(404, f"there is no {request.url.path} here")),
        405: lambda request, _: _failed(ApiError(405, f"{request.method} is not for {request.url.path}")),
    }
    return Starlette(routes=routes, exception_handlers=handlers, lifespan=lifespan)


def _failed(error: ApiError) -> Response:
    headers = {"Retry-After": "1"} if error.status == 429 else None
    return JSONResponse(error.body, error.status, headers)


class _Stream(StreamingResponse):
    """Server-sent events; however they end, so does the job."""

    def __init__(self, job: Job, chunks: AsyncIterator[str]) -> None:
        super().__init__(chunks, media_type="text/event-stream")
        self.job = job

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.job.leave()


class _Server:
    """Handlers of the routes."""

    def __init__(self, worker: Worker, name: str, api_key: str | None, max_body: int) -> None:
        self.worker, self.name, self.max_body = worker, name, max_body
        self._key = api_key.encode() if api_key else None
        self._started = int(time.time())

    def guarded(self, handler: Handler) -> Handler:
        """The same for clients that send the key."""

        async def checked(request: Request) -> Response:
            kind, _, sent = request.headers.get("authorization", "").partition(" ")
            right = self._key is None or hmac.compare_digest(sent.encode(), self._key)
            if not right or (self._key is not None and kind.lower() != "bearer"):
                raise ApiError(401, "the API key is missing or wrong", code="invalid_api_key")
            return await handler(request)

        return checked

    async def health(self, _: Request) -> Response:
        """Open to all: it says nothing of what is asked."""
        worker = self.worker
        return JSONResponse(
            {
                "status": "ok",
                "unfinished": worker.unfinished,
                "answered": worker.answered,
                "left": worker.left,
            }
        )

    async def models(self, _: Request) -> Response:
        """The only model."""
        return JSONResponse({"object": "list", "data": [self._entry()]})

    async def model(self, request: Request) -> Response:
        """The model of a name."""
        self._check_name(request.path_params["name"])
        return JSONResponse(self._entry())

    async def chat(self, request: Request) -> Response:
        """Answer, whole or as a stream; the first piece is waited for, as an error has another status."""
        asked = ChatRequest.read(await self._json(request))
        self._check_name(asked.model)
        job = self.worker.submit(asked)
        events = job.events()
        gone = asyncio.ensure_future(_disconnected(request))
        try:
            event = await _unless(gone, events)
            if not asked.stream:
                return await self._whole(gone, events, event)
        except BaseException:
            job.leave()
            raise
        finally:
            gone.cancel()
        return _Stream(job, self._chunks(job, events, event))

    async def _whole(
        self, gone: asyncio.Future[None], events: AsyncIterator[Piece | End], event: Piece | End
    ) -> Response:
        text = ""
        while isinstance(event, Piece):
            text += event.text
            event = await _unless(gone, events)
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "finish_reason": event.finish_reason,
            "logprobs": None,
        }
        return JSONResponse(self._head("chat.completion") | {"choices": [choice], "usage": _usage(event)})

    async def _chunks(
        self, job: Job, events: AsyncIterator[Piece | End], first: Piece | End
    ) -> AsyncIterator[str]:
        """Server-sent events."""
        options = job.request.stream_options
        usage = {"usage": None} if options and options.include_usage else {}
        head = self._head("chat.completion.chunk")

        def chunk(delta: dict[str, Any], reason: str | None = None) -> str:
            choice = {"index": 0, "delta": delta, "finish_reason": reason, "logprobs": None}
            return _event(head | {"choices": [choice]} | usage)

        event = first
        try:
            yield chunk({"role": "assistant", "content": ""})
            while isinstance(event, Piece):
                if event.text:
                    yield chunk({"content": event.text})
                event = await anext(events)
        except ApiError as error:
            yield _event(error.body)
            return
        yield chunk({}, event.finish_reason)
        if usage:
            yield _event(head | {"choices": [], "usage": _usage(event)})
        yield "data: [DONE]\n\n"

    async def _json(self, request: Request) -> Any:
        if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
            raise ApiError(415, "expected a body of Content-Type application/json")
        too_large = ApiError(413, f"the body is over {self.max_body} bytes; send a smaller picture")
        if int(request.headers.get("content-length", 0)) > self.max_body:
            raise too_large
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > self.max_body:
                raise too_large
        try:
            data = json.loads(body)
            if rb"\ud" in body.lower():  # halves of characters can be written, but are no text
                json.dumps(data, ensure_ascii=False).encode()
            return data
        except (ValueError, RecursionError) as error:
            raise ApiError(400, f"the body is no JSON: {str(error)[:100]}") from None

    def _check_name(self, name: str) -> None:
        if name != self.name:
            raise ApiError(
                404,
                f"the model {name[:80]!r} does not exist; this server has {self.name!r}",
                param="model",
                code="model_not_found",
            )

    def _entry(self) -> dict[str, Any]:
        return {"id": self.name, "object": "model", "created": self._started, "owned_by": "skipvision"}

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "object": kind,
            "created": int(time.time()),
            "model": self.name,
        }


async def _disconnected(request: Request) -> None:
    """Ends when the client goes; the request's body must have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _unless(gone: asyncio.Future[None], events: AsyncIterator[Piece | End]) -> Piece | End:
    """The next event; raises ClientDisconnect where the client goes before it comes."""
    following = asyncio.ensure_future(anext(events))
    either: set[asyncio.Future[Any]] = {following, gone}
    try:
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if gone.done():
            raise ClientDisconnect
        return following.result()
    finally:
        following.cancel()


def _usage(end: End) -> dict[str, int]:
    return {
        "prompt_tokens": end.prompt_tokens,
        "completion_tokens": end.completion_tokens,
        "total_tokens": end.prompt_tokens + end.completion_tokens,
    }


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content)}\n\n"
