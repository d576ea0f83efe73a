"""Bundles whose weights stay in the model's own files: equal to ordinary ones, small, and guarded."""

import errno
import json
import os
import shutil
import struct

import numpy as np
import onnx_ir as ir
import pytest
from damage import leave_as_it_is, twin
from full import FULL
from test_commands import refused
from tiny import tiny_config, tiny_model, tiny_processor

from skipvision_export import Bundle, SkipVisionConfig, export
from skipvision_export.bundle import load_graph, sha256_of
from skipvision_export.cli import run
from skipvision_export.errors import ConfigError
from skipvision_export.graph.passes.names import DECODE, PREFILL
from skipvision_export.runtime.widened import widened

SKIP = SkipVisionConfig.preset("skip-75")
PROMPT = np.array([[1, *[3] * 64, 50, 60, 70]], np.int64)


def write_model(folder, dtype="float32"):
    """A model in several files, with matrices too large to be folded into the graphs."""
    import torch

    model = tiny_model(tiny_config(hidden_size=128, intermediate_size=256))
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size="700KB")
    tiny_processor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("wide") / "model")


@pytest.fixture(scope="module")
def copied(model):
    return export(model, model.parent / "copied", SKIP)


@pytest.fixture(scope="module")
def linked(model):
    return export(model, model.parent / "linked", SKIP, reference_weights=True)


def outputs(bundle, **options):
    """Logits of a prefill and of three steps."""
    bundle = Bundle.load(bundle.folder, verify=False, **options)
    generator, backend = bundle.generator, bundle.backend
    features = generator.encode(np.random.default_rng(0).standard_normal((1, 3, 96, 96), np.float32))
    prefill = generator.prefill(PROMPT, features)
    cache = backend.cache(prefill)
    steps = [generator.decode(20 + i, PROMPT.shape[1] + i, cache) for i in range(3)]
    return np.concatenate([np.array(backend.numpy(x)).reshape(1, -1) for x in (prefill["logits"], *steps)])


def gap(one, other):
    """The largest difference, as a share of the largest number."""
    return np.abs(one - other).max() / np.abs(other).max()


# The fused products add in another order; without fusions nothing differs.
@pytest.mark.parametrize(("optimize", "limit"), [(True, 1e-6), (False, 0)])
def test_the_same_numbers(copied, linked, optimize, limit):
    assert gap(outputs(linked, optimize=optimize), outputs(copied, optimize=optimize)) <= limit


def test_nothing_is_copied(model, copied, linked):
    shards = sorted(model.glob("*.safetensors"))
    manifest = linked.manifest
    assert len(shards) > 1
    assert manifest.referenced == {f"onnx/{shard.name}": shard.name for shard in shards}
    for shard in shards:
        file = linked.folder / "onnx" / shard.name
        assert file.stat().st_ino == shard.stat().st_ino
        assert manifest.files[f"onnx/{shard.name}"].sha256 == sha256_of(shard)
    weights = sum(shard.stat().st_size for shard in shards)
    companions = sum(info.bytes for name, info in manifest.files.items() if not name.startswith("onnx/"))
    # What is folded into the graphs, most of it the small vision tower, is copied as ever.
    assert manifest.own_bytes - companions < 0.5 * weights < copied.manifest.own_bytes - companions
    for graph in (PREFILL, DECODE):
        held = load_graph(linked.folder / "onnx" / f"{graph}.onnx").graph.initializers.values()
        assert not [v.name for v in held if v.const_value.nbytes > 4 * 8192 and not is_linked(v)]


def is_linked(value):
    tensor = value.const_value
    return isinstance(tensor, ir.ExternalTensor) and str(tensor.location).endswith(".safetensors")


def test_both_products_read_the_stored_matrix(linked):
    graph = load_graph(linked.folder / "onnx" / f"{PREFILL}.onnx").graph
    turned = [n for n in graph if n.op_type == "Transpose" and n.inputs[0].is_initializer()]
    # Seven matrices of each of the three layers, and the head; the key and value matrices are small.
    assert len(turned) == 3 * 5 + 1 + sum(n.inputs[0].shape == [64, 128] for n in turned)
    assert all(is_linked(n.inputs[0]) for n in turned)


def wrong_offset(graph):
    """One matrix is read where another one lies."""
    gate, up = (
        next(v for v in graph.initializers.values() if is_linked(v) and list(v.shape) == shape)
        for shape in ([256, 128], [280, 128])
    )
    old, other = gate.const_value, up.const_value
    gate.const_value = ir.ExternalTensor(
        other.location, other.offset, old.length, old.dtype, shape=old.shape, name=gate.name
    )


