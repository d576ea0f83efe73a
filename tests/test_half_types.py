"""float16 and bfloat16 bundles of the random model: structure, precision, and broken twins."""

import json
import shutil

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from damage import leave_as_it_is, twin
from PIL import Image
from tiny import tiny_model

from skipvision_export import SkipVisionConfig
from skipvision_export.benchmark.contenders import Contenders
from skipvision_export.benchmark.parity import measure_gaps, synthetic_prompts
from skipvision_export.cli import run
from skipvision_export.errors import BackendError, ModelError
from skipvision_export.exporter import trace_model
from skipvision_export.graph.widen import half_types
from skipvision_export.models.loading import resolve_model
from skipvision_export.runtime.torch_reference import TorchReference
from skipvision_export.validation import LIMIT, MIN_CHOICE, MIN_DB

TYPES = ("float16", "bfloat16")


@pytest.fixture(scope="module")
def halves(traced, tmp_path_factory):
    """A merging bundle of each type, the graphs being traced in that type."""
    folder = tmp_path_factory.mktemp("halves")
    config = SkipVisionConfig.preset("quarter")
    return {name: trace_model(traced.source, name).write(folder / name, config) for name in TYPES}


def measure(bundle, reference, gaps=None, prompts=2, **more):
    asked = synthetic_prompts(prompts, 96)
    return measure_gaps(bundle, reference, asked, max_new_tokens=3, gaps=gaps, **more)


@pytest.mark.parametrize("name", TYPES)
def test_gaps(name, halves, reference):
    report = measure(halves[name], reference)
    assert set(report.gaps) == {"export", "rewrite", "backend", "method", "precision"}
    for tight in ("export", "rewrite"):
        assert report.gaps[tight].passed
        assert report.gaps[tight].overall.max_abs <= LIMIT
        assert report.gaps[tight].greedy_match == 1.0
    precision = report.gaps["precision"]
    assert precision.passed
    assert precision.overall.sqnr_db >= MIN_DB[name]
    assert precision.overall.max_abs > LIMIT  # or it would not be the half type's
    assert precision.choice.tokens >= MIN_CHOICE
    assert report.passed


def test_the_bundle_as_it_runs(halves, reference):
    backend = measure(halves["float16"], reference, ["backend"]).gaps["backend"]
    assert backend.passed
    assert backend.choice.tokens >= MIN_CHOICE
    assert backend.overall.max_abs > LIMIT
    skipped = measure(halves["bfloat16"], reference, ["backend", "rewrite"])
    assert skipped.gaps["backend"].passed is None
    assert "no CPU kernels" in skipped.gaps["backend"].not_run
    assert skipped.passed
    assert skipped.to_json()["gaps"]["backend"]["passed"] is None


def test_onnx_runtime_still_has_no_bfloat16_on_the_cpu(halves):
    file = halves["bfloat16"].folder / "onnx" / "vision_encoder.onnx"
    options = ort.SessionOptions()
    options.log_severity_level = 4
    with pytest.raises(Exception, match="NOT_IMPLEMENTED"):
        ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    with pytest.raises(BackendError, match="--dtype float32 or float16"):
        halves["bfloat16"].backend.session("vision_encoder")


@pytest.mark.parametrize("name", TYPES)
def test_no_graph_lost_its_rotary_embedding(name, halves, traced):
    for graph in ("decoder_prefill", "decoder_decode"):
        model = ir.load(halves[name].folder / "onnx" / f"{graph}.onnx")
        ops = [node.op_type for node in model.graph]
        assert half_types(model)
        assert ops.count("RotaryEmbedding") == 6
        assert "Neg" not in ops


# -- broken twins ------------------------------------------------------------------------------------


def matrix(graph, kind="MatMul", at=-3):
    node = [n for n in graph if n.op_type == kind][at]
    return next(v for v in node.inputs if v.is_initializer())


