"""`skipvision serve` with OpenAI's own client: answers, streams, limits, one clear message for a mistake."""

import base64
import contextlib
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from skipvision_export import Bundle
from skipvision_export.cli import run

httpx2 = pytest.importorskip("httpx2", reason="comes with the package openai")
openai = pytest.importorskip("openai", reason="needs the package openai: pip install openai")
uvicorn = pytest.importorskip("uvicorn", reason="needs the extra serve: starlette and uvicorn")

from skipvision_export.serving.app import make_app  # noqa: E402
from skipvision_export.serving.worker import Worker  # noqa: E402

NAME, KEY, WAITING = "tiny", "a key", 2
MANY = 400  # tokens of a long answer; the random model hardly ever ends by itself


def picture(seed=0, kind="PNG"):
    noise = np.random.default_rng(seed).integers(0, 256, (70, 90, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, kind)
    return file.getvalue()


def data_url(content, kind="png"):
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def asked(text="What is it?", *urls):
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


@contextlib.contextmanager
def serving(bundle, waiting=WAITING, **settings):
    """The base URL of a server in a thread."""
    worker = Worker(bundle, waiting, 16)
    listening = socket.create_server(("127.0.0.1", 0))
    app = make_app(worker, NAME, api_key=KEY, **settings)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def url(bundle):
    with serving(bundle, max_body=200_000) as url:
        yield url


@pytest.fixture(scope="module")
def client(url):
    return openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0, timeout=60)


def complete(client, messages, **options):
    return client.chat.completions.create(model=NAME, messages=messages, **options)


def health(url):
    return httpx2.get(f"{url}/health").json()


def until_idle(url):
    for _ in range(100):
        if not health(url)["unfinished"]:
            return health(url)
        time.sleep(0.05)
    raise AssertionError("the server did not become idle")


# -- answers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pictures", [0, 1, 2])
def test_it_answers_as_generate_does(pictures, client, bundle):
    content = [picture(i) for i in range(pictures)]
    found = complete(client, asked("What is it?", *map(data_url, content)), max_tokens=12)
    images = [Image.open(io.BytesIO(each)) for each in content]
    expected = bundle.generate(images or None, "What is it?", 12)
    (choice,) = found.choices
    assert choice.message.content == expected.text
    assert choice.message.role == "assistant"
    assert choice.finish_reason == "length"
    assert found.model == NAME
    usage = found.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (expected.prompt_tokens, 12)
    assert usage.total_tokens == expected.prompt_tokens + 12


def test_a_stream_is_the_same_in_pieces(client):
    messages = asked("What is it?", data_url(picture()))
    whole = complete(client, messages, max_tokens=40)
    chunks = list(
        complete(client, messages, max_tokens=40, stream=True, stream_options={"include_usage": True})
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    pieces = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices]
    assert "".join(piece or "" for piece in pieces) == whole.choices[0].message.content
    assert sum(bool(piece) for piece in pieces) > 10
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-2:] == [None, "length"]
    assert chunks[-1].usage == whole.usage
    assert len({chunk.id for chunk in chunks}) == 1


def test_turns_go_through_the_chat_template(client, bundle):
    messages = [
        {"role": "system", "content": "Be short."},
        *asked("One?", data_url(picture())),
        {"role": "assistant", "content": "It is one."},
        {"role": "user", "content": "Two?"},
    ]
    text = "USER: Be short.<image>\nOne?It is one.Two? ASSISTANT:"
    expected = bundle.generate(Image.open(io.BytesIO(picture())), text, 8)
    assert complete(client, messages, max_tokens=8).choices[0].message.content == expected.text


