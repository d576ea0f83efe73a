"""The accuracy half of benchmarks/int4_cpu.py; its times are taken on an idle machine only."""

import importlib.util

import pytest
from conftest import EXAMPLE

ROOT = EXAMPLE.parents[1]


@pytest.fixture
def script(monkeypatch):
    monkeypatch.chdir(ROOT)
    spec = importlib.util.spec_from_file_location("int4_cpu", ROOT / "benchmarks" / "int4_cpu.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_accuracy(script, monkeypatch):
    monkeypatch.setattr(script, "MODELS", {"quarter": "finetuned"})
    found = script.accuracy(samples=12, compared=1)["quarter"]
    assert found["questions"] == 12
    assert {kind: each["n"] for kind, each in found["accuracy"].items()} == {"float32": 12, "int4": 12}
    assert found["accuracy"]["float32"]["accuracy"] > 0.8
    assert found["same_answers"] > 0.8
    assert found["gaps"]["rewrite"]["passed"]
    assert found["gaps"]["precision"]["passed"]
    assert found["decoder_bytes"]["int4"] < 0.3 * found["decoder_bytes"]["float32"]


def test_ratios_have_their_spread(script):
    done = script.interleaved({"float32": lambda: None, "int4": lambda: None}, 7, 1, "test")
    assert done["int4"]["rounds"] == 7
    ratio = done["ratios"]["float32 / int4"]
    assert ratio["p10"] <= ratio["median"] <= ratio["p90"]
