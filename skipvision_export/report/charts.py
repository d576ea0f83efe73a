"""Charts as inline SVG."""

from __future__ import annotations

import io
from typing import Any

_COLOURS = ("#7d8794", "#e07b00")


def comparison_chart(dense: dict[str, Any], skip: dict[str, Any]) -> str:
    """Bars of two bench runs: prefill and decode times with their spread, FLOPs, K/V bytes."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot as plt

    panels = [
        ("prefill, ms", "prefill_ms", "prefill_ms_spread", 1.0),
        ("decode, ms a token", "decode_ms_per_token", "decode_ms_spread", 1.0),
        ("prefill, GFLOP", "flops", None, 1e9),
        ("K/V after prefill, MB", "kv_bytes", None, 1e6),
    ]
    with plt.rc_context({"svg.fonttype": "path", "svg.hashsalt": "skipvision", "font.size": 9}):
        figure, axes = plt.subplots(1, len(panels), figsize=(9, 2.4), layout="constrained")
        for axis, (title, key, spread, scale) in zip(axes, panels, strict=True):
            heights = [run[key] / scale for run in (dense, skip)]
            errors = None
            if spread is not None:
                errors = [
                    [h - run[spread][0] for h, run in zip(heights, (dense, skip), strict=True)],
                    [run[spread][1] - h for h, run in zip(heights, (dense, skip), strict=True)],
                ]
                errors = [[max(0.0, e) for e in side] for side in errors]
            axis.bar(["dense", "skip"], heights, yerr=errors, color=_COLOURS, capsize=4, width=0.6)
            axis.set_title(title, fontsize=9)
            axis.spines[["top", "right"]].set_visible(False)
        stream = io.StringIO()
        figure.savefig(stream, format="svg", metadata={"Date": None})
        plt.close(figure)
    svg = stream.getvalue()
    return svg[svg.index("<svg") :]
