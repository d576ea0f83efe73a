"""Skip-FFN on small graphs: what it rewrites, what it refuses, and that numbers stay right."""

import re

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest

from skipvision_export.errors import PassError
from skipvision_export.graph.clean import clear_inferred_types, unique_node_names
from skipvision_export.graph.passes.skip_ffn import SkipFFNPass

D, HIDDEN = 8, 12
HEAD = '<ir_version: 10, opset_import: ["" : 23]>\n'
FFN = """
  n = RMSNormalization<axis=-1, epsilon=0.00001>({x}, gamma)
  up = MatMul(n, w_up)
  gate = MatMul(n, w_gate)
  sig = Sigmoid(gate)
  act = Mul(gate, sig)
  prod = Mul(act, up)
  down = MatMul(prod, w_down)
"""


def graph(body: str, out: str = "y", extra: str = "") -> ir.Model:
    """A graph over inputs_embeds [batch, sequence, 8]; shapes of the inside are inferred."""
    text = (
        HEAD + f"g (float[batch, sequence, {D}] inputs_embeds{extra}) => "
        f"(float[batch, sequence, {D}] {out})\n"
        f"<float[{D}] gamma, float[{D}, {HIDDEN}] w_up, float[{D}, {HIDDEN}] w_gate, "
        f"float[{HIDDEN}, {D}] w_down, float[{D}, {D}] w_square>\n{{{body}}}"
    )
    import onnx

    proto = onnx.parser.parse_model(text)
    rng = np.random.default_rng(0)
    given = {value.name for value in proto.graph.value_info} | {init.name for init in proto.graph.initializer}
    shapes = {
        "gamma": (D,),
        "w_up": (D, HIDDEN),
        "w_gate": (D, HIDDEN),
        "w_down": (HIDDEN, D),
        "w_square": (D, D),
    }
    del proto.graph.initializer[:], proto.graph.value_info[:]
    for name in shapes.keys() & given:
        array = rng.standard_normal(shapes[name]).astype(np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto))


def run(model: ir.Model, **feeds):
    clear_inferred_types(model)
    unique_node_names(model)
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString())
    return session.run(None, feeds)[0]


def count(model: ir.Model, kind: str) -> int:
    return sum(node.op_type == kind for node in model.graph)


@pytest.mark.parametrize("order", ["Add({x}, down)", "Add(down, {x})"])
def test_split(order):
    model = graph(FFN.format(x="inputs_embeds") + "y = " + order.format(x="inputs_embeds"))
    x = np.random.default_rng(1).standard_normal((2, 5, D)).astype(np.float32)
    dense = run(model.clone(), inputs_embeds=x)
    SkipFFNPass([1])(model)
    assert count(model, "ScatterND") == count(model, "Gather") == 1
    assert count(model, "MatMul") == 3
    index = np.array([0, 3, 6, 9], np.int64)
    out = run(model, inputs_embeds=x, ffn_index=index)
    expected = x.reshape(-1, D).copy()
    expected[index] = dense.reshape(-1, D)[index]
    np.testing.assert_allclose(out.reshape(-1, D), expected, atol=1e-6)


@pytest.mark.parametrize("index", [[], list(range(10))], ids=["none", "all"])
def test_no_rows_and_all_rows(index):
    model = graph(FFN.format(x="inputs_embeds") + "y = Add(inputs_embeds, down)")
    x = np.random.default_rng(1).standard_normal((2, 5, D)).astype(np.float32)
    dense = run(model.clone(), inputs_embeds=x)
    SkipFFNPass([1])(model)
    out = run(model, inputs_embeds=x, ffn_index=np.array(index, np.int64))
    np.testing.assert_allclose(out, dense if index else x, atol=1e-6)


def test_a_broken_twin_is_caught():
    model = graph(FFN.format(x="inputs_embeds") + "y = Add(inputs_embeds, down)")
    x = np.random.default_rng(1).standard_normal((2, 5, D)).astype(np.float32)
    dense = run(model.clone(), inputs_embeds=x)
    SkipFFNPass([1])(model)
    scatter = next(node for node in model.graph if node.op_type == "ScatterND")
    scatter.outputs[0].replace_all_uses_with(scatter.inputs[0])
    out = run(model, inputs_embeds=x, ffn_index=np.arange(10))
    assert abs(out - dense).max() > 0.1


