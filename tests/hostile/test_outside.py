"""Nothing outside of a bundle or model is read or run, and no code that comes with one."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest
from others import optimum_decoder
from PIL import Image
from tiny import write_tiny

from skipvision_export import Bundle
from skipvision_export.bundle import MANIFEST, FileInfo, seal, sha256_of
from skipvision_export.cli import run
from skipvision_export.errors import BundleError

WEIGHTS = "onnx/decoder.onnx_data"
PREFILL = "onnx/decoder_prefill.onnx"


def forge(folder: Path, names: dict[str, str] | None = None) -> None:
    """Make the manifest agree with the files, as an attacker would; names: of files, old to new."""
    manifest = json.loads((folder / MANIFEST).read_text())
    for old, new in (names or {}).items():
        manifest["files"][new] = manifest["files"].pop(old)
    for name in manifest["files"]:
        file = folder / name
        info = FileInfo(bytes=file.stat().st_size, sha256=sha256_of(file))
        manifest["files"][name] = info.model_dump()
    (folder / MANIFEST).write_text(seal(manifest))


def refer(graph: Path, location: str) -> None:
    """Let a graph's weights lie elsewhere."""
    model = onnx.load(graph, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    graph.write_bytes(model.SerializeToString())


@pytest.fixture
def copy(bundle_folder, tmp_path):
    return shutil.copytree(bundle_folder, tmp_path / "inner" / "bundle")


@pytest.mark.parametrize("share", [True, False], ids=["one copy of the weights", "a copy in each session"])
@pytest.mark.parametrize("absolute", [True, False], ids=["absolute", "climbing"])
def test_weights_outside_of_the_bundle(absolute, share, copy):
    secret = copy.parent / "secret"
    shutil.copyfile(copy / WEIGHTS, secret)
    refer(copy / PREFILL, str(secret.resolve()) if absolute else "../../secret")
    forge(copy)
    bundle = Bundle.load(copy, share_weights=share)
    with pytest.raises(BundleError) as error:
        bundle.backend.session("decoder_prefill")
    assert "decoder_prefill" in str(error.value) or "outside of its folder" in str(error.value)


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "onnx/../../secret", ""])
def test_files_outside_of_the_bundle(name, copy):
    manifest = json.loads((copy / MANIFEST).read_text())
    manifest["files"][name] = manifest["files"][WEIGHTS]
    (copy / MANIFEST).write_text(seal(manifest))
    with pytest.raises(BundleError, match="is no path inside the bundle"):
        Bundle.load(copy)


def test_links_out_of_the_bundle(copy):
    outside = copy.parent / "elsewhere"
    (copy / WEIGHTS).rename(outside)
    (copy / WEIGHTS).symlink_to(outside)
    with pytest.raises(BundleError, match="is a link to a file outside of the bundle"):
        Bundle.load(copy)


def test_graphs_without_a_hash(copy):
    manifest = json.loads((copy / MANIFEST).read_text())
    del manifest["files"][PREFILL]
    (copy / MANIFEST).write_text(seal(manifest))
    with pytest.raises(BundleError, match="has no hash"):
        Bundle.load(copy)


@pytest.mark.parametrize("absolute", [True, False], ids=["absolute", "climbing"])
def test_others_decoders_with_weights_elsewhere(absolute, tmp_path, capsys):
    """`rewrite` copies weights: never a file that lies elsewhere."""
    file = optimum_decoder(tmp_path / "inner")
    model = onnx.load(file)
    onnx.save(model, file, save_as_external_data=True, location="weights", size_threshold=0)
    secret = tmp_path / "secret"
    (tmp_path / "inner" / "weights").rename(secret)
    refer(file, str(secret) if absolute else "../secret")
    assert run(["rewrite", str(file), "-o", str(tmp_path / "out.onnx")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not list(tmp_path.glob("out*"))


class Marks:
    """Leaves a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def test_pickles_are_not_loaded(tmp_path, capsys):
    folder, mark = write_tiny(tmp_path / "model"), tmp_path / "mark"
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"weight": Marks(mark)}))
    assert run(["export", str(folder), "-o", str(tmp_path / "out"), "--dense"]) == 2
    assert "no *.safetensors weights" in capsys.readouterr().err
    assert not mark.exists()
    np.testing.assert_equal(pickle.loads(pickle.dumps(Marks(mark))), None)
    assert mark.exists()  # it would have


@pytest.mark.parametrize("file", ["config.json", "processor_config.json", "tokenizer_config.json"])
def test_code_of_a_model_is_not_run(file, tmp_path, capsys, monkeypatch):
    folder, mark = write_tiny(tmp_path / "model"), tmp_path / "mark"
    (folder / "own.py").write_text(f"import os\nos.mkdir({str(mark)!r})\nclass Own: pass\n")
    values = json.loads((folder / file).read_text())
    values["auto_map"] = dict.fromkeys(
        ("AutoConfig", "AutoModel", "AutoProcessor", "AutoImageProcessor"), "own.Own"
    ) | {"AutoTokenizer": ["own.Own", "own.Own"]}
    if file == "config.json":
        values["model_type"] = "own"
    else:
        values["processor_class" if "processor" in file else "tokenizer_class"] = "Own"
    (folder / file).write_text(json.dumps(values))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked on the terminal"))
    code = run(["export", str(folder), "-o", str(tmp_path / "out"), "--preset", "skip-75"])
    if code == 0:  # the model's own processor is needed only to answer
        picture = tmp_path / "picture.png"
        Image.new("RGB", (96, 96)).save(picture)
        code = run(["generate", str(tmp_path / "out"), "--image", str(picture), "--prompt", "What?"])
    assert code in (0, 2)
    assert not mark.exists()
    assert "Traceback" not in capsys.readouterr().err
