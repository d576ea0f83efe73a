"""FFNs in the forms that other exporters give them: skipped rows pass by, kept rows are as before."""

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from skipvision_export.errors import PassError
from skipvision_export.graph.others import OthersDecoder
from skipvision_export.graph.passes import SKIP_FFN_OPSET, SKIP_KV_OPSET
from skipvision_export.graph.passes.cached_positions import CachedPositionsPass

D, HIDDEN, B, S = 32, 64, 2, 5
SHAPES = {
    "gamma": (D,),
    "beta": (D,),
    "b_down": (D,),
    "b_up": (HIDDEN,),
    "b_row": (1, D),
    "w_up": (D, HIDDEN),
    "w_gate": (D, HIDDEN),
    "w_both": (D, 2 * HIDDEN),
    "w_down": (HIDDEN, D),
    "w_first": (D, D),
    "w_route": (D, 4),
    "experts_up": (4, 2 * HIDDEN, D),
    "experts_down": (4, D, HIDDEN),
}
INTS = {
    "flat_up": [-1, D],
    "flat_down": [-1, HIDDEN],
    "back": [0, -1, D],
    "pair": [-1, 2 * D],
    "lead": [0, 1],
    "width": [D],
    "zero": [0],
    "flat_route": [-1, 4],
    "one_up": [1],
    "first_axis": [0],
    "half": [HIDDEN],
    "end": [2 * HIDDEN],
    "last": [-1],
    "turned": [0, D, -1],
    "per_row": [B, S, D],
}
PACKED = {"q": (HIDDEN, D // 32, 16), "s": (HIDDEN * D // 32,)}


def decoder(body, opset=23, outputs=f"float[batch, sequence, {D}] y", inputs=""):
    """A graph over inputs_embeds `x` and `y`, the sum and its norm of ONNX Runtime's included."""
    text = (
        f'<ir_version: 10, opset_import: ["" : {opset}, "com.microsoft" : 1]> '
        f"g (float[batch, sequence, {D}] inputs_embeds{inputs}) => ({outputs}) {{{body}}}"
    )
    proto = onnx.parser.parse_model(text)
    rng = np.random.default_rng(0)
    arrays = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}
    arrays |= {name: np.array(values, np.int64) for name, values in INTS.items()}
    arrays |= {"first": np.array(0), "second": np.array(1), "nought": np.array(0, np.float32)}
    arrays |= {"q": rng.integers(0, 255, PACKED["q"]).astype(np.uint8)}
    arrays |= {"s": rng.random(PACKED["s"]).astype(np.float32)}
    read = {name for node in proto.graph.node for name in node.input}
    for name in sorted(arrays.keys() & read):
        proto.graph.initializer.append(onnx.numpy_helper.from_array(arrays[name], name))
    for i, node in enumerate(proto.graph.node):
        node.name = node.name or f"{node.op_type}_{i}"
    return proto


def run(proto, **feeds):
    return ort.InferenceSession(proto.SerializeToString()).run(None, feeds)


X = "inputs_embeds"
# Two experts as they are traced, on the rows that chose them.
MIXTURE = """f = Reshape(n, flat_up) r = MatMul(f, w_route) soft = Softmax<axis=-1>(r)
    best, at = TopK(soft, one_up) size = Shape(f) none = Expand(nought, size)
    e0 = Equal(at, first) w0 = Where(e0, best, nought) o0 = ReduceSum<keepdims=1>(w0, last)
    f0 = NonZero(o0) t0 = Transpose<perm=[1, 0]>(f0) i0 = Gather<axis=1>(t0, first) c0 = Unsqueeze(i0, one_up)
    h0 = GatherND(f, c0) u0 = MatMul(h0, w_up) a0 = Relu(u0) d0 = MatMul(a0, w_down) p0 = GatherND(o0, c0)
    m0 = Mul(d0, p0) y0 = ScatterND<reduction="add">(none, c0, m0)
    e1 = Equal(at, second) w1 = Where(e1, best, nought) o1 = ReduceSum<keepdims=1>(w1, last)
    f1 = NonZero(o1) t1 = Transpose<perm=[1, 0]>(f1) i1 = Gather<axis=1>(t1, first) c1 = Unsqueeze(i1, one_up)
    h1 = GatherND(f, c1) m1 = MatMul(h1, w_first) y1 = ScatterND<reduction="add">(y0, c1, m1)
    shape = Shape(n) d = Reshape(y1, shape)"""
NORM = f"n = LayerNormalization<axis=-1>({X}, gamma, beta) "
FORMS = {
    "gemm": NORM
    + """f = Reshape(n, flat_up) u = Gemm(f, w_up, b_up) a = Relu(u) d = Gemm(a, w_down, b_down)
    shape = Shape(n) down = Reshape(d, shape)"""
    + f" y = Add({X}, down)",
    "gemm, sizes one by one": NORM
    + f"""size = Shape({X}) head = Gather(size, lead) f = Reshape(n, flat_up)
    u = Gemm(f, w_up, b_up) a = com.microsoft.Gelu(u) d = Gemm(a, w_down) to = Concat<axis=0>(head, width)
    down = Reshape(d, to) y = Add(down, {X})""",
    "gemm, batch from a zero": NORM
    + f"f = Reshape(n, flat_up) d = Gemm(f, w_first) b = Shape<end=1>(n) to = Concat<axis=0>(b, last, width) "
    f"down = Reshape(d, to) y = Add({X}, down)",
    "packed, split": NORM
    + """p = MatMul(n, w_both) g, u = Split<axis=-1, num_outputs=2>(p)
    a = com.microsoft.QuickGelu<alpha=1.0>(g) m = Mul(a, u) down = MatMul(m, w_down)"""
    + f" y = Add({X}, down)",
    "packed, slice": NORM
    + """p = MatMul(n, w_both) g = Slice(p, zero, half, last) u = Slice(p, half, end, last)
    e = Sigmoid(g) a = Mul(g, e) m = Mul(a, u) down = MatMul(m, w_down)"""
    + f" y = Add({X}, down)",
    "int4": NORM
    + f"""u = com.microsoft.MatMulNBits<K={D}, N={HIDDEN}, bits=4, block_size=32>(n, q, s)
    a = com.microsoft.FastGelu(u, b_up) down = MatMul(a, w_down) y = Add({X}, down)""",
    "bias and gelu in one": NORM
    + f"u = MatMul(n, w_up) a = com.microsoft.BiasGelu(u, b_up) d = MatMul(a, w_down) y = Add({X}, d)",
    "experts": NORM
    + """r = MatMul(n, w_route) flat = Reshape(r, flat_route)
    d = com.microsoft.MoE<k=2, activation_type="swiglu", swiglu_fusion=1, normalize_routing_weights=1>
    (n, flat, experts_up, , experts_down)"""
    + f" y = Add({X}, d)",
    "experts of plain operators": NORM + MIXTURE + f" y = Add({X}, d)",
    "fused sums": f"""m = Mul(other, other)
    n, u0, u1, t = com.microsoft.SkipLayerNormalization<epsilon=0.00001>({X}, m, gamma, beta)
    u = MatMul(n, w_up) a = Relu(u) d = MatMul(a, w_down)
    y0, u2, u3, y = com.microsoft.SkipLayerNormalization<epsilon=0.00001>(t, d, gamma, beta, b_down)""",
    "fused RMS": f"""n = SimplifiedLayerNormalization<axis=-1, epsilon=0.00001, stash_type=1>({X}, gamma)
    u = MatMul(n, w_up) a = Relu(u) d = MatMul(a, w_down)
    y0, u2, u3, y = com.microsoft.SkipSimplifiedLayerNormalization<epsilon=0.00001>(d, {X}, gamma, b_down)""",
}


@pytest.mark.parametrize("form", FORMS)
def test_kept_rows_are_as_before_and_others_pass_by(form):
    body = FORMS[form]
    inputs = f", float[batch, sequence, {D}] other" if "other" in body else ""
    dense = decoder(body, inputs=inputs)
    made = OthersDecoder(decoder(body, inputs=inputs), None)
    assert made.num_layers == 1
    skip = made.rewrite([1])
    rng = np.random.default_rng(1)
    x = rng.standard_normal((B, S, D)).astype(np.float32)
    feeds = {X: x} | ({"other": rng.standard_normal((B, S, D)).astype(np.float32)} if inputs else {})
    whole = run(dense, **feeds)[0]
    np.testing.assert_allclose(run(skip, **feeds, ffn_index=np.arange(B * S))[0], whole, rtol=1e-5, atol=1e-5)
    rows = np.array([1, 4, 7])
    found = run(skip, **feeds, ffn_index=rows)[0].reshape(-1, D)
    trunk = (x + feeds["other"] ** 2 if inputs else x).reshape(-1, D)
    np.testing.assert_allclose(found[rows], whole.reshape(-1, D)[rows], rtol=1e-5, atol=1e-5)
    others = np.setdiff1d(np.arange(B * S), rows)
    np.testing.assert_allclose(found[others], trunk[others], rtol=1e-6, atol=1e-6)
    assert np.abs(whole.reshape(-1, D)[others] - trunk[others]).max() > 0.1


@pytest.mark.parametrize(
    ("inside", "reason"),
    [
        ("d = MatMul(n, w_first) f = Reshape(d, pair) down = Reshape(f, back)", "Reshape.*may mix them"),
        ("t = Reshape(n, turned) d = Reshape(t, back) down = MatMul(d, w_first)", "Reshape.*may mix them"),
        ("d = MatMul(n, w_first) down = Reshape(d, per_row)", "Reshape.*may mix them"),
        (
            "d = MatMul(n, w_first) z = Shape(n) c = Cast<to=1>(z) r = ReduceSum(c, zero) down = Div(d, r)",
            "makes a size in a way that is not followed",
        ),
        (
            "d = MatMul(n, w_first) z = Shape<start=1, end=2>(n) c = Cast<to=1>(z) down = Div(d, c)",
            "Div.*computes with the number of tokens",
        ),
        ("f = Reshape(n, flat_up) g = Gemm<transA=1>(f, w_first) down = Reshape(g, back)", "Gemm.*turns"),
        ("f = Reshape(n, flat_up) d = Gemm(f, w_first) down = Mul(d, n)", "Mul.*joins tokens"),
        ("d = MatMul(n, w_first) down = com.microsoft.Whatever(d)", "Whatever.*not known"),
        (
            "d = MatMul(n, w_route) down = com.microsoft.MoE<k=2>(n, d, n, , experts_down)",
            "MoE.*no constants, but n",
        ),
        ("d = MatMul(n, w_first) down = com.microsoft.QMoE<k=1>(w_first, d, q)", "QMoE.*from elsewhere"),
    ],
)
def test_what_is_not_proved_is_refused(inside, reason):
    body = NORM + inside + f" y = Add({X}, down)"
    with pytest.raises(PassError, match=reason):
        OthersDecoder(decoder(body), None).rewrite([1])


@pytest.mark.parametrize(
    ("part", "instead", "reason"),
    [
        (
            'ScatterND<reduction="add">(y0, c1, m1)',
            "ScatterND(y0, c0, m1)",
            "ScatterND.*more with picked rows",
        ),
        ("m1 = MatMul(h1, w_first)", "m1 = Mul(h1, h0)", "Mul.*picked apart"),
        ("p0 = GatherND(o0, c0)", "p0 = Identity(o0)", "Mul.*picked apart"),
        (
            "a0 = Relu(u0)",
            "z0 = Shape(u0) q0 = Cast<to=1>(z0) b0 = ReduceMax(q0) a0 = Div(u0, b0)",
            "Shape.*counts",
        ),
        (
            "a0 = Relu(u0)",
            "b0 = ReduceMax<keepdims=1>(u0, first_axis) a0 = Sub(u0, b0)",
            "ReduceMax.*along axis 0",
        ),
        ("f0 = NonZero(o0)", "f0 = NonZero(soft)", "NonZero.*one number of each row"),
        (
            "i0 = Gather<axis=1>(t0, first)",
            "i0 = Gather<axis=1>(t0, second)",
            "Gather.*more with picked rows",
        ),
        (
            "h0 = GatherND(f, c0)",
            "k0 = Cast<to=1>(i0) v0 = Unsqueeze(k0, one_up) h0 = Mul(v0, v0)",
            "Cast.*picked",
        ),
        ("TopK(soft, one_up)", "TopK<axis=0>(soft, one_up)", "TopK.*along axis 0"),
        ("Softmax<axis=-1>(r)", "Softmax<axis=0>(r)", "Softmax.*along axis 0"),
        ("none = Expand(nought, size)", "none = Expand(b_row, size)", "Expand.*one number"),
    ],
)
def test_experts_whose_rows_may_mix_are_refused(part, instead, reason):
    assert part in MIXTURE
    body = NORM + MIXTURE.replace(part, instead) + f" y = Add({X}, d)"
    with pytest.raises(PassError, match=reason):
        OthersDecoder(decoder(body), None).rewrite([1])


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (
            f"m = MatMul({X}, w_first) k = MatMul({X}, w_first) "
            f"y = com.microsoft.SkipLayerNormalization<epsilon=0.00001>(m, k, gamma, beta, b_down)",
            "belongs to neither summand",
        ),
        (
            f"m = MatMul({X}, w_first) n, mean = com.microsoft.SkipLayerNormalization<epsilon=0.00001>"
            f"({X}, m, gamma, beta) y = Add(n, mean)",
            "something reads its statistics mean",
        ),
    ],
)
def test_a_fused_sum_that_cannot_be_taken_apart_is_named(body, reason):
    with pytest.raises(PassError, match=f"node SkipLayerNormalization_.*{reason}"):
        OthersDecoder(decoder(body), None)


