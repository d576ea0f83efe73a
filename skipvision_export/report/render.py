"""One HTML file with the evidence, readable without a network."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from typing import Any

from skipvision_export.benchmark.accuracy import Accuracy, normalize
from skipvision_export.benchmark.parity import ParityReport
from skipvision_export.bundle import Manifest
from skipvision_export.report.charts import comparison_chart
from skipvision_export.report.overlay import data_uri, draw_grid
from skipvision_export.runtime.data import Sample

_BETWEEN = {
    "export": "dense PyTorch, dense ONNX",
    "rewrite": "patched PyTorch, rewritten ONNX",
    "backend": "ONNX Runtime without and with optimizations",
    "method": "dense PyTorch, patched PyTorch",
}


def render_report(
    *,
    title: str,
    manifest: Manifest,
    samples: Sequence[Sample],
    accuracies: dict[str, Accuracy],
    parity: ParityReport,
    bench: dict[str, Any],
    parameters: int,
    cards: int = 6,
) -> str:
    """The report of a demo.

    accuracies: by contender, with "dense" and "skip" among them, over `samples`; parity.orders are
    those of the first samples; bench: skip first, dense second.
    """
    import jinja2

    template = (
        resources.files("skipvision_export.report").joinpath("report.html.j2").read_text(encoding="utf-8")
    )
    skip, dense = bench["runs"]
    machine = bench["machine"]
    types = list(accuracies["dense"].by_type)
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    return environment.from_string(template).render(
        title=title,
        source=f"{manifest.source.name} ({manifest.source.architecture})",
        preset=manifest.preset,
        retained=manifest.roles.retained,
        skipped=manifest.roles.skipped,
        summaries=manifest.layout.summaries,
        merged=manifest.roles.retained + manifest.roles.skipped < manifest.model.visual_tokens,
        visual=manifest.model.visual_tokens,
        machine=f"{machine['cpu']}, {machine['cores']} cores",
        passed=parity.passed,
        cards=_cards(manifest, samples, accuracies, parity, cards),
        accuracy={
            "n": accuracies["dense"].n,
            "types": types,
            "rows": [
                {"name": name, "all": a.accuracy, "types": [a.by_type.get(t, 0.0) for t in types]}
                for name, a in accuracies.items()
            ],
        },
        gap_n=parity.gaps["rewrite"].n,
        gaps=[
            {
                "name": name,
                "between": _BETWEEN[name],
                "limit": "reported" if gap.limit is None else f"{gap.limit:.0e}",
                "greedy_match": gap.greedy_match,
                "passed": gap.passed,
                **gap.overall.to_json(),
            }
            for name, gap in parity.gaps.items()
        ],
        sibling={
            "parameters": f"{parameters / 1e6:.0f} M",
            "visual": dense["kv_tokens"] - bench["settings"]["text_tokens"],
            "text": bench["settings"]["text_tokens"],
            "rounds": bench["settings"]["rounds"],
        },
        chart=jinja2.utils.markupsafe.Markup(comparison_chart(dense, skip)),
        speed=speed_rows(bench),
        versions=", ".join(f"{k} {v}" for k, v in machine.items() if k not in ("cpu", "cores")),
    )


def speed_rows(bench: dict[str, Any]) -> list[dict[str, str]]:
    """Rows of the table of times and sizes; bench: skip first, dense second."""
    skip, dense = bench["runs"]
    rows = []
    for name, key, scale, unit, ratio in (
        ("prefill", "prefill_ms", 1.0, "ms", "prefill"),
        ("time to first token", "ttft_ms", 1.0, "ms", "ttft"),
        ("decode, a token", "decode_ms_per_token", 1.0, "ms", "decode"),
        ("decoder prefill", "flops", 1e9, "GFLOP", "flops"),
        ("K/V after prefill", "kv_bytes", 1e6, "MB", "kv_bytes"),
        ("peak memory", "peak_rss_mb", 1.0, "MB", "peak_rss_mb"),
    ):
        spread = bench["ratio_spread"].get(ratio)
        tail = f" [{spread[0]:.2f}, {spread[1]:.2f}]" if spread else ""
        rows.append(
            {
                "name": name,
                "dense": f"{dense[key] / scale:.1f} {unit}",
                "skip": f"{skip[key] / scale:.1f} {unit}",
                "ratio": f"{bench['ratios'][ratio]:.2f}{tail}",
            }
        )
    return rows


def _cards(
    manifest: Manifest,
    samples: Sequence[Sample],
    accuracies: dict[str, Accuracy],
    parity: ParityReport,
    limit: int,
) -> list[dict[str, Any]]:
    """A card for each of the first pictures: retained patches, questions, both answers."""
    grid = round(manifest.model.visual_tokens**0.5)
    keep = manifest.roles.retained
    cards: dict[str, dict[str, Any]] = {}
    for i, order in enumerate(parity.orders):
        sample = samples[i]
        name = str(sample.image)
        if name not in cards:
            if len(cards) == limit:
                break
            image = data_uri(draw_grid(sample.image, grid, order[:keep]))
            cards[name] = {"image": image, "rows": []}
        expected = normalize(sample.answer)
        answers = {kind: accuracies[kind].answers[i] for kind in ("dense", "skip")}
        cards[name]["rows"].append(
            {
                "question": sample.question,
                "expected": sample.answer,
                **answers,
                **{f"{k}_right": normalize(a) == expected for k, a in answers.items()},
            }
        )
    return list(cards.values())
