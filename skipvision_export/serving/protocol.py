"""What of OpenAI's chat completions is understood; all else is refused by its name, not passed over."""

from __future__ import annotations

import base64
import binascii
import io
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from PIL import Image
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from skipvision_export.errors import InputError
from skipvision_export.runtime.prompt import decode_image

_FORMATS = ("PNG", "JPEG", "WEBP", "GIF")
_MOST_PIXELS = 50_000_000
# Fields without an effect on the answer, and values of others that ask for what happens anyway.
_IGNORED = frozenset(
    ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "verbosity")
)
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "modalities": (["text"],),
    "response_format": ({"type": "text"},),
    "parallel_tool_calls": (True, False),
}


class ApiError(Exception):
    """What a client gets instead of an answer: an HTTP status and OpenAI's error object."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        kind: str = "invalid_request_error",
    ) -> None:
        """message: one line; param: the field at fault."""
        super().__init__(message)
        self.status = status
        self.body = {
            "error": {"message": " ".join(message.split()), "type": kind, "param": param, "code": code}
        }


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ImageUrl(_Strict):
    """A picture as a data: URL; there is one level of detail."""

    url: str
    detail: Literal["auto", "low", "high"] | None = None


class ImagePart(_Strict):
    """A picture at its place in a message."""

    type: Literal["image_url"]
    image_url: ImageUrl


class TextPart(_Strict):
    """Words of a message."""

    type: Literal["text"]
    text: str


Part = Annotated[TextPart | ImagePart, Field(discriminator="type")]
# One of what may be several.
Parts = Annotated[
    list[Part],
    BeforeValidator(lambda given: [{"type": "text", "text": given}] if isinstance(given, str) else given),
]
Stops = Annotated[
    list[str],
    Field(max_length=4),
    BeforeValidator(lambda given: [given] if isinstance(given, str) else given),
]


class Message(_Strict):
    """One turn."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Parts
    name: str | None = None
    refusal: None = None


class StreamOptions(_Strict):
    """Whether the numbers of tokens come behind a stream."""

    include_usage: bool = False


class ChatRequest(_Strict):
    """A chat completion; greedy unless a temperature is given."""

    model: str
    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(0.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    seed: int | None = Field(None, ge=0)
    stop: Stops = []
    stream: bool = False
    stream_options: StreamOptions | None = None

    @classmethod
    def read(cls, data: Any) -> ChatRequest:
        """From parsed JSON; raises ApiError that names the first field at fault."""
        if not isinstance(data, dict):
            raise ApiError(400, "the body is no JSON object; expected a chat completion request")
        given = {
            name: value
            for name, value in data.items()
            if value is not None and name not in _IGNORED and value not in _NEUTRAL.get(name, ())
        }
        try:
            return cls.model_validate(given)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = list(first["loc"])
            if where[0] == "messages":
                del where[4:5]  # the kind of a part, which is no name
            name = ".".join(map(str, where))
            if first["type"] == "extra_forbidden":
                raise ApiError(
                    400, f"{name} is not supported by this server; leave it out", param=name
                ) from None
            raise ApiError(400, f"{name}: {first['msg']}", param=name) from None

    @property
    def new_tokens(self) -> int | None:
        """Where the answer is cut; None where the request leaves it open."""
        return self.max_completion_tokens or self.max_tokens


@dataclass(frozen=True)
class Chat:
    """Turns as chat templates take them, and their pictures in order."""

    turns: list[dict[str, Any]]
    pictures: list[Image.Image]


def read_chat(messages: list[Message]) -> Chat:
    """Decode a request's messages; raises ApiError for a picture that cannot be used."""
    turns, pictures = [], []
    for i, message in enumerate(messages):
        parts: list[dict[str, Any]] = []
        for k, part in enumerate(message.content):
            if isinstance(part, TextPart):
                parts.append({"type": "text", "text": part.text})
                continue
            where = f"messages.{i}.content.{k}.image_url"
            if message.role != "user":
                raise ApiError(400, f"{where}: only a user's message may have pictures", param=where)
            pictures.append(_picture(part.image_url.url, where))
            parts.append({"type": "image"})
        turns.append({"role": "system" if message.role == "developer" else message.role, "content": parts})
    return Chat(turns, pictures)


def _picture(url: str, where: str) -> Image.Image:
    head, comma, data = url.partition(",")
    if not head.startswith("data:image/") or not head.endswith(";base64") or not comma:
        found = head[:40] if head.startswith("data:") else url.split(":")[0][:20]
        raise ApiError(
            400,
            f"{where}: pictures come as data:image/...;base64, URLs, nothing is fetched; got {found}...",
            param=where,
        )
    try:
        content = base64.b64decode(data, validate=True)
        return decode_image(io.BytesIO(content), f"{where}: the picture", _FORMATS, _MOST_PIXELS)
    except binascii.Error as error:
        raise ApiError(400, f"{where}: no base64 ({error})", param=where) from None
    except InputError as error:
        raise ApiError(400, str(error), param=where) from None
