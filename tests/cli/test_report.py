"""Accuracy against time, and the page that shows it with all else, in a browser."""

import json
import re

import numpy as np
import pytest
from browser import chromium, look
from conftest import EXAMPLE
from full import only_in_full

from skipvision_export.benchmark.pareto import on_front
from skipvision_export.cli import run
from skipvision_export.config import SkipVisionConfig
from skipvision_export.report.token_maps import skip_shares
from skipvision_export.runtime.pipeline import Bundle

DATA = ("--data", str(EXAMPLE / "test"))
ASKED = 24
SIZES = [(390, "light"), (390, "dark"), (1280, "light"), (1280, "dark")]


@pytest.fixture(scope="module")
def folder(finetuned, tmp_path_factory):
    """Bundles `dense` and `quarter` of one model, and what the commands measure of them."""
    folder = tmp_path_factory.mktemp("measured")
    for config in (SkipVisionConfig.dense(), SkipVisionConfig.preset("quarter")):
        finetuned.write(folder / config.name, config)
    quarter, dense = str(folder / "quarter"), str(folder / "dense")
    few = ["--rounds", "2", "--new-tokens"]
    validate = ["validate", quarter, "--model", str(EXAMPLE / "finetuned"), *DATA, "--samples", "2"]
    pareto = ["pareto", dense, quarter, *DATA, "--limit", str(ASKED), "--chart", str(folder / "pareto.svg")]
    for args, name in (
        (validate, "gaps"),
        (["bench", quarter, "--against", dense, *few, "1,4"], "bench"),
        ([*pareto, *few, "3", "--batch", "4"], "pareto"),
    ):
        assert run([*args, "--json", str(folder / f"{name}.json")]) == 0
    return folder


@pytest.fixture(scope="module")
def html(folder):
    page = folder / "report.html"
    files = [part for name in ("gaps", "bench", "pareto") for part in (f"--{name}", f"{folder / name}.json")]
    assert run(["report", str(folder / "quarter"), *DATA, *files, "-o", str(page)]) == 0
    return page.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def browser():
    with chromium() as found:
        yield found


# -- accuracy against time ---------------------------------------------------------------------------


def test_front():
    #        best    slower   worse, faster   beaten by it   equal to the best
    points = [(0.9, 5), (0.9, 6), (0.8, 2), (0.7, 3), (0.9, 5)]
    assert on_front(points) == [True, False, True, False, True]
    assert on_front([(0.5, 1.0)]) == [True]


def test_points_are_what_evaluate_and_bench_say(folder, tmp_path):
    result = json.loads((folder / "pareto.json").read_text())
    assert [(point["name"], point["kind"]) for point in result["points"]] == [
        ("dense", "dense"),
        ("quarter", "cls_attention"),
    ]
    for point in result["points"]:
        args = ["evaluate", str(folder / point["name"]), *DATA, "--limit", str(ASKED)]
        assert run([*args, "--json", str(tmp_path / "one.json")]) == 0
        asked = json.loads((tmp_path / "one.json").read_text())
        assert (point["accuracy"], point["by_type"]) == (asked["accuracy"], asked["by_type"])
        # in a batch, an answer's share of the time
        assert 0 < point["ms_spread"][0] <= point["ms"] <= point["ms_spread"][1]
    assert result["batch"] == 4
    assert any(point["front"] for point in result["points"])
    svg = (folder / "pareto.svg").read_text()
    assert svg.startswith("<svg") and svg.rstrip().endswith("</svg>")


@only_in_full
def test_a_model_with_presets_and_baselines(tmp_path):
    out = tmp_path / "pareto.json"
    model = ["--model", str(EXAMPLE / "checkpoint"), "--preset", "quarter", *DATA]
    assert run(["pareto", *model, "--limit", "8", "--rounds", "1", "--json", str(out)]) == 0
    kinds = {point["name"]: point["kind"] for point in json.loads(out.read_text())["points"]}
    assert kinds == {
        "dense": "dense",
        "quarter": "cls_attention",
        "quarter-random": "random",
        "quarter-uniform": "uniform",
    }


# -- token maps --------------------------------------------------------------------------------------


def test_token_maps_show_what_the_graphs_skip(folder, finetuned, tmp_path):
    quarter = Bundle.load(folder / "quarter").manifest
    order = np.random.default_rng(0).permutation(64).tolist()
    shares = skip_shares(quarter, order)
    assert sorted(np.flatnonzero(shares == 0)) == sorted(order[:11])
    assert set(shares) == {0.0, 1.0}
    with pytest.raises(ValueError, match="each of 64 once"):
        skip_shares(quarter, order[:-1] + order[:1])
    assert not skip_shares(Bundle.load(folder / "dense").manifest, []).any()
    # a policy: half of the tokens skip one layer of four, a half of them another too
    policy = SkipVisionConfig(layer_shares=(0.0, 0.5, 0.25, 0.0), selector="uniform")
    shares = skip_shares(finetuned.write(tmp_path / "policy", policy).manifest, [])
    assert sorted(np.unique(shares, return_counts=True)[1]) == [16, 16, 32]
    assert np.allclose(np.unique(shares), [0, 0.25, 0.5])
    # a selector that does not look at the picture: the same patches in every order of the layout
    found = []
    for order in ("grouped", "raster"):
        config = SkipVisionConfig(skip_share=0.75, selector="random", order=order)
        found.append(skip_shares(finetuned.write(tmp_path / order, config).manifest, []))
    assert (found[0] == found[1]).all() and found[0].sum() == 48


