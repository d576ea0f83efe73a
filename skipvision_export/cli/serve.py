"""The command serve: a bundle behind an OpenAI-compatible HTTP server."""

from __future__ import annotations

import signal
import socket
import sys
from typing import Annotated

import typer

from skipvision_export.cli.bundle_commands import NewTokens, backend_options
from skipvision_export.cli.common import (
    BundleArgument,
    EnginesOption,
    JsonOption,
    PluginOption,
    ThreadsOption,
    finish,
)
from skipvision_export.errors import ConfigError, InputError

_GRACE_SECONDS = 30
_LOCAL = ("127.0.0.1", "localhost", "::1")


def serve(
    bundle: BundleArgument,
    host: Annotated[
        str, typer.Option(help="Address to listen at; others than this machine's need it.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8000,
    model_name: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="What clients call the model; else BUNDLE's folder name."),
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="SKIPVISION_API_KEY", metavar="KEY", help="What clients must send; none by default."
        ),
    ] = None,
    queue: Annotated[int, typer.Option(min=0, help="Requests that may wait; more get status 429.")] = 16,
    max_new_tokens: NewTokens = 512,
    max_body_mb: Annotated[int, typer.Option(min=1, help="Largest request, pictures included.")] = 20,
    threads: ThreadsOption = 0,
    engines: EnginesOption = None,
    plugin: PluginOption = None,
    json: JsonOption = None,
) -> None:
    """Serve BUNDLE to OpenAI clients: POST /v1/chat/completions, GET /v1/models, GET /health.

    Answers one request at a time, whole or as a stream, greedily unless it has a temperature. Pictures come
    as data: URLs; nothing is fetched. --max-new-tokens cuts answers whose request names no max_tokens. On
    SIGTERM open requests are answered, up to 30 seconds, then it ends.

    Example: skipvision serve bundle --port 8000
    """
    try:
        import uvicorn

        from skipvision_export.serving.app import make_app
    except ImportError as error:
        raise ConfigError(
            f"serve needs {error.name}, which is not installed: pip install 'skipvision-export[serve]'"
        ) from None
    from skipvision_export.runtime.pipeline import Bundle
    from skipvision_export.serving.worker import Worker

    loaded = Bundle.load(bundle, **backend_options(engines, plugin, threads))
    if not loaded.processor.chat_template:
        raise InputError(f"{bundle} has no chat template, which the turns of a chat need; use generate")
    worker = Worker(loaded, queue, max_new_tokens)
    worker.warm_up()
    name = model_name or bundle.resolve().name
    listening = _listen(host, port)
    address = f"[{host}]" if ":" in host else host
    if host not in _LOCAL and api_key is None:
        print("skipvision: whoever reaches this address may ask; set --api-key", file=sys.stderr)
    app = make_app(worker, name, api_key=api_key, max_body=max_body_mb << 20)
    settings = uvicorn.Config(
        app, log_level="warning", access_log=False, timeout_graceful_shutdown=_GRACE_SECONDS
    )
    print(f"serving {name} at http://{address}:{listening.getsockname()[1]}/v1", flush=True)
    # uvicorn hands the signal on once it is done; by then there is nothing left to end.
    signal.signal(signal.SIGTERM, lambda *_: None)
    uvicorn.Server(settings).run(sockets=[listening])
    print(f"answered {worker.answered} requests, {worker.left} were left by their clients")
    finish({"model": name, "answered": worker.answered, "left": worker.left}, json)


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"cannot listen at {host} port {port}: {error}; give another --host or --port"
        ) from None
