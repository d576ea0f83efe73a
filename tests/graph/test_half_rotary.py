"""RotaryEmbedding out of a half type's rotation."""

from collections import Counter

import numpy as np
import onnx
import onnx_ir as ir
import onnx_ir.passes.common as common
import onnxruntime as ort
import pytest

from skipvision_export.graph.clean import unique_node_names
from skipvision_export.graph.passes.half_rotary import HalfRotaryPass
from skipvision_export.graph.widen import widen

TO = {"float16": 10, "bfloat16": 16, "float": 1}


def rotation(name: str = "float16", **changes: str) -> ir.Model:
    """q and k of 4 and 2 heads of 8, as the tracer leaves them; changes: parts to replace."""
    part = {
        "join": "Concat<axis = -1>(n_{x}, f_{x})",
        "angles": "twice",
        "axis": "one",
        "cut": "half",
        "order": "Add(a_{x}, b_{x})",
    } | changes
    out = f"{name}[b, %d, s, 8]"
    body = ""
    for x in "qk":
        body += f"""
        f_{x} = Slice({x}, zero, {part["cut"]}, three, one)
        l_{x} = Slice({x}, half, end, three, one)
        n_{x} = Neg(l_{x})
        h_{x} = {part["join"].format(x=x)}
        a_{x} = Mul({x}, cos)
        b_{x} = Mul(h_{x}, sin)
        r_{x} = {part["order"].format(x=x)}"""
    text = f"""
    <ir_version: 10, opset_import: ["" : 23]>
    g ({out % 4} q, {out % 2} k, float[b, s, 4] angles, float[b, s, 4] others)
    => ({out % 4} r_q, {out % 2} r_k)
    <int64[1] zero = {{0}}, int64[1] half = {{4}}, int64[1] end = {{9223372036854775807}},
     int64[1] three = {{3}}, int64[1] one = {{1}}, int64[1] two = {{2}}>
    {{
        twice = Concat<axis = -1>(angles, angles)
        different = Concat<axis = -1>(angles, others)
        wave = Cos({part["angles"]})
        other = Sin(twice)
        c = Cast<to = {TO[name]}>(wave)
        d = Cast<to = {TO[name]}>(other)
        cos = Unsqueeze(c, {part["axis"]})
        sin = Unsqueeze(d, one)
        {body}
    }}
    """
    return ir.from_proto(onnx.parser.parse_model(text))


def fused(model: ir.Model) -> ir.Model:
    result = HalfRotaryPass()(model)
    common.RemoveUnusedNodesPass()(model)
    unique_node_names(model)
    assert result.modified == any(node.op_type == "RotaryEmbedding" for node in model.graph)
    return model


def run(model: ir.Model, dtype) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    feeds = {
        "q": rng.standard_normal((2, 4, 5, 8)).astype(dtype),
        "k": rng.standard_normal((2, 2, 5, 8)).astype(dtype),
        "angles": rng.uniform(0, 50, (2, 5, 4)).astype(np.float32),
        "others": rng.uniform(0, 50, (2, 5, 4)).astype(np.float32),
    }
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), options)
    return session.run(None, feeds)


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_two_rotations_become_two_operators(name):
    model = fused(rotation(name))
    ops = Counter(node.op_type for node in model.graph)
    assert ops == {"Cos": 1, "Sin": 1, "Cast": 2, "RotaryEmbedding": 2}
    heads = [n.attributes.get_int("num_heads", 0) for n in model.graph if n.op_type == "RotaryEmbedding"]
    assert heads == [4, 2]
    assert [v.name for v in model.graph.outputs] == ["r_q", "r_k"]
    onnx.checker.check_model(ir.to_proto(model), full_check=True)


@pytest.mark.parametrize("name", ["float16", "bfloat16"])
def test_exact_but_for_rounding(name):
    for got, want in zip(
        run(widen(fused(rotation(name))), "f4"), run(widen(rotation(name)), "f4"), strict=True
    ):
        np.testing.assert_allclose(got, want, atol=1e-6)


def test_float16_rounds_alike():
    for got, want in zip(run(fused(rotation()), "f2"), run(rotation(), "f2"), strict=True):
        np.testing.assert_allclose(got.astype("f4"), want.astype("f4"), atol=2**-9)


def test_either_order_of_the_sum():
    model = fused(rotation(order="Add(b_{x}, a_{x})"))
    assert sum(node.op_type == "RotaryEmbedding" for node in model.graph) == 2


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "float"},  # the tracer's own rule is for these
        {"join": "Concat<axis = -1>(f_{x}, n_{x})"},  # turned the other way
        {"join": "Concat<axis = -1>(l_{x}, f_{x})"},  # not negated
        {"angles": "different"},
        {"order": "Sub(a_{x}, b_{x})"},
        {"cut": "two"},  # halves that are not equal; joined they are not 8 wide
    ],
    ids=lambda changes: next(iter(changes.items()))[1],
)
def test_what_is_no_rotation_is_left_alone(changes):
    model = rotation(**changes)
    before = Counter(node.op_type for node in model.graph)
    assert not HalfRotaryPass()(model).modified
    assert Counter(node.op_type for node in model.graph) == before


def test_a_swapped_table_is_seen():
    model = fused(rotation())
    for node in model.graph:
        if node.op_type == "RotaryEmbedding":
            cos, sin = node.inputs[1:]
            node.replace_input_with(1, sin)
            node.replace_input_with(2, cos)
    got, want = run(widen(model), "f4"), run(widen(rotation()), "f4")
    assert all(abs(a - b).max() > 0.1 for a, b in zip(got, want, strict=True))
