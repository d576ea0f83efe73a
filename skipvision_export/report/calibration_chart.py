"""Figures of a calibration as SVG."""

from __future__ import annotations

from typing import Any

from skipvision_export.report.charts import COLOURS, drawing

_KINDS = {"visual": COLOURS[1], "summary": "#2b7a78", "text": COLOURS[0]}


def calibration_chart(policy: dict[str, Any]) -> str:
    """A policy file as two panels: FFN updates of each layer by kind of token, and the path's curve.

    Left: the mean norm of an FFN's update over the norm of its input, and as a shade behind a layer's
    bars the share that skips it. Right: divergence against the share of the dense prefill's FLOPs.
    """
    layers, curve = policy["layers"], policy["curve"]
    with drawing((9, 2.8), 2) as (axes, svg):
        left, right = axes
        kinds = [kind for kind in _KINDS if any(row["ffn_update"][kind] is not None for row in layers)]
        width = 0.8 / len(kinds)
        for k, kind in enumerate(kinds):
            places = [row["layer"] + (k - (len(kinds) - 1) / 2) * width for row in layers]
            heights = [row["ffn_update"][kind] or 0.0 for row in layers]
            left.bar(places, heights, width, color=_KINDS[kind], label=kind)
        for row in layers:
            if row["skip"]:
                edges = row["layer"] - 0.48, row["layer"] + 0.48
                left.axvspan(*edges, color="black", alpha=0.12 * row["share"], lw=0, zorder=0)
        left.set_title("|FFN update| / |input| (shaded: visual tokens skip)", fontsize=9)
        left.set_xlabel("decoder layer")
        left.set_xticks([row["layer"] for row in layers][:: max(1, len(layers) // 16)])
        left.legend(frameon=False, fontsize=8)
        right.plot(
            [point["flops_share"] * 100 for point in curve],
            [point["divergence"] for point in curve],
            "o-",
            color=COLOURS[1],
            markersize=3,
        )
        right.set_title("KL of next-token logits, dense || skipped", fontsize=9)
        right.set_xlabel("prefill FLOPs, % of dense")
        right.invert_xaxis()
    return svg()
