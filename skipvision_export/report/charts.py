"""Charts as inline SVG."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

COLOURS = ("#7d8794", "#e07b00")


@contextmanager
def drawing(
    size: tuple[float, float], panels: int | tuple[int, int]
) -> Iterator[tuple[Any, Callable[[], str]]]:
    """Axes in the one look of all charts; the function gives the SVG afterwards.

    size: in inches; panels: of one row, or rows and columns.
    """
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot as plt

    stream = io.StringIO()

    def svg() -> str:
        text = stream.getvalue()
        return text[text.index("<svg") :]

    with plt.rc_context({"svg.fonttype": "path", "svg.hashsalt": "skipvision", "font.size": 9}):
        figure, axes = plt.subplots(
            *((1, panels) if isinstance(panels, int) else panels), figsize=size, layout="constrained"
        )
        yield axes, svg
        for axis in figure.axes:
            axis.spines[["top", "right"]].set_visible(False)
        figure.savefig(stream, format="svg", metadata={"Date": None})
        plt.close(figure)


def comparison_chart(dense: dict[str, Any], skip: dict[str, Any]) -> str:
    """Bars of two bench runs: prefill and decode times with their spread, FLOPs, K/V bytes."""
    panels = [
        ("prefill, ms", "prefill_ms", "prefill_ms_spread", 1.0),
        ("decode, ms a token", "decode_ms_per_token", "decode_ms_spread", 1.0),
        ("prefill, GFLOP", "flops", None, 1e9),
        ("K/V after prefill, MB", "kv_bytes", None, 1e6),
    ]
    with drawing((9, 2.4), len(panels)) as (axes, svg):
        for axis, (title, key, spread, scale) in zip(axes, panels, strict=True):
            heights = [run[key] / scale for run in (dense, skip)]
            errors = None
            if spread is not None:
                errors = [
                    [h - run[spread][0] for h, run in zip(heights, (dense, skip), strict=True)],
                    [run[spread][1] - h for h, run in zip(heights, (dense, skip), strict=True)],
                ]
                errors = [[max(0.0, e) for e in side] for side in errors]
            axis.bar(["dense", "skip"], heights, yerr=errors, color=COLOURS, capsize=4, width=0.6)
            axis.set_title(title, fontsize=9)
    return svg()
