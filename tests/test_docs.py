"""Every command of the documentation runs, and what it links to is there."""

import re
import shlex
from pathlib import Path

import pytest
from full import FULL

from skipvision_export.cli import run

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
BLOCK = re.compile(r"^```(sh|console|python)\n(.*?)^```", re.M | re.S)
# The others take a minute or two.
QUICK = ("first-export", "how-it-works")


def blocks(page: Path, kind: str) -> list[str]:
    return [text for found, text in BLOCK.findall(page.read_text()) if found == kind]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_command_runs(page, tmp_path, monkeypatch, request):
    """In an empty folder beside `examples` and `engines`, in order."""
    code = [(kind, text) for kind, text in BLOCK.findall(page.read_text()) if kind != "console"]
    if code and page.stem not in QUICK and not FULL:
        pytest.skip("takes long: set SKIPVISION_ALL_TESTS=1")
    if page.stem == "tensorrt":
        request.getfixturevalue("rtx")
    for name in ("examples", "engines"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    for kind, text in code:
        if kind == "python":
            exec(compile(text, str(page), "exec"), {})
            continue
        for line in text.splitlines():
            program, *args = shlex.split(line)
            assert program == "skipvision", line
            assert run(args) == 0, line


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_options_of_commands_for_other_machines_exist(page, capsys):
    for text in blocks(page, "console"):
        for line in text.splitlines():
            words = shlex.split(line)
            names = [word for word in words if word in ("skipvision", "skipvision_export")]
            if not names or words[0] not in ("skipvision", "accelerate"):
                continue
            command, *args = words[words.index(names[0]) + 1 :]
            assert run([command, "--help"]) == 0, line
            known = capsys.readouterr().out
            for option in (word for word in args if word.startswith("-")):
                assert re.search(rf"{re.escape(option)}\b", known), f"{option} of {line}"


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
        assert (page.parent / target).exists(), target
    for path in re.findall(
        r"`((?:skipvision_export|benchmarks|docs|examples|engines|plugins|tests)/[\w./]+)`", page.read_text()
    ):
        assert "NAME" in path or (ROOT / path).exists(), path


def test_every_page_is_listed():
    listed = set(re.findall(r"\]\(([\w-]+\.md)\)", (ROOT / "docs" / "README.md").read_text()))
    assert listed == {page.name for page in PAGES} - {"README.md"}
