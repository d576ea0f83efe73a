"""The committed benchmark holds what the documentation says of it."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "calibration_tiny.json"


def beaten(modes):
    """Budgets at which a baseline is as good as the calibrated policy, in any mode and measure."""
    found = []
    for mode, result in modes.items():
        for row in result["rows"]:
            ours, alike, randoms = row["calibrated"], row["all_layers"], row["random_layers"]
            assert all(ours["flops_share"] <= one["flops_share"] for one in (alike, *randoms))
            accuracy = max(alike["accuracy"], float(np.mean([one["accuracy"] for one in randoms])))
            divergence = min(alike["divergence"], float(np.mean([one["divergence"] for one in randoms])))
            if ours["accuracy"] < accuracy or ours["divergence"] >= divergence:
                found.append((mode, row["budget"]))
    return found


@pytest.fixture(scope="module")
def result():
    return json.loads(RESULTS.read_text())


def test_the_calibrated_policy_dominates(result):
    assert beaten(result["modes"]) == []
    twin = copy.deepcopy(result["modes"])
    row = twin["K/V kept"]["rows"][0]
    row["calibrated"]["divergence"] = row["all_layers"]["divergence"]
    assert beaten(twin) == [("K/V kept", row["budget"])]


def test_calibration_saw_no_test_question(result):
    assert result["questions"] == 1000
    assert result["modes"]["K/V kept"]["policy"]["samples"]["count"] == result["calibration_questions"]