def refuse(body: str, message: str, layers: int = 1, extra: str = "") -> None:
    with pytest.raises(PassError, match=message):
        SkipFFNPass([1] * layers)(graph(body, extra=extra))


X = "inputs_embeds"


@pytest.mark.parametrize(
    ("inside", "reason"),
    [
        ("mix = Softmax<axis=1>(up)", "Softmax.*axis 1"),
        ("mix = CumSum(up, axis_one)", "CumSum.*not known"),
        ("t = Transpose<perm=[0, 2, 1]>(up) mix = Transpose<perm=[0, 2, 1]>(t)", "Transpose"),
        ("m = ReduceMean(up, axis_one) mix = Add(up, m)", "ReduceMean.*axis 1"),
        ("mix = Add(up, per_token)", "Add.*along the tokens"),
    ],
    ids=["softmax", "cumsum", "transpose", "mean", "position-table"],
)
def test_token_mixing_is_refused_by_name(inside, reason):
    constants = """
      axis_one = Constant<value = int64[1] {1}>()
      per_token = Constant<value = float[5, 1] {1.0, 2.0, 3.0, 4.0, 5.0}>()
    """
    body = f"{constants} up = MatMul({X}, w_up) {inside} down = MatMul(mix, w_down) y = Add({X}, down)"
    refuse(body, reason)


def test_left_multiplication_is_refused():
    refuse(f"d = MatMul(w_square, {X}) y = Add({X}, d)", "mixes tokens|shape")


def test_no_ffn_is_an_error():
    refuse(f"s = Sigmoid({X}) y = Add({X}, s)", "no FFN found")


def test_another_number_than_layers_is_an_error():
    body = FFN.format(x=X) + f"y = Add({X}, down)"
    refuse(body, "found 1 FFNs in a decoder of 2 layers", layers=2)


def test_a_branch_with_another_input_is_left_alone():
    body = FFN.format(x=X) + f"h = Add({X}, down) m = Mul(h, mask) a = MatMul(m, w_square) y = Add(h, a)"
    model = graph(body, extra=f", float[batch, sequence, {D}] mask")
    SkipFFNPass([1])(model)
    assert count(model, "ScatterND") == 1


def test_a_value_read_outside_is_refused():
    body = FFN.format(x=X) + f"h = Add({X}, down) y = Add(h, n)"
    refuse(body, "also read outside|cannot be split")


KINDS = ("Tanh", "Sigmoid", "Erf")


def three() -> ir.Model:
    """Three different FFNs in a row."""
    body, x = "", X
    for i, (kind, out) in enumerate(zip(KINDS, "hiy", strict=True)):
        part = FFN.format(x=x).replace("Sigmoid", kind) + f"{out} = Add({x}, down)\n"
        body += re.sub(r"\b(n|up|gate|sig|act|prod|down)\b", rf"\1_{i}", part)
        x = out
    return graph(body)


@pytest.mark.parametrize("swapped", [False, True])
def test_tiers(swapped):
    """Layers of tier 2, 0 and 1; a twin in which two of them have each other's index."""
    x = np.random.default_rng(1).standard_normal((1, 6, D)).astype(np.float32)
    rows = {0: list(range(6)), 1: [0, 5], 2: [0, 2, 3, 5]}
    expected = x
    for kind, tier in zip(KINDS, (2, 0, 1), strict=True):
        one = graph(FFN.format(x=X).replace("Sigmoid", kind) + f"y = Add({X}, down)")
        dense = run(one, inputs_embeds=expected)
        expected = expected.copy()
        expected[:, rows[tier]] = dense[:, rows[tier]]
    model = three()
    SkipFFNPass([1, 0, 2] if swapped else [2, 0, 1])(model)
    assert count(model, "ScatterND") == 2
    assert [v.name for v in model.graph.inputs] == ["inputs_embeds", "ffn_index", "ffn_index.2"]
    feeds = {"ffn_index": np.array(rows[1]), "ffn_index.2": np.array(rows[2])}
    out = run(model, inputs_embeds=x, **feeds)
    if swapped:
        assert abs(out - expected).max() > 0.1
    else:
        np.testing.assert_allclose(out, expected, atol=1e-5)


def test_tier_zero_everywhere_leaves_the_graph():
    model = three()
    assert not SkipFFNPass([0, 0, 0])(model).modified
    assert [v.name for v in model.graph.inputs] == ["inputs_embeds"]
