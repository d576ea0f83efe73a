"""Every vision tower and text model of LLaVA: exported graphs against PyTorch, and broken twins."""

import os
import re

import numpy as np
import onnx_ir as ir
import pytest
from damage import leave_as_it_is, twin
from families import TEXT, text_config, write_family
from tiny import tiny_config, tiny_model, write_tiny
from transformers import LlavaForConditionalGeneration

from skipvision_export import SkipVisionConfig
from skipvision_export.benchmark.parity import measure_gaps, synthetic_prompts
from skipvision_export.cli import run
from skipvision_export.errors import ModelError
from skipvision_export.exporter import trace_model
from skipvision_export.models.loading import resolve_model
from skipvision_export.runtime.torch_reference import TorchReference

LIMIT = 1e-4
STEPS = 13  # one of prefill, twelve of decode
QUARTER = SkipVisionConfig.preset("quarter")
FAMILIES = {**{f"clip, {text}": (text, "clip") for text in TEXT}, "siglip, llama": ("llama", "siglip")}
if not os.environ.get("SKIPVISION_ALL_FAMILIES"):  # those that differ most; all of them take five minutes
    FAMILIES = {name: FAMILIES[name] for name in ("clip, qwen3", "clip, gemma", "siglip, llama")}


@pytest.fixture(scope="module", params=FAMILIES)
def traced(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("family") / "model"
    return trace_model(resolve_model(write_family(folder, *FAMILIES[request.param])))


@pytest.fixture(scope="module")
def reference(traced):
    return TorchReference(traced.source, traced.model)


@pytest.fixture(scope="module")
def skip(traced, tmp_path_factory):
    return traced.write(tmp_path_factory.mktemp("family") / "skip", QUARTER)


def measure(bundle, reference, gaps, prompts=2):
    prompts = synthetic_prompts(prompts, 96)
    return measure_gaps(bundle, reference, prompts, max_new_tokens=STEPS, gaps=gaps)


def test_dense(traced, reference, tmp_path):
    bundle = traced.write(tmp_path / "dense", SkipVisionConfig.dense())
    report = measure(bundle, reference, ["export", "rewrite", "backend"])
    assert report.passed
    assert max(gap.overall.max_abs for gap in report.gaps.values()) <= LIMIT


def test_skip(skip, reference):
    report = measure(skip, reference, ["export", "rewrite", "backend", "method"])
    assert report.passed
    for name in ("export", "rewrite", "backend"):
        assert report.gaps[name].overall.max_abs <= LIMIT
    assert report.gaps["method"].outputs["logits"].max_abs > 0.1
    assert max(len(t.token_ids) for t in report.transcripts["ort"]) == STEPS


def test_both_forms_for_onnx_runtime_are_there(skip, traced):
    if traced.source.config.text_config.model_type == "phi3":
        pytest.skip("Phi-3 packs and slices its projections itself: it runs in the form for every runtime")
    assert set(skip.manifest.variants) == {"decoder_prefill.onnxruntime", "decoder_decode.onnxruntime"}


# -- broken twins ------------------------------------------------------------------------------------


def let_a_row_pass_by(graph):
    """The first row of the FFNs takes the place of the last one."""
    index = next(v for v in graph.inputs if v.name == "ffn_index")
    zero, end = (ir.Value(name=f"twin.{n}", const_value=ir.tensor(np.array([n]))) for n in (0, -1))
    one = ir.Value(name="twin.1", const_value=ir.tensor(np.array([1])))
    for value in (zero, end, one):
        graph.register_initializer(value)
    users = [(use.node, use.idx) for use in index.uses()]
    head = ir.node("Slice", [index, zero, end])
    tail = ir.node("Slice", [index, zero, one])
    both = ir.node("Concat", [head.outputs[0], tail.outputs[0]], {"axis": 0})
    for node, at in users:
        node.replace_input_with(at, both.outputs[0])
    graph.insert_before(graph[0], [head, tail, both])


def count_positions_one_further(graph):
    position = next(v for v in graph.inputs if v.name == "position_ids")
    one = ir.Value(name="twin.one", const_value=ir.tensor(np.array(1)))
    graph.register_initializer(one)
    users = [(use.node, use.idx) for use in position.uses()]
    add = ir.node("Add", [position, one])
    for node, at in users:
        node.replace_input_with(at, add.outputs[0])
    graph.insert_before(graph[0], add)


@pytest.mark.parametrize(
    ("graph", "damage"),
    [
        ("decoder_prefill", let_a_row_pass_by),
        ("decoder_decode", count_positions_one_further),
    ],
)
def test_broken_graphs_are_caught(graph, damage, skip, reference, tmp_path):
    intact = twin(skip, tmp_path, leave_as_it_is, graph)
    assert measure(intact, reference, ["rewrite"], 1).gaps["rewrite"].passed
    found = measure(twin(skip, tmp_path, damage, graph), reference, ["rewrite"], 1).gaps["rewrite"]
    assert not found.passed
    assert found.overall.max_abs > 100 * LIMIT


# -- facts -------------------------------------------------------------------------------------------


def test_without_a_cls_row_tokens_are_chosen_by_redundancy(skip, traced):
    has_cls = traced.source.family.vision_dims(traced.source.config).has_cls
    assert skip.config.selector == ("cls_attention" if has_cls else "dart")


def refused(tmp_path, config, message):
    tiny_model(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=re.escape(message)):
        resolve_model(tmp_path)


@pytest.mark.parametrize(
    ("where", "part"),
    [
        ("model", "language_model"),
        ("model", "multi_modal_projector"),
        ("model.language_model", "layers"),
        ("model.language_model.layers.1", "mlp"),
    ],
)
def test_a_changed_layout_is_refused_by_the_part_that_is_missing(where, part, monkeypatch, tmp_path, capsys):
    """As a class of a later transformers may have it: the part has another name."""

    class Moved(LlavaForConditionalGeneration):
        @classmethod
        def from_pretrained(cls, *args, **kwargs):
            model, info = LlavaForConditionalGeneration.from_pretrained(*args, **kwargs)
            owner = model.get_submodule(where)
            owner.moved = getattr(owner, part)
            delattr(owner, part)
            return model, info

    folder = write_tiny(tmp_path / "model")
    monkeypatch.setattr("transformers.LlavaForConditionalGeneration", Moved)
    assert run(["export", str(folder), "-o", str(tmp_path / "out"), "--dense"]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("skipvision: ")]
    assert len(lines) == 1
    assert f"no attribute {part!r}" in lines[0] and "not laid out as family 'llava' knows it" in lines[0]


def test_sliding_windows_are_refused(tmp_path):
    config = tiny_config()
    config.text_config = text_config("mistral")
    config.text_config.sliding_window = 64
    refused(tmp_path, config, "has sliding windows (sliding_window=64)")


def test_a_selection_that_does_not_fit_the_tower_is_refused(tmp_path):
    config = tiny_config()
    config.vision_feature_select_strategy = "full"
    refused(tmp_path, config, "supported with clip_vision_model: 'default'")
