"""One training run from a plan to a finished checkpoint folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from skipvision_export.training.output import RunFolder
from skipvision_export.training.plan import Plan, Progress, plan
from skipvision_export.training.session import Session

__all__ = ["Plan", "check_output", "finetune", "plan"]


def check_output(plan: Plan, output: Path, *, resume: bool = False, force: bool = False) -> None:
    """Raise OutputError where `finetune` would not write to `output`."""
    RunFolder(output).check(force, resume, plan.identity())


def finetune(
    plan: Plan,
    output: Path,
    *,
    resume: bool = False,
    force: bool = False,
    keep_checkpoints: bool = False,
    progress: Progress = lambda _: None,
    callbacks: Sequence[Any] = (),
) -> dict[str, Any]:
    """Train and write a checkpoint folder that `export` and `evaluate` take as it is.

    callbacks: more of Trainer's. Returns steps, train_loss, and the evaluation's numbers. Raises
    OutputError for a folder that holds something else, and for an interrupted run without `resume`.
    """
    check_output(plan, output, resume=resume, force=force)
    return Session(plan, RunFolder(output), progress).train(resume, keep_checkpoints, callbacks)
