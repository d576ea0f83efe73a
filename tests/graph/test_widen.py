"""Widening half types to float32."""

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest

from skipvision_export.graph.widen import half_types, widen

TYPES = {"float16": (np.float16, 10), "bfloat16": (ml_dtypes.bfloat16, 16)}


def half_model(name: str) -> ir.Model:
    """Casts, a constant, an initializer, CastLike, a function and a branch, all of a half type."""

    def numbers(*values: float) -> str:
        """The parser takes half types as integers of their bits."""
        return ", ".join(map(str, np.array(values, TYPES[name][0]).view(np.uint16)))

    text = f"""
    <ir_version: 10, opset_import: ["" : 23, "own" : 1]>
    g ({name}[n, 4] x, float[n, 4] wide, bool flag) => ({name}[n, 4] y)
    <{name}[4] w = {{{numbers(1, 2, 3, 4)}}}>
    {{
        narrow = Cast<to = {TYPES[name][1]}>(wide)
        like = CastLike(wide, x)
        a = Add(narrow, like)
        b = Mul(a, w)
        c = own.twice(b)
        y = If(flag) <
            then_branch = t () => ({name}[n, 4] p) {{
                half = Constant<value = {name}[4] {{{numbers(0.5, 0.25, 0.125, 0.0625)}}}>()
                p = Mul(c, half)
            }},
            else_branch = e () => ({name}[n, 4] q) {{ q = Add(c, x) }}
        >
    }}
    <domain: "own", opset_import: ["" : 23]>
    twice (v) => (r) {{
        two = Constant<value = {name}[1] {{{numbers(2)}}}>()
        up = Cast<to = 1>(v)
        down = Cast<to = {TYPES[name][1]}>(up)
        r = Mul(down, two)
    }}
    """
    return ir.from_proto(onnx.parser.parse_model(text))


@pytest.mark.parametrize("name", TYPES)
def test_no_half_type_is_left_and_the_numbers_are_float32_s(name):
    model = half_model(name)
    assert half_types(model)
    before = ir.to_proto(model).SerializeToString()
    wide = widen(model)
    assert ir.to_proto(model).SerializeToString() == before  # the given model is left alone
    assert not half_types(wide)
    proto = ir.to_proto(wide)
    onnx.checker.check_model(proto, full_check=True)
    kinds = {onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16}
    assert not kinds & {t.data_type for t in proto.graph.initializer}
    assert sum(node.op_type == "Cast" for node in wide.graph) == 1  # idle casts stay
    rng = np.random.default_rng(0)
    x, given = rng.standard_normal((2, 3, 4)).astype(np.float32)
    session = ort.InferenceSession(proto.SerializeToString())
    doubled = 2 * (2 * given * np.arange(1, 5, dtype=np.float32))
    for flag, want in ((True, doubled * 0.5 ** np.arange(1, 5)), (False, doubled + x)):
        got = session.run(None, {"x": x, "wide": given, "flag": np.array(flag)})[0]
        np.testing.assert_allclose(got, want, rtol=1e-6)


def test_what_is_left_is_named():
    model = half_model("float16")
    wide = widen(model)
    wide.graph.inputs[0].type = ir.TensorType(ir.DataType.FLOAT16)
    assert half_types(wide) == ["x"]
    cast = next(node for node in wide.graph if node.op_type == "Cast")
    cast.attributes["to"] = ir.AttrInt64("to", ir.DataType.FLOAT16)
    assert len(half_types(wide)) == 2


def test_float32_stays_bit_for_bit(bundle_folder):
    for file in sorted((bundle_folder / "onnx").glob("*.onnx")):
        model = ir.load(file)
        assert not half_types(model)
        assert ir.to_proto(widen(model)).SerializeToString() == ir.to_proto(model).SerializeToString()
