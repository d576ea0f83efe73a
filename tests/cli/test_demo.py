"""The demo, small: same code, fewer questions and rounds."""

import contextlib
import io
import json
import re

import pytest
from browser import chromium, look

from skipvision_export.cli import run


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """Its folder, with the JSON beside it, and what it printed."""
    folder = tmp_path_factory.mktemp("demo")
    args = ["demo", "-o", str(folder / "demo"), "--questions", "16", "--parity-questions", "8"]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert run([*args, "--rounds", "2", "--json", str(folder / "result.json")]) == 0
    return folder / "demo", printed.getvalue()


def test_demo(demo):
    out, printed = demo
    assert f"report: {out / 'report.html'}" in printed
    result = json.loads((out.parent / "result.json").read_text())
    assert {"report", "checkpoint", "accuracy", "gaps", "ratios"} <= set(result)
    assert set(result["accuracy"]) == {"dense", "skip", "shuffled"}
    assert {"prefill", "decode", "flops", "kv_bytes"} <= set(result["ratios"])
    assert 30e6 <= result["sibling"]["parameters"] <= 60e6
    assert [run["kv_tokens"] for run in result["sibling"]["runs"]] == [64 + 98 + 2, 64 + 576]

    kinds = {point["name"]: point["kind"] for point in result["pareto"]["points"]}
    assert kinds == {"dense": "dense", "skip": "cls_attention", "random": "random", "uniform": "uniform"}
    accuracies = {point["name"]: point["accuracy"] for point in result["pareto"]["points"]}
    assert {name: accuracies[name] for name in ("dense", "skip")} == {
        name: result["accuracy"][name] for name in ("dense", "skip")
    }

    html = (out / "report.html").read_text()
    assert html.count("data:image/png;base64,") >= 2
    assert "<svg" in html
    # readable without a network: nothing is loaded from elsewhere
    assert not re.search(r"""(?:src|href)\s*=\s*["'](?!data:|#)""", html.replace("xlink:href", "x"))
    assert "url(http" not in html
    assert {p.name for p in out.iterdir()} == {
        "dense",
        "skip",
        "sibling-dense",
        "sibling-skip",
        "report.html",
        "demo.json",
    }


@pytest.mark.parametrize(("width", "scheme"), [(390, "dark"), (1280, "light")])
def test_its_report_looks_right(demo, tmp_path, width, scheme):
    with chromium() as browser:
        seen = look(browser, (demo[0] / "report.html").read_text(), tmp_path, width, scheme)
    assert seen["found"] == []
    assert seen["charts"] == 3 + 1 + 4
    assert seen["images"] == 4  # of 16 questions, four to a picture
