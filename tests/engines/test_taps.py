"""Engines that show what each layer computes: what is built, and how it is compared.

Nothing runs engines here: the comparison is driven by a double, the very graphs that are built, in ONNX
Runtime.
"""

import numpy as np
import onnxruntime as ort
import pytest
from family_check import config_of
from faults import draw, inject
from full import FULL

from skipvision_export.benchmark.blame import compare_layers, record
from skipvision_export.benchmark.blame_engines import compare_engines
from skipvision_export.benchmark.parity import synthetic_prompts
from skipvision_export.bundle import load_graph
from skipvision_export.cli import run
from skipvision_export.errors import BackendError, BundleError
from skipvision_export.exporter import trace_skeleton
from skipvision_export.graph.module_paths import ModulePaths
from skipvision_export.graph.passes.names import DECODE, EMBED, ONNXRUNTIME, PREFILL, VISION
from skipvision_export.models.loading import resolve_model
from skipvision_export.runtime.ort import check_providers
from skipvision_export.runtime.pipeline import Bundle
from skipvision_export.tensorrt.build import build, plan, shown_graph
from skipvision_export.tensorrt.recipe import Recipe

PROMPT = synthetic_prompts(1, 96)[0]
LAYERS = [f"layers.{i}.{part}" for i in range(3) for part in ("attention", "ffn")]
FAULTS = 40 if FULL else 8
TYPES = {"float32": "float", "float16": "half", "bfloat16": "bf16"}  # as TensorRT calls them


def tapped_vision(bundle):
    """Its layers that are used, and what comes out before tokens are laid out."""
    layers = ModulePaths.of_source(resolve_model(bundle)).vision_layers
    return [*(f"vision.layers.{i}" for i in range(len(layers))), "image_features.raster"]


# -- what is built -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def half(traced, tmp_path_factory):
    own = trace_skeleton(traced.source, "float16")
    return own.write(tmp_path_factory.mktemp("half") / "bundle", config_of(traced))


@pytest.mark.parametrize("dtype", TYPES if FULL else ["float16"])
def test_engines_list_every_tap(rtx, traced, half, tmp_path, dtype):
    bundle = half.folder
    if dtype != "float16":
        own = trace_skeleton(traced.source, dtype)
        bundle = own.write(tmp_path / "bundle", config_of(traced)).folder
    made = {
        taps: build(bundle, Recipe(name="test"), tmp_path / f"engines-{taps}", taps=taps).engines
        for taps in (False, True)
    }
    more = {VISION: tapped_vision(bundle), EMBED: [], PREFILL: LAYERS, DECODE: LAYERS}
    for graph, info in made[True].items():
        before, after = ({t.name: t for t in engines[graph].outputs} for engines in (made[False], made[True]))
        assert list(after) == [*before, *more[graph]]
        assert {after[name].dtype for name in more[graph]} <= {
            {"float32": "float", "float16": "half"}.get(dtype, "bf16")
        }
        # What the compiler wrote has them too, not only what was asked of it.
        data = (tmp_path / "engines-True" / info.file).read_bytes()
        assert all(name.encode() in data for name in more[graph])


# -- how it is compared ------------------------------------------------------------------------------


class Double:
    """Runs the graphs that engines are built of."""

    def __init__(self, folder, taps=True):
        self.planned = plan(folder, Recipe(), taps=taps)

    def run(self, graph, feeds):
        model, origin = shown_graph(self.planned, graph)
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(origin.parent)
        )
        session = ort.InferenceSession(model.SerializeToString(), options)
        kinds = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int64)": np.int64}
        given = {value.name: feeds[value.name].astype(kinds[value.type]) for value in session.get_inputs()}
        return dict(zip([out.name for out in session.get_outputs()], session.run(None, given), strict=True))

    @staticmethod
    def numpy(value):
        return value


def test_nothing_is_blamed_where_nothing_is_wrong(form, reference):
    report = compare_engines(form, Double(form.folder), reference, PROMPT)
    assert report.verdict is None, report.line()
    graphs = compare_layers(form, reference, PROMPT).points
    seen = {(point.graph, point.name) for point in report.points}
    assert seen == {(p.graph, p.name) for p in graphs if not p.graph.endswith(ONNXRUNTIME)}


