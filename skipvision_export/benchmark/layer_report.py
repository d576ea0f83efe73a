"""What a comparison layer by layer found, in words and as JSON."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from skipvision_export.graph.passes.names import EMBED, IMAGE_FEATURES, PREFILL, RASTER_FEATURES, VISION
from skipvision_export.validation.blame import Point, Verdict


@dataclass
class LayerReport:
    """Every tensor compared, in order, and the first at fault; module and nodes are those behind it."""

    points: list[Point]
    verdict: Verdict | None
    module: str = ""
    nodes: list[str] = field(default_factory=list)

    def prefill(self) -> dict[str, Point]:
        """Points of the prefill graph, by name."""
        return {point.name: point for point in self.points if point.graph == PREFILL}

    def to_json(self) -> dict[str, Any]:
        """`tensors`, all of them, and `blame`, None where nothing is at fault."""
        blamed = None
        if self.verdict is not None:
            blamed = {
                **self.verdict.point.to_json(),
                "kind": self.verdict.kind,
                "shared": self.verdict.shared,
                "limit_db": self.verdict.limit_db,
                "module": self.module,
                "nodes": self.nodes,
                "try": self.advice(),
            }
        return {"tensors": [point.to_json() for point in self.points], "blame": blamed}

    def line(self) -> str:
        """The verdict in words."""
        if self.verdict is None:
            return "layers    ok      no tensor of any layer is over its limit"
        at, gap = self.verdict.point, self.verdict.point.alone
        if self.verdict.kind == "rounding":
            return (
                f"layers    FAILED  {at.name} of {at.graph}: {at.chained.sqnr_db:.1f} dB (limit "
                f"{self.verdict.limit_db:.0f}); no layer breaks by itself, rounding adds up: {self.advice()}"
            )
        behind = f" in {self.module}" if self.module else ""
        nodes = f" (node {', '.join(self.nodes)})" if self.nodes else ""
        return (
            f"layers    FAILED  {at.name} of {at.graph} breaks: {gap.sqnr_db:.1f} dB (limit "
            f"{self.verdict.limit_db:.0f}) though all before it is right{behind}{nodes}: {self.advice()}"
        )

    def advice(self) -> str:
        """What to try."""
        assert self.verdict is not None
        at = self.verdict.point
        if self.verdict.kind == "rounding":
            return "compute in float32, or in bfloat16 instead of float16, and look which layer loses most"
        if self.verdict.shared:
            return "every layer breaks alike: look at positions, the rotary embedding and the mask"
        if at.graph == VISION:
            return {
                IMAGE_FEATURES: "look at the choice and the merging of tokens, and at the summary's weights",
                RASTER_FEATURES: "look at the projector's weights, and at which rows of the tower it reads",
            }.get(at.name, "compare this layer's weights, epsilon and attention with the checkpoint's")
        if at.graph == EMBED:
            return "look at the placeholders' id, their number, and the order of the features"
        if at.name == "logits":
            return "look at the last norm, at lm_head (is it tied?), and at the row that is read"
        if at.name.endswith((".key", ".value")):
            return (
                "look at this layer's first norm, k_proj and v_proj, its positions, and which rows are kept"
            )
        if at.name.endswith(".ffn"):
            return "look at this layer's FFN: norm, epsilon, weights, activation, which rows go through it"
        return "look at this layer's attention: q_proj and o_proj, the order of heads, scale and mask"
