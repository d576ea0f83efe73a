"""KVPrune's function body against plain indexing."""

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skipvision_export.errors import PassError
from skipvision_export.graph.passes.kv_prune import KVPrunePass


def prefill(layers: int = 1) -> ir.Model:
    names = [f"present.{i}.{kind}" for i in range(layers) for kind in ("key", "value")]
    floats = ", ".join(f"float[batch, heads, sequence, size] {n.replace('.', '_')}_in" for n in names)
    outs = ", ".join(f"float[batch, heads, sequence, size] {n.replace('.', '_')}" for n in names)
    body = " ".join(f"{n.replace('.', '_')} = Identity({n.replace('.', '_')}_in)" for n in names)
    text = f'<ir_version: 10, opset_import: ["" : 23]> g ({floats}) => ({outs}) {{{body}}}'
    model = ir.from_proto(onnx.parser.parse_model(text))
    for value, name in zip(model.graph.outputs, names, strict=True):
        value.name = name
    return model


@pytest.fixture(scope="module")
def session():
    model = prefill()
    KVPrunePass(1)(model)
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    node = next(n for n in proto.graph.node if n.op_type == "KVPrune")
    assert node.domain == "skipvision"
    assert {a.name: a.s.decode() for a in node.attribute} == {
        "plugin_namespace": "skipvision",
        "plugin_version": "1",
    }
    assert [f.name for f in proto.functions] == ["KVPrune"]
    return ort.InferenceSession(proto.SerializeToString())


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_equals_indexing(session, data):
    b, h = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 4))
    s, d = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 5))
    kept = data.draw(st.integers(0, s))
    rows = [sorted(data.draw(st.permutations(range(s)))[:kept]) for _ in range(b)]
    keep = np.array(rows, np.int64).reshape(b, kept)
    rng = np.random.default_rng(0)
    key, value = rng.standard_normal((2, b, h, s, d)).astype(np.float32)
    out = session.run(None, {"present_0_key_in": key, "present_0_value_in": value, "kv_keep_index": keep})
    for got, full in zip(out, (key, value), strict=True):
        assert got.shape == (b, h, kept, d)
        for i in range(b):
            np.testing.assert_array_equal(got[i], full[i][:, keep[i]])


def test_a_shifted_index_is_seen(session):
    rng = np.random.default_rng(0)
    key, value = rng.standard_normal((2, 1, 2, 6, 3)).astype(np.float32)
    feeds = {"present_0_key_in": key, "present_0_value_in": value}
    right, wrong = (
        session.run(None, {**feeds, "kv_keep_index": np.array([[i, 3]], np.int64)})[0] for i in (1, 2)
    )
    assert (right != wrong).any()


def test_a_missing_layer_is_refused():
    with pytest.raises(PassError, match=r"present\.1\.key"):
        KVPrunePass(2)(prefill(1))
