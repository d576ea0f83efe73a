"""Wheel and sdist hold what they must and nothing else, and the wheel works where only it is installed."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest
from full import only_in_full

ROOT = Path(__file__).parents[1]
PACKAGE = "skipvision_export"
# Beside Python modules: read at run time, or by type checkers.
DATA = {"py.typed", "report/report.html.j2", "tensorrt/forward.c"}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The wheel, made from the sdist, and the sdist, made from what a clone has."""
    clone, out = tmp_path_factory.mktemp("clone"), tmp_path_factory.mktemp("dist")
    for name in listed():
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, clone / name)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(clone)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (wheel,), (sdist,) = out.glob("*.whl"), out.glob("*.tar.gz")
    return wheel, sdist


def listed():
    """Files of the repository, large results and pictures of tests left out; all there are without git."""
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode == 0:
        return [name for name in done.stdout.splitlines() if (ROOT / name).is_file()]
    parts = [file.relative_to(ROOT) for file in ROOT.rglob("*") if file.is_file()]
    return [str(file) for file in parts if not file.parts[0].startswith((".", "build", "demo"))]


def package_files():
    """What has to be in both."""
    files = (file for file in (ROOT / PACKAGE).rglob("*") if file.is_file())
    return {str(file.relative_to(ROOT)) for file in files if "__pycache__" not in file.parts}


def names_in(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if not name.endswith("/")}


def faults(wheel):
    """What is wrong with a wheel, in words."""
    names = names_in(wheel)
    found = [f"lacks {name}" for name in sorted(package_files() - names)]
    info = {name for name in names if name.split("/")[0].endswith(".dist-info")}
    found += [f"holds {name}" for name in sorted(names - package_files() - info)]
    if not any(name.endswith("licenses/LICENSE") for name in info):
        found.append("lacks LICENSE")
    return found


def test_the_wheel_holds_the_package_and_nothing_else(built):
    wheel, _ = built
    assert {f"{PACKAGE}/{name}" for name in DATA} <= package_files()
    assert faults(wheel) == []


@pytest.mark.parametrize("twin", [*sorted(DATA), "cli/report.py", "LICENSE", "+tests/tiny.py"])
def test_broken_wheels_are_caught(built, tmp_path, twin):
    wheel, _ = built
    broken = tmp_path / wheel.name
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(broken, "w") as new:
        for name in old.namelist():
            if not name.endswith(twin):
                new.writestr(name, old.read(name))
        if twin.startswith("+"):
            new.writestr(twin[1:], "")
    (fault,) = faults(broken)
    assert fault.endswith(twin.lstrip("+"))


def test_metadata(built):
    wheel, _ = built
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        about = Parser().parsestr(archive.read(name).decode())
        points = archive.read(name.replace("METADATA", "entry_points.txt")).decode()
    assert about["License-Expression"] == "Apache-2.0"
    assert about["Requires-Python"] == ">=3.11"
    assert about.get_payload().startswith("# skipvision_export")
    assert "skipvision = skipvision_export.cli:main" in points
    assert "[lmms_eval.models]" in points


def test_the_sdist_builds_the_same_and_has_the_documents(built):
    _, sdist = built
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert package_files() <= names
    assert {"pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "docs/README.md"} <= names
    sources = {name for name in listed() if name.startswith(("engines/", "plugins/"))}
    assert {"engines/runtime/CMakeLists.txt", "plugins/kv_prune/README.md"} <= sources <= names
    parts = {name.split("/")[0] for name in names}
    assert not parts & {"tests", "examples", "benchmarks", ".ci", "build", "demo"}
    assert not [name for name in names if "__pycache__" in name or name.endswith((".pyc", ".so", ".o"))]


@only_in_full
def test_the_wheel_alone_exports(built, tmp_path):
    """In a virtual environment of its own, which sees the packages of this one but not this repository."""
    wheel, _ = built
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    (site,) = venv.glob("lib/python*/site-packages")
    install = [sys.executable, "-m", "pip", "--python", str(venv / "bin/python"), "install", "--no-deps"]
    subprocess.run([*install, "--quiet", "--no-index", str(wheel)], check=True)
    # Plain paths, so that this environment's own editable install of the repository stays out.
    mine = next(Path(path) for path in sys.path if path.endswith("site-packages"))
    (site / "others.pth").write_text(f"{mine}\n")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}

    def skipvision(*args):
        command = [str(venv / "bin/skipvision"), *map(str, args)]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)

    where = "import skipvision_export, sys; sys.stdout.write(skipvision_export.__file__)"
    found = subprocess.run(
        [venv / "bin/python", "-c", where], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert Path(found.stdout).is_relative_to(venv)
    shown = skipvision("--help")
    assert (shown.returncode, shown.stderr) == (0, "")
    assert "export" in shown.stdout
    example = ROOT / "examples/tiny_vlm"
    done = skipvision("export", example / "finetuned", "-o", "bundle")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "bundle/skipvision.json").read_text())["preset"] == "quarter"
    page = skipvision("report", "bundle", "--data", example / "test", "-o", "report.html")
    assert page.returncode == 0, page.stderr
    assert "<h2>What is kept</h2>" in (tmp_path / "report.html").read_text()
    refused = skipvision("demo", "-o", "demo")
    assert refused.returncode == 2
    assert "clone of the repository" in refused.stderr
