"""Accuracy against time as SVG."""

from __future__ import annotations

from typing import Any

from skipvision_export.benchmark.pareto import time_of
from skipvision_export.report.charts import COLOURS, drawing

# kind: colour, marker, and what the legend says
KINDS = {
    "dense": ("#1d2430", "*", "dense"),
    "cls_attention": (COLOURS[1], "o", "CLS attention"),
    "dart": ("#8a5cc2", "P", "redundancy (dart)"),
    "thumbnail": (COLOURS[1], "o", "thumbnail"),
    "policy": ("#2f6fde", "D", "calibrated policy"),
    "random": (COLOURS[0], "s", "random"),
    "uniform": ("#2b7a78", "^", "uniform"),
}


def pareto_chart(result: dict[str, Any], size: tuple[float, float] = (7, 4), text: str = "path") -> str:
    """Points of `measure_pareto`, those that nothing beats in both joined by a line.

    Bars are the standard error of the accuracy, and the 10th to 90th percentile of the time. Presets are
    written beside their points, baselines have their selector's colour. size, text: see `drawing`.
    """
    points = result["points"]
    length = points[0]["end_to_end"][-1]["new_tokens"]
    with drawing(size, 1, text) as (axis, svg):
        front = sorted((time_of(p), 100 * p["accuracy"]) for p in points if p["front"])
        axis.plot(*zip(*front, strict=True), drawstyle="steps-post", color="#b3bac4", lw=1, zorder=1)
        for kind in dict.fromkeys(p["kind"] for p in points):
            colour, marker, label = KINDS.get(kind, ("#c2185b", "X", kind))
            of_kind = [p for p in points if p["kind"] == kind]
            axis.errorbar(
                [time_of(p) for p in of_kind],
                [100 * p["accuracy"] for p in of_kind],
                xerr=[[_to(p, 0) for p in of_kind], [_to(p, 1) for p in of_kind]],
                yerr=[100 * p["accuracy_error"] for p in of_kind],
                fmt=marker,
                color=colour,
                ms=10 if kind == "dense" else 5,
                elinewidth=0.6,
                label=label,
            )
        for i, point in enumerate(p for p in points if p["kind"] not in ("random", "uniform")):
            axis.annotate(
                point["name"],
                (time_of(point), 100 * point["accuracy"]),
                xytext=(4, 5 if i % 2 else -10),
                textcoords="offset points",
                fontsize=7,
            )
        axis.set_xlabel(f"ms end to end, {length} tokens")
        axis.set_ylabel("exact match, %")
        axis.legend(frameon=False, fontsize=8, loc="lower right")
    return svg()


def _to(point: dict[str, Any], side: int) -> float:
    low, high = point["end_to_end"][-1]["spread"]
    return max(0.0, (high - time_of(point)) if side else (time_of(point) - low))
