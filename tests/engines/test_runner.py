"""The engine runner as far as it goes without a GPU: which profile, which buffers, which errors."""

import ctypes

import numpy as np
import pytest

from skipvision_export.bundle import Manifest
from skipvision_export.errors import BundleError, CompilerError, InputError
from skipvision_export.runtime.generation import Generator
from skipvision_export.runtime.pipeline import Bundle
from skipvision_export.runtime.trt import TrtRunner, capacity, choose_profile, numpy_type
from skipvision_export.tensorrt.build import build, plan
from skipvision_export.tensorrt.driver import require_gpu
from skipvision_export.tensorrt.manifest import EngineInfo
from skipvision_export.tensorrt.recipe import ProfileSettings, Recipe


def engine(*ranges):
    profiles = [{"x": [[1, low], [1, (low + high) // 2], [4, high]]} for low, high in ranges]
    return EngineInfo(
        file="g.engine",
        bytes=1,
        sha256="",
        seconds=0,
        builder="TensorRT-RTX",
        builder_version="1.7.1",
        layers=1,
        plugin_layers=0,
        inputs=[],
        outputs=[],
        profiles=profiles,
    )


def test_the_first_profile_that_fits_is_taken():
    info = engine((1, 8), (4, 32))
    assert choose_profile(info, {"x": (1, 8)}, "g") == 0
    assert choose_profile(info, {"x": (1, 9)}, "g") == 1
    assert choose_profile(info, {"x": (4, 32)}, "g") == 1
    for shape in ((1, 33), (5, 8), (0, 8), (1, 8, 1)):
        with pytest.raises(
            InputError, match=r"g: x \[.*\] is outside \[\[1, 1\], \[4, 8\]\] in every profile"
        ):
            choose_profile(info, {"x": shape}, "g")


def test_a_growing_cache_rarely_moves():
    sizes = [capacity(1000 * step) for step in range(1, 200)]
    assert all(size >= 1000 * step for step, size in enumerate(sizes, 1))
    assert len(set(sizes)) <= 9 and sizes == sorted(sizes)
    assert capacity(0) == 256 and capacity(1 << 20) == 1 << 20


def test_types_of_engines_have_numpy_types():
    assert numpy_type("half") == np.float16 and numpy_type("int64") == np.int64
    assert numpy_type("bf16").itemsize == 2
    ones = np.ones(2, numpy_type("bf16"))
    assert ones.astype(np.float32).tolist() == [1, 1]


@pytest.fixture(scope="module")
def engines(rtx, bundle_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("engines") / "e"
    profile = ProfileSettings(text=(1, 20, 40), new_tokens=20)
    build(bundle_folder, Recipe(name="test", profiles=(profile,)), out)
    return out


def test_engines_take_what_the_generation_loop_feeds(bundle_folder, engines, monkeypatch):
    """Every array that a generation feeds fits a profile, by name and shape, and outputs are there."""
    # Unoptimized, ONNX Runtime runs the graphs that engines are built of.
    bundle = Bundle.load(bundle_folder, optimize=False)
    from skipvision_export.tensorrt.manifest import EnginesManifest

    made = EnginesManifest.load(engines).engines
    fed = []
    run = bundle.backend.run

    def spy(graph, feeds):
        shapes = {n: tuple(v.shape() if callable(v.shape) else v.shape) for n, v in feeds.items()}
        choose_profile(made[graph], shapes, graph)
        fed.append((graph, set(shapes)))
        out = run(graph, feeds)
        assert {tensor.name for tensor in made[graph].outputs} == set(out)
        return out

    monkeypatch.setattr(bundle.backend, "run", spy)
    from PIL import Image

    bundle.generate(Image.new("RGB", (96, 96)), "What?", max_new_tokens=4)
    assert {graph for graph, _ in fed} == set(made)
    for graph, names in fed:
        assert names == {tensor.name for tensor in made[graph].inputs}
    with pytest.raises(InputError, match="is outside"):
        bundle.generate(Image.new("RGB", (96, 96)), "What? " * 40, max_new_tokens=1)


def test_engines_of_another_bundle_are_refused(engines, dense_folder):
    with pytest.raises(BundleError, match="was built from another bundle"):
        TrtRunner(engines, dense_folder)


def has_gpu():
    try:
        return require_gpu() > 0
    except CompilerError:
        return False


@pytest.mark.skipif(has_gpu(), reason="is about machines without a GPU")
def test_without_a_driver_one_line_says_so(engines, bundle_folder):
    with pytest.raises(CompilerError) as error:
        TrtRunner(engines, bundle_folder)
    assert "no NVIDIA driver here" in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(CompilerError):
        _ = Bundle.load(bundle_folder, engines=engines).generator


def test_a_driver_that_fails_is_said(monkeypatch):
    class Driver:
        def cuInit(self, _):
            return 100

        def cuDeviceGetCount(self, _):
            return 0

    monkeypatch.setattr(ctypes, "CDLL", lambda _: Driver())
    with pytest.raises(CompilerError, match="reports error 100"):
        require_gpu()


@pytest.mark.skipif(not has_gpu(), reason="needs a GPU: runs engines, prefill to decode")
def test_engines_answer_like_onnx_runtime(engines, bundle_folder, bundle):
    from PIL import Image

    picture = Image.new("RGB", (96, 96), "red")
    expected = bundle.generate(picture, "What?", max_new_tokens=8)
    actual = Bundle.load(bundle_folder, engines=engines).generate(picture, "What?", max_new_tokens=8)
    assert actual.token_ids == expected.token_ids
    assert Manifest.load(bundle_folder).dtype == "float32"


def test_decode_embeds_within_the_profile(example_in):
    """A skip bundle's pictures have other numbers of tokens than the model's."""
    bundle = Bundle.load(example_in("float32"))
    fed = {}

    class Recording:
        def run(self, graph, feeds):
            fed.update({name: np.shape(value) for name, value in feeds.items()})
            return {"inputs_embeds": None}

    Generator(Recording(), bundle.manifest).embed(np.ones((1, 1), np.int64))
    low, _, high = plan(bundle.folder, Recipe()).profiles("embed_tokens")[0]["image_features"]
    assert all(a <= n <= b for a, n, b in zip(low, fed["image_features"], high, strict=True))
