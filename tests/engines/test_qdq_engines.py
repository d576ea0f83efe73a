"""Q/DQ around split FFNs reaches NVIDIA's compiler."""

from dataclasses import replace

import numpy as np
import onnx
import pytest
import qdq

from skipvision_export import SkipVisionConfig
from skipvision_export.graph.passes.names import DECODE, PREFILL
from skipvision_export.graph.trace import Trace
from skipvision_export.tensorrt.build import build, lowered_graph, plan
from skipvision_export.tensorrt.recipe import PluginSettings, Recipe

RECIPE = Recipe(name="test", plugin=PluginSettings(kv_prune="none"))


@pytest.fixture(scope="module", params=["int8", "fp8"])
def bundle(request, finetuned, tmp_path_factory):
    """The committed fine-tune with quantized decoder graphs; ranges are those of noise."""
    rng = np.random.default_rng(0)
    feeds = {
        "inputs_embeds": rng.standard_normal((1, 40, 128)).astype(np.float32),
        "attention_mask": np.ones((1, 40), np.int64),
        "position_ids": np.arange(40)[None],
    }
    graphs = dict(finetuned.trace.graphs)
    largest = qdq.largest_activations(graphs[PREFILL], feeds)
    for name in (PREFILL, DECODE):
        graphs[name] = qdq.insert(graphs[name], largest, request.param)[0]
    folder = tmp_path_factory.mktemp("qdq") / request.param
    made = replace(finetuned, trace=Trace(graphs))
    return made.write(folder, SkipVisionConfig.preset("quarter"))


def layers(rtx, planned, graph):
    """Kinds of the layers that the parser makes of a graph."""
    trt = rtx.module
    lowered, origin = lowered_graph(planned, graph, rtx.compiler)
    log = trt.Logger(trt.Logger.ERROR)
    network = trt.Builder(log).create_network(0)
    assert trt.OnnxParser(network, log).parse(lowered.SerializeToString(), str(origin.resolve()))
    return [network.get_layer(i).type for i in range(network.num_layers)]


def test_q_and_dq_are_layers_and_the_engines_build(rtx, bundle, tmp_path):
    planned = plan(bundle.folder, RECIPE)
    for graph in (PREFILL, DECODE):
        file = bundle.folder / "onnx" / f"{graph}.onnx"
        nodes = [n.op_type for n in onnx.load(file, load_external_data=False).graph.node]
        kinds = layers(rtx, planned, graph)
        assert nodes.count("QuantizeLinear") == 2 * 29
        assert kinds.count(rtx.module.LayerType.QUANTIZE) == nodes.count("QuantizeLinear")
        assert kinds.count(rtx.module.LayerType.DEQUANTIZE) == nodes.count("DequantizeLinear")
        # all layers but the last, of which one row is left
        assert kinds.count(rtx.module.LayerType.SCATTER) == (3 if graph == PREFILL else 0)
    made = build(bundle.folder, RECIPE, tmp_path / "e")
    engine = (tmp_path / "e" / made.engines[PREFILL].file).read_bytes()
    assert b"QuantizeLinear" in engine
