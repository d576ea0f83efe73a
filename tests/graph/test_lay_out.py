"""Laying tokens out in a graph against PyTorch: selectors, merge, summaries, policies, broken twins."""

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from skipvision_export import SkipVisionConfig
from skipvision_export.errors import PassError
from skipvision_export.graph.clean import unique_node_names
from skipvision_export.graph.passes.lay_out import LayOutPass
from skipvision_export.graph.passes.names import RASTER_FEATURES
from skipvision_export.method import SummaryTokens, cls_attention_scores, lay_out
from skipvision_export.tokens import TorchImage, selector_names

D, HEADS, SIZE = 6, 2, 4
LIMIT = 1e-5
LOOKING = [name for name in selector_names() if name != "thumbnail"]


def vision(v: int | str, layers: int = 1) -> ir.Model:
    """A graph that gives features on and has an attention whose query and key choose."""
    n = v + 1 if isinstance(v, int) else "rows"
    qkv = f"float[num_images, {HEADS}, {n}, {SIZE}]"
    body = " ".join(f"a{i} = Attention<scale=0.5>(q, k, k)" for i in range(layers))
    text = (
        f'<ir_version: 10, opset_import: ["" : 23]> g (float[num_images, {v}, {D}] x, {qkv} q, {qkv} k) '
        f"=> (float[num_images, {v}, {D}] image_features) {{{body} image_features = Identity(x)}}"
    )
    return ir.from_proto(onnx.parser.parse_model(text))


def summary_tokens(seed: int = 0) -> SummaryTokens:
    """Trained-looking weights."""
    generator = torch.Generator().manual_seed(seed)
    summary = SummaryTokens(D)
    with torch.no_grad():
        for parameter in summary.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator))
    return summary


def laid_out(config, v, damage=None, dynamic=False, tiled=False) -> ort.InferenceSession:
    layout = config.layout(v, tiled=tiled)
    model = vision("tokens" if dynamic else v)
    weights = {name: tensor.numpy() for name, tensor in summary_tokens().state_dict().items()}
    LayOutPass(config, layout, v, 1, weights)(model)
    if damage is not None:
        damage(model.graph)
    unique_node_names(model)
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=damage is None)
    return ort.InferenceSession(proto.SerializeToString())


def inputs(n, v, seed, zero_rows=(), tokens=None):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, tokens or v, D)).astype(np.float32) * 2
    x[:, list(zero_rows)] = 0
    q, k = rng.standard_normal((2, n, HEADS, v + 1, SIZE)).astype(np.float32)
    return {"x": x, "q": q, "k": k}


@torch.no_grad()
def expected(config, v, feeds, tiled=False):
    x, q, k = (torch.from_numpy(feeds[name]) for name in "xqk")

    def scores():
        return cls_attention_scores((q @ k.transpose(-1, -2) * 0.5).softmax(-1))

    layout = config.layout(v, tiled=tiled)
    return lay_out(TorchImage(x, scores, config.seed), layout, config, summary_tokens())[0].numpy()


def gap(config, v, seed=0, n=2, damage=None, zero_rows=()):
    feeds = inputs(n, v, seed, zero_rows)
    want, got = expected(config, v, feeds), laid_out(config, v, damage).run(None, feeds)[0]
    return abs(want - got).max() if want.shape == got.shape else np.inf


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_equals_pytorch(data):
    v = data.draw(st.integers(2, 30), "v")
    retained = data.draw(st.integers(0, v - 1), "retained")
    skipped = data.draw(st.integers(1, v - retained), "skipped")
    config = SkipVisionConfig.counts(
        retained,
        skipped,
        selector=data.draw(st.sampled_from(LOOKING)),
        summaries=data.draw(st.booleans()),
        seed=data.draw(st.integers(0, 3)),
    )
    zero_rows = data.draw(st.lists(st.integers(0, v - 1), max_size=4, unique=True), "zero rows")
    seed, n = data.draw(st.integers(0, 99)), data.draw(st.integers(1, 3))
    assert gap(config, v, seed, n, zero_rows=zero_rows) <= LIMIT


@pytest.mark.parametrize("seed", range(4))
def test_equal_redundancies_go_to_the_lower_index(seed):
    """Of two tokens and a zero one, both are as redundant as the other: their product, however rounded."""
    config = SkipVisionConfig.counts(0, 2)
    assert gap(config, 3, seed, n=64, zero_rows=[1]) <= LIMIT


@pytest.mark.parametrize("zero_rows", [[0, 2], [1, 3], [0, 1, 2, 3]])
def test_equally_large_pivots_go_to_the_lower_index(zero_rows):
    """Four pivots of five tokens, two or more of them zero."""
    config = SkipVisionConfig.counts(1, 1, selector="dart")
    assert gap(config, 5, zero_rows=zero_rows) <= LIMIT


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.sampled_from([0, 0.2, 0.5, 0.75, 1]), min_size=1, max_size=5),
    st.sampled_from(LOOKING),
    st.integers(0, 99),
)
def test_policies_equal_pytorch(shares, selector, seed):
    config = SkipVisionConfig(layer_shares=tuple(shares), selector=selector)
    assert gap(config, 20, seed) <= LIMIT


