"""Large anonymous memory that comes within is backed by huge pages, and holds what it held."""

import re
from pathlib import Path

import numpy as np
import pytest

from skipvision_export.runtime import huge_pages as module
from skipvision_export.runtime.huge_pages import SIZE, available, huge_pages


def huge_bytes(array: np.ndarray) -> int:
    """Of the mapping that an array's middle lies in: its ends may be in small pages."""
    inside, address = False, array.ctypes.data + array.nbytes // 2
    for line in Path("/proc/self/smaps").read_text().splitlines():
        place = re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line)
        if place:
            inside = int(place[1], 16) <= address < int(place[2], 16)
        elif inside and line.startswith("AnonHugePages"):
            return int(line.split()[1]) << 10
    return 0


@pytest.mark.skipif(not available(), reason="needs huge pages: this system gives none")
def test_new_memory_gets_huge_pages():
    before = np.random.default_rng(0).integers(0, 256, 16 * SIZE, np.uint8)
    with huge_pages():
        made = before.copy()
    if not huge_bytes(made):
        pytest.skip("needs free huge pages: the system is out of them")
    assert huge_bytes(made) >= 14 * SIZE  # all but its ends
    assert (made == before).all()


def test_nothing_happens_where_there_are_none(monkeypatch, tmp_path):
    setting = tmp_path / "enabled"
    monkeypatch.setattr(module, "_SETTING", setting)
    assert not available()
    setting.write_text("always madvise [never]")
    assert not available()
    monkeypatch.setattr(module, "_large", lambda: pytest.fail("looked"))
    with huge_pages():
        made = np.ones(SIZE)
    assert made.all()


def test_errors_inside_come_out():
    with pytest.raises(ZeroDivisionError), huge_pages():
        1 / 0  # noqa: B018