def test_a_stop_string_ends_an_answer(client):
    messages = asked("What is it?", data_url(picture()))
    whole = complete(client, messages, max_tokens=40).choices[0].message.content
    stop = whole[10:12]
    for streamed in (False, True):
        found = complete(client, messages, max_tokens=40, stop=["never there", stop], stream=streamed)
        if streamed:
            chunks = list(found)
            text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
            reason = chunks[-1].choices[0].finish_reason
        else:
            text, reason = found.choices[0].message.content, found.choices[0].finish_reason
        assert (text, reason) == (whole[: whole.find(stop)].strip(), "stop")


def test_a_temperature_draws_by_its_seed(client):
    def draw(**options):
        return complete(client, asked(), max_tokens=30, **options).choices[0].message.content

    greedy = draw()
    first = draw(temperature=1.5, seed=7)
    assert first == draw(temperature=1.5, seed=7) != greedy
    assert first != draw(temperature=1.5, seed=8)
    assert greedy == draw(temperature=1.5, top_p=1e-9, seed=7) == draw(temperature=0, seed=1)


def test_models_are_listed(client):
    assert [model.id for model in client.models.list()] == [NAME]
    assert client.models.retrieve(NAME).owned_by == "skipvision"
    with pytest.raises(openai.NotFoundError, match="does not exist; this server has 'tiny'"):
        client.models.retrieve("gpt")


def test_an_answer_without_a_limit_ends_at_the_server_s(client):
    assert complete(client, asked()).usage.completion_tokens == 16


def test_many_at_once_are_each_answered(bundle):
    questions = [f"What is {i}?" for i in range(12)]
    expected = [bundle.generate(None, question, 10).text for question in questions]
    with serving(bundle, waiting=12) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0)

        def ask(question):
            return complete(client, asked(question), max_tokens=10).choices[0].message.content

        with ThreadPoolExecutor(12) as pool:
            assert list(pool.map(ask, questions)) == expected
        assert until_idle(url)["answered"] == 12


# -- limits --------------------------------------------------------------------------------------------


def test_a_full_queue_is_said_at_once(client, url):
    def ask(_):
        try:
            return complete(client, asked(), max_tokens=MANY)
        except openai.RateLimitError as error:
            return error

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(ask, range(8)))
    refused = [each for each in found if isinstance(each, openai.RateLimitError)]
    assert 1 <= len(refused) <= 8 - (WAITING + 1)
    assert all(each.usage.completion_tokens == MANY for each in found if each not in refused)
    for error in refused:
        assert error.response.headers["retry-after"] == "1"
        assert f"one request runs and {WAITING} wait" in str(error)
    until_idle(url)


@pytest.mark.parametrize("streamed", [True, False])
def test_a_client_that_goes_ends_its_answer(streamed, client, url):
    left = until_idle(url)["left"]
    if streamed:
        stream = complete(client, asked(), max_tokens=MANY, stream=True)
        next(iter(stream))
        stream.close()
    else:
        with pytest.raises(openai.APITimeoutError):
            complete(client, asked(), max_tokens=MANY, timeout=0.1)
    assert until_idle(url)["left"] == left + 1


