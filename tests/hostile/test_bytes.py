"""Files with a byte changed, cut short or filled with something else: refused in a line, or read as they are.

More than 10,000 cases, each of which must end in an error of this package or in a right result.
"""

from __future__ import annotations

import io
import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import write_tiny

from skipvision_export import Bundle, SkipVisionConfig
from skipvision_export.bundle import MANIFEST
from skipvision_export.cli import run
from skipvision_export.errors import BundleError, SkipVisionError
from skipvision_export.models.checkpoint import Checkpoint
from skipvision_export.models.loading import resolve_model
from skipvision_export.runtime.data import load_imagefolder
from skipvision_export.runtime.prompt import load_image
from skipvision_export.tensorrt.recipe import Recipe

SECONDS = 10
REPOSITORY = Path(__file__).parents[2]


def changed(content: bytes, cases: int, seed: int = 0) -> Iterator[bytes]:
    """The content with a bit or byte changed, cut, repeated, or with bytes that parsers stumble over."""
    rng = np.random.default_rng(seed)
    odd = (b"\0", b"\xff", b'"', b"{", b"[" * 3000, b"-1", b"1e999", b"null", b"9" * 5000, b"../", b"\\u0000")
    for i in range(cases):
        data = bytearray(content)
        at = int(rng.integers(len(data)))
        match i % 6:
            case 0:
                data[at] ^= 1 << int(rng.integers(8))
            case 1:
                data[at] = int(rng.integers(256))
            case 2:
                del data[at:]
            case 3:
                end = at + int(rng.integers(1, 40))
                data[at:end] = odd[int(rng.integers(len(odd)))]
            case 4:
                data[at:at] = data[: int(rng.integers(1, 64))]
            case _:
                del data[at : at + int(rng.integers(1, 64))]
        if bytes(data) != content:
            yield bytes(data)


def refused(read: Callable[[], object]) -> bool:
    """Is it an error of the package? Others fail the test, as does what takes too long."""
    start = time.monotonic()
    try:
        read()
        return False
    except SkipVisionError:
        return True
    finally:
        assert time.monotonic() - start < SECONDS


def each(file: Path, cases: int, read: Callable[[], object], seed: int = 0) -> float:
    """Read each changed form of a file; the share that was refused. The file is put back."""
    content = file.read_bytes()
    results = []
    try:
        for data in changed(content, cases, seed):
            file.write_bytes(data)
            results.append(refused(read))
    finally:
        file.write_bytes(content)
    read()
    return float(np.mean(results))


def test_no_changed_byte_of_a_bundle_is_accepted(bundle_folder, tmp_path):
    copy = shutil.copytree(bundle_folder, tmp_path / "bundle")
    files = sorted(path for path in copy.rglob("*") if path.is_file())
    for seed, file in enumerate(files):
        cases = 1000 if file.name == MANIFEST else 250
        assert each(file, cases, lambda: Bundle.load(copy), seed) == 1, file.name


def test_the_digest_is_what_catches_a_changed_number(bundle_folder, tmp_path):
    """Without it another number of skipped tokens, or another placeholder, would be taken for right."""
    copy = shutil.copytree(bundle_folder, tmp_path / "bundle")
    file = copy / MANIFEST
    text = file.read_text()
    assert '"image_token_id": 3,' in text
    file.write_text(text.replace('"image_token_id": 3,', '"image_token_id": 4,'))
    with pytest.raises(BundleError, match="is altered: its sha256 is not its digest"):
        Bundle.load(copy)


@pytest.mark.parametrize("kind", ["preset", "policy"])
def test_configurations(kind, tmp_path):
    config = SkipVisionConfig.preset("quarter")
    if kind == "policy":
        config = SkipVisionConfig(layer_shares=(0.0, 0.5, 0.9), kv_share=0.5)
    file = tmp_path / "policy.json"
    file.write_text(json.dumps({"kind": "skipvision-policy", "version": 1, "config": config.to_json()}))
    if kind == "preset":
        file.write_text(json.dumps(config.to_json()))
    each(file, 1500, lambda: SkipVisionConfig.load(file).layout(64, num_layers=3))


def test_recipes(tmp_path):
    for seed, recipe in enumerate(sorted((REPOSITORY / "engines" / "recipes").glob("*.toml"))):
        file = shutil.copy(recipe, tmp_path / recipe.name)
        each(Path(file), 200, lambda file=file: Recipe.load(Path(file)), seed)


def test_data_folders(questions_folder, tmp_path):
    copy = shutil.copytree(questions_folder, tmp_path / "data")
    each(copy / "metadata.jsonl", 1500, lambda: load_imagefolder(copy))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"])
def test_pictures(kind, tmp_path):
    stream = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(stream, kind)
    file = tmp_path / f"picture.{kind.lower()}"
    file.write_bytes(stream.getvalue())
    each(file, 500, lambda: load_image(file))


def test_checkpoints(tmp_path):
    """The header, where it is what readers go by; the numbers behind it are the exporter's to check."""
    folder = write_tiny(tmp_path / "model")
    file = folder / "model.safetensors"
    content = file.read_bytes()
    size = 8 + int.from_bytes(content[:8], "little")
    head, rest = content[:size], content[size:]
    for data in changed(head, 600):
        file.write_bytes(data + rest)
        refused(lambda: Checkpoint.open(folder))


def test_model_configurations(tmp_path):
    folder = write_tiny(tmp_path / "model")
    each(folder / "config.json", 300, lambda: resolve_model(folder))


def test_inspect_of_changed_configurations(tmp_path, capsys):
    """By the command: a number is computed, or one line says what is wrong."""
    file = write_tiny(tmp_path / "model") / "config.json"
    content = file.read_bytes()
    for data in changed(content, 60, seed=1):
        file.write_bytes(data)
        code = run(["inspect", str(file.parent)])
        error = capsys.readouterr().err
        assert code in (0, 2)
        assert code == 0 or error.count("\n") == 1, error
