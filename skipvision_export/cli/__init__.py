"""The command `skipvision`."""

from __future__ import annotations

import sys

import typer

from skipvision_export.cli import (
    build,
    bundle_commands,
    calibrate,
    demo,
    finetune,
    model_commands,
    rewrite,
    serve,
)
from skipvision_export.errors import SkipVisionError

app = typer.Typer(
    name="skipvision",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help=(
        "Ship a faster vision-language model: export it with Skip-Vision (visual tokens that skip "
        "the FFN, and whose keys and values are dropped after prefill), prove it equal to PyTorch, "
        "measure it.\n\nStart with `skipvision demo -o demo`, or `skipvision inspect MODEL`. Exit "
        "codes: 0 done, 1 a check failed, 2 something given is wrong."
    ),
)
app.command()(demo.demo)
app.command()(model_commands.inspect)
app.command()(model_commands.export)
app.command()(rewrite.rewrite)
app.command()(finetune.finetune)
app.command()(calibrate.calibrate)
app.command()(bundle_commands.validate)
app.command()(bundle_commands.bench)
app.command()(bundle_commands.generate)
app.command()(bundle_commands.evaluate)
app.command()(build.build)
app.command()(serve.serve)


def main(args: list[str] | None = None) -> None:
    """Run the command line and exit; a user's mistake gets one line, never a traceback."""
    sys.exit(run(sys.argv[1:] if args is None else args))


def run(args: list[str]) -> int:
    """Run the command line; returns the exit code."""
    try:
        return int(app(args, standalone_mode=False) or 0)
    except SkipVisionError as error:
        return _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except typer.Abort:
        return _fail("aborted", 130)
    except Exception as error:
        # typer's usage errors are of a class of its own, which older versions took from click.
        message = getattr(error, "format_message", None)
        if message is None:
            raise
        text = message()
        if not text.strip():  # a command without its arguments has already printed its help
            return 2
        return _fail(f"{text} Try --help.", 2)


def _fail(message: str, code: int) -> int:
    if sys.stderr.isatty():
        sys.stderr.write("\r\x1b[K")  # the unfinished line of a progress
    print(f"skipvision: {' '.join(message.split())}", file=sys.stderr)
    return code
