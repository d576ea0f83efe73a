"""The strict mask inside the prefill graph against the reference's."""

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from skipvision_export.errors import PassError
from skipvision_export.graph.clean import unique_node_names
from skipvision_export.graph.passes.strict_mask import StrictMaskPass
from skipvision_export.layout import TokenLayout
from skipvision_export.method.masks import prefill_mask
from skipvision_export.runtime.batch import PromptBatch, image_index

QKV = "float[batch, 1, sequence, 4] q"


def prefill(mask: str = "bool[batch, 1, sequence, sequence] mask", nodes: int = 2) -> ir.Model:
    given = ", mask" if mask else ""
    body = " ".join(f"y{i} = Attention(q, q, q{given})" for i in range(nodes))
    body += f" y = Add(y0, y{nodes - 1})" if nodes else " y = Identity(q)"
    text = (
        f'<ir_version: 10, opset_import: ["" : 23]> g ({", ".join(filter(None, [QKV, mask]))}) => '
        f"(float[batch, 1, sequence, 4] y) {{{body}}}"
    )
    return ir.from_proto(onnx.parser.parse_model(text))


@pytest.fixture(scope="module")
def session():
    """Gives the mask itself."""
    model = prefill()
    StrictMaskPass()(model)
    masks = {node.inputs[3] for node in model.graph if node.op_type == "Attention"}
    assert len(masks) == 1  # shared by all layers
    mask = masks.pop()
    mask.name, mask.type = "stricter", ir.TensorType(ir.DataType.BOOL)
    mask.shape = ir.Shape(["batch", 1, "sequence", "sequence"])
    model.graph.outputs.append(mask)
    unique_node_names(model)
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    return ort.InferenceSession(proto.SerializeToString())


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_equals_the_reference(session, data):
    b, s = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 12))
    rows = st.lists(st.integers(-2, 2), min_size=s, max_size=s)
    index = np.array([data.draw(rows) for _ in range(b)], np.int64)
    given = torch.ones(b, s, dtype=torch.int64)
    causal = np.tril(np.ones((s, s), bool))[None, None].repeat(b, 0)
    q = np.zeros((b, 1, s, 4), np.float32)
    got = session.run(["stricter"], {"q": q, "mask": causal, "image_index": index})[0]
    tensor = torch.from_numpy(index)
    want = prefill_mask(given, tensor < 0, tensor.abs(), strict=True, answers=None, dtype=torch.float32)
    np.testing.assert_array_equal(got, (want == 0).numpy())


def test_image_index():
    layout = TokenLayout((("retained", 1), ("summary", 1), ("skipped", 2)))

    def index(*ids):
        return image_index(PromptBatch.join([np.array([ids])], 3), 3, layout).tolist()

    assert index(7, 3, 3, 3, 3, 8, 3, 3, 3, 3, 9) == [[0, 1, 1, -1, -1, 0, 2, 2, -2, -2, 0]]
    assert index(7, 8) == [[0, 0]]


def test_no_attention_is_an_error():
    with pytest.raises(PassError, match="no Attention node"):
        StrictMaskPass()(prefill(nodes=0))


@pytest.mark.parametrize("mask", ["", "float[batch, 1, sequence, sequence] mask"])
def test_an_attention_without_a_boolean_mask_is_named(mask):
    with pytest.raises(PassError, match=r"\(Attention\) has no boolean mask"):
        StrictMaskPass()(prefill(mask))
