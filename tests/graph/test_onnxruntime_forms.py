"""What is faster in ONNX Runtime: packed projections, grouped attention in prefill, norms with their sums."""

from collections import Counter

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common
import onnxruntime as ort
import pytest
from damage import another_mask, causal, instead_of_input

from skipvision_export.graph.clean import clear_inferred_types, unique_node_names
from skipvision_export.graph.passes.grouped_prefill import GroupedPrefillPass
from skipvision_export.graph.passes.grouped_rotary import GroupedRotaryPass
from skipvision_export.graph.passes.kv_prune import KVPrunePass
from skipvision_export.graph.passes.last_layer import LastLayerPass
from skipvision_export.graph.passes.names import DECODE, PREFILL
from skipvision_export.graph.passes.native_gqa import NativeGQAPass
from skipvision_export.graph.passes.pack_projections import PackProjectionsPass
from skipvision_export.graph.passes.shared_kv import SharedKVPass
from skipvision_export.graph.passes.skip_norm import SkipNormPass
from skipvision_export.graph.passes.strict_mask import StrictMaskPass
from skipvision_export.models.weights import pack

LAYERS, WIDTH = 3, 64


def ready(traced, graph, *passes):
    """A graph of the random model, brought to where the passes here begin."""
    model = traced.trace.graphs[graph].clone()
    first = [NativeGQAPass(), *passes]
    if graph == PREFILL:
        first += [LastLayerPass(), KVPrunePass(LAYERS)]
    for each in first:
        each(model)
        common.RemoveUnusedNodesPass()(model)
    return model


def count(model):
    common.RemoveUnusedNodesPass()(model)
    return Counter(node.op_type for node in model.graph)


def run(model, feeds):
    common.RemoveUnusedNodesPass()(model)
    clear_inferred_types(model)
    unique_node_names(model)
    return ort.InferenceSession(ir.to_proto(model).SerializeToString()).run(None, feeds)


def prompt(length=9, batch=2):
    rng = np.random.default_rng(length)
    return {
        "inputs_embeds": rng.standard_normal((batch, length, WIDTH)).astype(np.float32),
        "attention_mask": np.ones((batch, length), np.int64),
        "position_ids": np.arange(length)[None].repeat(batch, 0),
        "kv_keep_index": np.array([[0, 2, 3, length - 1]] * batch),
    }


def step(cached=6, batch=2):
    rng = np.random.default_rng(cached)
    feeds = {
        "inputs_embeds": rng.standard_normal((batch, 1, WIDTH)).astype(np.float32),
        "attention_mask": np.ones((batch, cached + 1), np.int64),
        "position_ids": np.full((batch, 1), 17),
    }
    names = [f"past_key_values.{i}.{kind}" for i in range(LAYERS) for kind in ("key", "value")]
    return feeds | {n: rng.standard_normal((batch, 2, cached, 16)).astype(np.float32) for n in names}


def assert_equal(got, want, limit=5e-6):
    for one, other in zip(got, want, strict=True):
        np.testing.assert_allclose(one, other, atol=limit)


# -- projections -------------------------------------------------------------------------------------


def test_projections_are_packed_alike_in_both_graphs(traced):
    work = PackProjectionsPass(pack)
    prefill, decode = ready(traced, PREFILL), ready(traced, DECODE)
    want = run(prefill.clone(), prompt()), run(decode.clone(), step())
    before = count(decode.clone())["MatMul"]
    assert work(prefill).modified and work(decode).modified
    # q, k and v of two layers, k and v of the last one, whose q prefill computes for one row; gate and up
    for model in (prefill, decode):
        made = count(model)
        assert (made["MatMul"], made["Split"]) == (before - 2 * 2 - 1 - LAYERS, 2 * LAYERS)
    assert_equal(run(prefill, prompt()), want[0])
    assert_equal(run(decode, step()), want[1])
    shared = [{v.name: v.const_value for v in m.graph.initializers.values()} for m in (prefill, decode)]
    packed = [name for name in shared[0] if name.endswith(".packed")]
    assert len(packed) == 2 * LAYERS
    assert all(shared[0][name] is shared[1][name] for name in packed)


