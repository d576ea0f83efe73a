"""The C++ runtime's TensorRT backend, as far as a machine without a GPU shows it.

Real: TensorRT's headers, and where it is at hand its library, which finds no GPU. The answers come from
stand-ins for TensorRT and CUDA (tensorrt_double.py) that run the bundle's graphs in ONNX Runtime: they prove
the host's logic and say nothing about TensorRT.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
import tensorrt_double as double
from conftest import EXAMPLE
from cpp_build import ask, call, configure_and_build, need_tools, questions, wheel_library
from PIL import Image
from tiny import write_tiny_next

from skipvision_export.bundle import seal
from skipvision_export.config import SkipVisionConfig
from skipvision_export.exporter import trace_model
from skipvision_export.models.loading import resolve_model

PICTURE = EXAMPLE / "test" / "000.png"
QUESTION = questions(1)[0]["question"]
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer")
TWO_PROFILES = """
[[profiles]]
text = [1, 64, 90]
new_tokens = 30
[[profiles]]
text = [1, 64, 200]
new_tokens = 250
"""


@pytest.fixture(scope="session")
def headers():
    need_tools()
    double.cuda_headers()
    return double.tensorrt_headers()


@pytest.fixture(scope="session")
def library(headers, tmp_path_factory):
    return wheel_library(tmp_path_factory.mktemp("cpp_tensorrt") / "lib")


@pytest.fixture(scope="session")
def build(headers, library):
    """Against the stand-ins, all of it under ASan and UBSan."""
    folder = library.parent.parent
    stand_ins = double.build_double(folder / "double", headers, library, *SANITIZERS)
    options = ("-DCMAKE_BUILD_TYPE=None", "-DSKIPVISION_SANITIZE=address,undefined")
    options += ("-DCMAKE_CXX_FLAGS=-O0", "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON")
    return configure_and_build(
        folder / "build",
        library,
        *options,
        *double.tensorrt_options(headers, *stand_ins),
        targets=("skipvision-run", "skipvision-probe"),
    )


@pytest.fixture(scope="session")
def probe(build):
    return build / "tests" / "skipvision-probe"


@pytest.fixture(scope="session")
def bundles(example_in, dense_bundle, strict_bundle, traced, tmp_path_factory):
    """Bundles by name: quarter, float16, dense, strict, and endless, whose model never ends."""
    root = tmp_path_factory.mktemp("cpp_tensorrt_bundles")
    endless = traced.write(root / "endless", SkipVisionConfig.preset("skip-75")).folder
    double.never_ends(endless)
    return {
        "quarter": example_in("float32"),
        "float16": example_in("float16"),
        "dense": dense_bundle,
        "strict": strict_bundle,
        "endless": endless,
    }


@pytest.fixture(scope="session")
def engines(bundles, headers, tmp_path_factory):
    """`engines(name, recipe)`: a folder of engines of a bundle, for the stand-in."""
    root = tmp_path_factory.mktemp("cpp_tensorrt_engines")

    def make(name, recipe="", **options):
        out = root / str(len(list(root.iterdir())))
        return double.write_engines(bundles[name], out, double.version(headers), recipe, **options)

    return make


@pytest.mark.parametrize("how", ["--no-cuda-graphs", "graphs"])
@pytest.mark.parametrize("kind", ["quarter", "dense", "strict", "float16"])
def test_answers_are_onnx_runtimes(kind, how, build, bundles, engines):
    program = build / "skipvision-run"
    arguments = () if how == "graphs" else (how,)
    expected = double.answers(program, bundles[kind])
    assert double.answers(program, bundles[kind], "--engines", engines(kind), *arguments) == expected


LONG = ("--max-new-tokens", 150)


@pytest.fixture(scope="session")
def long_answers(build, bundles):
    return double.answers(build / "skipvision-run", bundles["endless"], *LONG, n=3)


@pytest.mark.parametrize(
    ("how", "words", "captures"), [("--no-cuda-graphs", "", 0), ("", "", 6), ("", "no-capture", 0)]
)
def test_long_answers(how, words, captures, build, bundles, engines, long_answers, tmp_path):
    """Through each size of the cache; a graph for each, only logits come back to the host."""
    arguments = (*LONG, "--engines", engines("endless"), *filter(None, [how]))
    program, bundle = build / "skipvision-run", bundles["endless"]
    found = double.answers(program, bundle, *arguments, n=3, words=words, report=tmp_path / "report")
    assert found == long_answers
    report = json.loads((tmp_path / "report").read_text())
    assert report["captures"] == captures
    vocabulary = json.loads((bundle / "skipvision.json").read_text())["model"]["vocab_size"]
    assert report["to_host_bytes"] == 3 * 150 * vocabulary * 4
    # Of 149 steps after prefill, two for each size of the cache are launched one by one.
    assert report["launches"] == (3 * 149 - captures if captures else 0)


def test_the_next_answer_takes_the_graph_over(build, bundles, engines, tmp_path):
    arguments = ("--max-new-tokens", 20, "--engines", engines("endless"))
    program, report = build / "skipvision-run", tmp_path / "report"
    double.answers(program, bundles["endless"], *arguments, n=3, report=report)
    counted = json.loads(report.read_text())
    assert (counted["captures"], counted["launches"]) == (1, 3 * 19 - 1)


def test_several_profiles(build, bundles, engines, long_answers):
    arguments = (*LONG, "--engines", engines("endless", TWO_PROFILES))
    for how in ((), ("--no-cuda-graphs",)):
        found = double.answers(build / "skipvision-run", bundles["endless"], *arguments, *how, n=3)
        assert found == long_answers


@pytest.mark.parametrize("how", ["--no-cuda-graphs", ""])
def test_batches(how, build, bundles, engines, long_answers):
    """Three together, and three of at most two."""
    for most in (4, 2):
        folder = engines("endless", f"[[profiles]]\nbatch = [1, 2, {most}]")
        arguments = (*LONG, "--batch", 4, "--engines", folder, *filter(None, [how]))
        assert double.answers(build / "skipvision-run", bundles["endless"], *arguments, n=3) == long_answers


def test_tiles(build, engines, bundles, tmp_path):
    """Pictures of as many tiles in one run of the vision encoder, others one after the other."""
    config = SkipVisionConfig.counts(64, 40, summaries=True, selector="thumbnail", tiled=True)
    source = resolve_model(write_tiny_next(tmp_path / "model"))
    bundles["tiles"] = trace_model(source).write(tmp_path / "bundle", config).folder
    lines = []
    for size in [(200, 90), (90, 220), (180, 180), (300, 90)]:
        Image.open(PICTURE).resize(size).save(tmp_path / f"{size}.png")
        lines.append(json.dumps({"image": str(tmp_path / f"{size}.png"), "prompt": "What"}))
    arguments = (bundles["tiles"], "--lines", "--max-new-tokens", 20, "--batch")
    folder = engines("tiles", "[[profiles]]\nbatch = [1, 2, 4]")
    for batch in (1, 4):
        expected, found = (
            double.run(build / "skipvision-run", *arguments, batch, *own, input="\n".join(lines))
            for own in ((), ("--engines", folder))
        )
        assert found.returncode == 0, found.stderr[-3000:]
        ids = [json.loads(line)["token_ids"] for line in found.stdout.splitlines()]
        assert ids == [json.loads(line)["token_ids"] for line in expected.stdout.splitlines()]


def test_two_threads(bundles, engines, probe):
    prompts = [q["question"] for q in questions(8)]
    request = {"bundle": str(bundles["quarter"]), "image": str(PICTURE), "prompts": prompts}
    expected = ask(probe, "threads", **request)
    assert ask(probe, "threads", engines=str(engines("quarter")), **request) == expected
    assert expected[0] == expected[1]


ONE_LANE = (
    "trt_backend.cpp",
    "LaneHold lane(lanes_.back().release(), back);\n  lanes_.pop_back();\n  return lane;",
    "return LaneHold(lanes_.back().get(), [](Lane*) {});",
)


def nested(probe, bundles, **request):
    texts = ["a", "which one?"]
    return ask(probe, "nested", bundle=str(bundles["endless"]), image=str(PICTURE), prompts=texts, **request)


def test_sequences_at_once(bundles, engines, probe, tmp_path):
    """One sequence within the steps of another; the twin has one lane for both."""
    folder = str(engines("endless"))
    expected = nested(probe, bundles)
    assert nested(probe, bundles, engines=folder) == expected
    assert expected[:2] == expected[2:] and expected[0] != expected[1]
    twin = double.twin_of(probe, tmp_path, *ONE_LANE)
    with pytest.raises(AssertionError):
        assert nested(twin, bundles, engines=folder) == expected


# Of trt_sequence.cpp: what is there, and what is there in the broken twin.
TWINS = {
    "position of the cache": (
        "std::copy(positions.begin(), positions.end(), static_cast<std::int64_t*>(inputs[2].host));",
        "*static_cast<std::int64_t*>(inputs[2].host) = length_ + 0 * positions[0];",
    ),
    "one buffer": ("std::swap(lane_.past, lane_.present);\n      ++pitch_", "++pitch_"),
    "row beside its place": (
        "bytes * length_, pitch_,",
        "bytes * (length_ - 1), pitch_,",
    ),
    "free positions seen": (
        "mask + length_, mask + pitch_, 0",
        "mask + length_, mask + pitch_, 1",
    ),
    "free positions not zeroed": (
        "data(), 0, bytes, lane_",
        "data(), 0, 0 * bytes, lane_",
    ),
    "old graph": ("lane_.graph.reset();\n    lane_.runs = 0;", "lane_.runs = 0;"),
    "inputs in turn": ("    lane_.stream.wait();\n    graph_ms_", "    graph_ms_"),
}


@pytest.mark.parametrize("name", TWINS)
def test_a_broken_twin_is_caught(name, build, bundles, engines, long_answers, tmp_path):
    program = double.twin_of(build / "skipvision-run", tmp_path, "trt_sequence.cpp", *TWINS[name])
    arguments = (*LONG, "--engines", engines("endless"))
    for how in ((), ("--no-cuda-graphs",)):
        try:
            if double.answers(program, bundles["endless"], *arguments, *how, n=3) != long_answers:
                return
        except AssertionError:  # a sanitizer's report, or the stand-in's
            return
    pytest.fail("the twin gives the right answers")


def one_line(done, part):
    assert done.returncode == 2, (done.returncode, done.stderr[-3000:])
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert part in done.stderr
    assert done.stdout == ""


def alter(folder, change):
    manifest = json.loads((folder / "engines.json").read_text())
    change(manifest)
    (folder / "engines.json").write_text(seal(manifest))


def rewrite(folder, data, hashed=False):
    """Another decode engine, in the manifest too if `hashed`."""
    file = folder / "decoder_decode.engine"
    size = file.stat().st_size
    file.write_bytes(data[:size].ljust(size))
    if hashed:
        sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
        alter(folder, lambda m: m["engines"]["decoder_decode"].update(sha256=sha256))


DECODE = "decoder_decode.engine"
DAMAGES = {
    "no manifest": (lambda e: (e / "engines.json").unlink(), "holds no engines"),
    "truncated manifest": (
        lambda e: (e / "engines.json").write_text((e / "engines.json").read_text()[:200]),
        "truncated or no JSON; build again",
    ),
    "changed number": (
        lambda e: (e / "engines.json").write_text(
            (e / "engines.json").read_text().replace('"schema_version": 1', '"schema_version": 1 ')
        ),
        "digest: is not the sha256 of the file, which is altered; build again",
    ),
    "newer schema": (lambda e: alter(e, lambda m: m.update(schema_version=9)), "schema_version: is 9"),
    "route of the other product": (
        lambda e: alter(e, lambda m: m.update(route="trt-rtx")),
        "route: is trt-rtx: TensorRT-RTX's engines need its own runtime",
    ),
    "another bundle": (
        lambda e: alter(e, lambda m: m["bundle"].update(sha256="0" * 64)),
        "bundle.sha256: the engines were built from another bundle",
    ),
    "missing graph": (lambda e: alter(e, lambda m: m["engines"].pop("embed_tokens")), "engines.embed_tokens"),
    "missing input": (
        lambda e: alter(e, lambda m: m["engines"]["decoder_decode"]["profiles"][0].pop("position_ids")),
        "has no shapes of position_ids",
    ),
    "outside path": (
        lambda e: alter(e, lambda m: m["engines"]["embed_tokens"].update(file="../x.engine")),
        "engines.embed_tokens.file",
    ),
    "another version": (
        lambda e: alter(e, lambda m: m["engines"]["embed_tokens"].update(builder_version="10.2.1")),
        "was built with TensorRT 10.2.1",
    ),
    "missing engine": (lambda e: (e / DECODE).unlink(), f"{DECODE} is missing; build again"),
    "truncated engine": (
        lambda e: (e / DECODE).write_bytes((e / DECODE).read_bytes()[:100]),
        "truncated: 100 bytes",
    ),
    "altered engine": (lambda e: rewrite(e, b"x"), "its sha256 is not the manifest's; build again"),
    "no engine": (lambda e: rewrite(e, b"x", hashed=True), "cannot be loaded by TensorRT"),
}


def asks(bundle, folder, *arguments):
    return (bundle, "--engines", folder, "--image", PICTURE, "--prompt", QUESTION, *arguments)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_one_line(damage, build, bundles, engines, tmp_path):
    change, part = DAMAGES[damage]
    folder = shutil.copytree(engines("quarter"), tmp_path / "engines")
    change(folder)
    one_line(double.run(build / "skipvision-run", *asks(bundles["quarter"], folder)), part)


def test_what_fits_no_profile_is_one_line(build, bundles, engines):
    folder = engines("quarter", "[[profiles]]\ntext = [1, 8, 9]\nprompt = [1, 30, 31]\nkept = [1, 20, 31]")
    done = double.run(build / "skipvision-run", *asks(bundles["quarter"], folder))
    one_line(done, "is outside [[1, 1], [1, 31]] in every profile")


def test_an_answer_beyond_every_profile_is_one_line(build, bundles, engines):
    folder = engines("endless", "[[profiles]]\ntext = [1, 64, 90]\nnew_tokens = 5")
    done = double.run(build / "skipvision-run", *asks(bundles["endless"], folder, *LONG, "--no-hashes"))
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "attention_mask" in done.stderr and "in every profile" in done.stderr


def test_no_gpu(build, bundles, engines):
    done = double.run(
        build / "skipvision-run", *asks(bundles["quarter"], engines("quarter")), words="no-device"
    )
    one_line(done, "no NVIDIA GPU here (no CUDA-capable device is detected)")


@pytest.fixture(scope="session")
def plugins(headers, tmp_path_factory):
    """Libraries that pass for the plugin, or for none, by name."""
    folder = tmp_path_factory.mktemp("cpp_tensorrt_plugins")
    function = 'extern "C" const char* skipvision_kv_prune_version() {{ return "{} (skipvision-export)"; }}\n'
    creators = 'extern "C" void* getCreators(int*) { return nullptr; }\n'
    sources = {
        "good": function.format(1) + creators,
        "older": function.format(0) + creators,
        "refused": function.format(1),
        "another": "int nothing;\n",
    }
    for name, source in sources.items():
        (folder / f"{name}.cpp").write_text(source)
        call("c++", "-shared", "-fPIC", folder / f"{name}.cpp", "-o", folder / f"{name}.so")
    return folder


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("missing", "missing.so is no file; build it from plugins/kv_prune"),
        ("another", "is no KVPrune plugin library"),
        ("older", "holds version 0 of KVPrune, expected 1"),
        ("refused", "TensorRT did not take KVPrune"),
    ],
)
def test_a_wrong_plugin_is_one_line(name, part, build, bundles, engines, plugins):
    folder = engines("quarter", plugin=True)
    arguments = asks(bundles["quarter"], folder, "--plugin", plugins / f"{name}.so")
    one_line(double.run(build / "skipvision-run", *arguments), part)


def test_the_plugin(build, bundles, engines, plugins):
    folder, program = engines("quarter", plugin=True), build / "skipvision-run"
    expected = double.answers(program, bundles["quarter"], n=2)
    arguments = ("--engines", folder, "--plugin", plugins / "good.so")
    assert double.answers(program, bundles["quarter"], *arguments, n=2) == expected
    one_line(double.run(program, *asks(bundles["quarter"], folder)), "libskipvision_kv_prune.so is no file")
    shutil.copy(plugins / "good.so", folder / "libskipvision_kv_prune.so")
    assert double.answers(program, bundles["quarter"], *arguments[:2], n=2) == expected


def test_the_real_library_finds_no_gpu(headers, library, bundles, engines, tmp_path):
    """Linked with NVIDIA's own libraries, which must not be touched where there is no GPU."""
    folders = [
        headers.parent / "lib",
        *map(Path, filter(None, [os.environ.get("SKIPVISION_NVINFER_FOLDER")])),
    ]
    found = [file for folder in folders for file in sorted(folder.glob("libnvinfer*.so.1?"))]
    found = [file for file in found if file.name.startswith(("libnvinfer.so", "libnvinfer_lean.so"))]
    if not found:
        pytest.skip("set SKIPVISION_NVINFER_FOLDER to a folder with libnvinfer_lean.so or libnvinfer.so")
    cudart = double.cuda_headers().parent / "lib64" / "libcudart.so"
    if not cudart.exists():
        pytest.skip(f"needs {cudart}")
    options = double.tensorrt_options(headers, found[0], cudart)
    build = configure_and_build(tmp_path / "build", library, *options, targets=("skipvision-run",))
    done = double.run(build / "skipvision-run", *asks(bundles["quarter"], engines("quarter")))
    if done.returncode == 0 or "no NVIDIA GPU here" not in done.stderr:
        pytest.skip("there is a GPU here")
    one_line(done, "no NVIDIA GPU here")
