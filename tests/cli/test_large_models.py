"""Checkpoints as large models have them, whole and broken, through the command line."""

import json
import shutil
import struct

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_commands import refused
from tiny import write_tiny

from skipvision_export.benchmark.parity import measure_gaps, synthetic_prompts
from skipvision_export.cli import run
from skipvision_export.models.checkpoint import INDEX
from skipvision_export.models.loading import resolve_model
from skipvision_export.runtime.pipeline import Bundle
from skipvision_export.runtime.torch_reference import TorchReference


@pytest.fixture
def sharded(tiny_folder, tmp_path):
    """The random model in three files."""
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    places = {key: f"model-{i % 3}.safetensors" for i, key in enumerate(weights)}
    for file in set(places.values()):
        save_file({k: w for k, w in weights.items() if places[k] == file}, folder / file, {"format": "pt"})
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


def exported(folder, tmp_path, *args):
    """A dense bundle and how far its logits and caches are from PyTorch's."""
    out = tmp_path / "bundle"
    assert run([str(part) for part in ("export", folder, "-o", out, "--dense", *args)]) == 0
    bundle = Bundle.load(out)
    reference = TorchReference(resolve_model(folder))
    report = measure_gaps(bundle, reference, synthetic_prompts(1, 96), max_new_tokens=2, gaps=["export"])
    return bundle, report.gaps["export"]


def test_shards_are_the_same_model(sharded, tmp_path):
    bundle, gap = exported(sharded, tmp_path)
    assert gap.passed and gap.overall.max_abs < 1e-4
    from skipvision_export.bundle import sha256_of

    files = [sharded / "config.json", *sorted(sharded.glob("*.safetensors"))]
    assert bundle.manifest.source.sha256 == sha256_of(*files)


def test_broken_shards(capsys, sharded, tmp_path):
    export = ("export", sharded, "-o", tmp_path / "out", "--dense")
    file = sharded / "model-1.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:-1000])
    refused(capsys, "model-1.safetensors is truncated", *export)
    file.unlink()
    refused(capsys, "model-1.safetensors is missing", *export)
    (sharded / INDEX).write_text("{ no json")
    refused(capsys, "no index of a checkpoint", *export)
    assert not (tmp_path / "out").exists()


def test_tied_embeddings(tmp_path):
    folder = write_tiny(tmp_path / "tied", tie_word_embeddings=True)
    assert not any("lm_head" in key for key in load_file(folder / "model.safetensors"))
    assert exported(folder, tmp_path)[1].passed


def test_mixed_types_become_one(tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder, tmp_path / "mixed")
    weights = load_file(folder / "model.safetensors")
    mixed = {k: w.astype(np.float16) if "mlp" in k else w for k, w in weights.items()}
    # Older checkpoints hold this buffer too.
    place = next(key for key in weights if key.endswith("position_embedding.weight"))
    mixed[place.replace("position_embedding.weight", "position_ids")] = np.arange(65)[None]
    save_file(mixed, folder / "model.safetensors", {"format": "pt"})
    assert exported(folder, tmp_path)[1].passed


def test_quantized_weights_are_refused(capsys, tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    name = next(key for key in weights if key.endswith("layers.1.mlp.up_proj.weight"))
    save_file(weights | {name: weights[name].astype(np.int8)}, folder / "model.safetensors", {"format": "pt"})
    refused(capsys, "up_proj.weight is no", "export", folder, "-o", tmp_path / "out", "--dense")


def claim(folder, count, nbytes):
    """Put `count` more tensors of `nbytes` each into a checkpoint, as a hole that takes no disk."""
    file = folder / "model.safetensors"
    data = file.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    for i in range(count):
        start = len(body) + i * nbytes
        header[f"more.{i}"] = {
            "dtype": "BF16",
            "shape": [nbytes // 2],
            "data_offsets": [start, start + nbytes],
        }
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + body)
    with file.open("r+b") as stream:
        stream.truncate(8 + len(text) + len(body) + count * nbytes)


def test_no_room_on_the_disk(capsys, tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    claim(folder, 3000, 1 << 30)
    out = tmp_path / "out"
    refused(capsys, "the bundle takes about", "export", folder, "-o", out, "--dense")
    assert not out.exists()


def test_no_room_in_memory(capsys, tiny_folder, tmp_path):
    import psutil

    memory = psutil.virtual_memory().total
    if shutil.disk_usage(tmp_path).free < 1.1 * memory:
        pytest.skip("the disk is smaller than the memory, and is asked first")
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    claim(folder, 1, memory)
    refused(capsys, "of memory", "export", folder, "-o", tmp_path / "out", "--dense", "--dtype", "bfloat16")


def test_weights_that_are_not_finite_leave_nothing(capsys, tmp_path):
    folder = write_tiny(tmp_path / "wide", hidden_size=128, intermediate_size=256)
    weights = load_file(folder / "model.safetensors")
    name = next(key for key in weights if key.endswith("layers.2.mlp.down_proj.weight"))
    assert weights[name].size > 8192  # one that is streamed
    weights[name][5, 7] = np.inf
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    out = tmp_path / "out"
    refused(capsys, "layers.2.mlp.down_proj.weight", "export", folder, "-o", out, "--dense")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["wide"]
