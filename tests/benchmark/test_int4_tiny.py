"""benchmarks/int4_tiny.py on a few questions."""

import importlib.util

import pytest
from conftest import EXAMPLE

ROOT = EXAMPLE.parents[1]


@pytest.fixture
def script(monkeypatch):
    monkeypatch.chdir(ROOT)
    spec = importlib.util.spec_from_file_location("int4_tiny", ROOT / "benchmarks" / "int4_tiny.py")
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
