"""Decode over one buffer of K/V: what the pass makes of a decode graph, and that numbers stay right."""

from collections import Counter

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common
import onnxruntime as ort
import pytest
from damage import another_mask, causal

from skipvision_export.graph.clean import clear_inferred_types, unique_node_names
from skipvision_export.graph.passes.names import DECODE
from skipvision_export.graph.passes.native_gqa import NativeGQAPass
from skipvision_export.graph.passes.shared_kv import SharedKVPass

LAYERS, HEADS, SIZE, WIDTH = 3, 2, 16, 64
CAPACITY = 24


@pytest.fixture
def decode(traced):
    """The random model's decode graph."""
    model = traced.trace.graphs[DECODE].clone()
    NativeGQAPass()(model)
    return model


def session(model: ir.Model) -> ort.InferenceSession:
    common.RemoveUnusedNodesPass()(model)
    clear_inferred_types(model)
    unique_node_names(model)
    return ort.InferenceSession(ir.to_proto(model).SerializeToString())


def feeds(cached: int, new: int = 1, batch: int = 1) -> tuple[dict, dict]:
    """Inputs, and K/V of `cached` positions."""
    rng = np.random.default_rng(cached)
    x = rng.standard_normal((batch, new, WIDTH)).astype(np.float32)
    inputs = {
        "inputs_embeds": x,
        "attention_mask": np.ones((batch, cached + new), np.int64),
        "position_ids": np.arange(40, 40 + new)[None].repeat(batch, 0),
    }
    names = [f"past_key_values.{i}.{kind}" for i in range(LAYERS) for kind in ("key", "value")]
    shape = (batch, HEADS, cached, SIZE)
    return inputs, {name: rng.standard_normal(shape).astype(np.float32) for name in names}


def buffered(past: dict) -> dict:
    """The same K/V at the head of buffers whose rest would poison whatever reads it."""
    poison = {n: np.full((*v.shape[:2], CAPACITY, SIZE), np.nan, np.float32) for n, v in past.items()}
    for name, value in past.items():
        poison[name][:, :, : value.shape[2]] = value
    return poison


def test_one_operator_for_each_layer(decode):
    before = Counter(node.op_type for node in decode.graph)
    assert SharedKVPass()(decode).modified
    common.RemoveUnusedNodesPass()(decode)
    after = Counter(node.op_type for node in decode.graph)
    assert (after["GroupQueryAttention"], after["Attention"]) == (LAYERS, 0)
    # no join, no mask, no splitting of heads, and their shapes' arithmetic
    assert after["Concat"] == after["Reshape"] == after["Transpose"] == after["Expand"] == 0
    assert (after["MatMul"], after["RotaryEmbedding"]) == (before["MatMul"], before["RotaryEmbedding"])
    shapes = {v.name: v.shape for v in (*decode.graph.inputs, *decode.graph.outputs)}
    assert shapes["past_key_values.1.value"] == shapes["present.1.value"] == ["batch", 2, "max_sequence", 16]


@pytest.mark.parametrize(("cached", "new", "batch"), [(0, 1, 1), (7, 1, 1), (7, 1, 2), (5, 3, 1), (23, 1, 1)])
def test_equal(decode, cached, new, batch):
    plain = session(decode.clone())
    SharedKVPass()(decode)
    inputs, past = feeds(cached, new, batch)
    want = plain.run(None, inputs | past)
    got = session(decode).run(None, inputs | buffered(past))
    np.testing.assert_allclose(got[0], want[0], atol=2e-6)
    for one, other in zip(got[1:], want[1:], strict=True):
        assert one.shape[2] == CAPACITY
        np.testing.assert_allclose(one[:, :, : cached + new], other, atol=1e-6)


def test_a_broken_twin_is_caught(decode):
    """One position too few is attended to."""
    plain = session(decode.clone())
    SharedKVPass()(decode)
    minus = next(node for node in decode.graph if node.op_type == "Sub")
    two = ir.node("Constant", [], {"value": ir.tensor(np.array([2], np.int64))})
    decode.graph.insert_before(minus, two)
    minus.replace_input_with(1, two.outputs[0])
    inputs, past = feeds(7)
    got = session(decode).run(None, inputs | buffered(past))[0]
    assert not np.allclose(got, plain.run(None, inputs | past)[0], atol=1e-3)


def no_join(node):
    node.inputs[1].producer().op_type = "Add"


@pytest.mark.parametrize("change", [another_mask, causal, no_join], ids=lambda f: f.__name__)
def test_what_does_not_match_in_every_layer_is_left_alone(decode, change):
    """A sliding window, for one, has a mask of its own."""
    change([node for node in decode.graph if node.op_type == "Attention"][1])
    before = [node.op_type for node in decode.graph]
    assert not SharedKVPass()(decode).modified
    assert [node.op_type for node in decode.graph] == before
