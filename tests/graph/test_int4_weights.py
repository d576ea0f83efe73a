"""int4 weights: what becomes MatMulNBits, what is refused, and what numbers it computes with."""

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from skipvision_export.errors import ConfigError, PassError
from skipvision_export.graph.int4 import check_weights, quantize
from skipvision_export.graph.passes.int4_weights import BLOCK, EXACT, FAST, OP, Int4WeightsPass
from skipvision_export.validation import tensor_gap

TYPES = {"float": np.float32, "float16": np.float16}
# K with a last block that is not whole, and one with an odd number of blocks, among them.
SIZES = [(64, 24), (40, 7), (96, 33)]


def graph(k, n, name="float", body="y = MatMul(x, w)"):
    text = f"""
    <ir_version: 10, opset_import: ["" : 23]>
    g ({name}[batch, sequence, {k}] x) => ({name}[batch, sequence, {n}] y)
    <{name}[{k}, {n}] w> {{ {body} }}
    """
    proto = onnx.parser.parse_model(text)
    del proto.graph.initializer[:], proto.graph.value_info[:]
    weight = (0.1 * np.random.default_rng(0).standard_normal((k, n))).astype(TYPES[name])
    proto.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    return ir.from_proto(proto), weight


def at(model, level):
    """The accuracy level of activations."""
    for node in model.graph:
        if node.op_type == OP:
            node.attributes["accuracy_level"] = ir.AttrInt64("accuracy_level", level)
    return model


def run(model, x):
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    return ort.InferenceSession(proto.SerializeToString()).run(None, {"x": x})[0]


def numbers(weight):
    """[K, N] float32: each block of a column to 16 equal steps, the number farthest from 0 to -8.

    Written down from the operator's description, element by element, without a packed byte.
    """
    k, n = weight.shape
    made = np.zeros((k, n), np.float32)
    for start in range(0, k, BLOCK):
        for column in range(n):
            block = weight[start : start + BLOCK, column].astype(np.float32)
            scale = np.float32(block[np.abs(block).argmax()] / -8)
            steps = np.clip(np.round(block / scale), -8, 7)
            stored = scale.astype(weight.dtype).astype(np.float32)
            made[start : start + BLOCK, column] = steps * stored
    return made


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", TYPES)
def test_numbers(size, name):
    model, weight = graph(*size, name)
    x = np.random.default_rng(1).standard_normal((2, 5, size[0])).astype(TYPES[name])
    wide = x.astype(np.float32)
    full = run(model.clone(), x)
    work = Int4WeightsPass(quantize)
    assert work(model).modified
    assert work.count == 1
    assert [node.op_type for node in model.graph] == [OP]
    assert set(model.graph.initializers) == {f"w.int4.{p}" for p in ("packed", "scales")}
    exact = run(at(model, EXACT), x)
    limit = 1e-5 if name == "float" else 5e-3
    np.testing.assert_allclose(exact, wide @ numbers(weight), atol=limit)
    fast = run(at(model, FAST), x)
    assert tensor_gap(exact, fast).sqnr_db > 30
    assert 15 < tensor_gap(full, exact).sqnr_db < 30


def swap_the_halves(packed, scales):
    packed[:] = (packed >> 4) | (packed << 4)


def shift_a_scale(packed, scales):
    scales[1] *= np.asarray(1.1, scales.dtype)


@pytest.mark.parametrize("damage", [swap_the_halves, shift_a_scale])
def test_broken_twins_are_caught(damage):
    def broken(matrix):
        made = quantize(matrix)
        damage(made.packed, made.scales)
        return made

    model, weight = graph(64, 24)
    x = np.random.default_rng(1).standard_normal((2, 5, 64)).astype(np.float32)
    Int4WeightsPass(broken)(model)
    assert abs(run(at(model, EXACT), x) - x @ numbers(weight)).max() > 1e-3


def test_a_matrix_is_quantized_once():
    calls = []

    def counted(matrix):
        calls.append(matrix.shape)
        return quantize(matrix)

    first, _ = graph(64, 64, body="h = MatMul(x, w) y = MatMul(h, w)")
    second = first.clone()
    work = Int4WeightsPass(counted)
    work(first)
    work(second)
    assert work.count == 2
    assert calls == [(64, 64)]
    assert len(first.graph.initializers) == 2
    held = [m.graph.initializers["w.int4.packed"].const_value.tobytes() for m in (first, second)]
    assert held[0] == held[1]


def test_a_graph_output_keeps_its_name_and_other_readers_keep_the_weight():
    model, _ = graph(64, 64, body="h = MatMul(x, w) z = Add(h, w) y = MatMul(z, w)")
    Int4WeightsPass(quantize)(model)
    assert model.graph.outputs[0].name == "y"
    assert "w" in model.graph.initializers  # the Add reads it
    assert [node.op_type for node in model.graph] == [OP, "Add", OP]


def refuse(model, message):
    with pytest.raises(PassError, match=message):
        Int4WeightsPass(quantize)(model)


def test_what_cannot_be_is_refused_by_name():
    refuse(graph(64, 24, body="y = MatMul(x, x)")[0], "no MatMul by constant weights")
    model, weight = graph(64, 24)
    value = model.graph.initializers["w"]
    value.const_value = ir.tensor(weight.astype(np.float64), name="w")
    model.graph[0].name = "MatMul_3"
    refuse(model, r"node MatMul_3 \(MatMul, .*: w is double \[64, 24\]; expected a matrix of float32")
    value.const_value = ir.tensor(weight[None], name="w")
    refuse(model, r"float \[1, 64, 24\]")


def test_kinds_of_weights():
    assert check_weights(None, "bfloat16") is None
    assert check_weights("int4", "float16") == "int4"
    with pytest.raises(ConfigError, match="'int3' is not one of int4"):
        check_weights("int3", "float32")
    with pytest.raises(ConfigError, match=r"cannot be bfloat16.*float32 or float16"):
        check_weights("int4", "bfloat16")
