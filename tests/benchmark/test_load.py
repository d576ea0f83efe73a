"""Prompts at the same time: they answer as alone, and what is told of them is of all of them."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from skipvision_export.benchmark.load import Load, measure_load, points
from skipvision_export.benchmark.timing import BenchSettings, bench_inputs
from skipvision_export.graph.passes.names import VISION
from skipvision_export.runtime.pipeline import Bundle

TEXT, NEW, CLIENTS = 16, 6, 4


def alone(bundle, seed):
    inputs = bench_inputs(bundle, TEXT, seed)
    return bundle.generator.generate(inputs.input_ids, inputs.pixel_values, max_new_tokens=NEW).token_ids


@pytest.mark.parametrize("shape", [(CLIENTS, 1), (1, CLIENTS), (2, 2)])
def test_answers_are_those_of_each_alone(bundle, shape):
    expected = [alone(bundle, seed) for seed in range(CLIENTS)]
    assert len(set(map(tuple, expected))) > 1  # else a mix-up would not show
    found = Load(bundle, TEXT, NEW, *shape).round()
    assert [done.token_ids for done in found.done] == expected
    assert len(found.latencies) == shape[1]
    assert max(found.latencies) <= found.seconds


def test_clients_are_served_at_the_same_time(bundle, monkeypatch):
    """Every client is inside the runtime before any is let go on: in turn they would wait for ever."""
    generator = bundle.generator
    together = threading.Barrier(CLIENTS, timeout=20)
    generate = generator.generate_batch

    def meet(*args, **options):
        together.wait()
        return generate(*args, **options)

    monkeypatch.setattr(generator, "generate_batch", meet)
    assert len(Load(bundle, TEXT, NEW, concurrency=CLIENTS).round().done) == CLIENTS
    together.reset()
    together = threading.Barrier(CLIENTS, timeout=0.2)
    with pytest.raises(threading.BrokenBarrierError):
        Load(bundle, TEXT, NEW, batch=CLIENTS).round()


def test_threads_load_a_graph_once(bundle_folder, monkeypatch):
    """Two that loaded it at the same time crashed: one's weights were freed while the other read them."""
    backend = Bundle.load(bundle_folder).backend
    together = threading.Barrier(CLIENTS)
    load, loaded = backend._load, []

    def slow(file):
        loaded.append(file)
        time.sleep(0.2)  # long enough for all others to come
        return load(file)

    def session(_):
        together.wait()
        return backend.session(VISION)

    monkeypatch.setattr(backend, "_load", slow)
    with ThreadPoolExecutor(CLIENTS) as pool:
        found = list(pool.map(session, range(CLIENTS)))
    assert len(loaded) == 1
    assert all(one is found[0] for one in found)


def test_points():
    assert points((1, 8), (1, 4)) == [(1, 1), (8, 1), (1, 4)]
    assert points((), ()) == []


def test_numbers_are_of_all_prompts(bundle):
    one, many = measure_load([bundle], [(1, 1), (8, 1)], BenchSettings(TEXT, NEW, rounds=1))
    assert [point["batch"] for point in (one, many)] == [1, 8]
    (single,), (batch,) = one["runs"], many["runs"]
    assert batch["kv_bytes"] == 8 * single["kv_bytes"]
    assert batch["tokens_per_s"] == pytest.approx(NEW * batch["requests_per_s"])
    assert batch["requests_per_s"] * batch["latency_ms"] / 1e3 == pytest.approx(8)
    assert batch["peak_rss_mb"] > single["peak_rss_mb"] > 10