def test_a_half_type_is_held_to_its_own_limits(half, reference):
    report = compare_engines(half, Double(half.folder), reference, PROMPT)
    assert report.verdict is None, report.line()
    worst = min(point.alone.sqnr_db for point in report.points)
    assert 50 <= worst < 100  # it was float16 that was compared


def test_the_named_layer_is_the_wrong_one(bundle, reference, tmp_path):
    recorded = record(bundle, reference, PROMPT)
    token, vision = int(recorded.placed.input_ids[0, -1]), len(recorded.taps.paths.vision_layers)
    wrong = []
    for seed in range(FAULTS):
        rng = np.random.default_rng(1000 + seed)
        fault = draw(rng, bundle.manifest.model.num_layers, vision)
        broken = inject(bundle, tmp_path / str(seed), fault, rng, token)
        report = compare_engines(bundle, Double(broken.folder), reference, PROMPT)
        at = report.verdict and report.verdict.point
        right = at is not None and at.graph == fault.graph
        if right and fault.layer is None:
            right = fault.part == "all" or at.name == fault.part
        elif right:
            part = "vision" if at.name.startswith("vision") else "attention" if at.in_attention else "ffn"
            right = (at.layer, part) == (fault.layer, fault.part)
        if not right:
            wrong.append((seed, str(fault), at))
    assert not wrong, wrong


def test_engines_without_taps_are_refused(bundle, reference):
    with pytest.raises(BundleError, match=r"does not give vision\.layers\.0; build again with --taps"):
        compare_engines(bundle, Double(bundle.folder, taps=False), reference, PROMPT)


# -- the command line --------------------------------------------------------------------------------


def refused(capsys, *args):
    assert run([str(arg) for arg in args]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("skipvision: ")]
    assert len(lines) == 1
    return lines[0]


def test_commands(bundle_folder, tiny_folder, capsys, tmp_path):
    validate = ("validate", bundle_folder, "--model", tiny_folder)
    assert "holds no engines" in refused(capsys, *validate, "--engines", tmp_path)
    assert "give --engines too" in refused(capsys, *validate, "--plugin", tmp_path / "library.so")
    assert "device 'tpu' is not one of cpu, cuda" in refused(capsys, *validate, "--device", "tpu")
    decoder = bundle_folder / "onnx" / "decoder_decode.onnx"
    given = ("validate", decoder, "--model", tiny_folder, "--engines", tmp_path)
    assert "--engines belongs to the bundle" in refused(capsys, *given)
    out = tmp_path / "engines"
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('[builder]\nproduct = "tensorrt"\n')
    asked = ["build", bundle_folder, "--recipe", recipe, "-o", out, "--taps", "--onnx-only"]
    assert run([str(arg) for arg in asked]) == 0
    names = [value.name for value in load_graph(out / "decoder_prefill.onnx").graph.outputs]
    assert names[-len(LAYERS) :] == LAYERS


@pytest.mark.skipif("CUDAExecutionProvider" in ort.get_available_providers(), reason="it is there")
def test_without_the_provider_one_line_says_so(bundle_folder, tiny_folder, capsys):
    said = refused(capsys, "validate", bundle_folder, "--model", tiny_folder, "--device", "cuda")
    assert "needs ONNX Runtime's CUDAExecutionProvider" in said and "CPUExecutionProvider" in said


@pytest.mark.skipif("CUDAExecutionProvider" in ort.get_available_providers(), reason="it is there")
def test_another_provider_than_the_one_asked_for_is_no_answer(bundle_folder):
    """Without a driver ONNX Runtime takes the next one, and only warns."""
    other = Bundle.load(bundle_folder, providers=("CUDAExecutionProvider", "CPUExecutionProvider"))
    with pytest.raises(BackendError, match="cannot use CUDAExecutionProvider here"):
        other.backend.session(EMBED)
    assert check_providers("cpu") == ("CPUExecutionProvider",)
