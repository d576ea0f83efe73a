"""The shared K/V buffer of decode against K/V that each step joins anew."""

import numpy as np
import onnxruntime as ort
import pytest

from skipvision_export.graph.passes.names import DECODE
from skipvision_export.runtime import kv_cache
from skipvision_export.runtime.kv_cache import JoinedCache, SharedCache
from skipvision_export.runtime.pipeline import Bundle

PROMPT = np.array([[1, *[3] * 64, 50, 60, 70]], np.int64)


@pytest.fixture(scope="module")
def prefilled(bundle):
    features = bundle.generator.encode(np.random.default_rng(0).standard_normal((1, 3, 96, 96), np.float32))
    return bundle.generator.prefill(PROMPT, features)


def steps(bundle, cache, count=9):
    """Logits of a few steps over fixed tokens."""
    found = []
    for i in range(count):
        value = bundle.generator.decode(20 + i, PROMPT.shape[1] + i, cache)
        found.append(np.array(bundle.backend.numpy(value)))
    return np.concatenate(found)


@pytest.fixture(scope="module")
def joined(bundle, prefilled):
    return steps(bundle, JoinedCache(bundle.backend, prefilled))


@pytest.mark.parametrize("room", [1, 4, 256])
def test_equal_however_often_the_buffer_grows(bundle, prefilled, joined, room, monkeypatch):
    monkeypatch.setattr(kv_cache, "ROOM", room)
    cache = bundle.backend.cache(prefilled)
    assert isinstance(cache, SharedCache) and cache.length == 20
    np.testing.assert_allclose(steps(bundle, cache), joined, atol=2e-5)
    assert cache.length == 20 + 9
    # what prefill gave is not written to: another answer may start from it
    np.testing.assert_allclose(steps(bundle, bundle.backend.cache(prefilled)), joined, atol=2e-5)


def test_a_cache_that_loses_a_step_is_caught(bundle, prefilled, joined):
    cache = bundle.backend.cache(prefilled)
    one = steps(bundle, cache, 1)
    cache.length -= 1
    np.testing.assert_allclose(one, joined[:1], atol=2e-5)
    rest = [np.array(bundle.backend.numpy(bundle.generator.decode(20 + i, 68 + i, cache))) for i in (1, 2)]
    assert abs(np.concatenate(rest) - joined[1:3]).max() > 1e-3


def test_past_and_present_are_the_same_memory(bundle, prefilled):
    """A step copies no cache: it writes where the buffer lies."""
    cache = bundle.backend.cache(prefilled)
    before = {name: array.__array_interface__["data"][0] for name, array in cache._arrays.items()}
    steps(bundle, cache, 1)
    assert before == {n: a.__array_interface__["data"][0] for n, a in cache._arrays.items()}
    assert all(array[0, :, 20].any() and not array[0, :, 21].any() for array in cache._arrays.values())


def test_unoptimized_runs_the_graph_of_all_runtimes(bundle_folder, prefilled):
    plain = Bundle.load(bundle_folder, optimize=False)
    assert isinstance(plain.backend.cache(prefilled), JoinedCache)
    assert f"{DECODE}.onnxruntime" in plain.manifest.variants


def test_memory_stays_with_its_array():
    """What SharedCache relies on: an OrtValue of a numpy array on the CPU is that array's memory."""
    array = np.zeros(4, np.float32)
    value = ort.OrtValue.ortvalue_from_numpy(array)
    array[1] = 5
    assert value.numpy()[1] == 5
