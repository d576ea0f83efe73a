"""Choosing, merging and laying out the tokens of a picture of any shape, in the vision encoder's graph."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir import tape

from skipvision_export.config import SkipVisionConfig
from skipvision_export.errors import PassError
from skipvision_export.graph.passes.lay_out import Weights, grouped_order, summarized, summary_weights
from skipvision_export.graph.passes.names import (
    GROUP_SIZES,
    PLACES,
    RASTER_FEATURES,
    TOKEN_ORDER,
    TOKEN_SCORES,
)
from skipvision_export.tokens import GraphImage, merge, selector
from skipvision_export.tokens.ops import constant, take_rows

_END = int(np.iinfo(np.int64).max)


class LayOutVaryingPass(ir.passes.InPlacePass):
    """Turn image_features [1, V, W] of one picture, whatever its V, into [1, total, W].

    As LayOutPass, with how many tokens are retained and skipped as an input, so that no rounding is done
    twice: group_sizes [2]. image_places [1, total] comes out beside: each token's index in raster order,
    that of its destination for a merged token, -1 for a summary token.

    Cases:
    1. Nothing to choose (dense), or order "raster": left as it is.
    2. A selector that does not look at the picture: its scores are an input too, token_scores [1, V].
    3. The configuration merges, or summarizes: as LayOutPass.

    Where W is more than D, what is behind the first D features goes the same ways: it neither chooses
    nor weighs. Raises PassError for scores of a CLS row, which such a vision tower has not.
    """

    def __init__(self, config: SkipVisionConfig, width: int, summary: Weights) -> None:
        """width: D; summary: see LayOutPass."""
        super().__init__()
        self.config, self.width, self.summary = config, width, summary

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite the vision encoder in place."""
        graph, config = model.graph, self.config
        if config.is_dense or config.order == "raster":
            return ir.passes.PassResult(model, modified=False)
        features = graph.outputs[0]
        name, shape = features.name, features.shape
        assert name is not None and shape is not None
        t = tape.Tape()
        x, places = self._laid_out(t, graph, features, self._main(t, features))
        features.name = RASTER_FEATURES
        x.name, x.type, x.shape = name, features.type, ir.Shape([1, "laid_out_tokens", shape[2]])
        places.name, places.type = PLACES, ir.TensorType(ir.DataType.INT64)
        places.shape = ir.Shape([1, "laid_out_tokens"])
        graph.extend(t.nodes)
        graph.outputs[0] = x
        graph.outputs.append(places)
        return ir.passes.PassResult(model, modified=True)

    def _main(self, t: tape.Tape, x: ir.Value) -> ir.Value:
        """The features that choose."""
        if x.shape is not None and x.shape[-1] == self.width:
            return x
        return t.op("Slice", [x, constant(t, 0), constant(t, self.width), constant(t, -1)])

    def _laid_out(
        self, t: tape.Tape, graph: ir.Graph, features: ir.Value, main: ir.Value
    ) -> tuple[ir.Value, ir.Value]:
        """Features and places in layout order."""
        config = self.config
        whole = main is features
        sizes = _input(graph, GROUP_SIZES, ir.DataType.INT64, [2])
        retained, skipped = (_part(t, sizes, constant(t, i), constant(t, i + 1), 0) for i in (0, 1))
        order = self._order(t, graph, main, retained)
        order.name = TOKEN_ORDER
        x = take_rows(t, features, order)
        if not (config.merges_some or config.summaries):
            return x, t.op("Identity", [order])
        zero, end = constant(t, 0), constant(t, _END)
        blocks = []
        for first, last in ((zero, retained), (retained, end)):
            blocks.append((_part(t, x, first, last, 1), _part(t, order, first, last, 1)))
        if config.merges_some:
            rest, places = blocks[1]
            by = rest if whole else self._main(t, rest)
            merged, chosen = merge(config.merge).graph_merge(t, rest, skipped, by)
            blocks[1] = merged, t.op("GatherElements", [places, chosen], {"axis": 1})
        if config.summaries:
            weights = summary_weights(graph, features, self.summary)
            none = t.op("Constant", [], {"value": ir.tensor(np.array([[-1]], np.int64))})
            for i in (1, 0):
                block = blocks[i][0]
                pooled = summarized(t, block, weights, block if whole else self._main(t, block))
                blocks.insert(i + 1, (pooled, none))
        joined = (t.op("Concat", list(parts), {"axis": 1}) for parts in zip(*blocks, strict=True))
        laid, at = joined
        return laid, at

    def _order(self, t: tape.Tape, graph: ir.Graph, main: ir.Value, retained: ir.Value) -> ir.Value:
        """[1, V] int64: retained tokens first, both groups in raster order."""
        chooser = selector(self.config.selector)
        count = t.op("Shape", [main], {"start": 1, "end": 2})
        if chooser.static:
            scores = _input(graph, TOKEN_SCORES, ir.DataType.FLOAT, [1, "visual_tokens"])
        else:
            scores = chooser.graph_scores(t, GraphImage(main, _no_cls_row, count))
        start, step = (t.op("Constant", [], {"value_int": i}) for i in (0, 1))
        place = t.op("Range", [start, t.op("Squeeze", [count]), step])
        first = t.op("Less", [place, retained])
        wide = t.op("Cast", [count], {"to": ir.DataType.FLOAT})
        starts = t.op("Where", [first, constant(t, 0, dtype=np.float32), wide])
        places = t.op("Cast", [place], {"to": ir.DataType.FLOAT})
        return grouped_order(t, scores, count, starts, places)


def _no_cls_row(t: tape.Tape) -> ir.Value:
    raise PassError("cls_attention needs a vision tower with a CLS row; use another selector, such as dart")


def _input(graph: ir.Graph, name: str, dtype: ir.DataType, shape: list[int | str]) -> ir.Value:
    value = ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
    graph.inputs.append(value)
    return value


def _part(t: tape.Tape, x: ir.Value, start: ir.Value, end: ir.Value, axis: int) -> ir.Value:
    """x[start:end] along an axis."""
    return t.op("Slice", [x, start, end, constant(t, axis)])
