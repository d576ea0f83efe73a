"""Models and bundles that many tests share; each is traced once in a session."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from cpp_build import configure_and_build, need_tools, wheel_library
from families import FAMILIES, QWEN
from family_check import Subject
from full import FULL
from questions import write_questions
from tiny import write_tiny

from skipvision_export.config import SkipVisionConfig
from skipvision_export.errors import CompilerError
from skipvision_export.exporter import TracedModel, export, trace_model
from skipvision_export.models.loading import resolve_model
from skipvision_export.runtime.pipeline import Bundle
from skipvision_export.runtime.torch_reference import TorchReference
from skipvision_export.tensorrt.library import TensorRT, find
from skipvision_export.training.run import Plan, plan
from skipvision_export.training.settings import FinetuneSettings

EXAMPLE = Path(__file__).parents[1] / "examples" / "tiny_vlm"
FORMS = {
    "dense": SkipVisionConfig.dense(),
    "skip-75": SkipVisionConfig.preset("skip-75"),
    "strict": SkipVisionConfig.counts(16, 24, selector="dart", summaries=True, strict=True),
    "policy": SkipVisionConfig(layer_shares=(0.0, 0.5, 0.9)),
}


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model as a Hugging Face folder."""
    return write_tiny(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def traced(tiny_folder: Path) -> TracedModel:
    """The random model, traced."""
    return trace_model(resolve_model(tiny_folder))


@pytest.fixture(scope="session")
def bundle_folder(traced: TracedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A skip-75 bundle of the random model; copy it before changing it."""
    return traced.write(
        tmp_path_factory.mktemp("bundles") / "skip", SkipVisionConfig.preset("skip-75")
    ).folder


@pytest.fixture(scope="session")
def dense_folder(traced: TracedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense bundle of the random model."""
    return traced.write(tmp_path_factory.mktemp("bundles") / "dense", SkipVisionConfig.dense()).folder


@pytest.fixture(scope="module", params=FORMS)
def form(request: Any, traced: TracedModel, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Bundles of the random model that differ most in what a prefill is told."""
    return traced.write(tmp_path_factory.mktemp("form") / "bundle", FORMS[request.param])


@pytest.fixture(scope="session")
def bundle(bundle_folder: Path) -> Bundle:
    """The skip-75 bundle, loaded."""
    return Bundle.load(bundle_folder)


@pytest.fixture(scope="session")
def reference(traced: TracedModel) -> TorchReference:
    """The random model in PyTorch."""
    return TorchReference(traced.source, traced.model)


@pytest.fixture(scope="session")
def finetuned() -> TracedModel:
    """The committed fine-tune, traced."""
    return trace_model(resolve_model(EXAMPLE / "finetuned"))


@pytest.fixture(scope="session")
def example_in(finetuned: TracedModel, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`example_in(dtype)`: a bundle of the committed fine-tune in a type, with its own preset."""
    folder = tmp_path_factory.mktemp("example")

    @cache
    def make(dtype: str) -> Path:
        traced = finetuned if dtype == "float32" else trace_model(finetuned.source, dtype)
        return traced.write(folder / dtype, SkipVisionConfig.preset("quarter")).folder

    return make


@pytest.fixture(scope="session", params=tuple(QWEN) if FULL else ("qwen3_vl",))
def any_shape(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    """A random model that takes pictures of any shape, traced, and its bundle that skips."""
    return Subject.make(FAMILIES[request.param], tmp_path_factory.mktemp("any_shape"))


@pytest.fixture(scope="session")
def any_shape_dense(any_shape: Subject, tmp_path_factory: pytest.TempPathFactory) -> Bundle | None:
    """Its bundle in which nothing is skipped."""
    return any_shape.dense(tmp_path_factory.mktemp("dense") / "bundle")


@pytest.fixture(scope="session")
def rtx() -> TensorRT:
    """NVIDIA's compiler that needs no GPU; what asks for it is skipped without it."""
    try:
        return find("tensorrt-rtx")
    except CompilerError as error:
        pytest.skip(f"needs TensorRT-RTX: {error}")


@pytest.fixture(scope="session")
def trained() -> TracedModel:
    """The committed checkpoint, traced."""
    return trace_model(resolve_model(EXAMPLE / "checkpoint"))


@pytest.fixture(scope="session")
def questions_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten questions with one picture, several or none, to train on."""
    return write_questions(tmp_path_factory.mktemp("questions"))


@pytest.fixture(scope="session")
def planned(tiny_folder: Path, questions_folder: Path) -> Callable[..., Plan]:
    """`planned(preset, **settings)`: a training run of the random model on these questions."""

    def make(preset: str = "quarter", **settings: Any) -> Plan:
        config = SkipVisionConfig.preset(preset)
        return plan(resolve_model(tiny_folder), config, FinetuneSettings(**settings), questions_folder)

    return make


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ONNX Runtime's library, to build the C++ runtime against."""
    need_tools()
    return wheel_library(tmp_path_factory.mktemp("cpp") / "lib")


@pytest.fixture(scope="session")
def build(library: Path) -> Path:
    """The C++ runtime's build folder."""
    return configure_and_build(library.parent.parent / "build", library)


@pytest.fixture(scope="session")
def probe(build: Path) -> Path:
    """tests/probe.cpp, built."""
    return build / "tests" / "skipvision-probe"


@pytest.fixture(scope="session")
def skip_bundle(example_in: Callable[[str], Path]) -> Path:
    """The committed fine-tune's."""
    return example_in("float32")


@pytest.fixture(scope="session")
def dense_bundle(trained: TracedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The committed checkpoint, dense."""
    return trained.write(tmp_path_factory.mktemp("cpp_dense") / "dense", SkipVisionConfig.dense()).folder


@pytest.fixture(scope="session")
def int4_bundle(finetuned: TracedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fine-tune with weights of 4 bits."""
    folder = tmp_path_factory.mktemp("cpp_int4") / "int4"
    return finetuned.write(folder, SkipVisionConfig.preset("quarter"), weights="int4").folder


@pytest.fixture(scope="session")
def referenced_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fine-tune with its weights where they lie."""
    folder = tmp_path_factory.mktemp("cpp_referenced")
    model = shutil.copytree(EXAMPLE / "finetuned", folder / "model")  # links need one file system
    return export(model, folder / "bundle", reference_weights=True).folder


@pytest.fixture(scope="session")
def strict_bundle(trained: TracedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint with strict masking."""
    config = SkipVisionConfig(**(SkipVisionConfig.preset("quarter").to_json() | {"strict": True}))
    return trained.write(tmp_path_factory.mktemp("cpp_strict") / "strict", config).folder


@pytest.fixture(scope="session")
def policy_bundle(trained: TracedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint with another share of skipped tokens in each layer."""
    config = SkipVisionConfig(layer_shares=(0.0, 0.5, 0.75, 0.9))
    return trained.write(tmp_path_factory.mktemp("cpp_policy") / "policy", config).folder
