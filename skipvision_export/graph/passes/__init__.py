"""Graph passes, one in each file; which run on which graph, and in which order, stands here.

Passes import onnx_ir and numpy only, so that they can be tested on any graph.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from skipvision_export.graph.passes.kv_prune import KVPrunePass
from skipvision_export.graph.passes.names import DECODE, EMBED, PREFILL, VISION
from skipvision_export.graph.passes.native_gqa import NativeGQAPass
from skipvision_export.graph.passes.select_tokens import SelectTokensPass
from skipvision_export.graph.passes.skip_ffn import SkipFFNPass


@dataclass(frozen=True)
class PassContext:
    """What passes have to know about the model: numbers only."""

    num_layers: int
    vision_layers: int
    visual_tokens: int
    retained: int


def passes_for(graph: str, context: PassContext) -> list[ir.passes.InPlacePass]:
    """The passes of one graph of a bundle, in order.

    Skip-FFN comes before anything that would fuse the residual Add away. KV-prune comes last: it
    renames the graph's outputs.
    """
    passes: dict[str, list[ir.passes.InPlacePass]] = {
        VISION: [
            SelectTokensPass(context.retained, context.visual_tokens, context.vision_layers),
        ],
        EMBED: [],
        PREFILL: [
            NativeGQAPass(),
            SkipFFNPass(context.num_layers),
            KVPrunePass(context.num_layers),
        ],
        DECODE: [NativeGQAPass()],
    }
    return passes[graph]
