"""Huge pages behind what a session allocates: a decode step reads every weight once, page by page.

With pages of 4 KiB a processor looks up a translation for each, in a virtual machine twice over; with
2 MiB it hardly notices: a step is 4 percent faster (benchmarks/results/huge_pages.json). ONNX Runtime has no
option for it, so its memory is asked for afterwards, by address; loading takes twice as long, 2 seconds for
900 MB.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Iterator
from pathlib import Path

SIZE = 2 << 20
_LEAST = 8 << 20  # bytes of a mapping that is worth it: weights are hundreds of megabytes
# Linux's numbers: include/uapi/asm-generic/mman-common.h. Collapse is there from 6.1 on.
_ADVISE, _COLLAPSE = 14, 25
_MAPS = Path("/proc/self/maps")
_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@contextlib.contextmanager
def huge_pages() -> Iterator[None]:
    """Back anonymous memory that is allocated within, and kept, by huge pages.

    Does nothing where the system has none to give: what is asked for may be refused, then pages stay small.
    """
    if not available():
        yield
        return
    before = set(_large())
    yield
    advise = ctypes.CDLL(None).madvise
    advise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    for start, end in sorted(set(_large()) - before):
        start, end = -(-start // SIZE) * SIZE, end // SIZE * SIZE
        advise(start, end - start, _ADVISE)
        for at in range(start, end, SIZE):
            advise(at, SIZE, _COLLAPSE)


def available() -> bool:
    """Does this system give huge pages to those who ask?"""
    try:
        return sys.platform == "linux" and "[never]" not in _SETTING.read_text()
    except OSError:
        return False


def _large() -> Iterator[tuple[int, int]]:
    """Start and end of each large anonymous mapping that may be written."""
    for line in _MAPS.read_text().splitlines():
        place, rights, _, device, *rest = line.split()
        start, end = (int(number, 16) for number in place.split("-"))
        named = len(rest) > 1 and rest[1] != "[heap]"
        if rights == "rw-p" and device == "00:00" and not named and end - start >= _LEAST:
            yield start, end