@pytest.mark.parametrize("preset", ["llava-100-156", "llava-256-320", "llava-64-156"])
def test_presets_of_the_paper(preset):
    assert gap(SkipVisionConfig.preset(preset), 576) <= LIMIT


@pytest.mark.parametrize("selector", LOOKING)
def test_equal_scores_go_to_the_lower_index(selector):
    config = SkipVisionConfig.counts(3, 5, selector=selector)
    feeds = {name: np.zeros_like(array) for name, array in inputs(1, 8, 0).items()}
    # pivots of dart are the largest, all others the same
    feeds["x"][..., 0] = np.arange(8) + 1
    got = laid_out(config, 8).run(None, feeds)[0]
    np.testing.assert_array_equal(got, expected(config, 8, feeds))


@pytest.mark.parametrize("tiles", [1, 2, 4])
def test_tiles_are_merged_whatever_their_number(tiles):
    config = SkipVisionConfig.counts(8, 8, selector="thumbnail", tiled=True, summaries=True)
    feeds = inputs(1, 8, 3, tokens=8 * (1 + tiles))
    got = laid_out(config, 8, dynamic=True, tiled=True).run(None, feeds)[0]
    want = expected(config, 8, feeds, tiled=True)
    assert want.shape == got.shape == (1, 18, D)
    np.testing.assert_allclose(got, want, atol=LIMIT)


@pytest.mark.parametrize(
    "config",
    [
        SkipVisionConfig.dense(),
        SkipVisionConfig(skip_share=0.5, selector="uniform", order="raster"),
        SkipVisionConfig.counts(0, 8),
    ],
    ids=["dense", "raster", "one group"],
)
def test_nothing_to_lay_out(config):
    model = vision(8)
    before = len(list(model.graph))
    assert not LayOutPass(config, config.layout(8), 8, 1, {})(model).modified
    assert len(list(model.graph)) == before


def test_the_graph_keeps_raster_features_and_names_its_weights():
    model = vision(8)
    config = SkipVisionConfig.counts(2, 3, summaries=True)
    weights = {name: tensor.numpy() for name, tensor in summary_tokens().state_dict().items()}
    LayOutPass(config, config.layout(8), 8, 1, weights)(model)
    assert RASTER_FEATURES in {v.name for node in model.graph for v in node.outputs}
    assert {name for name in model.graph.initializers if name.startswith("skip_vision.summary.")} == {
        f"skip_vision.summary.ada.{i}.{kind}" for i in (0, 1) for kind in ("weight", "bias")
    }
    assert [o.name for o in model.graph.outputs] == ["image_features"]
    assert list(model.graph.outputs[0].shape)[1:] == [7, D]


def test_another_number_of_attentions_is_refused():
    config = SkipVisionConfig.counts(2, 3)
    with pytest.raises(PassError, match="2 Attention nodes"):
        LayOutPass(config, config.layout(8), 8, 1, {})(vision(8, layers=2))


# -- broken twins ------------------------------------------------------------------------------------


def first(graph, kind):
    return next(node for node in graph if node.op_type == kind)


def drop_a_summary(graph):
    """q1 is a retained token again."""
    concat = [node for node in graph if node.op_type == "Concat"][-1]
    block = concat.inputs[0]
    one, two, axis = (ir.node("Constant", [], {"value": ir.tensor(np.array([i]))}) for i in (0, 1, 1))
    token = ir.node("Slice", [block, one.outputs[0], two.outputs[0], axis.outputs[0]])
    graph.insert_before(concat, [one, two, axis, token])
    concat.replace_input_with(1, token.outputs[0])


def repeat_a_summary(graph):
    """q2 is q1."""
    concat = [node for node in graph if node.op_type == "Concat"][-1]
    concat.replace_input_with(3, concat.inputs[1])


def shift_destinations(graph):
    """Each source goes to the destination behind its own."""
    node = first(graph, "OneHot")
    one, k = (ir.node("Constant", [], {"value": ir.tensor(np.array([i]))}) for i in (1, 9))
    add = ir.node("Add", [node.inputs[0], one.outputs[0]])
    mod = ir.node("Mod", [add.outputs[0], k.outputs[0]])
    graph.insert_before(node, [one, k, add, mod])
    node.replace_input_with(0, mod.outputs[0])


def reverse_selection(graph):
    """The least important tokens are retained."""
    first(graph, "TopK").attributes["largest"] = ir.AttrInt64("largest", 0)


def reverse_redundancy(graph):
    """The least redundant tokens are merged away."""
    [n for n in graph if n.op_type == "TopK"][-1].attributes["largest"] = ir.AttrInt64("largest", 0)


@pytest.mark.parametrize(
    "damage",
    [drop_a_summary, repeat_a_summary, shift_destinations, reverse_selection, reverse_redundancy],
)
def test_broken_graphs_are_caught(damage):
    config = SkipVisionConfig.counts(5, 9, summaries=True)
    assert gap(config, 24) <= LIMIT
    assert gap(config, 24, damage=damage) > 1e-2


def test_another_epsilon_of_the_norm_would_show():
    config = SkipVisionConfig.counts(5, 9, summaries=True)

    def damage(graph):
        first(graph, "LayerNormalization").attributes["epsilon"] = ir.AttrFloat32("epsilon", 1e-1)

    assert gap(config, 24, damage=damage) > 10 * LIMIT