def test_matrices_in_another_order_are_caught(traced):
    work = PackProjectionsPass(lambda tensors: pack([*tensors[:-2], tensors[-1], tensors[-2]]))
    model = ready(traced, PREFILL)
    want = run(model.clone(), prompt())[0]
    work(model)
    assert abs(run(model, prompt())[0] - want).max() > 1e-3


def test_what_others_read_too_stays_apart(traced):
    model = ready(traced, DECODE)
    makers = [n for n in model.graph if n.op_type == "MatMul" and n.inputs[1].is_initializer()][:3]
    model.graph.outputs.append(makers[1].outputs[0])
    before = count(model.clone())["MatMul"]
    PackProjectionsPass(pack)(model)
    assert makers[1] in list(model.graph)
    assert count(model)["MatMul"] == before - 1 - 2 * 2 - LAYERS  # q and v of the first layer


def test_it_comes_before_int4(traced):
    model = ready(traced, DECODE)
    node = next(n for n in model.graph if n.op_type == "MatMul")
    node.op_type, node.domain = "MatMulNBits", "com.microsoft"
    with pytest.raises(ir.passes.PreconditionError, match="before Int4Weights"):
        PackProjectionsPass(pack)(model)


# -- attention of prefill ----------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 3])
def test_grouped_prefill(traced, batch):
    model = ready(traced, PREFILL)
    want = run(model.clone(), prompt(batch=batch))
    assert GroupedPrefillPass()(model).modified
    made = count(model)
    assert (made["GroupQueryAttention"], made["Attention"]) == (LAYERS - 1, 1)
    assert_equal(run(model, prompt(batch=batch)), want)


def test_padding_on_the_right(traced):
    model = ready(traced, PREFILL)
    feeds = prompt(batch=1)
    feeds["attention_mask"][:, -2:] = 0
    feeds["kv_keep_index"] = np.arange(7)[None]
    want = run(model.clone(), feeds)
    GroupedPrefillPass()(model)
    assert_equal(run(model, feeds)[1:], want[1:])  # logits are of a padding row


def test_one_position_too_few_is_caught(traced):
    model = ready(traced, PREFILL)
    want = run(model.clone(), prompt())
    GroupedPrefillPass()(model)
    minus = next(node for node in model.graph if node.op_type == "Sub")
    two = ir.node("Constant", [], {"value": ir.tensor(np.array([2], np.int64))})
    model.graph.insert_before(minus, two)
    minus.replace_input_with(1, two.outputs[0])
    got = run(model, prompt())
    assert max(abs(a - b).max() for a, b in zip(got, want, strict=True)) > 1e-3


@pytest.mark.parametrize("change", [another_mask, causal], ids=lambda f: f.__name__)
def test_other_masks_are_left_alone(traced, change):
    model = ready(traced, PREFILL)
    change(next(node for node in model.graph if node.op_type == "Attention"))
    before = [node.op_type for node in model.graph]
    assert not GroupedPrefillPass()(model).modified
    assert [node.op_type for node in model.graph] == before


def test_strict_masks_are_left_alone(traced):
    assert not GroupedPrefillPass()(ready(traced, PREFILL, StrictMaskPass())).modified


def test_it_comes_after_pruning(traced):
    with pytest.raises(ir.passes.PreconditionError, match="runs after KVPrune"):
        GroupedPrefillPass()(traced.trace.graphs[PREFILL].clone())


# -- norms -------------------------------------------------------------------------------------------


def test_norms_take_their_sums(traced):
    model = ready(traced, DECODE)
    want = run(model.clone(), step())
    before = count(model.clone())
    assert SkipNormPass()(model).modified
    made = count(model)
    assert made["SkipSimplifiedLayerNormalization"] == 2 * LAYERS
    assert made["RMSNormalization"] == before["RMSNormalization"] - 2 * LAYERS == 1  # the first
    assert made["Add"] == before["Add"] - 2 * LAYERS
    assert_equal(run(model, step()), want)


