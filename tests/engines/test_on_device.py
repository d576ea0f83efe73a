"""What only TensorRT itself would do here: it wants a GPU before it is called, and keeps timings."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from skipvision_export.errors import CompilerError
from skipvision_export.tensorrt import build as building
from skipvision_export.tensorrt.compile import _read_timing_cache, _write_timing_cache
from skipvision_export.tensorrt.driver import require_gpu
from skipvision_export.tensorrt.library import Compiler, TensorRT
from skipvision_export.tensorrt.recipe import Recipe

TENSORRT = TensorRT(SimpleNamespace(), Compiler("tensorrt", (10, 15)), "tensorrt")


def test_tensorrt_without_a_gpu_is_refused_before_it_is_called(bundle_folder, tmp_path, monkeypatch):
    try:
        require_gpu()
    except CompilerError:
        pass
    else:
        pytest.skip("is about machines without a GPU")
    monkeypatch.setattr(building, "find", lambda *_: TENSORRT)
    with pytest.raises(CompilerError, match="no NVIDIA driver here"):
        building.build(bundle_folder, Recipe(name="any"), tmp_path / "e")
    assert not list(tmp_path.iterdir())


def test_timings_are_kept_for_each_version(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    file = building._timing_cache(TENSORRT)
    assert isinstance(file, Path) and "10.15" in file.name
    given = []

    class Config:
        def create_timing_cache(self, data):
            given.append(data)
            return "cache"

        def set_timing_cache(self, cache, ignore_mismatch):
            return cache == "cache" and not ignore_mismatch

        def get_timing_cache(self):
            return SimpleNamespace(serialize=lambda: b"timings")

    assert _read_timing_cache(Config(), file) == "cache"
    _write_timing_cache(Config(), file)
    assert _read_timing_cache(Config(), file) == "cache"
    assert given == [b"", b"timings"]
    assert [f.name for f in file.parent.iterdir()] == [file.name]
    assert _read_timing_cache(Config(), None) is None
