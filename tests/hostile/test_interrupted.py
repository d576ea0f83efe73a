"""Killed at random moments, out of memory, out of disk, no permission: the whole output or none."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from full import FULL
from tiny import write_tiny

from skipvision_export import Bundle
from skipvision_export.cli import run
from skipvision_export.method.saved import saved_config
from skipvision_export.models.checkpoint import Checkpoint
from skipvision_export.models.loading import resolve_model

KILLS = 50 if FULL else 1  # of each command
DATA = Path(__file__).parents[2] / "examples" / "tiny_vlm" / "test"
# Imports once; each command runs in a fork of its own, so that kills fall into its work.
STARTS = """
import json, os, sys, skipvision_export.cli, skipvision_export.exporter, skipvision_export.runtime.pipeline
import skipvision_export.graph.trace, skipvision_export.method, skipvision_export.training
import torch, transformers, onnxruntime
for line in sys.stdin:
    child = os.fork()
    if not child:
        os.setsid()
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os._exit(skipvision_export.cli.run(json.loads(line)))
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Commands:
    """Runs commands, whole or until they are killed."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", STARTS],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def run(self, args: list[object], kill_after: float | None = None) -> int:
        """The exit code, -9 where it was killed."""
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps([str(arg) for arg in args]), file=self._process.stdin, flush=True)
        child = int(self._process.stdout.readline())
        if kill_after is not None:
            time.sleep(kill_after)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)
        return int(self._process.stdout.readline())

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


@pytest.fixture(scope="module")
def commands():
    started = Commands()
    yield started
    started.close()


def remove(out: Path) -> None:
    """A file or a folder, if it is there."""
    if out.is_file():
        out.unlink()
    shutil.rmtree(out, ignore_errors=True)


def kill_at_random_moments(
    commands: Commands, args: list[object], out: Path, whole: Callable[[], object], seed: int
) -> None:
    """Kill -9, each time at another moment of the time that it takes; then it runs again."""
    begun = time.monotonic()
    assert commands.run(args) == 0
    took = time.monotonic() - begun
    whole()
    rng = np.random.default_rng(seed)
    for _ in range(KILLS):
        remove(out)
        commands.run(args, kill_after=float(rng.uniform(0, took)))
        if out.exists():
            whole()
    assert commands.run(args) == 0
    whole()


def test_export_killed(commands, tiny_folder, tmp_path):
    out = tmp_path / "bundle"
    args = ["export", tiny_folder, "-o", out, "--preset", "skip-75", "--force"]
    kill_at_random_moments(commands, args, out, lambda: Bundle.load(out), 0)


def test_calibrate_killed(commands, tiny_folder, tmp_path):
    from skipvision_export import SkipVisionConfig

    out = tmp_path / "policy.json"
    args = ["calibrate", tiny_folder, "--data", DATA, "-o", out, "--samples", 2, "--flops", 0.8, "--force"]
    kill_at_random_moments(
        commands, args, out, lambda: SkipVisionConfig.load(out).layout(64, num_layers=3), 1
    )


def test_finetune_killed(commands, tiny_folder, questions_folder, tmp_path):
    out = tmp_path / "tuned"
    args = [
        "finetune",
        tiny_folder,
        "--data",
        questions_folder,
        "-o",
        out,
        "--preset",
        "quarter",
        "--max-steps",
        2,
    ]

    def whole() -> None:
        """The model is there at once; checkpoints to resume from may be there before."""
        if any(out.glob("*.json")):
            resolve_model(out)
            Checkpoint.open(out)
            assert saved_config(out) is not None

    kill_at_random_moments(commands, [*args, "--force"], out, whole, 2)


def test_build_killed(commands, rtx, bundle_folder, tmp_path):
    from skipvision_export.tensorrt.manifest import EnginesManifest

    out = tmp_path / "engines"
    recipe = Path(__file__).parents[2] / "engines" / "recipes" / "rtx.toml"
    args = ["build", bundle_folder, "--recipe", recipe, "-o", out, "--force"]
    kill_at_random_moments(commands, args, out, lambda: EnginesManifest.load(out).verify(out), 3)


def in_a_process(limit: int | None, *args: object) -> subprocess.CompletedProcess[str]:
    """The command, with at most `limit` bytes of addresses."""

    def cap() -> None:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

    command = [sys.executable, "-m", "skipvision_export", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, preexec_fn=cap, check=False, timeout=120)


@pytest.mark.parametrize("gigabytes", [0.2, 1.2, 1.4, 1.5] if FULL else [1.2, 1.4])
def test_export_without_memory_fails_in_a_line(gigabytes, tmp_path):
    """Less than the libraries need, or than a table of 300 MB does.

    A thread library that gives up by itself ends the process in a line of its own.
    """
    model, out = write_tiny(tmp_path / "model", vocab_size=1_200_000), tmp_path / "bundle"
    limit = int(gigabytes * (1 << 30))
    done = in_a_process(limit, "export", model, "-o", out, "--preset", "skip-75")
    assert done.returncode != 0, "the limit is too high to test anything"
    assert not out.exists()
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert "memory" in last if done.returncode == 2 else last


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere; test_full_disk.py is for root")
def test_a_folder_that_cannot_be_written(tiny_folder, tmp_path, capsys):
    tmp_path.chmod(0o500)
    assert run(["export", str(tiny_folder), "-o", str(tmp_path / "out"), "--dense"]) == 2
    assert "no permission" in capsys.readouterr().err
