"""The last layer computed for the last position: what moves, what stays, and that numbers stay right."""

from collections import Counter

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from skipvision_export.graph.clean import clear_inferred_types, unique_node_names
from skipvision_export.graph.passes.last_layer import LastLayerPass
from skipvision_export.graph.passes.skip_ffn import SkipFFNPass

D, H, DH = 16, 4, 4
LAYER = """
    n{i} = RMSNormalization<axis = -1>({x}, gamma)
    q{i} = MatMul(n{i}, w0)  q4{i} = Reshape<allowzero = 1>(q{i}, heads)
    k{i} = MatMul(n{i}, w1)  k4{i} = Reshape<allowzero = 1>(k{i}, heads)
    v{i} = MatMul(n{i}, w2)  v4{i} = Reshape<allowzero = 1>(v{i}, heads)
    qt{i} = Transpose<perm = [0, 2, 1, 3]>(q4{i})
    kt{i} = Transpose<perm = [0, 2, 1, 3]>(k4{i})
    value{i} = Transpose<perm = [0, 2, 1, 3]>(v4{i})
    qr{i} = RotaryEmbedding(qt{i}, cos, sin)
    key{i} = RotaryEmbedding(kt{i}, cos, sin)
    a{i} = {attention}
    at{i} = Transpose<perm = [0, 2, 1, 3]>(a{i})
    af{i} = Reshape<allowzero = 1>(at{i}, flat)
    o{i} = MatMul(af{i}, w3)
    r{i} = Add({x}, o{i})
    m{i} = RMSNormalization<axis = -1>(r{i}, gamma)
    u{i} = MatMul(m{i}, up)  s{i} = Sigmoid(u{i})  g{i} = Mul(u{i}, s{i})
    d{i} = MatMul(g{i}, down)
    x{i} = Add(r{i}, d{i})
"""
ATTENTION = "Attention(qr{i}, key{i}, value{i}, mask)"


def decoder(layers: int = 2, attention: str = ATTENTION, start: str = "minus", end: str = "far") -> ir.Model:
    """A decoder with K and V of each layer beside its logits, as the tracer leaves it."""
    body, x = "", "inputs_embeds"
    for i in range(layers):
        body += LAYER.format(i=i, x=x, attention=attention.format(i=i))
        x = f"x{i}"
    kv = [f"float[batch, {H}, sequence, {DH}] {n}{i}" for i in range(layers) for n in ("key", "value")]
    text = f"""
    <ir_version: 10, opset_import: ["" : 23]>
    g (float[batch, sequence, {D}] inputs_embeds, bool[batch, 1, sequence, sequence] mask,
       float[batch, sequence, {DH // 2}] cos, float[batch, sequence, {DH // 2}] sin)
    => (float[batch, one, 32] logits, {", ".join(kv)})
    <float[{D}] gamma, float[{D}, {D}] w0, float[{D}, {D}] w1, float[{D}, {D}] w2, float[{D}, {D}] w3,
     float[{D}, 24] up, float[24, {D}] down, float[{D}, 32] head,
     int64[1] minus = {{-1}}, int64[1] first = {{0}}, int64[1] far = {{9223372036854775807}},
     int64[1] axis = {{1}}, int64[1] step = {{1}}, int64[1] h = {{{H}}}, int64[1] dh = {{{DH}}},
     int64[1] dim = {{{D}}}>
    {{
        b = Shape<start = 0, end = 1>(inputs_embeds)  s = Shape<start = 1, end = 2>(inputs_embeds)
        heads = Concat<axis = 0>(b, s, h, dh)  flat = Concat<axis = 0>(b, s, dim)
        {body}
        norm = RMSNormalization<axis = -1>({x}, gamma)
        last = Slice(norm, {start}, {end}, axis, step)
        logits = MatMul(last, head)
    }}
    """
    proto = onnx.parser.parse_model(text)
    rng = np.random.default_rng(0)
    for value in proto.graph.value_info:
        shape = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        array = rng.standard_normal(shape).astype(np.float32) / 2
        proto.graph.initializer.append(onnx.numpy_helper.from_array(array, value.name))
    del proto.graph.value_info[:]
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto, data_prop=True))


