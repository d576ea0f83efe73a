"""Accuracy against time: the numbers are evaluate's, and the front is what nothing beats."""

import json

import pytest
from conftest import EXAMPLE
from full import only_in_full

from skipvision_export.benchmark.pareto import on_front
from skipvision_export.cli import run
from skipvision_export.config import SkipVisionConfig


def test_front():
    #        best    slower   worse, faster   beaten by it   equal to the best
    points = [(0.9, 5), (0.9, 6), (0.8, 2), (0.7, 3), (0.9, 5)]
    assert on_front(points) == [True, False, True, False, True]
    assert on_front([(0.5, 1.0)]) == [True]


@pytest.fixture(scope="module")
def pair(trained, tmp_path_factory):
    """Dense, and `quarter` of the same model."""
    folder = tmp_path_factory.mktemp("pareto")
    for config in (SkipVisionConfig.dense(), SkipVisionConfig.preset("quarter")):
        trained.write(folder / config.name, config)
    return folder / "dense", folder / "quarter"


def test_bundles(pair, tmp_path, capsys):
    data = ("--data", str(EXAMPLE / "test"), "--limit", "24")
    out, chart = tmp_path / "pareto.json", tmp_path / "pareto.svg"
    args = ["--rounds", "2", "--new-tokens", "3", "--json", str(out), "--chart", str(chart)]
    assert run(["pareto", *map(str, pair), *data, *args]) == 0
    assert len(capsys.readouterr().out.strip().splitlines()) == 2
    result = json.loads(out.read_text())
    assert [point["kind"] for point in result["points"]] == ["dense", "cls_attention"]
    for point, bundle in zip(result["points"], pair, strict=True):
        assert run(["evaluate", str(bundle), *data, "--json", str(tmp_path / "one.json")]) == 0
        asked = json.loads((tmp_path / "one.json").read_text())
        assert (point["name"], point["accuracy"]) == (bundle.name, asked["accuracy"])
        assert point["by_type"] == asked["by_type"]
        assert point["end_to_end"][-1]["ms"] >= point["ttft_ms"] > 0
    assert any(point["front"] for point in result["points"])
    svg = chart.read_text()
    assert svg.startswith("<svg") and svg.rstrip().endswith("</svg>")


@only_in_full
def test_a_model_with_presets_and_baselines(tmp_path):
    out = tmp_path / "pareto.json"
    model = ["--model", str(EXAMPLE / "checkpoint"), "--preset", "quarter", "--data", str(EXAMPLE / "test")]
    few = ["--limit", "8", "--rounds", "1", "--new-tokens", "2"]
    assert run(["pareto", *model, *few, "--json", str(out)]) == 0
    kinds = {point["name"]: point["kind"] for point in json.loads(out.read_text())["points"]}
    assert kinds == {
        "dense": "dense",
        "quarter": "cls_attention",
        "quarter-random": "random",
        "quarter-uniform": "uniform",
    }


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["nowhere"], "two bundles or more"),
        (["--preset", "quarter"], "give --model"),
        (["--model", str(EXAMPLE / "checkpoint"), "--preset", "nope"], "unknown preset"),
        (["--model", str(EXAMPLE / "checkpoint"), "--preset", "llava-100-156"], "576 visual tokens"),
    ],
)
def test_mistakes(args, message, capsys):
    assert run(["pareto", *args, "--data", str(EXAMPLE / "test")]) == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]
