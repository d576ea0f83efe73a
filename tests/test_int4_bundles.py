"""Bundles with int4 weights of the random model: structure, cost, broken twins, and commands."""

import json
import shutil

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from damage import leave_as_it_is, twin
from safetensors.numpy import load_file, save_file

from skipvision_export import SkipVisionConfig, export
from skipvision_export.benchmark.flops import count_flops
from skipvision_export.benchmark.parity import measure_gaps, synthetic_prompts
from skipvision_export.bundle import Manifest
from skipvision_export.cli import run
from skipvision_export.errors import ConfigError
from skipvision_export.exporter import trace_model
from skipvision_export.graph.passes.int4_weights import OP
from skipvision_export.graph.passes.names import DECODE, PREFILL
from skipvision_export.tensorrt.build import build
from skipvision_export.tensorrt.recipe import Recipe
from skipvision_export.validation import INT4_MIN_DB, LIMIT

TYPES = ("float32", "float16")
PRESET = SkipVisionConfig.preset("quarter")


@pytest.fixture(scope="module")
def int4(traced, tmp_path_factory):
    """A merging bundle of each type."""
    folder = tmp_path_factory.mktemp("int4")
    traces = {"float32": traced, "float16": trace_model(traced.source, "float16")}
    return {name: traces[name].write(folder / name, PRESET, weights="int4") for name in TYPES}


def measure(bundle, reference, gaps=None, prompts=1):
    return measure_gaps(bundle, reference, synthetic_prompts(prompts, 96), max_new_tokens=3, gaps=gaps)


@pytest.mark.parametrize("name", TYPES)
def test_gaps(name, int4, reference):
    """Structure to the limit of float32; activations in 8 bits, and int4 itself, apart."""
    report = measure(int4[name], reference, prompts=2)
    assert report.passed
    for tight in ("export", "rewrite"):
        assert report.gaps[tight].overall.max_abs <= LIMIT
        assert report.gaps[tight].greedy_match == 1.0
        assert "int4" in report.gaps[tight].note
    backend, precision = report.gaps["backend"], report.gaps["precision"]
    assert backend.min_db == INT4_MIN_DB["backend"] < backend.overall.sqnr_db < 60
    assert precision.min_db is None
    assert 5 < precision.overall.sqnr_db < 30


@pytest.mark.parametrize("graph", [PREFILL, DECODE])
def test_operators(graph, int4, traced, tmp_path):
    full = traced.write(tmp_path / "full", PRESET)
    before, after = (
        [
            n.op_type
            for n in onnx.load(b.folder / "onnx" / f"{graph}.onnx", load_external_data=False).graph.node
        ]
        for b in (full, int4["float32"])
    )
    # three layers with q, k and v in one, but for the last one's q, which prefill computes for one row; gate
    # and up in one
    assert before.count("MatMul") == after.count(OP) == 3 * 4 + 1 + 1
    assert not after.count("MatMul")
    assert sorted(before) == sorted("MatMul" if kind == OP else kind for kind in after)


def test_both_graphs_share_one_small_file(int4, traced, tmp_path):
    full = traced.write(tmp_path / "full", PRESET)
    sizes = {
        name: sum(f.bytes for file, f in Manifest.load(folder).files.items() if file.endswith("onnx_data"))
        for name, folder in (("full", full.folder), ("int4", int4["float32"].folder))
    }
    # 4 bits, and 36 more for 32 of them; norms and what is too small to be there are not.
    assert sizes["int4"] < sizes["full"] * 1.05 * (4 + 36 / 32) / 32
    places = []
    for graph in (PREFILL, DECODE):
        model = onnx.load(int4["float32"].folder / "onnx" / f"{graph}.onnx", load_external_data=False)
        places.append(
            {
                t.name: {e.key: e.value for e in t.external_data}
                for t in model.graph.initializer
                if ".int4." in t.name
            }
        )
    assert places[0] == places[1]


def test_flops_are_those_of_full_weights(int4, traced, tmp_path):
    full = traced.write(tmp_path / "full", PRESET)
    sizes = {"batch": 1, "sequence": 84, "ffn_tokens": 40, "kept": 40}
    counted = [
        count_flops(onnx.load(b.folder / "onnx" / f"{PREFILL}.onnx", load_external_data=False), sizes)
        for b in (full, int4["float32"], int4["float16"])
    ]
    assert counted[0] == counted[1] == counted[2] > 0


# -- broken twins ------------------------------------------------------------------------------------


def packed(graph, at):
    return [n for n in graph if n.op_type == OP][at].inputs[1]


def swap_two_matrices(graph):
    """The FFNs of two layers have each other's elements of gate and up."""
    first, second = ([n for n in graph if n.op_type == OP][at] for at in (2, 6))
    one, two = first.inputs[1], second.inputs[1]
    first.replace_input_with(1, two)
    second.replace_input_with(1, one)


def clear_some_elements(graph):
    value = packed(graph, -3)
    array = value.const_value.numpy().copy()
    array[:3] = 0
    value.const_value = ir.tensor(array, name=value.name)


def give_a_scale_another_sign(graph):
    value = [n for n in graph if n.op_type == OP][1].inputs[2]
    array = value.const_value.numpy().copy()
    array[:8] *= -1
    value.const_value = ir.tensor(array, name=value.name)


@pytest.mark.parametrize(
    "damage", [leave_as_it_is, swap_two_matrices, clear_some_elements, give_a_scale_another_sign]
)
@pytest.mark.parametrize("name", TYPES)
def test_damage_shows_in_the_tight_gap(name, damage, int4, reference, tmp_path):
    found = measure(twin(int4[name], tmp_path, damage), reference, ["rewrite"]).gaps["rewrite"]
    assert found.passed == (damage is leave_as_it_is)
    if damage is not leave_as_it_is:
        assert found.overall.max_abs > 10 * LIMIT


