"""Charts as inline SVG."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

COLOURS = ("#7d8794", "#e07b00")
INK = "#1d2430"
# Of a chart on a page: as wide as a phone, so that its text is never scaled down.
SMALL = (3.4, 2.5)


@contextmanager
def drawing(
    size: tuple[float, float], panels: int | tuple[int, int], text: str = "path"
) -> Iterator[tuple[Any, Callable[[], str]]]:
    """Axes in the one look of all charts; the function gives the SVG afterwards.

    size: in inches; panels: of one row, or rows and columns; text: "path" looks alike everywhere, "none"
    leaves it text and the ground transparent, for `themed`.
    """
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot as plt

    stream = io.StringIO()

    def svg() -> str:
        found = stream.getvalue()
        return found[found.index("<svg") :]

    inked = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    look: Any = {"svg.fonttype": text, "svg.hashsalt": "skipvision", "font.size": 9}
    if text == "none":
        look |= dict.fromkeys(inked, INK) | dict.fromkeys(("figure.facecolor", "axes.facecolor"), "none")
    with plt.rc_context(look):
        figure, axes = plt.subplots(
            *((1, panels) if isinstance(panels, int) else panels), figsize=size, layout="constrained"
        )
        yield axes, svg
        for axis in figure.axes:
            axis.spines[["top", "right"]].set_visible(False)
        figure.savefig(stream, format="svg", metadata={"Date": None})
        plt.close(figure)


def themed(svg: str, title: str) -> str:
    """An SVG for a page whose text has the colour of the CSS variable `--ink`; title: what it shows."""
    from xml.sax.saxutils import quoteattr

    svg = svg.replace(INK, "var(--ink)")
    return svg.replace("<svg ", f"<svg role='img' aria-label={quoteattr(title)} ", 1)


def comparison_charts(runs: list[dict[str, Any]], names: list[str]) -> list[str]:
    """Bars of bench's runs, a chart each: prefill and decode times with their spread, FLOPs, K/V bytes."""
    panels = [
        ("prefill, ms", "prefill_ms", "prefill_ms_spread", 1.0),
        ("decode, ms a token", "decode_ms_per_token", "decode_ms_spread", 1.0),
        ("prefill, GFLOP", "flops", None, 1e9),
        ("K/V after prefill, MB", "kv_bytes", None, 1e6),
    ]
    charts = []
    for title, key, spread, scale in panels:
        with drawing((2.5, 2.1), 1, "none") as (axis, svg):
            heights = [run[key] / scale for run in runs]
            errors = None
            if spread is not None:
                pairs = list(zip(heights, (run[spread] for run in runs), strict=True))
                errors = [
                    [max(0.0, height - low) for height, (low, _) in pairs],
                    [max(0.0, high - height) for height, (_, high) in pairs],
                ]
            colours = [COLOURS[(i + 1) % 2] for i in range(len(runs))]
            axis.bar(names, heights, yerr=errors, color=colours, ecolor=INK, capsize=4, width=0.6)
            axis.set_title(title, fontsize=9)
        charts.append(themed(svg(), title))
    return charts
