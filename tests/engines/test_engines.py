"""Engines by NVIDIA's own compiler, on the CPU: the tiny VLM, LLaVA's layers, and graphs it refuses."""

import importlib.util
import json
import re
import shutil

import onnx
import pytest
from conftest import EXAMPLE
from full import only_in_full
from tiny import tiny_config, tiny_processor

from skipvision_export import SkipVisionConfig, export
from skipvision_export.errors import BundleError, CompilerError, ConfigError
from skipvision_export.graph.passes.names import PREFILL, VISION
from skipvision_export.tensorrt import compile as compiling
from skipvision_export.tensorrt import library, lowering
from skipvision_export.tensorrt.build import build
from skipvision_export.tensorrt.compile import compile_graph
from skipvision_export.tensorrt.manifest import ENGINES, EnginesManifest
from skipvision_export.tensorrt.recipe import BuilderSettings, PluginSettings, Recipe

pytestmark = pytest.mark.usefixtures("rtx")

GRAPHS = {"vision_encoder", "embed_tokens", "decoder_prefill", "decoder_decode"}


def recipe(kv_prune="declared", **more):
    return Recipe(name="test", plugin=PluginSettings(kv_prune=kv_prune), **more)


@pytest.fixture(params=["float32", "float16", "bfloat16"])
def example(request, example_in):
    """The committed fine-tune in each type."""
    return example_in(request.param)


@pytest.mark.parametrize("form", ["declared", "none"])
def test_all_graphs_of_the_tiny_vlm_build(rtx, example, tmp_path, form):
    made = build(example, recipe(form), tmp_path / "e")
    assert set(made.engines) == GRAPHS
    layers = {name: engine.plugin_layers for name, engine in made.engines.items()}
    assert layers == dict.fromkeys(GRAPHS, 0) | {PREFILL: 4 if form == "declared" else 0}
    engine = (tmp_path / "e" / made.engines[PREFILL].file).read_bytes()
    # The engine itself tells a plugin from nodes of an inlined body.
    assert (b"_pluginVersion" in engine) == (form == "declared")
    assert (b"(KVPrune)]" in engine) == (form == "none")
    loaded = EnginesManifest.load(tmp_path / "e")
    loaded.verify(tmp_path / "e")
    assert loaded == made
    assert (loaded.bundle.dtype, loaded.route) == (example.name, rtx.route)
    assert {e.builder for e in loaded.engines.values()} == {"TensorRT-RTX"}


@pytest.mark.parametrize(
    "config",
    [
        SkipVisionConfig(name="strict", skip_share=0.5, strict=True),
        SkipVisionConfig(name="policy", layer_shares=(0, 0.5, 0.75), kv_share=0.5),
        SkipVisionConfig(name="raster", skip_share=0.5, selector="uniform", order="raster"),
        SkipVisionConfig.counts(0, 64),
        SkipVisionConfig.counts(10, 10, selector="dart", summaries=True),
        SkipVisionConfig.dense(),
    ],
    ids=lambda config: config.name,
)
def test_every_kind_of_configuration_builds(traced, config, tmp_path):
    made = build(traced.write(tmp_path / "b", config).folder, recipe(), tmp_path / "e")
    assert made.engines[PREFILL].plugin_layers == 3


@only_in_full
def test_llava_layers_build(tmp_path):
    """Two layers of LLaVA-1.5-7B's shapes in float16: 405 M parameters, random."""
    import torch
    from transformers import LlavaForConditionalGeneration

    sizes = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 32, "num_key_value_heads": 32}
    torch.set_default_dtype(torch.float16)
    try:
        LlavaForConditionalGeneration(tiny_config(**sizes, **heads)).save_pretrained(tmp_path / "model")
    finally:
        torch.set_default_dtype(torch.float32)
    tiny_processor().save_pretrained(tmp_path / "model")
    config = SkipVisionConfig.counts(11, 10, summaries=True)
    bundle = export(tmp_path / "model", tmp_path / "bundle", config, dtype="float16")
    made = build(bundle.folder, recipe(), tmp_path / "e")
    assert made.engines[PREFILL].plugin_layers == 2
    assert made.engines[PREFILL].bytes > 2 * 400e6


def test_without_permission_to_take_it_apart_attention_is_refused(example_in, tmp_path, monkeypatch):
    """The twin of lowering: in float32 no fused kernel exists, and the compiler says so."""
    monkeypatch.setattr(lowering, "_DECOMPOSABLE", "ignored")
    with pytest.raises(CompilerError) as error:
        build(example_in("float32"), recipe("none"), tmp_path / "e")
    assert re.search(r"onnx: node Attention_\d+ \(Attention\)", str(error.value))
    assert "export with --dtype float16" in str(error.value)
    assert not list(tmp_path.iterdir())