# -- the page ----------------------------------------------------------------------------------------


def test_every_part_is_there(html):
    for heading in ("What is kept", "The gaps", "Layer by layer", "Accuracy against time", "Machine"):
        assert f"<h2>{heading}</h2>" in html
    assert html.count("data:image/png;base64,") == 6
    assert html.count("<svg") == 3 + 1 + 4  # graphs, accuracy against time, bench
    assert not re.search(r"""(?:src|href)\s*=\s*["'](?!data:|#)""", html.replace("xlink:href", "x"))


@pytest.mark.parametrize(("width", "scheme"), SIZES)
def test_it_looks_right(browser, html, tmp_path, width, scheme):
    seen = look(browser, html, tmp_path, width, scheme)
    assert seen["found"] == []
    assert (seen["images"], seen["charts"]) == (6, 8)
    assert seen["texts"] > 200
    assert (seen["ground"] < 0.05) == (scheme == "dark")


@pytest.mark.parametrize(
    ("old", "new", "width", "scheme", "found"),
    [
        ('<table class="stack">', '<table style="min-width: 1400px">', 1280, "light", "scrolls sideways"),
        ("td { display: flex;", "td { display: flex; min-width: 500px;", 390, "light", "scrolls sideways"),
        ("--muted: #a2abb8", "--muted: #4a515c", 390, "dark", "contrast"),
        ("--ink: #e6e9ee;", "", 1280, "dark", "contrast"),
        ("--muted: #5b6472", "--muted: #9aa3ae", 1280, "light", "contrast"),
        ("<h1>", "<img src='https://example.invalid/x.png'><h1>", 1280, "light", "request: https"),
        ("svg { display: block;", "svg { display: block; width: 140px;", 390, "light", "text of .*px"),
        ("data:image/png;base64,iVBO", "data:image/png;base64,iVBX", 390, "light", "does not load"),
        ("data:image/png", "missing.png?", 390, "light", "request: file"),
    ],
)
def test_broken_twins_are_caught(browser, html, tmp_path, old, new, width, scheme, found):
    assert old in html
    seen = look(browser, html.replace(old, new), tmp_path, width, scheme)
    assert any(re.search(found, what) for what in seen["found"]), seen["found"]


def test_a_break_is_shown(folder, tmp_path):
    """The report of a bundle that is not right says so, and draws where."""
    gaps = json.loads((folder / "gaps.json").read_text())
    at = next(t for t in gaps["tensors"] if t["tensor"] == "layers.2.ffn")
    at["alone"]["sqnr_db"] = 12.0
    gaps["passed"] = False
    gaps["blame"] = at | {"kind": "break", "module": "model.layers.2.mlp", "nodes": [], "try": "look there"}
    (tmp_path / "gaps.json").write_text(json.dumps(gaps))
    page = tmp_path / "report.html"
    args = ["report", str(folder / "quarter"), "--gaps", str(tmp_path / "gaps.json"), "-o", str(page)]
    assert run(args) == 0
    html = page.read_text()
    assert "over its limit" in html and "layers.2.ffn of decoder_prefill breaks in model.layers.2.mlp" in html
    assert html.count(">layers.2.ffn</text>") == 1


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["pareto", "nowhere", *DATA], "two bundles or more"),
        (["pareto", "--preset", "quarter", *DATA], "give --model"),
        (["pareto", "--model", str(EXAMPLE / "checkpoint"), "--preset", "nope", *DATA], "unknown preset"),
        (
            ["pareto", "--model", str(EXAMPLE / "checkpoint"), "--preset", "llava-100-156", *DATA],
            "576 visual tokens",
        ),
        (["report", "{quarter}", "-o", "r", "--gaps", "{bench}"], "`skipvision validate --json`"),
        (["report", "{quarter}", "-o", "r", "--bench", "{quarter}"], "cannot be read"),
        (["report", "{quarter}", "-o", "r", "--gaps", "{old}"], "measure again"),
    ],
)
def test_mistakes(args, message, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    gaps = json.loads((folder / "gaps.json").read_text())
    (tmp_path / "old.json").write_text(json.dumps(gaps | {"gaps": {"export": {}}}))
    names = {"quarter": folder / "quarter", "bench": folder / "bench.json", "old": tmp_path / "old.json"}
    assert run([arg.format(**names) for arg in args]) == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]
    assert not (tmp_path / "r").exists()
