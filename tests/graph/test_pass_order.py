"""Passes in a wrong order are refused, each by its own condition."""

import onnx_ir as ir
import pytest

from skipvision_export.graph.passes import kv_prune
from skipvision_export.graph.passes.kv_prune import KVPrunePass
from skipvision_export.graph.passes.last_layer import LastLayerPass
from skipvision_export.graph.passes.names import DECODE, PREFILL
from skipvision_export.graph.passes.native_gqa import NativeGQAPass
from skipvision_export.graph.passes.shared_kv import SharedKVPass
from skipvision_export.graph.passes.skip_ffn import SkipFFNPass
from skipvision_export.graph.passes.strict_mask import StrictMaskPass

SKIP, KV = SkipFFNPass([1, 1, 1]), KVPrunePass(3)


@pytest.mark.parametrize(
    ("graph", "passes", "message"),
    [
        (PREFILL, [SKIP, LastLayerPass()], "LastLayer runs before SkipFFN"),
        (PREFILL, [LastLayerPass(), StrictMaskPass()], "StrictMask runs before LastLayer"),
        (PREFILL, [SKIP, SKIP], "SkipFFN runs once"),
        (PREFILL, [KV, KV], "KVPrune runs once"),
        (DECODE, [SharedKVPass()], "SharedKV runs after NativeGQA"),
    ],
)
def test_a_wrong_order_is_refused(traced, graph, passes, message):
    model = traced.trace.graphs[graph].clone()
    for each in passes[:-1]:
        each(model)
    with pytest.raises(ir.passes.PreconditionError, match=message):
        passes[-1](model)


def test_the_right_order_is_not(traced):
    model = traced.trace.graphs[PREFILL].clone()
    for each in (NativeGQAPass(), StrictMaskPass(), LastLayerPass(), SKIP, KV):
        assert each(model).modified


def test_fused_residuals_are_refused(traced):
    model = traced.trace.graphs[PREFILL].clone()
    next(node for node in model.graph if node.op_type == "Add").op_type = "SkipSimplifiedLayerNormalization"
    with pytest.raises(ir.passes.PreconditionError, match="before residual adds are fused"):
        SKIP(model)


def test_a_layer_left_whole_is_caught(traced, monkeypatch):
    monkeypatch.setattr(kv_prune, "made_by", lambda value, kind: None)
    with pytest.raises(ir.passes.PostconditionError, match="is not pruned"):
        KV(traced.trace.graphs[PREFILL].clone())
