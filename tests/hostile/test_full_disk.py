"""Each command that writes, on a disk that is full or cannot be written: one line, and nothing is left.

A small file system in memory, mounted by the test; once it has room, the same command runs.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from full import FULL, only_in_full
from others import optimum_decoder

from skipvision_export.cli import run

RECIPE = Path(__file__).parents[2] / "engines" / "recipes" / "rtx.toml"
# Those that write a folder, a file, or their result.
COMMANDS = ["export", "rewrite", "calibrate", "inspect", "onnx-only"]
if FULL:
    COMMANDS += ["build", "finetune", "evaluate", "generate", "validate", "bench", "demo"]


def mount(*args):
    """Whether it is done: in a container root may not be allowed to."""
    return subprocess.run(["mount", *map(str, args)], capture_output=True, check=False).returncode == 0


@pytest.fixture
def disk(tmp_path):
    """An empty file system of 8 KiB; remount it with another size, or read-only."""
    place = tmp_path / "disk"
    place.mkdir()
    may = os.geteuid() == 0 and shutil.which("mount") is not None
    if not may or not mount("-t", "tmpfs", "-o", "size=8k", "none", place):
        pytest.skip("needs to mount a file system")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.fixture(scope="module")
def command(tiny_folder, bundle_folder, questions_folder, tmp_path_factory):
    """`command(name, out)`: its arguments; `out` is the folder that it writes or writes a file in."""
    data, model = ["--data", questions_folder], ["--model", tiny_folder]
    few = ["--max-new-tokens", 2]
    made = {
        "export": [tiny_folder, "--preset", "skip-75"],
        "rewrite": [tmp_path_factory.mktemp("optimum")],
        "calibrate": [tiny_folder, *data, "--samples", 2, "--flops", 0.8],
        "inspect": [tiny_folder],
        "onnx-only": [bundle_folder, "--recipe", RECIPE, "--onnx-only"],
        "build": [bundle_folder, "--recipe", RECIPE],
        "finetune": [tiny_folder, *data, "--preset", "quarter", "--max-steps", 2],
        "evaluate": [bundle_folder, *data, "--limit", 2],
        "generate": [bundle_folder, "--prompt", "What?", *few],
        "validate": [bundle_folder, *model, "--samples", 1, *few],
        "bench": [bundle_folder, "--rounds", 1],
        "demo": ["--questions", 8, "--parity-questions", 1, "--rounds", 1],
    }
    made["rewrite"] = [optimum_decoder(made["rewrite"][0])]
    files = {"rewrite": "out.onnx", "calibrate": "policy.json"}
    reports = ("inspect", "evaluate", "generate", "validate", "bench")

    def make(name, out):
        option = "--json" if name in reports else "-o"
        file = out / "report.json" if name in reports else out / files.get(name, "")
        return [name.replace("onnx-only", "build"), *made[name], option, file]

    return make


def refused(capsys, args):
    """The one line on standard error."""
    capsys.readouterr()
    assert run([str(arg) for arg in args]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("skipvision: ")]
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize("name", COMMANDS)
def test_a_full_disk(disk, command, capsys, name):
    (disk / "filler").write_bytes(bytes(8192))
    args = command(name, disk / "a" / "out")
    said = refused(capsys, args)
    assert any(words in said for words in ("no space left", "bytes left", "B left")), said
    assert [file.name for file in disk.iterdir()] == ["filler"]
    assert mount("-o", "remount,size=1g", disk)
    assert run([str(arg) for arg in args]) == 0
    assert any((disk / "a").iterdir())


@pytest.mark.parametrize("name", COMMANDS)
def test_a_disk_that_cannot_be_written(disk, command, capsys, name):
    assert mount("-o", "remount,ro", disk)
    said = refused(capsys, command(name, disk / "out"))
    assert "cannot be written" in said and ("permission" in said or "Read-only" in said), said
    assert not list(disk.iterdir())


@only_in_full  # tests/bundle/test_bundle.py has one with a limit on files in place of a disk
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_disk_that_runs_full_in_the_middle(disk, command, capsys, bundle_folder, tiny_folder, share):
    """With room for the weights, which is what is asked for before, but not for all."""
    needed = (tiny_folder / "model.safetensors").stat().st_size
    whole = sum(file.stat().st_size for file in bundle_folder.rglob("*") if file.is_file())
    assert mount("-o", f"remount,size={int(needed + share * (whole - needed))}", disk)
    assert "no space left" in refused(capsys, command("export", disk / "out"))
    assert not list(disk.iterdir())