def test_one_position_of_each_sequence_is_refused():
    body = (
        f"h = Gather<axis=1>({X}, last) u = MatMul(h, w_up) a = Relu(u) d = MatMul(a, w_down) y = Add(h, d)"
    )
    with pytest.raises(PassError, match="one position of each sequence, and nothing says which"):
        OthersDecoder(decoder(body, outputs=f"float[batch, 1, {D}] y"), None)


@pytest.mark.parametrize(("keep_kv", "least"), [(True, SKIP_FFN_OPSET), (False, SKIP_KV_OPSET)])
def test_the_least_opset_is_the_least(keep_kv, least):
    """What is put in exists there, and not all of it in the opset before."""
    past = "float[batch, 2, sequence, 16]"
    body = f"""c = Cos(position_ids) present_0_key = Mul(past, c) present_0_value = Identity(past)
    g = ReduceMean<axes=[-1], keepdims=0>(present_0_key) p = ReduceMean<axes=[1], keepdims=0>(g)
    h = Unsqueeze(p, last) x = Add({X}, h) u = MatMul(x, w_up) a = Relu(u) d = MatMul(a, w_down)
    y = Add(x, d)"""
    outputs = f"float[batch, sequence, {D}] y, {past} present_0_key, {past} present_0_value"
    given = f", {past} past, float[batch, 1, sequence, 16] position_ids"
    proto = decoder(body, least, outputs, given)
    skip = OthersDecoder(proto, None).rewrite([1], keep_kv)
    onnx.checker.check_model(skip, full_check=True)
    for entry in (skip.opset_import, *(function.opset_import for function in skip.functions)):
        next(each for each in entry if each.domain == "").version = least - 1
    with pytest.raises(onnx.checker.ValidationError):
        onnx.checker.check_model(skip)


