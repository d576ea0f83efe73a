"""A trace without weights is the trace of the loaded model, node by node and number by number."""

import json
import re
from functools import cache

import numpy as np
import onnx_ir as ir
import pytest
import torch
from conftest import EXAMPLE
from full import FULL
from tiny import write_tiny, write_tiny_next

from skipvision_export.exporter import trace_model, trace_skeleton
from skipvision_export.graph.passes.names import DECODE
from skipvision_export.graph.repeat import NotRepeatableError, repeat_layers
from skipvision_export.graph.trace import trace
from skipvision_export.models.loading import resolve_model
from skipvision_export.models.skeleton import load_skeleton
from skipvision_export.models.weights import WeightTensor


def rows(model):
    """The graph, values by where they come from: its nodes, outputs, inputs."""
    made, found = {}, []

    def seen(value):
        if value is None or value.is_graph_input():
            return value and value.name
        if value.is_initializer():
            array = value.const_value.numpy()
            return str(array.dtype), array.shape, array.tobytes()
        return made[value]

    for i, node in enumerate(model.graph):
        attributes = sorted((a.name, str(a.value)) for a in node.attributes.values())
        # The scope's last name is the tracer's numbering of its own nodes.
        scope = re.findall(r"'([^']*layers\.[^']*)', ", node.metadata_props.get("name_scopes", ""))
        outputs = [(str(v.shape), v.dtype) for v in node.outputs]
        found.append((node.op_type, node.domain, [seen(v) for v in node.inputs], attributes, scope, outputs))
        made |= {value: (i, k) for k, value in enumerate(node.outputs)}
    boundary = [
        [(v.name, str(v.shape), v.dtype) for v in vs] for vs in (model.graph.inputs, model.graph.outputs)
    ]
    return found, boundary, [made[v] for v in model.graph.outputs]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {
        "example": EXAMPLE / "finetuned",  # four decoder layers, of which one is a copy
        "tied": write_tiny(folder / "tied", num_hidden_layers=5, tie_word_embeddings=True),
        "tiled": write_tiny_next(folder / "tiled"),
    }


@cache
def lazily(folder, dtype):
    return trace_skeleton(resolve_model(folder), dtype)


KINDS = [("example", "bfloat16"), ("tied", "float32"), ("tiled", "float16")]


@pytest.mark.parametrize(("name", "dtype"), [("example", "float32"), *KINDS] if FULL else KINDS)
def test_the_same_graphs(models, name, dtype):
    lazy = lazily(models[name], dtype)
    whole = trace_model(lazy.source, dtype)
    assert lazy.model is None
    for graph, model in lazy.trace.graphs.items():
        assert rows(model) == rows(whole.trace.graphs[graph]), graph
    held = [v.const_value for v in lazy.trace.graphs[DECODE].graph.initializers.values()]
    large = [tensor for tensor in held if tensor.size > 8192]
    assert large and all(isinstance(tensor, WeightTensor) for tensor in large)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_configuration_that_ties_what_the_checkpoint_holds_apart(dtype, tmp_path, monkeypatch):
    """The loader compares the two: what stands in for them must differ, whatever memory held before."""
    folder = write_tiny(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = True
    (folder / "config.json").write_text(json.dumps(config))
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *sizes, **options: empty(*sizes, **options).zero_())
    skeleton = load_skeleton(resolve_model(folder), dtype)
    head = skeleton.model.get_output_embeddings().weight
    assert head.data_ptr() != skeleton.model.get_input_embeddings().weight.data_ptr()
    assert skeleton.weights["lm_head.weight"].stored.key.endswith("lm_head.weight")


def test_a_wrong_weight_would_show(models):
    """The twin: one layer takes its neighbour's weight, and then the two traces differ."""
    model = lazily(models["example"], "bfloat16").trace.graphs[DECODE].clone()
    before = rows(model)
    weights = [v for v in model.graph.initializers.values() if isinstance(v.const_value, WeightTensor)]
    gates = [v for v in weights if v.const_value.parameter.endswith("gate_proj.weight")]
    assert len(gates) == 4
    gates[2].const_value = gates[3].const_value
    assert rows(model) != before


def test_layers_that_differ_are_not_repeated():
    def node(op, inputs, layer):
        made = ir.node(op, inputs, name=f"{op}_{layer}")
        made.metadata_props["name_scopes"] = f"['', 'decoder', 'decoder.layers.{layer}', 'x']"
        return made

    x = ir.Value(name="x", shape=ir.Shape([1]), type=ir.TensorType(ir.DataType.FLOAT))
    nodes, last = [], x
    for layer, op in enumerate(("Neg", "Neg", "Abs")):
        nodes.append(node(op, [last], layer))
        last = nodes[-1].outputs[0]
    graph = ir.Graph([x], [last], nodes=nodes, opset_imports={"": 23})
    with pytest.raises(NotRepeatableError, match="Neg_1 and Abs_2 differ"):
        repeat_layers(ir.Model(graph, ir_version=10), "decoder.layers", 5, lambda weight, _: weight)


@pytest.mark.parametrize("change", [0.5, None], ids=["another scale", "none"])
def test_a_layer_that_is_not_traced_may_differ(models, change):
    """As one with a sliding window does: then all are traced."""
    source = resolve_model(models["example"])
    skeleton = load_skeleton(source, "float32")
    last = source.family.decoder_layers(skeleton.model)[3]
    if change:
        last.self_attn.scaling = change
    graph = trace(skeleton.model, source.family, weights=skeleton.weights).graphs[DECODE].graph
    scales = [n.attributes.get_float("scale") for n in graph if n.op_type == "Attention"]
    assert len(scales) == 4 and (scales[3] == scales[2]) == (change is None)


def test_numbers_are_cast_and_turned_as_pytorch_does(models):
    import torch
    from safetensors.torch import load_file

    skeleton = load_skeleton(resolve_model(models["example"]), "bfloat16")
    stored = load_file(models["example"] / "model.safetensors")
    for weight in skeleton.weights.values():
        want = stored[weight.stored.key].to(torch.bfloat16)
        assert np.array_equal(weight.numpy().view(np.int16), want.view(torch.int16).numpy())
        if want.ndim == 2:
            turned = weight.transpose().numpy().view(np.int16)
            assert np.array_equal(turned, want.t().contiguous().view(torch.int16).numpy())
