"""Accuracy against time as SVG."""

from __future__ import annotations

from typing import Any

from skipvision_export.report.charts import COLOURS, INK, drawing

# kind: colour, marker, and what the legend says
KINDS = {
    "dense": (INK, "*", "dense"),
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
    length, batch = result["settings"]["new_tokens"], result["batch"]
    with drawing(size, 1, text) as (axis, svg):
        front = sorted((p["ms"], 100 * p["accuracy"]) for p in points if p["front"])
        axis.plot(*zip(*front, strict=True), drawstyle="steps-post", color="#b3bac4", lw=1, zorder=1)
        for kind in dict.fromkeys(p["kind"] for p in points):
            colour, marker, label = KINDS.get(kind, ("#c2185b", "X", kind))
            of_kind = [p for p in points if p["kind"] == kind]
            axis.errorbar(
                [p["ms"] for p in of_kind],
                [100 * p["accuracy"] for p in of_kind],
                xerr=[[_to(p, 0) for p in of_kind], [_to(p, 1) for p in of_kind]],
                yerr=[100 * p["accuracy_error"] for p in of_kind],
                fmt=marker,
                color=colour,
                ms=10 if kind == "dense" else 5,
                elinewidth=0.6,
                label=label,
            )
        times = [p["ms"] for p in points]
        room = 0.3 * (max(times) - min(times)) or 0.1 * max(times)
        axis.set_xlim(min(times) - room, max(times) + room)  # where bars are longer they are cut
        axis.set_xlabel(f"ms for {length} tokens" + (f", {batch} prompts together" if batch > 1 else ""))
        axis.set_ylabel("exact match, %")
        axis.legend(frameon=False, fontsize=8, loc="lower right")
        axis.figure.draw_without_rendering()  # lays out, so that places are known
        _label(axis, points)
    return svg()


def _label(axis: Any, points: list[dict[str, Any]]) -> None:
    """Names beside the points, baselines left out, where they cover each other and the points least."""
    scale = 72 / axis.figure.dpi
    at = [axis.transData.transform((p["ms"], 100 * p["accuracy"])) * scale for p in points]
    taken = [(x - 3, y - 3, x + 3, y + 3) for x, y in at]
    named = [
        (p, place) for p, place in zip(points, at, strict=True) if p["kind"] not in ("random", "uniform")
    ]
    for point, (x, y) in sorted(named, key=lambda pair: -pair[1][1]):
        width, height = 4.4 * len(point["name"]), 8.0
        free = [
            (x + left, y + up, x + left + width, y + up + height)
            for up in (-4, 6, -14, 16, -24, 26, -34, 36, -44)
            for left in (6, -6 - width)
        ]
        box = min(free, key=lambda box: sum(_overlap(box, other) for other in taken))
        taken.append(box)
        offset = box[0] - x, box[1] - y
        axis.annotate(
            point["name"],
            (point["ms"], 100 * point["accuracy"]),
            xytext=offset,
            textcoords="offset points",
            fontsize=8,
            color=INK,
            arrowprops={"arrowstyle": "-", "lw": 0.3, "color": COLOURS[0]} if abs(offset[1]) > 10 else None,
        )


def _overlap(one: tuple[float, ...], other: tuple[float, ...]) -> float:
    """Of two boxes (left, bottom, right, top): the area."""
    wide = min(one[2], other[2]) - max(one[0], other[0])
    high = min(one[3], other[3]) - max(one[1], other[1])
    return max(0.0, wide) * max(0.0, high)


def _to(point: dict[str, Any], side: int) -> float:
    low, high = point["ms_spread"]
    return max(0.0, (high - point["ms"]) if side else (point["ms"] - low))
