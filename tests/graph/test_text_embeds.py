"""Embeddings without features: what is not the choice that our tracer makes is refused."""

import onnx
import onnx_ir as ir
import pytest

from skipvision_export.errors import PassError
from skipvision_export.graph.passes.batch_size import BatchSizePass
from skipvision_export.graph.passes.text_embeds import TextEmbedsPass

GRAPH = """<ir_version: 10, opset_import: ["" : 23]>
g (int64[batch, sequence] input_ids, float[n, v, 8] image_features) =>
(float[batch, sequence, 8] inputs_embeds) {{
    one = Constant<value_ints=[1]>() table = Constant<value_floats=[0.0]>()
    t = Expand(table, one) takes = Equal(input_ids, one) at = Unsqueeze(takes, one)
    f = ReduceMean(image_features) e = Gather(t, input_ids) {end}
}}"""


def embeddings(end):
    return ir.from_proto(onnx.parser.parse_model(GRAPH.format(end=end)))


def test_features_go_with_all_that_reads_them():
    model = embeddings("inputs_embeds = Where(at, f, e)")
    TextEmbedsPass()(model)
    assert [value.name for value in model.graph.inputs] == ["input_ids"]
    assert [value.name for value in model.graph.outputs] == ["inputs_embeds"]
    assert {node.op_type for node in model.graph} == {"Constant", "Expand", "Gather"}


@pytest.mark.parametrize(
    "end",
    [
        "inputs_embeds = Add(f, e)",
        "inputs_embeds = Where(at, e, f)",
        "inputs_embeds = Identity(image_features)",
    ],
)
def test_another_form_is_refused(end):
    with pytest.raises(PassError, match="does not end in a choice"):
        TextEmbedsPass()(embeddings(end))


def test_only_the_batch_is_renamed():
    model = embeddings("inputs_embeds = Where(at, f, e)")
    assert BatchSizePass()(model).modified
    sizes = [[str(size) for size in value.shape] for value in (*model.graph.inputs, *model.graph.outputs)]
    assert sizes == [["batch_size", "sequence"], ["n", "v", "8"], ["batch_size", "sequence", "8"]]
    assert not BatchSizePass()(model).modified