def damage_one_weight(graph):
    """One number of one matrix is off by a little."""
    value = matrix(graph)
    array = value.const_value.numpy().copy()
    array[0, 0] += np.asarray(0.5, array.dtype)
    value.const_value = ir.tensor(array, name=value.name)


def interleave_a_rotation(graph):
    node = [n for n in graph if n.op_type == "RotaryEmbedding"][2]
    node.attributes["interleaved"] = ir.AttrInt64("interleaved", 1)


def cast_the_angles_too_early(graph):
    """Cosines of angles that were cut to integers before."""
    cos = next(n for n in graph if n.op_type == "Cos")
    down = ir.node("Cast", [cos.inputs[0]], {"to": ir.DataType.INT64}, name="twin.down")
    up = ir.node("Cast", [down.outputs[0]], {"to": ir.DataType.FLOAT}, name="twin.up")
    graph.insert_before(cos, [down, up])
    cos.replace_input_with(0, up.outputs[0])


def shift_the_kept(graph):
    """One layer keeps the K and V one place before."""
    node = [n for n in graph if n.op_type == "KVPrune"][1]
    one = ir.Value(name="twin.one", const_value=ir.tensor(np.array([1], np.int64)))
    zero = ir.Value(name="twin.zero", const_value=ir.tensor(np.array([0], np.int64)))
    graph.register_initializer(one)
    graph.register_initializer(zero)
    sub = ir.node("Sub", [node.inputs[2], one], name="twin.sub")
    low = ir.node("Max", [sub.outputs[0], zero], name="twin.low")
    graph.insert_before(node, [sub, low])
    node.replace_input_with(2, low.outputs[0])


DAMAGES = [damage_one_weight, interleave_a_rotation, cast_the_angles_too_early, shift_the_kept]


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("damage", [leave_as_it_is, *DAMAGES])
def test_damage_shows_in_the_tight_gap(name, damage, halves, reference, tmp_path):
    found = measure(twin(halves[name], tmp_path, damage), reference, ["rewrite"], 1).gaps["rewrite"]
    assert found.passed == (damage is leave_as_it_is)
    if damage is not leave_as_it_is:
        assert found.overall.max_abs > 3 * LIMIT


def test_damage_to_the_choice_shows(halves, reference, tmp_path):
    """The real graph chooses by negated scores, the widened one does not."""

    def turn_the_scores(graph):
        node = next(n for n in graph if n.op_type == "TopK")
        node.attributes["largest"] = ir.AttrInt64("largest", 0)

    class Mixed(Contenders):
        """Widens the undamaged bundle, runs the damaged one."""

        @property
        def wide(self):
            return intact.wide

        def check_real(self):
            pass

    intact = Contenders(halves["float16"], reference, 3)
    damaged = twin(halves["float16"], tmp_path, turn_the_scores, "vision_encoder")
    with intact:
        found = measure(damaged, reference, ["backend"], contenders=Mixed(damaged, reference, 3))
    gap = found.gaps["backend"]
    assert gap.choice.tokens < 0.5
    assert any("chosen visual tokens" in line for line in gap.failures())


class Coarse(Contenders):
    """A half type with as many bits of mantissa as `bits` says, its weights at least."""

    bits = 4

    @property
    def in_half(self):
        model = tiny_model()
        with torch.no_grad():
            for parameter in model.parameters():
                mantissa, exponent = torch.frexp(parameter)
                step = 2.0 ** (self.bits + 1)
                parameter.copy_(torch.ldexp((mantissa * step).round() / step, exponent))
        return TorchReference(self.reference.source, model)


class Fine(Coarse):
    bits = 10


def test_coarse_weights_are_over_the_limit(halves, reference):
    found = {
        kind: measure(
            halves["float16"], reference, ["precision"], contenders=kind(halves["float16"], reference, 3)
        ).gaps["precision"]
        for kind in (Coarse, Fine)
    }
    assert found[Fine].passed
    assert found[Coarse].passed is False
    assert found[Coarse].overall.sqnr_db < MIN_DB["float16"] - 6


