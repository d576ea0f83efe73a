"""Quantized decoders: Q/DQ of ModelOpt's kind stays around split FFNs, and means the same there."""

from dataclasses import replace

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import qdq
from conftest import EXAMPLE

from skipvision_export import SkipVisionConfig
from skipvision_export.errors import PassError
from skipvision_export.graph.clean import clear_inferred_types, unique_node_names
from skipvision_export.graph.passes.kv_prune import KVPrunePass
from skipvision_export.graph.passes.names import DECODE, EMBED, PREFILL, VISION
from skipvision_export.graph.passes.native_gqa import NativeGQAPass
from skipvision_export.graph.passes.skip_ffn import SkipFFNPass, find_ffns
from skipvision_export.graph.trace import Trace
from skipvision_export.runtime.data import load_imagefolder

LIMIT = 1e-5
FORMS = [("int8", False), ("int8", True), ("fp8", False), ("fp8", True)]


@pytest.fixture(scope="module")
def dense(finetuned, tmp_path_factory):
    return finetuned.write(tmp_path_factory.mktemp("qdq") / "dense", SkipVisionConfig.dense())


@pytest.fixture(scope="module")
def prompts(dense):
    """What the example's prefill reads for three questions of its test set."""
    found = []
    for sample in load_imagefolder(EXAMPLE / "test", 3):
        inputs = dense.prepare(sample.image, sample.question)
        pixels = dense.backend.run(VISION, {"pixel_values": inputs.pixel_values})
        embeds = dense.backend.run(EMBED, {"input_ids": inputs.input_ids, **pixels})["inputs_embeds"].numpy()
        length = embeds.shape[1]
        found.append(
            {
                "inputs_embeds": embeds,
                "attention_mask": np.ones((1, length), np.int64),
                "position_ids": np.arange(length)[None],
            }
        )
    return found


@pytest.fixture(scope="module")
def largest(finetuned, prompts):
    """Ranges of the activations over these."""
    each = [qdq.largest_activations(finetuned.trace.graphs[PREFILL], feeds) for feeds in prompts]
    return {name: max(one[name] for one in each) for name in each[0]}


@pytest.fixture(scope="module")
def quantized(finetuned, largest):
    """`quantized(kind, folded)`: the example's prefill graph with Q/DQ, and their number."""
    return lambda kind, folded: qdq.insert(finetuned.trace.graphs[PREFILL], largest, kind, folded)


def ready(model):
    """Fit to run after passes."""
    clear_inferred_types(model)
    unique_node_names(model)
    return model


def part(model, start, end):
    """The nodes between two values, as a model."""
    proto = ir.to_proto(model)
    return ir.from_proto(onnx.utils.Extractor(proto).extract_model(start, end))


def by_hand(model, feeds, rows, keep):
    """Logits, keys and values: each quantized FFN alone, on its rows, put back and pruned by numpy."""
    ffns = find_ffns(model.graph)
    graph_inputs = [value.name for value in model.graph.inputs]
    values = dict(feeds)
    last = "inputs_embeds"
    for layer, ffn in enumerate(ffns):
        trunk, out = ffn.trunk.name, ffn.add.outputs[0].name
        made = [trunk, f"present.{layer}.key", f"present.{layer}.value"]
        # Shapes are read off inputs_embeds in every layer.
        start = list(dict.fromkeys([*graph_inputs, last]))
        attention = qdq.session(part(model, start, made))
        found = attention.run(None, {value.name: values[value.name] for value in attention.get_inputs()})
        values |= dict(zip(made, found, strict=True))
        x = values[trunk]
        flat = x.reshape(-1, x.shape[-1]).copy()
        alone = qdq.session(part(model, [trunk], [out]))
        flat[rows] = alone.run(None, {trunk: flat[rows][None]})[0][0]
        values[out] = flat.reshape(x.shape)
        last = out
    logits = qdq.session(part(model, [last], ["logits"])).run(None, {last: values[last]})[0]
    kept = [values[f"present.{i}.{kind}"][:, :, keep] for i in range(len(ffns)) for kind in ("key", "value")]
    return [logits, *kept]


