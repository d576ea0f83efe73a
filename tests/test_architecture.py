"""Rules of the design that a reader would otherwise have to trust."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import skipvision_export

PACKAGE = Path(skipvision_export.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

# Layers from the ground up: a module imports from its own part or from a lower layer.
LAYERS = [
    {"errors"},
    {"tokens", "layout"},
    {"config"},
    {"models", "method", "graph.passes", "validation"},
    {"bundle", "graph"},
    {"runtime", "exporter", "rewriting", "training", "tensorrt"},
    {"benchmark"},
    {"report", "calibration", "serving", "evaluation"},
    {"cli"},
    {"__main__"},
]
# method needs the facts of models, training the prompts and data of runtime, which runs engines;
# otherwise parts of one layer do not know each other.
ALLOWED = {("method", "models"), ("exporter", "runtime"), ("training", "runtime"), ("runtime", "tensorrt")}


def part(module: str) -> str:
    name = module.removeprefix("skipvision_export").lstrip(".")
    return "graph.passes" if name.startswith("graph.passes") else name.split(".")[0]


def imports(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
    return found


def module_name(file: Path) -> str:
    return ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


def level(name: str) -> int:
    return next(i for i, layer in enumerate(LAYERS) if name in layer)


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_imports_point_one_way(file):
    here = part(module_name(file))
    if not here:  # the package itself only names where things are
        return
    for module in imports(file):
        if not module.startswith("skipvision_export"):
            continue
        there = part(module)
        assert there == here or level(there) < level(here) or (here, there) in ALLOWED, (
            f"{file.name} imports {module}"
        )


def test_passes_import_onnx_ir_and_numpy_only():
    for file in (PACKAGE / "graph" / "passes").glob("*.py"):
        others = {m.split(".")[0] for m in imports(file)} - set(sys.stdlib_module_names)
        assert others <= {"onnx_ir", "numpy", "skipvision_export"}, file


def test_validation_knows_no_backend():
    for file in (PACKAGE / "validation").glob("*.py"):
        others = {m.split(".")[0] for m in imports(file)} - set(sys.stdlib_module_names)
        assert others <= {"numpy", "skipvision_export"}, file


def test_import_is_lean():
    code = (
        "import sys, skipvision_export\n"
        "heavy = {'torch', 'transformers', 'onnxruntime', 'onnx', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert {'export', 'Bundle', 'SkipVisionConfig', 'apply_skip_vision'} <= set(dir(skipvision_export))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_help_is_lean():
    code = (
        "import sys\n"
        "from skipvision_export.cli import run\n"
        "assert run(['export', '--help']) == 0\n"
        "assert not {'torch', 'transformers', 'onnxruntime'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_public_names():
    for name in skipvision_export.__all__:
        assert getattr(skipvision_export, name)


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_files_stay_small(file):
    assert len(file.read_text().splitlines()) <= 400
