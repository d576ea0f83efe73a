"""A text model with experts: parity, broken experts and routers that are caught, operations, refusals."""

import contextlib
from types import SimpleNamespace

import numpy as np
import onnx_ir as ir
import pytest
from damage import twin
from families import FAMILIES
from family_check import LIMIT, PARITY, Subject

from skipvision_export import SkipVisionConfig
from skipvision_export.benchmark.floor import decoder_dims, phase_work
from skipvision_export.benchmark.flops import prefill_cost
from skipvision_export.bundle import check_room
from skipvision_export.bundle.room import memory_needed
from skipvision_export.cli import run
from skipvision_export.errors import ConfigError, RoomError
from skipvision_export.exporter import check_target
from skipvision_export.graph.experts import traced_by_rows
from skipvision_export.graph.passes.own_sizes import OwnSizesPass
from skipvision_export.graph.passes.rowwise import prove_rowwise
from skipvision_export.graph.passes.skip_ffn import find_ffns
from skipvision_export.models.checkpoint import Checkpoint
from skipvision_export.models.experts import experts_of

STEPS = 13  # one of prefill, the others of decode


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    return Subject.make(FAMILIES["llava: clip, mixtral"], tmp_path_factory.mktemp("mixture"))


@pytest.fixture(scope="module")
def dense(subject, tmp_path_factory):
    return subject.dense(tmp_path_factory.mktemp("dense") / "dense")


def test_parity(subject, dense):
    for bundle in (dense, subject.skip):
        report = subject.measure(bundle, (*PARITY, "method"), STEPS)
        assert report.passed
        assert max(report.gaps[name].overall.max_abs for name in PARITY) <= LIMIT
        assert max(len(t.token_ids) for t in report.transcripts["ort"]) == STEPS
    assert report.gaps["method"].outputs["logits"].max_abs > 0.1


def expert_weights(graph, part):
    values = {name: value for name, value in graph.initializers.items() if f".{part}." in name}
    assert len(values) == 8  # four experts in each of two layers
    return [values[name] for name in sorted(values)]


def take_each_other_s_matrices(graph):
    """The experts of the first layer."""
    values = expert_weights(graph, "down_of")[:4]
    for value, other in zip(values, [v.const_value for v in (*values[1:], values[0])], strict=True):
        value.const_value = other


def choose_the_worst_experts(graph):
    for node in graph:
        if node.op_type == "TopK":
            node.attributes["largest"] = ir.AttrInt64("largest", 0)


def leave_shares_out(graph):
    """Experts' sums are not weighted."""
    for node in graph:
        if node.op_type == "ScatterND" and "experts" in node.metadata_props.get("name_scopes", ""):
            product = node.inputs[2].producer()
            node.replace_input_with(2, product.inputs[0])


@pytest.mark.parametrize("graph", ["decoder_prefill", "decoder_decode"])
@pytest.mark.parametrize("damage", [take_each_other_s_matrices, choose_the_worst_experts, leave_shares_out])
def test_broken_experts_are_caught(graph, damage, subject, tmp_path):
    broken = subject.measure(twin(subject.skip, tmp_path, damage, graph), ("rewrite",), 4, 1)
    assert broken.gaps["rewrite"].overall.max_abs > 100 * LIMIT


def test_other_broken_graphs_are_caught(subject, tmp_path):
    assert min(subject.twins(tmp_path, 4).values()) > 100 * LIMIT


def test_operations_are_those_of_the_experts_that_are_chosen(subject, dense):
    for bundle in (dense, subject.skip):
        dims = decoder_dims(bundle)
        assert (dims.experts, dims.experts_per_token) == (4, 2)
        cost = prefill_cost(dims, bundle.manifest.layout, 10)
        assert phase_work(bundle, 10, 2)["prefill"].flops == cost.prefill_flops
    one = 3 * dims.hidden_size * dims.intermediate_size
    assert dims.ffn_products == 2 * one + 4 * dims.hidden_size
    assert dims.ffn_weights == 4 * one + 4 * dims.hidden_size