def feeds(batch: int = 2, length: int = 5) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    angle = rng.standard_normal((batch, length, DH // 2)).astype(np.float32)
    mask = np.tril(np.ones((length, length), bool))[None, None].repeat(batch, 0)
    mask[0, :, 1:, 0] = False  # padded on the left
    x = rng.standard_normal((batch, length, D)).astype(np.float32)
    return {"inputs_embeds": x, "mask": mask, "cos": np.cos(angle), "sin": np.sin(angle)}


def run(model: ir.Model, **more: np.ndarray) -> list[np.ndarray]:
    clear_inferred_types(model)
    unique_node_names(model)
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(proto.SerializeToString(), options).run(None, feeds() | more)


def reduced(model: ir.Model) -> bool:
    return LastLayerPass()(model).modified


@pytest.mark.parametrize("layers", [1, 2])
def test_equal_and_one_row(layers):
    model = decoder(layers)
    before = run(model.clone())
    nodes = Counter(node.op_type for node in model.graph)
    assert reduced(model)
    shapes = {node.op_type: node.outputs[0].shape for node in model.graph}
    assert shapes["Attention"][2] == shapes["Sigmoid"][1] == 1
    # x, n, q's two tables and the mask are cut instead of the norm's output.
    after = Counter(node.op_type for node in model.graph)
    assert after["Gather"] == nodes["Gather"] + 5
    assert after["Slice"] == 0
    assert after["MatMul"] == nodes["MatMul"]
    for one, other in zip(before, run(model), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-6)


def test_rows_of_the_last_layer():
    """Only K's and V's products of the last layer, and all of the first layer's, have every row."""
    model = decoder(2)
    reduced(model)
    whole = [n.inputs[1].name for n in model.graph if n.op_type == "MatMul" and n.outputs[0].shape[1] != 1]
    assert whole.pop() == "head"  # its one position is not in its declared shape
    assert whole == ["w0", "w1", "w2", "w3", "up", "down", "w1", "w2"]


@pytest.mark.parametrize(
    "changes",
    [
        {"attention": "Attention<is_causal = 1>(qr{i}, key{i}, value{i})"},
        {"start": "first"},
    ],
    ids=["causal by attribute", "every position"],
)
def test_what_cannot_be_reduced_stays_right(changes):
    """With is_causal a single query would see the first key alone: the cut stops behind Attention."""
    model = decoder(2, **changes)
    before = run(model.clone())
    reduced(model)
    attention = [node for node in model.graph if node.op_type == "Attention"]
    assert all(node.outputs[0].shape[2] != 1 for node in attention)
    for one, other in zip(before, run(model), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-6)


@pytest.mark.parametrize("name", ["qr1", "mask", "r0"])
def test_a_broken_twin_is_caught(name):
    """The first position instead of the last, in one of the cuts."""
    model = decoder(2)
    before = run(model.clone())
    reduced(model)
    cuts = [n for n in model.graph if n.op_type == "Gather"]
    cut = {"qr1": cuts[0], "mask": cuts[-2], "r0": cuts[-1]}[name]
    cut.replace_input_with(1, model.graph.initializers["first"])
    assert abs(before[0] - run(model)[0]).max() > 1e-2


@pytest.mark.parametrize("index", [[4, 9], [0, 9], []], ids=["both", "one", "none"])
def test_skip_ffn_of_the_last_row(index):
    """The last position's FFN is taken where the index names it, as for every other row."""
    chosen = np.array(index, np.int64)
    whole, model = decoder(2), decoder(2)
    SkipFFNPass([1, 1])(whole)
    reduced(model)
    SkipFFNPass([1, 1])(model)
    assert Counter(n.op_type for n in model.graph)["ScatterND"] == 1
    for one, other in zip(run(whole, ffn_index=chosen), run(model, ffn_index=chosen), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-6)
    # and a choice that takes it all the same is told apart
    where = next(n for n in model.graph if n.op_type == "Where")
    where.outputs[0].replace_all_uses_with(where.inputs[1])
    difference = abs(run(whole, ffn_index=chosen)[0] - run(model, ffn_index=chosen)[0]).max()
    assert difference < 2e-6 if index == [4, 9] else difference > 1e-2


def test_an_ffn_that_cannot_be_cut_whole_stays_whole():
    """SkipFFN has to find it: half an FFN of one row is none."""
    model = decoder(2)
    before = run(model.clone())
    gate = next(n for n in model.graph if n.op_type == "Sigmoid" and n.outputs[0].name == "s1")
    gate.outputs[0].shape = None
    gate.outputs[0].type = None
    assert not reduced(model)
    SkipFFNPass([1, 1])(model)
    for one, other in zip(before, run(model, ffn_index=np.arange(10)), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-6)
