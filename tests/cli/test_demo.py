"""The demo, small: same code, fewer questions and rounds."""

import json
import re

from skipvision_export.cli import run


def test_demo(tmp_path, capsys):
    out = tmp_path / "demo"
    args = ["demo", "-o", str(out), "--questions", "16", "--parity-questions", "8", "--rounds", "2"]
    assert run([*args, "--json", str(tmp_path / "result.json")]) == 0
    assert f"report: {out / 'report.html'}" in capsys.readouterr().out
    result = json.loads((tmp_path / "result.json").read_text())
    assert {"report", "checkpoint", "accuracy", "gaps", "ratios"} <= set(result)
    assert set(result["accuracy"]) == {"dense", "skip", "shuffled"}
    assert {"prefill", "decode", "flops", "kv_bytes"} <= set(result["ratios"])
    assert 30e6 <= result["sibling"]["parameters"] <= 60e6
    assert [run["kv_tokens"] for run in result["sibling"]["runs"]] == [64 + 98 + 2, 64 + 576]

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