def test_each_expert_s_matrices_are_in_the_decoder_s_file_once(subject):
    stored = (subject.skip.folder / "onnx" / "decoder.onnx_data").stat().st_size
    parameters = sum(p.numel() for p in subject.reference.model.model.language_model.parameters())
    head = subject.reference.model.lm_head.weight.numel()
    assert stored < 1.05 * 4 * (parameters + head)


def test_without_sizes_of_its_own_no_ffn_is_found(subject):
    model = subject.traced.trace.graphs["decoder_prefill"].clone()
    assert not find_ffns(model.graph)
    assert OwnSizesPass()(model).modified
    ffns = find_ffns(model.graph)
    assert len(ffns) == 2
    for ffn in ffns:
        prove_rowwise(ffn.nodes, ffn.trunk, ffn.scope)
    assert not OwnSizesPass()(subject.traced.trace.graphs["vision_encoder"].clone()).modified


def test_a_trace_leaves_the_model_as_it_was(subject):
    model = subject.reference.model
    names = [name for name, _ in model.named_parameters()]
    (first, *_) = experts_of(model)
    before = first.config._experts_implementation
    with contextlib.suppress(KeyError), traced_by_rows(model):
        assert len(list(model.parameters())) == len(names) + 2 * 2 * 4
        raise KeyError
    assert [name for name, _ in model.named_parameters()] == names
    assert first.config._experts_implementation == before


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"dtype": "float16"}, "float16 rounds what chooses"),
        ({"dtype": "bfloat16"}, "bfloat16 rounds what chooses"),
        ({"weights": "int4"}, "int4 rounds what chooses"),
        ({"reference_weights": True}, "leave out --reference-weights"),
    ],
)
def test_what_experts_do_not_allow_is_refused(given, message, subject):
    asked = {"dtype": "float32", "target": "onnxruntime"} | given
    with pytest.raises(ConfigError, match=message):
        check_target(subject.traced.source, SkipVisionConfig.dense(), **asked)


def test_memory_for_all_weights_is_asked_for(subject, tmp_path, monkeypatch):
    checkpoint = Checkpoint.open(subject.traced.source.folder)
    available = memory_needed(checkpoint)
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=available))
    check_room(checkpoint, "float32", tmp_path / "out")
    with pytest.raises(RoomError, match="of memory"):
        check_room(checkpoint, "float32", tmp_path / "out", whole=True)


def test_the_command_line(subject, tmp_path, capsys):
    folder, bundle = str(subject.traced.source.folder), str(subject.skip.folder)
    assert run(["inspect", folder]) == 0
    assert run(["validate", bundle, "--model", folder, "--samples", "1", "--max-new-tokens", "2"]) == 0
    assert run(["bench", bundle, "--rounds", "1", "--new-tokens", "2", "--text-tokens", "8"]) == 0
    out = str(tmp_path / "out")
    assert run(["export", folder, "-o", out, "--preset", "quarter", "--dtype", "float16"]) == 2
    assert "rounds what chooses a mixture's experts" in capsys.readouterr().err


def test_a_batch_answers_as_each_prompt_alone(subject):
    rng = np.random.default_rng(0)
    total = subject.skip.manifest.layout.total
    ids = [np.array([[*rng.integers(4, 280, n), *[3] * total, *rng.integers(4, 280, 5)]]) for n in (2, 6)]
    pixels = [rng.standard_normal((1, 3, 96, 96), np.float32) for _ in ids]
    together = subject.skip.generator.generate_batch(ids, pixels, max_new_tokens=4, keep_logits=True)
    for own, picture, found in zip(ids, pixels, together, strict=True):
        alone = subject.skip.generator.generate(own, picture, max_new_tokens=4, keep_logits=True)
        assert np.abs(np.array(alone.logits) - np.array(found.logits)).max() <= LIMIT
