"""The committed benchmark holds what the documentation says of it."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "calibration_tiny.json"


def beaten(result, measure):
    """Budgets at which a baseline is better than the calibrated policy, or as near to dense."""
    found = []
    for row in result["rows"]:
        ours, alike, randoms = row["calibrated"], row["all_layers"], row["random_layers"]
        assert all(ours["flops_share"] <= one["flops_share"] for one in (alike, *randoms))
        others = (alike[measure], float(np.mean([one[measure] for one in randoms])))
        good = measure == "accuracy"
        if ours[measure] < max(others) if good else ours[measure] >= min(others):
            found.append(row["budget"])
    return found


@pytest.fixture(scope="module")
def result():
    return json.loads(RESULTS.read_text())


def test_the_calibrated_policy_dominates(result):
    kept = result["modes"]["K/V kept"]
    assert beaten(kept, "accuracy") == []
    assert beaten(kept, "divergence") == []
    twin = copy.deepcopy(kept)
    row = twin["rows"][0]
    row["calibrated"]["divergence"] = row["all_layers"]["divergence"]
    assert beaten(twin, "divergence") == [row["budget"]]


def test_with_half_of_the_kv_dropped_it_is_level(result):
    # Dropping K/V diverges by 2e-2 on its own, beside which the FFNs' share can hardly be told; the standard
    # error of an accuracy is 6 questions of the 1,000.
    half = copy.deepcopy(result["modes"]["half of the K/V dropped"])
    for row in half["rows"]:
        row["calibrated"]["accuracy"] += 0.003
    assert beaten(half, "accuracy") == []
    half["rows"][0]["calibrated"]["accuracy"] -= 0.006
    assert beaten(half, "accuracy") == [half["rows"][0]["budget"]]


def test_calibration_saw_no_test_question(result):
    assert result["questions"] == 1000
    assert result["modes"]["K/V kept"]["policy"]["samples"]["count"] == result["calibration_questions"]
