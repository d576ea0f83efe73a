"""Choosing, merging and laying out visual tokens inside the vision encoder's graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx_ir import tape

from skipvision_export.config import SkipVisionConfig
from skipvision_export.graph.passes.cls_scores import cls_attention
from skipvision_export.graph.passes.names import RASTER_FEATURES, TOKEN_ORDER
from skipvision_export.layout import TokenLayout
from skipvision_export.tokens import GraphImage, merge, selector
from skipvision_export.tokens.ops import constant, take_rows, topk

SUMMARY_PREFIX = "skip_vision.summary."
# PyTorch's default, which the method's LayerNorm has.
EPSILON = 1e-5

Weights = Mapping[str, npt.NDArray[Any]]


class LayOutPass(ir.passes.InPlacePass):
    """Turn image_features [N, V, D] into [N, layout.total, D]: [retained][q1][skipped][q2].

    Cases:
    1. order "raster", or one group of tokens and nothing to merge or to summarize: left as it is.
    2. The configuration's selector splits the tokens in groups, most important first, each in raster
       order, ties to the lower index; where it does not look at the picture the order is a constant,
       and where that is the order they have, V may be dynamic (tiled images).
    3. More tokens than the last group has places: the configuration's merge.
    4. Summary tokens, behind the retained and behind the skipped block.

    The features as they were stay in the graph under the name `image_features.raster`, an order that
    depends on the picture under `image_features.order`; no shape depends on data. Source:
    Skip-Vision, section "choosing and merging".

    Raises PassError where scores cannot be found in the graph.
    """

    def __init__(
        self,
        config: SkipVisionConfig,
        layout: TokenLayout,
        visual_tokens: int,
        vision_layers: int,
        summary: Weights,
    ) -> None:
        """vision_layers: those that the features go through; summary: the trained weights.

        They are ada.0.weight and ada.0.bias [D] of the norm, ada.1.weight [1, D] and ada.1.bias [1]
        of the linear layer; read only where the layout has summary tokens.
        """
        super().__init__()
        self.config, self.layout, self.summary = config, layout, summary
        self.visual_tokens, self.vision_layers = visual_tokens, vision_layers

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite the vision encoder in place."""
        graph = model.graph
        features = graph.outputs[0]
        name, shape = features.name, features.shape
        assert name is not None and shape is not None
        t = tape.Tape()
        x = features if self.config.order == "raster" else self._laid_out(t, graph, features)
        if x is features:
            return ir.passes.PassResult(model, modified=False)
        features.name = RASTER_FEATURES
        x.name, x.type = name, features.type
        x.shape = ir.Shape([shape[0], self.layout.total, shape[2]])
        graph.extend(t.nodes)
        graph.outputs[0] = x
        return ir.passes.PassResult(model, modified=True)

    def _laid_out(self, t: tape.Tape, graph: ir.Graph, features: ir.Value) -> ir.Value:
        sizes = self.layout.selection_sizes()
        x = self._ordered(t, graph, features, sizes)
        if self.layout.tiers:
            return x
        assert features.shape is not None
        retained, skipped, found = sizes[0], sizes[1], features.shape[1]
        merges = skipped > 0 and found != retained + skipped
        if not merges and not self.layout.summaries:
            return x
        blocks = []
        if retained:
            blocks.append(_rows(t, x, 0, retained) if skipped else x)
        if skipped:
            rest = _rows(t, x, retained, None) if retained else x
            blocks.append(merge(self.config.merge).graph_merge(t, rest, skipped)[0] if merges else rest)
        if self.layout.summaries:
            weights = summary_weights(graph, features, self.summary)
            blocks = [part for block in blocks for part in (block, summarized(t, block, weights))]
        return t.op("Concat", blocks, {"axis": 1}) if len(blocks) > 1 else blocks[0]

    def _ordered(self, t: tape.Tape, graph: ir.Graph, features: ir.Value, sizes: Sequence[int]) -> ir.Value:
        """The features by groups; `features` itself where they stand so already."""
        if sum(size > 0 for size in sizes) < 2:
            return features
        chooser, v, seed = selector(self.config.selector), self.visual_tokens, self.config.seed
        # The last group takes what is left: it may be merged to its size.
        groups = np.repeat(np.arange(len(sizes)), [*sizes[:-1], v - sum(sizes[:-1])])
        if chooser.static:
            group = np.empty(v, np.int64)
            group[np.argsort(-chooser.static_scores(v, seed), kind="stable")] = groups
            order = np.argsort(group, kind="stable")
            if (order == np.arange(v)).all():
                return features
            return t.op("Gather", [features, constant(t, *order.tolist())], {"axis": 1})

        def scores(t: tape.Tape) -> ir.Value:
            return cls_attention(t, graph, v, self.vision_layers)

        image = GraphImage(features, scores, v)
        chosen = _order(t, chooser.graph_scores(t, image), groups)
        chosen.name = TOKEN_ORDER
        return take_rows(t, features, chosen)


