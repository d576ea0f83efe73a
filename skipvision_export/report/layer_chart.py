"""The error of every layer as SVG, out of what `validate` measured."""

from __future__ import annotations

from typing import Any

from skipvision_export.graph.passes.names import DECODE, PREFILL, VISION
from skipvision_export.report.charts import COLOURS, INK, SMALL, drawing, themed

_TITLES = {VISION: "vision encoder", PREFILL: "prefill", DECODE: "a decode step"}
_MOST_DB = 160.0  # above it there is nothing but equal numbers


def layer_charts(validated: dict[str, Any], limit_db: float) -> list[str]:
    """A chart for each graph: signal to noise in dB of every tensor, in the order in which they are computed.

    validated: the JSON of `validate`, with its `tensors` and `blame`; limit_db: of a tensor alone. Of a
    graph in several forms the one at fault is drawn, else the portable one. Empty without tensors.
    """
    blame = validated.get("blame") or {}
    charts = []
    for graph, title in _TITLES.items():
        form = blame.get("graph", graph) if str(blame.get("graph", "")).startswith(graph) else graph
        points = [point for point in validated.get("tensors", []) if point["graph"] == form]
        if points:
            charts.append(_chart(points, title, limit_db, blame))
    return charts


def _chart(points: list[dict[str, Any]], title: str, limit_db: float, blame: dict[str, Any]) -> str:
    with drawing(SMALL, 1, "none") as (axis, svg):
        places = range(len(points))
        for kind, colour, marker, label in (
            ("chained", COLOURS[0], "s", "from the picture on"),
            ("alone", COLOURS[1], "o", "each by itself"),
        ):
            heights = [_decibels(point[kind]["sqnr_db"]) for point in points]
            axis.plot(places, heights, color=colour, lw=1, marker=marker, ms=3, label=label)
        axis.axhline(limit_db, color=INK, lw=0.8, ls=":", label="limit by itself")
        at = [i for i, point in enumerate(points) if point["tensor"] == blame.get("tensor")]
        if at and blame["graph"] == points[0]["graph"]:
            worst = _decibels(points[at[0]][blame_kind(blame)]["sqnr_db"])
            axis.plot(at[0], worst, "o", ms=11, mfc="none", mec="#d33a3f", mew=2)
            side = "right" if at[0] > len(points) / 2 else "left"
            axis.annotate(
                points[at[0]]["tensor"],
                (at[0], worst),
                xytext=(-9 if side == "right" else 9, 7),
                textcoords="offset points",
                ha=side,
                fontsize=9,
            )
        firsts = {point["layer"]: i for i, point in reversed(list(enumerate(points)))}
        firsts.pop(None, None)
        shown = sorted(firsts.items())[:: max(1, len(firsts) // 8)]
        axis.set_xticks([place for _, place in shown], [str(layer) for layer, _ in shown])
        axis.set_xlabel("layer")
        axis.set_ylabel("signal to noise, dB")
        axis.set_ylim(min(0.0, *axis.get_ylim()), _MOST_DB + 5)
        axis.set_title(title, fontsize=10)
        axis.legend(frameon=False, fontsize=8, loc="best")
    return themed(svg(), f"signal to noise of each tensor, {title}")


def blame_kind(blame: dict[str, Any]) -> str:
    """Which of a point's gaps is over its limit."""
    return "chained" if blame.get("kind") == "rounding" else "alone"


def _decibels(value: float | None) -> float:
    """What is drawn; None stands for what is not finite in JSON."""
    return max(-20.0, min(_MOST_DB, -20.0 if value is None else value))