def test_a_request_over_the_size_is_refused(client):
    noise = np.random.default_rng(0).integers(0, 256, (400, 500, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, "PNG")
    with pytest.raises(openai.APIStatusError, match="over 200000 bytes") as error:
        complete(client, asked("What?", data_url(file.getvalue())))
    assert error.value.status_code == 413


def test_too_many_tokens_are_refused(client):
    with pytest.raises(openai.BadRequestError, match="are over the model's 512; ask for at most"):
        complete(client, asked(), max_tokens=600)


# -- what is wrong -------------------------------------------------------------------------------------

BOMB = io.BytesIO()
Image.new("1", (10_000, 6_000)).save(BOMB, "PNG")
BAD = {
    "fetched": (asked("What?", "https://example.com/a.png"), {}, "nothing is fetched; got https..."),
    "a file": (asked("What?", "file:///etc/passwd"), {}, "nothing is fetched; got file..."),
    "text": (asked("What?", "data:text/plain;base64,aGk="), {}, "nothing is fetched; got data:text/plain"),
    "no base64": (asked("What?", "data:image/png;base64,a$b="), {}, "no base64"),
    "truncated": (asked("What?", data_url(picture()[:900])), {}, "the picture is truncated or no picture"),
    "no picture": (asked("What?", data_url(b"hello")), {}, "the picture is truncated or no picture"),
    "PostScript": (asked("What?", data_url(b"%!PS-Adobe-3.0 EPSF-3.0\n")), {}, "truncated or no picture"),
    "too large": (asked("What?", data_url(BOMB.getvalue())), {}, "10000 x 6000 pixels, over the limit"),
    "placeholder": (asked("What is <image>?"), {}, "leave <image> out"),
    "of the assistant": (
        [
            {
                "role": "assistant",
                "content": [{"type": "image_url", "image_url": {"url": data_url(picture())}}],
            }
        ],
        {},
        "messages.0.content.0.image_url: only a user's message may have pictures",
    ),
    "no message": ([], {}, "messages: List should have at least 1 item"),
    "a role": ([{"role": "tool", "content": "x"}], {}, "messages.0.role: Input should be"),
    "a part": (
        [{"role": "user", "content": [{"type": "video"}]}],
        {},
        "messages.0.content.0: Input tag 'video'",
    ),
    "no url": (
        [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}],
        {},
        "messages.0.content.0.image_url.url: Field required",
    ),
    "tools": (
        asked(),
        {"tools": [{"type": "function", "function": {"name": "f"}}]},
        "tools is not supported",
    ),
    "several": (asked(), {"n": 2}, "n is not supported by this server; leave it out"),
    "logprobs": (asked(), {"logprobs": True}, "logprobs is not supported"),
    "JSON": (asked(), {"response_format": {"type": "json_object"}}, "response_format is not supported"),
    "hot": (asked(), {"temperature": 3}, "temperature: Input should be less than or equal to 2"),
    "top_p": (asked(), {"top_p": 0}, "top_p: Input should be greater than 0"),
    "none": (asked(), {"max_tokens": 0}, "max_tokens: Input should be greater than or equal to 1"),
    "a field": (asked(), {"extra_body": {"top_k": 5}}, "top_k is not supported"),
}


@pytest.mark.parametrize("wrong", BAD)
def test_what_is_wrong_is_said(wrong, client, capfd):
    messages, options, message = BAD[wrong]
    with pytest.raises(openai.BadRequestError) as error:
        complete(client, messages, **options)
    body = error.value.body
    assert message in body["message"]
    assert "\n" not in body["message"] and len(body["message"]) < 300
    assert body["type"] == "invalid_request_error"
    assert not capfd.readouterr().err


def test_values_that_ask_for_nothing_are_taken(client):
    found = complete(
        client,
        asked(),
        max_completion_tokens=3,
        n=1,
        presence_penalty=0,
        user="me",
        response_format={"type": "text"},
    )
    assert found.usage.completion_tokens == 3


def test_another_model_or_key_is_refused(client, url):
    with pytest.raises(openai.NotFoundError, match="this server has 'tiny'"):
        client.chat.completions.create(model="gpt", messages=asked())
    with pytest.raises(openai.AuthenticationError, match="the API key is missing or wrong"):
        client.with_options(api_key="another").models.list()
    for sent in ("", "Bearer", f"Basic {KEY}", "Bearer ä".encode()):
        found = httpx2.get(f"{url}/v1/models", headers={"Authorization": sent})
        assert (found.status_code, found.json()["error"]["code"]) == (401, "invalid_api_key")