def split(model, layers):
    """Through the passes of prefill."""
    model = model.clone()
    for each in (NativeGQAPass(), SkipFFNPass([1] * layers), KVPrunePass(layers)):
        each(model)
    return ready(model)


def leave_as_it_is(graph):
    """Not broken."""


def activations(graph):
    """QuantizeLinear nodes of activations in FFNs."""
    return [
        n
        for n in graph
        if n.op_type == "QuantizeLinear"
        and "mlp" in n.metadata_props.get("name_scopes", "")
        and n.inputs[0].producer() is not None
    ]


def shift_a_scale(graph):
    """One activation is quantized with half the scale, so that its ends are cut off."""
    node = activations(graph)[4]
    array = node.inputs[1].producer().attributes["value"].as_tensor().numpy()
    constant = ir.node("Constant", [], {"value": ir.tensor(array / 2)}, name="twin.scale")
    graph.insert_before(node, constant)
    node.replace_input_with(1, constant.outputs[0])


def lose_a_pair(graph):
    """One activation reaches its MatMul as it is."""
    node = activations(graph)[4]
    dequantize = next(iter(node.outputs[0].uses())).node
    dequantize.outputs[0].replace_all_uses_with(node.inputs[0])


def scatter_what_was_gathered(graph):
    """One FFN does nothing."""
    scatter = [n for n in graph if n.op_type == "ScatterND"][1]
    scatter.outputs[0].replace_all_uses_with(scatter.inputs[0])


@pytest.mark.parametrize("damage", [leave_as_it_is, shift_a_scale, lose_a_pair, scatter_what_was_gathered])
@pytest.mark.parametrize(("kind", "folded"), FORMS)
def test_split_equals_the_quantized_ffn_on_its_rows(kind, folded, damage, quantized, prompts, finetuned):
    model, numbers = quantized(kind, folded)
    layers = len(find_ffns(model.graph))
    assert layers == finetuned.source.config.text_config.num_hidden_layers
    feeds = prompts[0]
    length = feeds["inputs_embeds"].shape[1]
    rows = np.flatnonzero(np.arange(length) % 3 != 1)
    whole = split(model, layers)
    assert qdq.counts(whole) == numbers
    assert sum(node.op_type == "ScatterND" for node in whole.graph) == layers
    damage(whole.graph)
    onnx.checker.check_model(ir.to_proto(whole), full_check=True)
    found = qdq.session(whole).run(None, feeds | {"ffn_index": rows, "kv_keep_index": rows[None]})
    expected = by_hand(model, feeds, rows, rows)
    gaps = [abs(a - b).max() for a, b in zip(expected, found, strict=True)]
    assert (max(gaps) <= LIMIT) == (damage is leave_as_it_is), gaps
    if damage is not leave_as_it_is:
        assert max(gaps) > 100 * LIMIT


def test_quantization_is_there_at_all(quantized, prompts, finetuned):
    """8 bits move the logits, and by no more than 8 bits do."""
    feeds = prompts[0]
    full = qdq.session(finetuned.trace.graphs[PREFILL]).run(["logits"], feeds)[0]
    for kind in ("int8", "fp8"):
        found = qdq.session(quantized(kind, False)[0]).run(["logits"], feeds)[0]
        assert 1e-3 < abs(found - full).max() / abs(full).max() < 0.2


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_a_bundle_of_a_quantized_decoder_answers(kind, finetuned, largest, tmp_path):
    graphs = dict(finetuned.trace.graphs)
    for name in (PREFILL, DECODE):
        graphs[name] = qdq.insert(graphs[name], largest, kind)[0]
    made = replace(finetuned, trace=Trace(graphs))
    bundle = made.write(tmp_path / "bundle", SkipVisionConfig.preset("quarter"))
    samples = list(load_imagefolder(EXAMPLE / "test", 24))
    right = [bundle.generate(s.image, s.question, 8).text == str(s.answer) for s in samples]
    assert np.mean(right) > 0.8
    with pytest.raises(PassError, match="not quantized yet"):
        made.write(tmp_path / "twice", SkipVisionConfig.preset("quarter"), weights="int4")