def test_another_epsilon_is_caught(traced):
    model = ready(traced, DECODE)
    want = run(model.clone(), step())[0]
    SkipNormPass()(model)
    node = next(n for n in model.graph if n.op_type == "SkipSimplifiedLayerNormalization")
    node.attributes["epsilon"] = ir.AttrFloat32("epsilon", 1e-2)
    assert abs(run(model, step())[0] - want).max() > 1e-4


def test_a_norm_over_more_axes_is_left_alone(traced):
    model = ready(traced, DECODE)
    for node in model.graph:
        if node.op_type == "RMSNormalization":
            node.attributes["axis"] = ir.AttrInt64("axis", 1)
    assert not SkipNormPass()(model).modified


def test_both_forms_of_decode_together(traced):
    model = ready(traced, DECODE)
    assert SharedKVPass()(model).modified and SkipNormPass()(model).modified


# -- rotation inside attention -----------------------------------------------------------------------


def shared(traced, *passes):
    model = ready(traced, DECODE, PackProjectionsPass(pack))
    for each in (SharedKVPass(), *passes):
        each(model)
    return model


def in_buffer(cached=6, batch=2, room=12):
    """Inputs of a step on a buffer that past and present share."""
    feeds = step(cached, batch)
    for name in feeds:
        if name.startswith("past_key_values"):
            feeds[name] = np.pad(feeds[name], ((0, 0), (0, 0), (0, room - cached), (0, 0)))
    return feeds


@pytest.mark.parametrize("ids", [[[17], [17]], [[3], [99]]])
def test_attention_rotates(traced, ids):
    feeds = in_buffer() | {"position_ids": np.array(ids)}
    want = run(shared(traced), feeds)
    model = shared(traced, GroupedRotaryPass(100))
    made = count(model)
    assert (made["RotaryEmbedding"], made["Split"]) == (0, LAYERS)  # those of gate and up
    assert_equal(run(model, feeds), want)


def test_a_table_that_begins_one_further_is_caught(traced):
    want = run(shared(traced), in_buffer())[0]
    model = shared(traced, GroupedRotaryPass(100))
    every = next(node for node in model.graph if node.op_type == "Range")
    for i, end in enumerate((1, 101)):
        constant = ir.node("Constant", [], {"value": ir.tensor(np.array(end, np.int64))})
        model.graph.insert_before(every, constant)
        every.replace_input_with(i, constant.outputs[0])
    assert abs(run(model, in_buffer())[0] - want).max() > 1e-3


def depend_on_all_positions(graph):
    """As dynamic scaling does, where the longest position changes every angle."""

    def make(ids):
        longest = ir.node("ReduceMax", [ids], {"keepdims": 1})
        return [longest, ir.node("Mul", [ids, longest.outputs[0]])]

    instead_of_input(graph, "position_ids", make)


def rotate_pairs(graph):
    for node in graph:
        if node.op_type == "RotaryEmbedding":
            node.attributes["interleaved"] = ir.AttrInt64("interleaved", 1)


def test_what_is_not_packed_rotates_too(traced):
    model = ready(traced, DECODE)
    SharedKVPass()(model)
    want = run(model.clone(), in_buffer())
    assert GroupedRotaryPass(100)(model).modified
    assert count(model)["RotaryEmbedding"] == 0
    assert_equal(run(model, in_buffer()), want)


def make_heads_odd(graph):
    for node in graph:
        if node.op_type == "GroupQueryAttention":
            node.inputs[3].shape[3] = 24


@pytest.mark.parametrize(
    "change", [depend_on_all_positions, rotate_pairs, make_heads_odd], ids=lambda f: f.__name__
)
def test_other_rotations_are_left_alone(traced, change):
    model = shared(traced)
    change(model.graph)
    assert not GroupedRotaryPass(100)(model).modified


@pytest.mark.parametrize("positions", [None, 1 << 20])
def test_no_table_without_a_limit_or_above_it(traced, positions):
    assert not GroupedRotaryPass(positions)(shared(traced)).modified
