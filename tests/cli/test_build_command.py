"""`skipvision build` as a user types it: results, a dry run, and one clear line for each mistake."""

import importlib.util
import json

import pytest
from conftest import EXAMPLE

from skipvision_export.cli import run

RECIPES = EXAMPLE.parents[1] / "engines" / "recipes"


def refused(capsys, *args):
    assert run([*map(str, args)]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("skipvision: ")]
    assert len(lines) == 1
    return lines[0]


def test_build(rtx, bundle_folder, tmp_path, capsys):
    recipe = tmp_path / "mine.toml"
    recipe.write_text('[plugin]\nkv_prune = "declared"\n')
    out, result = tmp_path / "engines", tmp_path / "r.json"
    assert (
        run(["build", str(bundle_folder), "--recipe", str(recipe), "-o", str(out), "--json", str(result)])
        == 0
    )
    engines = json.loads(result.read_text())["engines"]
    for name, engine in engines.items():
        keys = {"file", "bytes", "seconds", "builder", "builder_version", "plugin_layers"}
        assert keys <= set(engine)
        assert (out / engine["file"]).stat().st_size == engine["bytes"], name
    assert engines["decoder_prefill"]["plugin_layers"] == 3
    assert "3 KVPrune layers" in capsys.readouterr().out
    said = refused(capsys, "build", bundle_folder, "--recipe", recipe, "-o", out)
    assert "exists and is not empty" in said and "--force" in said
    said = refused(capsys, "generate", bundle_folder, "--engines", out, "--prompt", "?", "--image", "x.png")
    assert "x.png" in said or "no NVIDIA driver" in said


def test_dry_run_and_onnx_only(bundle_folder, tmp_path, capsys):
    recipe = tmp_path / "mine.toml"
    recipe.write_text('[builder]\nproduct = "tensorrt"\nversion = "10.3"\n[plugin]\nkv_prune = "library"\n')
    out, result = tmp_path / "out", tmp_path / "r.json"
    args = ["build", str(bundle_folder), "--recipe", str(recipe), "-o", str(out), "--json", str(result)]
    assert run([*args, "--dry-run"]) == 0
    assert not out.exists()
    shown = capsys.readouterr().out
    assert shown.count("trtexec --onnx=") == 4 and "--dynamicPlugins=libskipvision_kv_prune.so" in shown
    assert set(json.loads(result.read_text())["commands"]) == set(json.loads(result.read_text())["profiles"])
    assert run([*args, "--onnx-only"]) == 0
    assert (out / "build_engines.sh").stat().st_mode & 0o111
    assert "run it on the device" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("recipe", "options", "said"),
    [
        ("precison = []", [], "unknown field"),
        ("precision = ['float16']", [], "export again with --dtype float16"),
        ("[[profiles]]\nprompt = [1, 10, 9999]", [], "the model has 512 positions"),
        ("[plugin]\nkv_prune = 'library'", [], "wants the KVPrune plugin"),
        ("", ["--plugin", "missing.so"], "plugin library missing.so does not exist"),
        ("[plugin]\nkv_prune = 'none'", ["--plugin", "missing.so"], "leave out --plugin"),
        ("[builder]\nproduct = 'tensorrt'", [], "TensorRT is not installed"),
        ("[builder]\nversion_compatible = true", [], "has no such engines"),
    ],
)
def test_mistakes(bundle_folder, tmp_path, capsys, recipe, options, said):
    if "TensorRT is" in said and importlib.util.find_spec("tensorrt"):
        pytest.skip("is about machines without TensorRT")
    file = tmp_path / "mine.toml"
    file.write_text(recipe)
    out = tmp_path / "e"
    assert said in refused(capsys, "build", bundle_folder, "--recipe", file, "-o", out, *options)
    assert not out.exists()


def test_a_library_that_is_no_plugin(rtx, bundle_folder, tmp_path, capsys):
    file = tmp_path / "other.so"
    file.write_bytes(b"no library")
    said = refused(
        capsys,
        "build",
        bundle_folder,
        "--recipe",
        RECIPES / "rtx.toml",
        "-o",
        tmp_path / "e",
        "--plugin",
        file,
    )
    assert "is no KVPrune plugin library" in said


def test_no_bundle_and_plugins_without_engines(tmp_path, capsys, bundle_folder):
    said = refused(capsys, "build", tmp_path, "--recipe", RECIPES / "rtx.toml", "-o", tmp_path / "e")
    assert "is no bundle" in said
    said = refused(capsys, "generate", bundle_folder, "--plugin", "x.so", "--prompt", "?", "--image", "x.png")
    assert "give --engines too" in said