@pytest.mark.parametrize(
    ("content", "kind", "status", "message"),
    [
        (b"{", "application/json", 400, "the body is no JSON"),
        (b"[]", "application/json", 400, "no JSON object"),
        (b"\xff\xfe", "application/json", 400, "the body is no JSON"),
        (b"[" * 100_000, "application/json", 400, "the body is no JSON"),
        (b"{}", "text/plain", 415, "Content-Type application/json"),
        (b"{}", "application/json", 400, "model: Field required"),
        (
            json.dumps({"model": NAME, "messages": [{"role": "user", "content": "\ud800"}]}).encode(),
            "application/json",
            400,
            "the body is no JSON",
        ),
        (b'{"\\uD800": 1}', "application/json", 400, "the body is no JSON"),
        (b'{"\\ud83d\\ude00": 2}', "application/json", 400, "model: Field required"),
    ],
)
def test_bodies_that_are_no_request(content, kind, status, message, url, capfd):
    headers = {"Content-Type": kind, "Authorization": f"Bearer {KEY}"}
    found = httpx2.post(f"{url}/v1/chat/completions", content=content, headers=headers)
    assert found.status_code == status
    assert message in found.json()["error"]["message"]
    assert not capfd.readouterr().err


def test_other_places_have_errors_of_the_same_form(url):
    headers = {"Authorization": f"Bearer {KEY}"}
    assert httpx2.get(f"{url}/v2", headers=headers).json()["error"]["message"] == "there is no /v2 here"
    found = httpx2.get(f"{url}/v1/chat/completions", headers=headers)
    assert (found.status_code, found.json()["error"]["type"]) == (405, "invalid_request_error")


# -- the command ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def command(folder, *options, **environment):
    """A server as a process of its own, and its base URL."""
    asked = [sys.executable, "-m", "skipvision_export", "serve", str(folder), "--port", "0", *options]
    process = subprocess.Popen(
        asked,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | environment,
    )
    try:
        yield process, re.search(r"http://\S+", process.stdout.readline())[0]
    finally:
        process.kill()
        process.wait()


def test_the_command_ends_after_what_it_has_begun(bundle_folder, tmp_path):
    result = tmp_path / "result.json"
    options = ("--threads", "1", "--json", str(result), "--model-name", "mine")
    with command(bundle_folder, *options, SKIPVISION_API_KEY=KEY) as (process, base):
        client = openai.OpenAI(base_url=base, api_key=KEY, max_retries=0)
        stream = client.chat.completions.create(model="mine", messages=asked(), max_tokens=MANY, stream=True)
        chunks = [next(iter(stream))]
        process.send_signal(signal.SIGTERM)
        chunks += list(stream)
        assert chunks[-1].choices[0].finish_reason == "length"
        out, err = process.communicate(timeout=20)
        assert process.returncode == 0, err
        assert "answered 1 requests" in out
        assert not err
        assert json.loads(result.read_text()) == {"model": "mine", "answered": 1, "left": 0}


def test_what_cannot_be_served_is_said(bundle_folder, tmp_path, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert run(["serve", str(bundle_folder), "--port", str(taken.getsockname()[1])]) == 2
    assert "cannot listen at 127.0.0.1 port" in capsys.readouterr().err
    assert run(["serve", str(tmp_path)]) == 2
    assert "is no bundle" in capsys.readouterr().err


def test_without_the_extra_the_command_says_so(bundle_folder, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert run(["serve", str(bundle_folder)]) == 2
    assert "pip install 'skipvision-export[serve]'" in capsys.readouterr().err


def test_a_broken_answer_does_not_end_the_server(bundle_folder, capfd):
    bundle = Bundle.load(bundle_folder)
    with serving(bundle) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0)
        complete(client, asked(), max_tokens=2)
        whole = bundle.generator.manifest
        bundle.generator.manifest = None
        with pytest.raises(openai.InternalServerError, match="the server's log says why"):
            complete(client, asked(), max_tokens=2)
        bundle.generator.manifest = whole
        assert complete(client, asked(), max_tokens=2).usage.completion_tokens == 2
    assert "Traceback" not in (err := capfd.readouterr().err)
    assert "an answer failed: AttributeError" in err