def test_an_operator_that_the_parser_lacks_is_named(rtx, tmp_path):
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 23]> g (float[n, 4] x, bool[n] c) => (float[m, 4] y)'
        "{ y = Compress<axis=0>(x, c) }"
    )
    model.graph.node[0].name = "Compress_7"
    shapes = {"x": ((1, 4),) * 3, "c": ((1,),) * 3}
    with pytest.raises(CompilerError, match=r"g\.onnx: node Compress_7 \(Compress\): "):
        compile_graph(rtx, model, tmp_path / "g.onnx", [shapes], BuilderSettings())


def test_a_profile_that_contradicts_the_graph(rtx, tmp_path):
    model = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 23]> g (float[n, 4] x) => (float[n, 4] y) { y = Relu(x) }'
    )
    shapes = {"x": ((1, 5),) * 3}
    with pytest.raises(CompilerError, match=r"g\.onnx"):
        compile_graph(rtx, model, tmp_path / "g.onnx", [shapes], BuilderSettings())


def test_a_plugin_layer_that_is_missing_is_noticed(example_in, tmp_path, monkeypatch):
    """The twin of the count: a graph whose nodes do not ask for the plugin."""
    original = lowering.lower
    monkeypatch.setattr(
        "skipvision_export.tensorrt.build.lower",
        lambda model, compiler, plugin: original(model, compiler, plugin=False),
    )
    with pytest.raises(CompilerError, match="0 plugin layers were built of 4 KVPrune nodes"):
        build(example_in("float16"), recipe(), tmp_path / "e")
    assert not (tmp_path / "e").exists()


def test_a_full_disk_leaves_nothing(bundle_folder, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("skipvision_export.tensorrt.build._write", full)
    with pytest.raises(Exception, match="No space left"):
        build(bundle_folder, recipe(), tmp_path / "e")
    assert not list(tmp_path.iterdir())


def test_altered_bundles_and_other_types_are_refused(bundle_folder, tmp_path):
    with pytest.raises(ConfigError, match="is float32, recipe half builds float16"):
        build(bundle_folder, Recipe(name="half", precision=("float16",)), tmp_path / "e")
    copy = shutil.copytree(bundle_folder, tmp_path / "copy")
    (copy / "onnx" / f"{VISION}.onnx").write_bytes(b"x")
    with pytest.raises(BundleError, match=r"vision_encoder\.onnx is truncated"):
        build(copy, recipe(), tmp_path / "e")
    manifest = json.loads((copy / "skipvision.json").read_text())
    (copy / "skipvision.json").write_text(json.dumps(manifest | {"schema_version": 99}))
    with pytest.raises(BundleError, match="schema version 99, this version reads 1"):
        build(copy, recipe(), tmp_path / "e")


def test_engine_manifests_of_another_schema_or_altered_engines(bundle_folder, tmp_path):
    made = build(bundle_folder, recipe(), tmp_path / "e")
    file = tmp_path / "e" / ENGINES
    text = file.read_text()
    file.write_text(text.replace('"schema_version": 1', '"schema_version": 9'))
    with pytest.raises(BundleError, match="schema version 9"):
        EnginesManifest.load(tmp_path / "e")
    file.write_text(text[:100])
    with pytest.raises(BundleError, match="truncated or no JSON"):
        EnginesManifest.load(tmp_path / "e")
    file.write_text(text)
    (tmp_path / "e" / made.engines[PREFILL].file).write_bytes(b"x")
    with pytest.raises(BundleError, match="truncated or altered"):
        EnginesManifest.load(tmp_path / "e").verify(tmp_path / "e")


def test_missing_compilers_and_old_ones():
    if not importlib.util.find_spec("tensorrt"):
        with pytest.raises(CompilerError, match="TensorRT is not installed; install NVIDIA's tensorrt"):
            library.find("tensorrt")
    with pytest.raises(CompilerError, match=r"TensorRT-RTX 1\.7\.\d is too old; expected TensorRT-RTX 9\.0"):
        library.find("tensorrt-rtx", "9.0")


def test_errors_say_what_to_do():
    words = compiling._explained("node A (B)", "Plugin not found, are the plugin name right?", EXAMPLE)
    assert words.endswith('pass --plugin LIBRARY, or set kv_prune = "none" in the recipe')