# -- overflow ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def loud(tiny_folder, tmp_path_factory):
    """The random model with logits over 65504, and one with a weight over it."""
    folder = tmp_path_factory.mktemp("loud")
    for name, factor in (("logits", 1e5), ("weight", 1e7)):
        shutil.copytree(tiny_folder, folder / name)
        model = tiny_model()
        with torch.no_grad():
            model.get_output_embeddings().weight.mul_(factor)
        model.save_pretrained(folder / name)
    return folder


def test_overflow_in_pytorch_says_what_to_do(halves, loud):
    reference = TorchReference(resolve_model(loud / "logits"))
    found = measure(halves["float16"], reference, ["precision"], 1).gaps["precision"]
    assert found.not_finite == ["logits"]
    assert found.passed is False
    assert "float16 overflowed" in found.failures()[0]
    assert "bfloat16" in found.failures()[0]
    assert not measure(halves["bfloat16"], reference, ["precision"], 1).gaps["precision"].not_finite


def test_a_weight_that_overflows_is_named(loud):
    with pytest.raises(ModelError, match=r"lm_head.*NaN or infinity in float16.*bfloat16"):
        trace_model(resolve_model(loud / "weight"), "float16")


def test_overflow_in_onnx_runtime_says_what_to_do(halves, reference, tmp_path):
    def amplify(graph):
        """Logits leave float16, not float32."""
        value = matrix(graph, at=-1)
        array = (value.const_value.numpy().astype(np.float32) * 1e5).astype(np.float16)
        assert np.isfinite(array).all()
        value.const_value = ir.tensor(array, name=value.name)

    found = measure(twin(halves["float16"], tmp_path, amplify), reference, ["backend"], 1).gaps["backend"]
    assert found.not_finite == ["logits"]
    assert "float16 overflowed" in found.failures()[0]


# -- commands ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """A picture and a question about it."""
    folder = tmp_path_factory.mktemp("asked")
    blocks = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(blocks).resize((96, 96)).save(folder / "a.png")
    (folder / "metadata.jsonl").write_text('{"file_name": "a.png", "question": "What?", "answer": "x"}\n')
    return folder


def commands(folder, asked):
    yield ["generate", folder, "--image", asked / "a.png", "--prompt", "What?", "--max-new-tokens", 3]
    yield ["evaluate", folder, "--data", asked, "--max-new-tokens", 3]
    yield ["bench", folder, "--rounds", 1, "--new-tokens", 2, "--text-tokens", 8]


def test_float16_bundles_run(halves, asked):
    for command in commands(halves["float16"].folder, asked):
        assert run([*map(str, command)]) == 0, command[0]


def test_bfloat16_bundles_say_what_runs_them(halves, asked, capsys):
    for command in commands(halves["bfloat16"].folder, asked):
        assert run([*map(str, command)]) == 2, command[0]
        lines = [line for line in capsys.readouterr().err.splitlines() if "bfloat16" in line]
        assert len(lines) == 1
        assert "--dtype float32 or float16" in lines[0]


def test_validate_prints_every_gap(halves, tiny_folder, tmp_path, capsys):
    out = tmp_path / "out.json"
    command = ["validate", halves["bfloat16"].folder, "--model", tiny_folder, "--samples", 1, "--json", out]
    assert run([*map(str, command)]) == 0
    lines = capsys.readouterr().out.splitlines()
    named = ["export", "rewrite", "backend", "method", "precision", "layers"]
    assert [line.split()[0] for line in lines] == named
    assert lines[2].split()[1:3] == ["not", "run:"]
    assert "limit 22 dB" in lines[4]
    assert lines[5].split()[1] == "ok"
    gaps = json.loads(out.read_text())["gaps"]
    assert gaps["precision"]["min_sqnr_db"] == 22
    assert gaps["precision"]["choice"]["limit"] == MIN_CHOICE
    assert "same image features" in gaps["precision"]["note"]
    assert gaps["backend"]["not_run"]
