"""Graph passes, one in each file; which run on which graph, and in which order, stands here.

Passes import onnx_ir and numpy only, so that they can be tested on any graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import onnx_ir as ir

from skipvision_export.config import SkipVisionConfig
from skipvision_export.graph.passes.batch_size import BatchSizePass
from skipvision_export.graph.passes.cached_positions import CachedPositionsPass
from skipvision_export.graph.passes.deepstack import DeepstackPass
from skipvision_export.graph.passes.flat_features import FlatFeaturesPass
from skipvision_export.graph.passes.grouped_prefill import GroupedPrefillPass
from skipvision_export.graph.passes.grouped_rotary import GroupedRotaryPass
from skipvision_export.graph.passes.half_rotary import HalfRotaryPass
from skipvision_export.graph.passes.int4_weights import Int4WeightsPass
from skipvision_export.graph.passes.kv_prune import KVPrunePass
from skipvision_export.graph.passes.last_layer import LastLayerPass
from skipvision_export.graph.passes.lay_out import LayOutPass, Weights
from skipvision_export.graph.passes.lay_out_varying import LayOutVaryingPass
from skipvision_export.graph.passes.names import (
    APPEND,
    DECODE,
    EMBED,
    GENAI,
    ONNXRUNTIME,
    PREFILL,
    TRANSFORMERS_JS,
    VISION,
)
from skipvision_export.graph.passes.native_gqa import NativeGQAPass
from skipvision_export.graph.passes.own_sizes import OwnSizesPass
from skipvision_export.graph.passes.pack_projections import PackProjectionsPass
from skipvision_export.graph.passes.shared_kv import SharedKVPass
from skipvision_export.graph.passes.skip_ffn import SkipFFNPass
from skipvision_export.graph.passes.skip_norm import SkipNormPass
from skipvision_export.graph.passes.strict_mask import StrictMaskPass
from skipvision_export.graph.passes.text_embeds import TextEmbedsPass
from skipvision_export.graph.passes.wider_mask import WiderMaskPass
from skipvision_export.layout import TokenLayout


@dataclass(frozen=True)
class PassContext:
    """What passes have to know about the model and the method.

    sees: what of a prompt its tokens see (ModelFamily.sees).
    max_positions: of a sequence, where the model names a limit.
    summary: weights of the summary tokens, see LayOutPass; empty where the layout has none. pack, int4: the
    passes that both decoder graphs go through, where projections are packed, and where weights become int4.
    target: the runtime that the bundle is for. width: of the decoder, where the number of visual tokens
    varies with the picture; deepstack: layers that get further features of these.
    """

    num_layers: int
    vision_layers: int
    visual_tokens: int
    config: SkipVisionConfig
    layout: TokenLayout
    sees: str = "before"
    max_positions: int | None = None
    summary: Weights = field(default_factory=dict)
    pack: PackProjectionsPass | None = None
    int4: Int4WeightsPass | None = None
    target: str = ONNXRUNTIME
    width: int | None = None
    deepstack: int = 0


def passes_for(graph: str, context: PassContext) -> list[ir.passes.InPlacePass]:
    """The passes of one graph of a bundle, in order.

    Sizes of experts' rows come first: no FFN of a mixture is found without them. The last layer's rows go
    before Skip-FFN, which splits what is left of its FFN another way, and after the strict mask, which has a
    row for each query. Skip-FFN comes before anything that would fuse the residual Add away. KV-prune comes
    after those that look at the graph's outputs: it renames them. Projections are packed when all is where
    it stays, int4 weights come last: no other pass knows their operator.
    """
    config, layout = context.config, context.layout
    weights: list[ir.passes.InPlacePass] = [each for each in (context.pack, context.int4) if each]
    tiers = [layout.layer_tier(layer) for layer in range(context.num_layers)]
    prefill: list[ir.passes.InPlacePass] = [
        OwnSizesPass(),
        *([DeepstackPass(context.deepstack)] if context.deepstack else []),
        HalfRotaryPass(),
        NativeGQAPass(),
        *([WiderMaskPass(context.sees)] if context.sees != "before" else []),
        *([StrictMaskPass()] if config.strict else []),
        LastLayerPass(),
        SkipFFNPass(tiers),
        KVPrunePass(context.num_layers),
        *weights,
    ]
    passes: dict[str, list[ir.passes.InPlacePass]] = {
        VISION: [
            LayOutPass(config, layout, context.visual_tokens, context.vision_layers, context.summary)
            if context.width is None
            else LayOutVaryingPass(config, context.width, context.summary),
        ],
        EMBED: [],
        PREFILL: prefill,
        APPEND: prefill,
        DECODE: [HalfRotaryPass(), NativeGQAPass(), *weights],
    }
    return passes[graph]


def variants_for(graph: str, context: PassContext) -> dict[str, list[ir.passes.InPlacePass]]:
    """Other forms of a graph, by the runtime they are for: the passes that make each, after all others.

    A variant stands beside the graph, which every runtime can run, and shares its weights. It is left
    out where the first of its passes finds nothing to change. GroupedPrefill's operator is causal.
    """
    forms: dict[str, dict[str, list[ir.passes.InPlacePass]]] = {
        PREFILL: {ONNXRUNTIME: [GroupedPrefillPass()]} if context.sees == "before" else {},
        DECODE: {ONNXRUNTIME: [SharedKVPass(), GroupedRotaryPass(context.max_positions), SkipNormPass()]},
    }
    if context.target == GENAI:
        forms |= {graph: {GENAI: [FlatFeaturesPass()]} for graph in (VISION, EMBED)}
    if context.target == TRANSFORMERS_JS:
        forms[EMBED] = {TRANSFORMERS_JS: [TextEmbedsPass()]}
        forms[DECODE][TRANSFORMERS_JS] = [BatchSizePass()]
    return forms.get(graph, {})


def passes_for_others(tiers: Sequence[int], kv_names: Sequence[str]) -> list[ir.passes.InPlacePass]:
    """The passes of a decoder that another program exported, after SplitNormPass, in order.

    tiers: see SkipFFNPass; kv_names: see KVPrunePass, none where keys and values stay whole.
    """
    kv = [CachedPositionsPass(), KVPrunePass(len(tiers), kv_names)] if kv_names else []
    return [SkipFFNPass(tiers), *kv]


# The oldest opset that has the operators which those passes put in: Squeeze with its axes as an input, and,
# of KVPrune's body, Shape of some axes.
SKIP_FFN_OPSET, SKIP_KV_OPSET = 13, 15
