"""What a phase must do at least, and what the machine does in that time."""

import pytest

from skipvision_export.benchmark.floor import MOST_BYTES, Rates, Work, buffer_bytes, decoder_dims, phase_work
from skipvision_export.benchmark.flops import prefill_cost
from skipvision_export.runtime.pipeline import Bundle


def test_work_is_the_files_and_the_formula_s(bundle, dense_folder):
    dense = Bundle.load(dense_folder)
    skip, whole = (phase_work(one, 20, 10) for one in (bundle, dense))
    for one, work in ((bundle, skip), (dense, whole)):
        dims = decoder_dims(one)
        cost = prefill_cost(dims, one.manifest.layout, 20)
        assert work["prefill"].flops == pytest.approx(cost.prefill_flops, rel=0.02)
        # weights lie in a file of their own, but for a few small ones; positions grow from 0 to 8 more
        stored = (one.folder / "onnx" / "decoder.onnx_data").stat().st_size
        cached = cost.kv_bytes * (1 + 4 / (20 + one.manifest.layout.kept_kv))
        assert work["decode"].bytes == pytest.approx(stored + cached, rel=0.02)
        # each float32 weight is multiplied once, but for the norms'; then the products of attention
        past = work["decode"].bytes - stored
        attention = 2 * dims.num_heads // dims.num_kv_heads * past / 4
        assert work["decode"].flops == pytest.approx(2 * stored / 4 + attention, rel=0.03)
    assert skip["prefill"].flops < 0.8 * whole["prefill"].flops
    assert skip["decode"].bytes < whole["decode"].bytes
    assert skip["vision"].flops == pytest.approx(whole["vision"].flops, rel=0.05)


def test_the_floor_is_the_larger_of_both():
    rates = Rates(2, 1e9, "", {buffer_bytes(10**6): 1e8})
    bound = rates.floor(Work(10**6, 10**6), 30.0)
    assert (bound["bound"], bound["floor_ms"], bound["multiple"]) == ("bytes", 10.0, 3.0)
    bound = rates.floor(Work(10**6, 10**8), 30.0)
    assert (bound["bound"], bound["floor_ms"], bound["multiple"]) == ("flops", 100.0, 0.3)


def test_a_buffer_is_no_larger_than_what_it_stands_for():
    assert buffer_bytes(3_000_000) == 1 << 21
    assert buffer_bytes(1 << 21) == 1 << 21
    assert buffer_bytes(10**12) == MOST_BYTES


def test_rates_are_measured_and_only_grow():
    rates, works = Rates.of(1), [Work(1 << 20, 1)]
    rates.measure(works)
    first = rates.to_json()
    # any machine since 2005 does more than a billion operations and bytes a second, and none so many
    assert 1e9 < first["matrix_flops_per_s"] < 1e14
    assert 1e9 < first["bytes_per_s"][str(1 << 20)] < 1e13
    rates.measure(works)
    assert rates.matrix_flops_per_s >= first["matrix_flops_per_s"]
    assert rates.bytes_per_s[1 << 20] >= first["bytes_per_s"][str(1 << 20)]
