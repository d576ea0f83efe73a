"""One HTML file with the evidence, readable without a network."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from typing import Any

from skipvision_export.benchmark.accuracy import Accuracy
from skipvision_export.bundle import Manifest
from skipvision_export.report.charts import comparison_charts, themed
from skipvision_export.report.layer_chart import layer_charts
from skipvision_export.report.pareto_chart import pareto_chart
from skipvision_export.validation.blame import ALONE_DB

_BETWEEN = {
    "export": "dense PyTorch, dense ONNX",
    "rewrite": "patched PyTorch, rewritten ONNX",
    "backend": "ONNX Runtime without and with optimizations",
    "precision": "patched PyTorch, float32 and the bundle's type",
    "method": "dense PyTorch, patched PyTorch",
}


def render_report(
    *,
    title: str,
    manifest: Manifest,
    machine: dict[str, Any],
    cards: Sequence[dict[str, Any]] = (),
    accuracies: dict[str, Accuracy] | None = None,
    validated: dict[str, Any] | None = None,
    bench: dict[str, Any] | None = None,
    bench_names: Sequence[str] = (),
    bench_note: str = "",
    pareto: dict[str, Any] | None = None,
) -> str:
    """A page of what is given; parts that are not are left out.

    manifest: of the bundle that it is about; machine: of `timing.machine`; cards: of `picture_cards`;
    accuracies: by contender; validated, bench, pareto: the JSON of these commands; bench_names: of its
    runs, by default the bundles'; bench_note: what they were taken on. Raises KeyError or TypeError for
    JSON of something else.
    """
    import jinja2

    template = (
        resources.files("skipvision_export.report").joinpath("report.html.j2").read_text(encoding="utf-8")
    )
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    safe = jinja2.utils.markupsafe.Markup
    types = list(next(iter(accuracies.values())).by_type) if accuracies else []
    names = list(bench_names or (run["bundle"] for run in bench["runs"])) if bench else []
    return environment.from_string(template).render(
        title=title,
        source=f"{manifest.source.name} ({manifest.source.architecture})",
        manifest=manifest,
        dense=manifest.skip_config.is_dense,
        by_layer=manifest.skip_config.layer_shares is not None,
        visual=manifest.model.visual_tokens,
        merged=manifest.roles.retained + manifest.roles.skipped < manifest.model.visual_tokens,
        selector=manifest.skip_config.selector,
        machine=machine,
        cards=cards,
        accuracies=accuracies or {},
        types=types,
        validated=validated,
        gaps=_gaps(validated) if validated else [],
        layers=[safe(chart) for chart in layer_charts(validated, _limit_db(manifest))] if validated else [],
        bench=bench,
        bench_note=bench_note,
        names=names,
        charts=[safe(chart) for chart in comparison_charts(bench["runs"], names)] if bench else [],
        speed=speed_rows(bench) if bench else [],
        floors=_floors(bench, names) if bench else [],
        pareto=pareto,
        pareto_chart=safe(themed(pareto_chart(pareto, (3.55, 3.4), "none"), "accuracy against time"))
        if pareto
        else "",
        pareto_rows=_pareto_rows(pareto) if pareto else [],
    )


def speed_rows(bench: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of the table of times and sizes: `name`, `values` of each run, and `ratio` of two."""
    runs, ratios = bench["runs"], bench["ratios"]
    rows = []
    for name, key, scale, unit, ratio in (
        ("prefill", "prefill_ms", 1.0, "ms", "prefill"),
        ("time to first token", "ttft_ms", 1.0, "ms", "ttft"),
        ("decode, a token", "decode_ms_per_token", 1.0, "ms", "decode"),
        ("decoder prefill", "flops", 1e9, "GFLOP", "flops"),
        ("K/V after prefill", "kv_bytes", 1e6, "MB", "kv_bytes"),
        ("peak memory", "peak_rss_mb", 1.0, "MB", "peak_rss_mb"),
    ):
        values = [f"{_three_digits(run[key] / scale)} {unit}" for run in runs]
        rows.append({"name": name, "values": values, "ratio": _ratio(bench, ratio)})
    for i, whole in enumerate(runs[0].get("end_to_end", [])):
        length = whole["new_tokens"]
        values = [f"{_three_digits(run['end_to_end'][i]['ms'])} ms" for run in runs]
        row = {"name": f"end to end, {length} tokens", "values": values}
        rows.insert(3 + i, row | {"ratio": _ratio(bench, f"end_to_end_{length}")})
    return rows if ratios else [row | {"ratio": ""} for row in rows]


def _three_digits(value: float) -> str:
    """And never an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _ratio(bench: dict[str, Any], name: str) -> str:
    if name not in bench["ratios"]:
        return ""
    spread = bench["ratio_spread"].get(name)
    return f"{bench['ratios'][name]:.2f}" + (f" [{spread[0]:.2f}, {spread[1]:.2f}]" if spread else "")


def _floors(bench: dict[str, Any], names: Sequence[str]) -> list[dict[str, str]]:
    """How many times its floor each phase of each run took."""
    rows = []
    for run, name in zip(bench["runs"], names, strict=True):
        for phase, floor in run.get("floor", {}).items():
            bytes_bound = floor["bound"] == "bytes"
            amount = (
                f"{_three_digits(floor['bytes'] / 1e6)} MB"
                if bytes_bound
                else f"{_three_digits(floor['flops'] / 1e9)} GFLOP"
            )
            rows.append(
                {
                    "name": f"{name}, {phase}",
                    "floor": f"{floor['floor_ms']:.3g} ms",
                    "from": amount,
                    "multiple": f"{floor['multiple']:.1f}",
                }
            )
    return rows


def _gaps(validated: dict[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for name, gap in validated["gaps"].items():
        if gap.get("min_sqnr_db") is not None:
            limit = f"{gap['min_sqnr_db']:.0f} dB"
        else:
            limit = "reported" if gap["limit"] is None else f"{gap['limit']:.0e}"
        row = {"name": name, "between": _BETWEEN.get(name, ""), "limit": limit, "passed": gap["passed"]}
        if gap.get("not_run"):
            rows.append(
                row | dict.fromkeys(("max_abs", "cosine", "sqnr", "tokens"), "") | {"limit": "not run"}
            )
            continue
        decibels, far = gap["sqnr_db"], gap["max_abs"]
        rows.append(
            row
            | {
                "max_abs": "not finite" if far is None else f"{far:.1e}",
                "cosine": f"{gap['cosine']:.6f}",
                "sqnr": f"{decibels:.0f} dB",
                "tokens": f"{gap['greedy_match']:.1%}",
            }
        )
    return rows


def _limit_db(manifest: Manifest) -> float:
    """Of a tensor alone: graphs of bfloat16 and of int4 weights are compared widened to float32."""
    float16 = manifest.dtype == "float16" and manifest.weights is None
    return ALONE_DB["float16" if float16 else "float32"]


def _pareto_rows(pareto: dict[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for point in sorted(pareto["points"], key=lambda point: point["ms"]):
        low, high = point["ms_spread"]
        rows.append(
            {
                "name": point["name"],
                "front": point["front"],
                "accuracy": f"{point['accuracy']:.1%} ± {100 * point['accuracy_error']:.1f}",
                "time": f"{point['ms']:.2f} ms [{low:.2f}, {high:.2f}]",
                "flops": f"{point['flops'] / 1e9:.3g} G",
                "kv": f"{point['kv_bytes'] / 1e6:.3g} MB",
            }
        )
    return rows