# -- rules -------------------------------------------------------------------------------------------

D = 8


def ffn(activation):
    """y = x + q W over [1, 5, 8]; activation: what makes q of {x}."""
    text = f"""
    <ir_version: 10, opset_import: ["" : 23]>
    g (float[1, 5, {D}] inputs_embeds) => (float[1, 5, {D}] y)
    <float[{D}, {D}] w>
    {{
        s = Constant<value = float {{0.02}}>()
        z = Constant<value = int8 {{0}}>()
        by_feature = Constant<value = float[{D}] {{{", ".join(["0.02"] * D)}}}>()
        by_feature_z = Constant<value = int8[{D}] {{{", ".join(["0"] * D)}}}>()
        by_token = Constant<value = float[5] {{0.1, 0.2, 0.3, 0.4, 0.5}}>()
        by_token_z = Constant<value = int8[5] {{0, 0, 0, 0, 0}}>()
        blocks = Constant<value = float[1, 5, 2] {{{", ".join(["0.02"] * 10)}}}>()
        {activation.format(x="inputs_embeds")}
        m = MatMul(q, w)
        y = Add(inputs_embeds, m)
    }}
    """
    proto = onnx.parser.parse_model(text)
    del proto.graph.initializer[:], proto.graph.value_info[:]
    weight = np.random.default_rng(0).standard_normal((D, D)).astype(np.float32)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    return ir.from_proto(proto)


@pytest.mark.parametrize(
    "body",
    [
        "p = QuantizeLinear({x}, s, z) q = DequantizeLinear(p, s, z)",
        "p = QuantizeLinear({x}, s) q = DequantizeLinear(p, s)",
        "p = QuantizeLinear<axis=-1>({x}, by_feature, by_feature_z)"
        "q = DequantizeLinear<axis=2>(p, by_feature, by_feature_z)",
    ],
    ids=["per tensor", "no zero point", "per feature"],
)
def test_static_scales_pass(body):
    model = ffn(body)
    x = np.random.default_rng(1).standard_normal((1, 5, D)).astype(np.float32)
    before = qdq.session(model).run(None, {"inputs_embeds": x})[0]
    SkipFFNPass([1])(model)
    out = qdq.session(ready(model)).run(None, {"inputs_embeds": x, "ffn_index": np.array([1, 3])})[0]
    expected = x.copy()
    expected[:, [1, 3]] = before[:, [1, 3]]
    np.testing.assert_allclose(out, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (
            "p, t, u = DynamicQuantizeLinear({x}) q = DequantizeLinear(p, t, u)",
            "DynamicQuantizeLinear.*one scale",
        ),
        (
            "t = Abs({x}) p = QuantizeLinear({x}, t, z) q = DequantizeLinear(p, t, z)",
            "QuantizeLinear.*no constant",
        ),
        (
            "p = QuantizeLinear<axis=1>({x}, by_token, by_token_z)"
            "q = DequantizeLinear<axis=1>(p, by_token, by_token_z)",
            "QuantizeLinear.*axis 1",
        ),
        (
            "p = QuantizeLinear<axis=2, block_size=4, output_dtype=3>({x}, blocks)"
            "q = DequantizeLinear<axis=2, block_size=4>(p, blocks)",
            "blocks of an activation",
        ),
    ],
    ids=["dynamic", "computed scale", "per token", "blocks"],
)
def test_scales_of_the_tokens_are_refused_by_name(body, reason):
    with pytest.raises(PassError, match=reason):
        SkipFFNPass([1])(ffn(body))
