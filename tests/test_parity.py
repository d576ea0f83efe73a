"""The trained checkpoints: exported graphs against PyTorch on held-out questions, and broken twins."""

from functools import partial

import numpy as np
import onnx_ir as ir
import pytest
from conftest import EXAMPLE
from damage import held, instead_of_input, leave_as_it_is, twin
from full import FULL

from skipvision_export import SkipVisionConfig
from skipvision_export.benchmark.accuracy import BundleAnswerer, evaluate, shuffled
from skipvision_export.benchmark.parity import measure_gaps, prompts_from
from skipvision_export.method import saved_config
from skipvision_export.runtime.data import load_imagefolder
from skipvision_export.runtime.generation import Generator
from skipvision_export.runtime.torch_reference import TorchReference
from skipvision_export.validation import compare_steps

QUESTIONS = 200 if FULL else 60
LIMIT = 1e-4


@pytest.fixture(scope="module")
def samples():
    return load_imagefolder(EXAMPLE / "test")


@pytest.fixture(scope="module")
def trained_reference(trained):
    return TorchReference(trained.source, trained.model)


@pytest.fixture(scope="module")
def skip(finetuned, tmp_path_factory):
    """The fine-tune with what it carries: the quarter preset and trained summary tokens."""
    config = saved_config(finetuned.source.folder)
    assert config.name == "quarter"
    return finetuned.write(tmp_path_factory.mktemp("trained") / "skip", config)


@pytest.fixture(scope="module")
def dense(trained, tmp_path_factory):
    return trained.write(tmp_path_factory.mktemp("trained") / "dense", SkipVisionConfig.dense())


@pytest.fixture(scope="module")
def report(skip, finetuned, samples):
    reference = TorchReference(finetuned.source, finetuned.model)
    return measure_gaps(skip, reference, prompts_from(samples[:QUESTIONS]))


@pytest.mark.parametrize("name", ["export", "rewrite", "backend"])
def test_gap(report, name):
    gap = report.gaps[name]
    assert gap.n == QUESTIONS
    assert gap.greedy_match == 1.0
    assert set(gap.outputs) > {"logits", "present.0.key"}
    assert gap.overall.max_abs <= LIMIT
    assert gap.passed


def test_the_method_gap_is_no_rounding(report):
    # were patched and dense the same, the other gaps would prove nothing
    assert report.gaps["method"].outputs["logits"].max_abs > 0.1


def test_decode_takes_several_steps(report):
    assert np.mean([len(t.token_ids) for t in report.transcripts["ort"]]) > 3


OTHERS = {
    "dense": SkipVisionConfig.dense(),
    **{name: SkipVisionConfig.preset(name) for name in ("skip-50", "skip-75", "skip-90")},
    "strict": SkipVisionConfig.counts(16, 24, selector="dart", summaries=True, strict=True),
    "policy": SkipVisionConfig(layer_shares=(0.0, 0.5, 0.75, 0.9)),
}


@pytest.mark.parametrize("name", OTHERS if FULL else ["dense", "skip-75", "strict", "policy"])
def test_rewrite_gap_of(name, trained, trained_reference, samples, tmp_path):
    bundle = trained.write(tmp_path / "bundle", OTHERS[name])
    prompts = prompts_from(samples[:QUESTIONS])
    gap = measure_gaps(bundle, trained_reference, prompts, gaps=["rewrite"]).gaps["rewrite"]
    assert gap.passed
    assert gap.n == QUESTIONS
    assert gap.overall.max_abs <= LIMIT


# -- broken twins: each must be caught --------------------------------------------------------------


def shift_ffn_index(graph):
    """Every FFN takes its rows one further."""
    one = held(graph, "one", [1])

    def make(index):
        add = ir.node("Add", [index, one])
        # the last token is text, so the largest row is the sequence's last: no index leaves it
        last = ir.node("ReduceMax", [index], attributes={"keepdims": 0})
        return [add, last, ir.node("Min", [add.outputs[0], last.outputs[0]])]

    instead_of_input(graph, "ffn_index", make)


def leave_a_layer_unpruned(graph):
    """One layer gives its full K and V out."""
    node = [n for n in graph if n.op_type == "KVPrune"][1]
    for i in (0, 1):
        pruned, full = node.outputs[i], node.inputs[i]
        at = list(graph.outputs).index(pruned)
        name = pruned.name
        pruned.name = f"{name}.unused"
        full.name, graph.outputs[at] = name, full


def drop_a_scatter(graph):
    """One layer's FFN output never gets back."""
    node = [n for n in graph if n.op_type == "ScatterND"][2]
    ir.convenience.replace_all_uses_with(node.outputs[0], node.inputs[0])


class RestartedPositions(Generator):
    """Decode counts on from the length of the cache."""

    def decode(self, token, position, cache):
        return super().decode(token, cache.length, cache)


def caught(skip, generator, report, samples):
    """Does the rewrite gap fail, or the run itself, on the first questions?"""
    pairs = []
    try:
        for i, sample in enumerate(samples[:12]):
            inputs = skip.prepare(sample.image, sample.question)
            run = partial(generator.generate, max_new_tokens=16, eos=skip.eos, keep_logits=True, keep_kv=True)
            pairs.append((report.transcripts["patched"][i], run(inputs.input_ids, inputs.pixel_values)))
    except Exception as error:
        return type(error).__name__
    gap = compare_steps("rewrite", pairs, LIMIT)
    return "" if gap.passed else f"{gap.overall.max_abs:.1e}"


@pytest.mark.parametrize("damage", [shift_ffn_index, leave_a_layer_unpruned, drop_a_scatter])
def test_broken_graphs_are_caught(skip, report, samples, tmp_path, damage):
    assert caught(skip, twin(skip, tmp_path, damage).generator, report, samples)


def test_restarted_positions_are_caught(skip, report, samples):
    assert caught(skip, RestartedPositions(skip.backend, skip.manifest), report, samples)


def test_an_unbroken_twin_is_not_caught(skip, report, samples, tmp_path):
    assert not caught(skip, twin(skip, tmp_path, leave_as_it_is).generator, report, samples)


# -- the checkpoint itself ---------------------------------------------------------------------------


def test_checkpoints_are_small(trained):
    for name in ("checkpoint", "finetuned"):
        assert sum(p.stat().st_size for p in (EXAMPLE / name).iterdir()) <= 8e6
    assert sum(p.numel() for p in trained.model.parameters()) <= 4e6
    assert trained.source.family.visual_tokens(trained.source.config) <= 144


def test_checkpoint_has_learned(dense, skip, samples):
    assert len(samples) == 1000
    right = evaluate(BundleAnswerer(dense, batch=16), samples)
    floor = evaluate(BundleAnswerer(dense, batch=16), shuffled(samples[:300]))
    skipping = evaluate(BundleAnswerer(skip, batch=16), samples)
    assert right.accuracy >= 0.95
    # one point below dense is what the method is allowed to cost
    assert skipping.accuracy >= right.accuracy - 0.01
    assert floor.accuracy <= 0.4