def test_a_wrong_offset_is_caught(copied, linked, tmp_path):
    want = outputs(copied)
    assert gap(outputs(twin(linked, tmp_path, leave_as_it_is)), want) <= 1e-6
    assert gap(outputs(twin(linked, tmp_path, wrong_offset)), want) > 1e-3


def test_a_copy_or_a_model_that_is_gone_changes_nothing(tmp_path):
    folder = write_model(tmp_path / "model")
    bundle = export(folder, tmp_path / "bundle", SKIP, reference_weights=True)
    want = outputs(bundle)
    shutil.copytree(bundle.folder, tmp_path / "elsewhere")
    shutil.rmtree(folder)
    for place in ("bundle", "elsewhere"):
        assert np.array_equal(outputs(Bundle.load(tmp_path / place)), want)


def test_a_model_changed_afterwards_is_named(capsys, tmp_path):
    folder = write_model(tmp_path / "model")
    bundle = export(folder, tmp_path / "bundle", SKIP, reference_weights=True)
    shard = sorted(folder.glob("*.safetensors"))[1]
    whole = shard.read_bytes()
    ask = ("generate", bundle.folder, "--image", "x.png", "--prompt", "What?")
    for data, what in (
        (whole[:-1] + bytes([whole[-1] ^ 1]), "altered: its sha256"),
        (whole[:-100], "truncated"),
    ):
        shard.write_bytes(data)
        refused(capsys, f"{shard.name} is {what}", *ask)
        refused(capsys, f"the model's own {shard.name} (--reference-weights), which was changed", *ask)
    shard.write_bytes(whole)
    Bundle.load(bundle.folder)
    (bundle.folder / "onnx" / shard.name).unlink()
    refused(capsys, f"{shard.name} is missing", *ask)


def test_another_file_system(capsys, model, tmp_path, monkeypatch):
    def link(*_):
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(os, "link", link)
    out = tmp_path / "out"
    command = ("export", model, "-o", out, "--preset", "skip-75", "--reference-weights")
    refused(capsys, "same file system and the right to it; choose another output folder, or", *command)
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_referenced(capsys, model, tmp_path):
    command = ("export", model, "-o", tmp_path / "out", "--dense", "--reference-weights")
    refused(capsys, "leave out --weights or --reference-weights", *command, "--weights", "int4")
    what = "the bundle is bfloat16, the model's weights are float32; give --dtype float32"
    refused(capsys, what, *command, "--dtype", "bfloat16")
    with pytest.raises(ConfigError, match="int4"):
        export(model, tmp_path / "out", SKIP, weights="int4", reference_weights=True)
    assert not (tmp_path / "out").exists()


def test_help_teaches_it(capsys):
    assert run(["export", "--help"]) == 0
    assert "--reference-weights" in capsys.readouterr().out


def test_misaligned_weights_are_copied(copied, model, tmp_path):
    folder = shutil.copytree(model, tmp_path / "model")
    odd = sorted(folder.glob("*.safetensors"))[0]
    data = odd.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.dumps(json.loads(data[8 : 8 + length]))
    header += " " * (1 - len(header) % 2)  # an odd length
    odd.write_bytes(struct.pack("<Q", len(header)) + header.encode() + data[8 + length :])
    bundle = export(folder, tmp_path / "bundle", SKIP, reference_weights=True)
    assert odd.name not in bundle.manifest.referenced.values() and bundle.manifest.referenced
    assert gap(outputs(bundle), outputs(copied)) <= 1e-6


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"] if FULL else ["float16"])
def test_half_types(dtype, tmp_path):
    """Compared as validation does it, in float32; float16 as it runs too."""
    folder = write_model(tmp_path / "model", dtype)
    one, other = (
        export(folder, tmp_path / name, SKIP, dtype=dtype, reference_weights=name == "linked")
        for name in ("linked", "copied")
    )
    assert len(one.manifest.referenced) == len(list(folder.glob("*.safetensors")))
    wide = [tmp_path / "wide linked", tmp_path / "wide copied"]
    for place in wide:
        place.mkdir()
    numbers = [outputs_of(widened(b, place)) for b, place in zip((one, other), wide, strict=True)]
    assert gap(*numbers) <= 1e-6
    if dtype == "float16":
        assert gap(outputs(one), outputs(other)) <= 1e-6


def outputs_of(bundle):
    """Logits of a prefill without an image, of a bundle that is no folder to load."""
    generator = bundle.generator
    return np.array(bundle.backend.numpy(generator.prefill(PROMPT[:, 65:], None)["logits"]))
