"""The command `skipvision`."""

from __future__ import annotations

import errno
import sys

import typer

from skipvision_export.cli import (
    bench,
    build,
    bundle_commands,
    calibrate,
    demo,
    finetune,
    model_commands,
    pareto,
    report,
    rewrite,
    serve,
)
from skipvision_export.errors import RoomError, SkipVisionError

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
app.command()(bench.bench)
app.command()(pareto.pareto)
app.command()(report.report)
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
        if "--help" not in args:
            _check_limit()
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
            if _out_of_memory(error):
                return _fail(
                    "out of memory: free some, lift the limit (ulimit -v), or take a smaller model", 2
                )
            raise
        text = message()
        if not text.strip():  # a command without its arguments has already printed its help
            return 2
        return _fail(f"{text} Try --help.", 2)


# What torch, ONNX Runtime and their libraries map before any work. With less, OpenBLAS tries again for ever.
_LEAST = 1.25


def _check_limit() -> None:
    """Raise RoomError where the process may not even map its libraries."""
    try:
        import resource
    except ImportError:  # Windows has no such limits
        return
    limit = resource.getrlimit(resource.RLIMIT_AS)[0] / (1 << 30)
    if 0 <= limit < _LEAST:
        raise RoomError(
            f"out of memory: this process may have {limit:.2f} GiB of addresses (ulimit -v), the libraries "
            f"alone take {_LEAST} GiB; lift the limit"
        )


# As the loader, torch, ONNX Runtime and glibc say it, each in a class of its own.
_NO_MEMORY = ("failed to map segment", "not enough memory", "can't allocate", "bad allocation", "bad_alloc")


def _out_of_memory(error: BaseException | None) -> bool:
    """Is it, or what it came from, that memory ran out?"""
    while error is not None:
        text = str(error)
        if isinstance(error, MemoryError) or any(words in text for words in _NO_MEMORY):
            return True
        if isinstance(error, OSError) and error.errno == errno.ENOMEM:
            return True
        error = error.__cause__ or error.__context__
    return False


def _fail(message: str, code: int) -> int:
    if sys.stderr.isatty():
        sys.stderr.write("\r\x1b[K")  # the unfinished line of a progress
    print(f"skipvision: {' '.join(message.split())}", file=sys.stderr)
    return code
