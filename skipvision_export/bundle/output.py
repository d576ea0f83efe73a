"""Writing a folder so that it is either whole or not there."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from skipvision_export.errors import OutputError


def check_output(folder: Path, force: bool) -> None:
    """Raise OutputError where `folder` must not or cannot be written; call it before any long work."""
    _check_above(folder)
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder} exists and is not a folder; choose another output folder")
    if folder.is_dir() and any(folder.iterdir()) and not force:
        raise OutputError(
            f"{folder} exists and is not empty; choose another output folder, or --force to replace it"
        )


def check_output_file(file: Path, force: bool) -> None:
    """Raise OutputError where `file` must not or cannot be written; call it before any long work."""
    _check_above(file)
    if file.is_dir():
        raise OutputError(f"{file} is a folder; name an output file")
    if file.exists() and not force:
        raise OutputError(f"{file} exists; choose another output file, or --force to replace it")


@contextlib.contextmanager
def atomic_folder(folder: Path, force: bool = False) -> Iterator[Path]:
    """Yield a scratch folder beside `folder` that takes its name if the block succeeds.

    On any error the scratch folder is removed and what stood there before stays. Raises OutputError
    for a full disk or a folder that cannot be written.
    """
    check_output(folder, force)
    with _scratch(folder) as scratch:
        yield scratch
        _replace(scratch, folder.absolute())


@contextlib.contextmanager
def atomic_file(file: Path, force: bool = False) -> Iterator[Path]:
    """Yield a scratch folder for a file and what belongs beside it; they are moved to its folder at the end.

    `file` itself comes last, so that what it refers to is there when it is. On any error nothing is
    left. Raises OutputError as `atomic_folder` does.
    """
    check_output_file(file, force)
    with _scratch(file) as scratch:
        yield scratch
        for made in sorted(scratch.iterdir(), key=lambda made: made.name == file.name):
            os.replace(made, file.absolute().parent / made.name)


@contextlib.contextmanager
def _scratch(path: Path) -> Iterator[Path]:
    """A folder beside `path`, gone at the end, as are the folders above it that are empty still."""
    target = path.absolute()
    made: list[Path] = []
    scratch: Path | None = None
    try:
        for parent in reversed([target.parent, *target.parent.parents]):
            if not parent.exists():
                parent.mkdir()
                made.append(parent)
        scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
        os.chmod(scratch, 0o777 & ~_umask())
        yield scratch
    except OSError as error:
        raise OutputError(_explain(path, error)) from error
    finally:
        if scratch is not None:
            shutil.rmtree(scratch, ignore_errors=True)
        for parent in reversed(made):
            with contextlib.suppress(OSError):
                parent.rmdir()


def write_text(file: Path, text: str) -> None:
    """Write a file whole or not at all, in place of one that is there; raises OutputError."""
    with atomic_file(file, force=True) as scratch:
        (scratch / file.name).write_text(text, encoding="utf-8")


def nearest_folder(path: Path) -> Path:
    """What is there already above a path that may still have to be made."""
    return next(parent for parent in path.absolute().parents if parent.exists())


def _check_above(path: Path) -> None:
    above = nearest_folder(path)
    if not above.is_dir():
        raise OutputError(f"{path} cannot be written: {above} is not a folder")
    if not os.access(above, os.W_OK | os.X_OK):
        raise OutputError(f"{path} cannot be written: no permission in {above}")


def _replace(scratch: Path, target: Path) -> None:
    if not target.exists():
        scratch.rename(target)
        return
    # A folder that is not empty cannot be replaced in one step: move it aside, then remove it.
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old-", dir=target.parent))
    target.rename(old / target.name)
    try:
        scratch.rename(target)
    except OSError:
        (old / target.name).rename(target)
        old.rmdir()
        raise
    shutil.rmtree(old, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _explain(where: Path, error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"no space left to write {where} ({error.strerror}); nothing was left behind"
    return f"{where} cannot be written: {error.strerror or error}; nothing was left behind"