def summary_weights(graph: ir.Graph, features: ir.Value, weights: Weights) -> dict[str, ir.Value]:
    """The summary's weights as named initializers in the features' type; the matrix as [D, 1]."""
    assert features.dtype is not None
    found = {}
    for name, array in weights.items():
        array = np.ascontiguousarray(array.T if array.ndim == 2 else array)
        tensor = ir.tensor(array.astype(features.dtype.numpy()), name=SUMMARY_PREFIX + name)
        value = ir.Value(name=tensor.name, const_value=tensor, shape=ir.Shape(array.shape))
        value.type = ir.TensorType(features.dtype)
        graph.register_initializer(value)
        found[name] = value
    return found


def _order(t: tape.Tape, scores: ir.Value, groups: npt.NDArray[np.int64]) -> ir.Value:
    """Scores [N, V] and the group of each rank [V] -> [N, V] int64: the token at each place."""
    v = len(groups)
    starts = constant(t, *(groups * v).tolist(), dtype=np.float32)
    places = constant(t, *range(v), dtype=np.float32)
    return grouped_order(t, scores, constant(t, v), starts, places)


def grouped_order(
    t: tape.Tape, scores: ir.Value, count: ir.Value, starts: ir.Value, places: ir.Value
) -> ir.Value:
    """Scores [N, V] -> [N, V] int64: the token at each place, by groups, each in raster order.

    count: [1] int64, V; starts: [V] float32, V times the group of each rank; places: [V] float32, 0 to V - 1.
    """
    ranked = topk(t, scores, count)[1]
    shape = t.op("Shape", [ranked])
    # Sort key: the group, then the raster index; all are distinct and exact in float32.
    starts = t.op("Expand", [starts, shape])
    zeros = t.op("Expand", [constant(t, 0, dtype=np.float32), shape])
    group = t.op("ScatterElements", [zeros, ranked, starts], {"axis": 1})
    return topk(t, t.op("Add", [group, places]), count, largest=0)[1]


def _rows(t: tape.Tape, x: ir.Value, start: int, end: int | None) -> ir.Value:
    """x[:, start:end]."""
    end = np.iinfo(np.int64).max if end is None else end
    return t.op("Slice", [x, constant(t, start), constant(t, end), constant(t, 1)])


def summarized(
    t: tape.Tape, x: ir.Value, weights: dict[str, ir.Value], by: ir.Value | None = None
) -> ir.Value:
    """[N, n, D] -> [N, 1, D]: the mean of a block, weighted by a softmax over its tokens.

    by: [N, n, D'], what the weights follow from, where it is not x itself.
    """
    normed = t.op(
        "LayerNormalization",
        [x if by is None else by, weights["ada.0.weight"], weights["ada.0.bias"]],
        {"axis": -1, "epsilon": EPSILON},
    )
    logits = t.op("MatMul", [normed, weights["ada.1.weight"]])
    logits = t.op("Add", [logits, weights["ada.1.bias"]])
    share = t.op("Softmax", [logits], {"axis": 1})
    return t.op("ReduceSum", [t.op("Mul", [share, x]), constant(t, 1)], {"keepdims": 1})