def test_decode_is_held_to_it_too(int4, reference, tmp_path):
    broken = twin(int4["float32"], tmp_path, clear_some_elements, DECODE)
    assert not measure(broken, reference, ["rewrite"]).gaps["rewrite"].passed


def test_coarse_activations_are_over_the_limit(int4, reference, tmp_path):
    """The twin of the backend gap: activations of one MatMul cut to halves."""
    from skipvision_export.benchmark.contenders import Contenders

    def cut_the_activations(graph):
        node = [n for n in graph if n.op_type == OP][-2]
        two = ir.Value(name="twin.two", const_value=ir.tensor(np.array(2, np.float32)))
        graph.register_initializer(two)
        up = ir.node("Mul", [node.inputs[0], two], name="twin.up")
        cut = ir.node("Round", [up.outputs[0]], name="twin.cut")
        down = ir.node("Div", [cut.outputs[0], two], name="twin.down")
        graph.insert_before(node, [up, cut, down])
        node.replace_input_with(0, down.outputs[0])

    class Mixed(Contenders):
        """Widens the undamaged bundle, runs the damaged one."""

        @property
        def wide(self):
            return intact.wide

    intact = Contenders(int4["float32"], reference, 3)
    damaged = twin(int4["float32"], tmp_path, cut_the_activations)
    with intact:
        report = measure_gaps(
            damaged,
            reference,
            synthetic_prompts(1, 96),
            max_new_tokens=3,
            gaps=["backend"],
            contenders=Mixed(damaged, reference, 3),
        )
    assert not report.passed
    assert "expected 20 or more" in report.gaps["backend"].failures()[0]


# -- commands ----------------------------------------------------------------------------------------


def lines(capsys):
    return capsys.readouterr().err.strip().splitlines()


def test_commands(tiny_folder, tmp_path, capsys):
    out, result = tmp_path / "bundle", tmp_path / "result.json"

    def ok(*command):
        assert run([*map(str, command), "--json", str(result)]) == 0, command[0]
        return json.loads(result.read_text())

    assert (
        ok("export", tiny_folder, "-o", out, "--preset", "quarter", "--weights", "int4")["weights"] == "int4"
    )
    assert Manifest.load(out).weights == "int4"
    gaps = ok("validate", out, "--model", tiny_folder, "--samples", 1)["gaps"]
    assert list(gaps) == ["export", "rewrite", "backend", "method", "precision"]
    assert gaps["backend"]["min_sqnr_db"] == 20
    capsys.readouterr()
    ran = ok("bench", out, "--rounds", 1, "--new-tokens", 2, "--text-tokens", 8)["runs"][0]
    assert ran["weights"] == "int4"
    assert "float32, int4 weights" in capsys.readouterr().out
    ok("inspect", out)
    full = ok("export", tiny_folder, "-o", tmp_path / "full", "--preset", "quarter")
    assert full["weights"] is None
    assert Manifest.load(tmp_path / "full").weights is None


def test_generate_and_evaluate(int4, tmp_path):
    from PIL import Image

    blocks = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(blocks).resize((96, 96)).save(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "question": "What?", "answer": "x"}\n')
    for name in TYPES:
        folder = str(int4[name].folder)
        ask = ["generate", folder, "--image", str(tmp_path / "a.png"), "--prompt", "What?"]
        assert run([*ask, "--max-new-tokens", "3"]) == 0
        assert run(["evaluate", folder, "--data", str(tmp_path), "--max-new-tokens", "3"]) == 0


def test_mistakes(tiny_folder, tmp_path, capsys):
    command = ["export", str(tiny_folder), "-o", str(tmp_path / "x"), "--dense"]
    assert run([*command, "--weights", "int3"]) == 2
    assert "weights 'int3' is not one of int4" in lines(capsys)[-1]
    assert run([*command, "--weights", "int4", "--dtype", "bfloat16"]) == 2
    assert "int4 weights cannot be bfloat16" in lines(capsys)[-1]
    with pytest.raises(ConfigError, match="cannot be bfloat16"):
        export(tiny_folder, tmp_path / "x", PRESET, dtype="bfloat16", weights="int4")
    assert not (tmp_path / "x").exists()


def test_engines_are_refused(int4, tmp_path):
    with pytest.raises(ConfigError, match=r"int4 weights.*TensorRT does not know; export again without"):
        build(int4["float32"].folder, Recipe(name="test"), tmp_path / "e")
    assert not (tmp_path / "e").exists()


@pytest.mark.parametrize("kind", ["config", "tensor", "quantizer"])
def test_a_quantized_checkpoint_is_refused(kind, tiny_folder, tmp_path, capsys):
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    config, file = folder / "config.json", folder / "model.safetensors"
    if kind == "config":
        quantized = {"quant_method": "modelopt", "quant_algo": "FP8"}
        config.write_text(json.dumps(json.loads(config.read_text()) | {"quantization_config": quantized}))
    else:
        weights = load_file(file)
        prefix = next(n for n in weights if n.endswith("layers.1.mlp.up_proj.weight")).removesuffix(".weight")
        name = "weight_scale" if kind == "tensor" else "input_quantizer._amax"
        save_file(weights | {f"{prefix}.{name}": np.ones(1, np.float32)}, file, {"format": "pt"})
    assert run(["export", str(folder), "-o", str(tmp_path / "out"), "--dense"]) == 2
    said = lines(capsys)[-1]
    assert "is quantized already" in said
    assert {"config": "modelopt", "tensor": "weight_scale", "quantizer": "_amax"}[kind] in said
    assert "export --weights int4" in said
    assert not (tmp_path / "out").exists()