GQA = "com.microsoft.GroupQueryAttention<num_heads=2, kv_num_heads=2, {}>" + f"({X}, {X}, {X})"


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (
            f"y = {GQA.format('do_rotary=1, local_window_size=8')}",
            "GroupQueryAttention.*window counts cached",
        ),
        ("y = com.microsoft.Attention<do_rotary=1>(inputs_embeds, w_first)", "Attention.*number of cached"),
        (f"a = {GQA.format('do_rotary=0')} y = Relu(a)", "nothing in the graph reads position_ids"),
        (f"a = {GQA.format('do_rotary=1')} y = Sin(a)", "Sin.*positions that are not position_ids"),
        (
            "size = Shape(inputs_embeds) h = Mul(inputs_embeds, position_ids) "
            "y = com.microsoft.RotaryEmbedding(h, size, gamma, gamma)",
            "RotaryEmbedding.*positions that are not position_ids",
        ),
    ],
)
def test_positions_that_count_cached_tokens_are_refused(body, reason):
    given = ", float[batch, sequence, 1] position_ids" if "position_ids" in body else ""
    with pytest.raises(PassError, match=f"cannot be pruned.*{reason}.*--keep-kv"):
        CachedPositionsPass()(ir.from_proto(decoder(body, inputs=given)))


def test_positions_become_an_input_of_each_attention():
    model = ir.from_proto(decoder(f"a = {GQA.format('do_rotary=1')} y = {GQA.format('do_rotary=1')}"))
    assert CachedPositionsPass()(model).modified
    (given,) = (value for value in model.graph.inputs if value.name == "position_ids")
    assert [str(size) for size in given.shape] == ["batch", "sequence"]
    assert [node.inputs[9] for node in model.graph] == [given, given]
    assert not CachedPositionsPass()(model).modified
