"""Every kind of configuration on the random model: rewritten ONNX against patched PyTorch."""

import numpy as np
import onnx_ir as ir
import pytest
from damage import leave_as_it_is, twin

from skipvision_export import SkipVisionConfig
from skipvision_export.benchmark.parity import measure_gaps, synthetic_prompts
from skipvision_export.bundle import Manifest
from skipvision_export.graph.passes.names import RASTER_FEATURES
from skipvision_export.method import SummaryTokens, save_skip_vision

LIMIT = 1e-4
counts = SkipVisionConfig.counts
POLICY = (0.75, 0.0, 0.3)

CONFIGS = {
    **{name: SkipVisionConfig.preset(name) for name in ("skip-50", "skip-90", "quarter")},
    "merge": counts(9, 16),
    "summaries": counts(16, 48, summaries=True),
    "retained=0": counts(0, 64),
    "retained=0, merged to one": counts(0, 1, summaries=True),
    "pass last": counts(9, 16, pass_through="last", summaries=True),
    "pass first and last": counts(9, 16, pass_through="first_last"),
    "strict": counts(9, 16, summaries=True, strict=True),
    "strict, pass last": counts(16, 48, strict=True, pass_through="last"),
    "no Skip-FFN": counts(9, 16, summaries=True, skip_ffn=False),
    "no Skip-KV": counts(9, 16, summaries=True, skip_kv=False),
    "no Skip-KV, pass last": counts(9, 16, summaries=True, skip_kv=False, pass_through="last"),
    "merge and summaries alone": counts(9, 16, summaries=True, skip_ffn=False, skip_kv=False),
    "dart": counts(9, 16, summaries=True, selector="dart"),
    "uniform": counts(9, 16, summaries=True, selector="uniform"),
    "random, raster": SkipVisionConfig(skip_share=0.7, selector="random", order="raster", seed=5),
    "policy": SkipVisionConfig(layer_shares=POLICY),
    "policy, raster": SkipVisionConfig(layer_shares=POLICY, selector="uniform", order="raster"),
    "policy, half of the K/V": SkipVisionConfig(layer_shares=POLICY, kv_share=0.5),
    "policy, most of the K/V": SkipVisionConfig(
        layer_shares=POLICY, kv_share=0.9, selector="uniform", order="raster"
    ),
    "policy of nothing": SkipVisionConfig(layer_shares=(0.0, 0.0, 0.0)),
}


@pytest.fixture(scope="module")
def trained_summary(traced):
    """Summary tokens beside the random model, as a fine-tuned checkpoint has them."""
    import torch

    torch.manual_seed(1)
    summary = SummaryTokens(64)
    with torch.no_grad():
        for parameter in summary.parameters():
            parameter.add_(torch.randn_like(parameter))
    folder = traced.source.folder
    save_skip_vision(folder, CONFIGS["quarter"], summary)
    yield summary
    for file in folder.glob("skip_vision*"):
        file.unlink()


@pytest.fixture(scope="module")
def reference(traced, trained_summary):
    from skipvision_export.runtime.torch_reference import TorchReference

    return TorchReference(traced.source, traced.model)


@pytest.fixture(scope="module")
def bundles(traced, trained_summary, tmp_path_factory):
    folder = tmp_path_factory.mktemp("rewrite")
    made = {}

    def bundle(name):
        if name not in made:
            made[name] = traced.write(folder / str(len(made)), CONFIGS[name])
        return made[name]

    return bundle


def gap(bundle, reference, prompts=2):
    report = measure_gaps(
        bundle, reference, synthetic_prompts(prompts, 96), max_new_tokens=3, gaps=["rewrite"]
    )
    return report.gaps["rewrite"]


@pytest.mark.parametrize("name", CONFIGS)
def test_rewritten_equals_patched(name, bundles, reference):
    found = gap(bundles(name), reference)
    assert found.passed
    assert found.overall.max_abs <= LIMIT
    assert len(found.outputs) == 7


@pytest.mark.parametrize("name", ["quarter", "strict", "policy"])
def test_unrewritten_parts_equal_dense(name, bundles, reference):
    report = measure_gaps(
        bundles(name), reference, synthetic_prompts(2, 96), max_new_tokens=3, gaps=["export", "method"]
    )
    assert report.gaps["export"].passed
    assert report.gaps["method"].outputs["logits"].max_abs > 0.1


def test_the_export_gap_sees_the_vision_encoder_of_a_merged_layout(bundles, reference, tmp_path):
    def shift_a_bias(graph):
        """The projector's is off by 0.02."""
        add = next(node for node in graph if node.outputs[0].name == RASTER_FEATURES)
        bias = next(v for v in add.inputs if v.is_initializer())
        bias.const_value = ir.tensor(bias.const_value.numpy() + np.float32(0.02), name=bias.name)

    broken = twin(bundles("quarter"), tmp_path, shift_a_bias, "vision_encoder")
    report = measure_gaps(broken, reference, synthetic_prompts(1, 96), max_new_tokens=1, gaps=["export"])
    assert not report.gaps["export"].passed


@pytest.mark.parametrize("name", CONFIGS)
def test_the_manifest_gives_the_layout_back(name, bundles, traced):
    source, bundle = traced.source, bundles(name)
    layout = source.family.layout(source.config, CONFIGS[name])
    manifest = Manifest.load(bundle.folder)
    assert manifest.layout == layout
    assert manifest.roles.retained + manifest.roles.skipped + manifest.roles.summaries == layout.total
    features = next(t for t in manifest.graphs["vision_encoder"].outputs)
    assert features.shape[1] == layout.total
    inputs = {t.name for t in manifest.graphs["decoder_prefill"].inputs}
    assert ("image_index" in inputs) == CONFIGS[name].strict


# -- broken twins ------------------------------------------------------------------------------------


def lose_the_strict_mask(graph):
    """Attention reads the mask as it was."""
    for node in graph:
        if node.op_type == "And" and node.inputs[1].producer().op_type == "Or":
            node.outputs[0].replace_all_uses_with(node.inputs[0])


def swap_the_tiers(graph):
    """Each layer of a policy takes the other's index."""
    one, two = (next(v for v in graph.inputs if v.name == n) for n in ("ffn_index", "ffn_index.2"))
    one.name, two.name = "ffn_index.2", "ffn_index"


def forget_the_training(graph):
    """The summary is a plain mean."""
    value = graph.initializers["skip_vision.summary.ada.1.weight"]
    zeros = np.zeros_like(value.const_value.numpy())
    value.const_value = ir.tensor(zeros, name=value.name)


@pytest.mark.parametrize(
    ("name", "graph", "damage"),
    [
        ("strict", "decoder_prefill", lose_the_strict_mask),
        ("policy", "decoder_prefill", swap_the_tiers),
        ("quarter", "vision_encoder", forget_the_training),
    ],
)
def test_broken_graphs_are_caught(name, graph, damage, bundles, reference, tmp_path):
    assert gap(twin(bundles(name), tmp_path, leave_as_it_is, graph), reference, 1).passed
    found = gap(twin(bundles(name), tmp_path, damage, graph), reference, 1)
    assert not found.passed
    assert found.overall.max_abs > 100 * LIMIT
