"""The README's numbers come from the committed benchmark, and what it names exists."""

import importlib.util
import re
from pathlib import Path

from skipvision_export.cli import app, run

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def load_updater():
    spec = importlib.util.spec_from_file_location("update_readme", ROOT / "benchmarks" / "update_readme.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_numbers_are_the_benchmark_s():
    updater = load_updater()
    results = updater.load()
    assert updater.updated(README, results) == README
    results["demo_cpu"]["accuracy"]["dense"] -= 0.05
    assert updater.updated(README, results) != README


def test_every_command_is_documented():
    commands = {c.name or c.callback.__name__ for c in app.registered_commands}
    assert commands == set(re.findall(r"^\| `skipvision (\w+)", README, re.M))


def test_every_command_has_help(capsys):
    for command in app.registered_commands:
        assert run([command.callback.__name__, "--help"]) == 0
        assert len(capsys.readouterr().out) > 200


def test_files_named_exist():
    for path in re.findall(r"`((?:skipvision_export|benchmarks|docs|examples)/[\w./]+)`", README):
        assert (ROOT / path).exists(), path
    for path in re.findall(r"\]\((docs/[^)]+)\)", README):
        assert (ROOT / path).is_file(), path
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^    make (\w+)", README, re.M):
        assert f"\n{target}:" in makefile
