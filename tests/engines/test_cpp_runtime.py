"""The C++ runtime gives what Python gives: pixels, ids, text, answers; and one line for each mistake."""

import json
import os
import re
import shutil

import numpy as np
import pytest
from conftest import EXAMPLE
from cpp_build import SOURCE, alter, ask, call, configure_and_build, questions, request_lines, run
from cpp_inputs import TEXTS, random_pictures, random_texts, trained_tokenizer
from full import FULL, only_in_full
from PIL import Image
from tiny import write_tiny
from transformers import CLIPImageProcessorPil

from skipvision_export.config import SkipVisionConfig
from skipvision_export.exporter import trace_model
from skipvision_export.models.loading import resolve_model
from skipvision_export.runtime.pipeline import Bundle

N = int(os.environ.get("SKIPVISION_CPP_QUESTIONS", "12"))
KINDS = ["skip", "dense", "strict", "int4", "referenced"]
PICTURE = EXAMPLE / "test" / "000.png"
QUESTION = "which digit is in the bottom right?"


def generate(build, folder, file, *arguments):
    ask_for = ("--image", PICTURE, "--prompt", QUESTION, "--json", file)
    done = run(build, folder, *ask_for, *arguments)
    assert done.returncode == 0, done.stderr
    return json.loads(file.read_text()), done.stdout


def texts_of(printed):
    return [json.loads(line)["text"] for line in printed.splitlines()]


@pytest.mark.parametrize("kind", KINDS if FULL else KINDS[:4])
def test_answers_are_pythons(kind, build, request):
    folder = request.getfixturevalue(f"{kind}_bundle")
    lines = request_lines(N)
    done = run(build, folder, "--lines", input=lines)
    assert done.returncode == 0, done.stderr
    bundle = Bundle.load(folder)
    for line, printed in zip(lines.splitlines(), done.stdout.splitlines(), strict=True):
        question = json.loads(line)
        expected = bundle.generate(question["image"], question["prompt"]).to_json()
        found = json.loads(printed)
        assert found.keys() == expected.keys()
        for key in found.keys() - {"ttft_ms", "decode_ms_per_token"}:
            assert found[key] == expected[key], (question, key)


def test_another_layout_is_noticed(skip_bundle, build, tmp_path):
    """The broken twin: rows and positions of other tokens give other answers."""
    folder = shutil.copytree(skip_bundle, tmp_path / "bundle")
    alter(folder, lambda m: m["roles"].update(layout=[["skipped", 10], ["summary", 1], ["retained", 12]]))
    right, wrong = (
        run(build, own, "--lines", input=request_lines(40)).stdout for own in (skip_bundle, folder)
    )
    assert texts_of(right) != texts_of(wrong)
    assert len(texts_of(right)) == len(texts_of(wrong)) == 40


@only_in_full
def test_float16(example_in, build, tmp_path):
    folder = example_in("float16")
    found, _ = generate(build, folder, tmp_path / "a.json")
    assert found["token_ids"] == Bundle.load(folder).generate(PICTURE, QUESTION).token_ids


def test_a_bundle_without_the_shared_cache(skip_bundle, build, tmp_path):
    folder = shutil.copytree(skip_bundle, tmp_path / "bundle")
    expected, _ = generate(build, folder, tmp_path / "a.json")
    alter(folder, lambda m: m.pop("variants"))
    found, _ = generate(build, folder, tmp_path / "b.json")
    assert found["token_ids"] == expected["token_ids"]


def test_streamed_text_is_the_answer(skip_bundle, build, tmp_path):
    found, printed = generate(build, skip_bundle, tmp_path / "a.json")
    assert printed == found["text"] + "\n"


def test_the_cache_grows(traced, build, tmp_path):
    """More new tokens than a buffer's room, on a model that never ends."""
    folder = traced.write(tmp_path / "bundle", SkipVisionConfig.preset("skip-75")).folder
    file = folder / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": 279}))
    # Sizes are checked in any case.
    alter(folder, lambda m: m["files"][file.name].update(bytes=file.stat().st_size))
    found, _ = generate(build, folder, tmp_path / "a.json", "--max-new-tokens", 300, "--no-hashes")
    bundle = Bundle.load(folder, verify=False)
    assert found["token_ids"] == bundle.generate(PICTURE, QUESTION, 300).token_ids


def test_sampling_is_reproducible(skip_bundle, build, tmp_path):
    hot = ("--temperature", 5, "--top-p", 0.99, "--top-k", 300)
    answers = [
        generate(build, skip_bundle, tmp_path / "a.json", *hot, "--seed", seed)[0]["token_ids"]
        for seed in (1, 1, 2, 3)
    ]
    assert answers[0] == answers[1]
    assert len({tuple(answer) for answer in answers}) > 1


def test_two_threads(skip_bundle, probe):
    prompts = [q["question"] for q in questions(20)]
    texts = ask(probe, "threads", bundle=str(skip_bundle), image=str(PICTURE), prompts=prompts)
    assert texts[0] == texts[1]
    assert texts[0].split("\n")[0::2] == [*texts[0].split("\n")[1::2], ""]


def peak_mb(build, folder):
    ask_for = ("--image", PICTURE, "--prompt", QUESTION, "--bench", "--rounds", 1, "--max-new-tokens", 8)
    done = run(build, folder, *ask_for, "--threads", 1)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["peak_rss_mb"]


@pytest.fixture(scope="module")
def wide_bundle(tmp_path_factory):
    """Nearly all of it in the decoder."""
    folder = tmp_path_factory.mktemp("cpp_wide")
    sizes = {"hidden_size": 768, "intermediate_size": 2048}
    write_tiny(folder / "model", num_attention_heads=12, num_key_value_heads=12, **sizes)
    wide = trace_model(resolve_model(folder / "model"))
    return wide.write(folder / "bundle", SkipVisionConfig.preset("skip-75")).folder


def test_weights_are_in_memory_once(build, bundle_folder, wide_bundle):
    """A wide decoder adds its weights to the peak, and less than half for what is computed; not twice."""
    weights_mb = (wide_bundle / "onnx" / "decoder.onnx_data").stat().st_size / 1e6
    assert weights_mb > 80
    assert peak_mb(build, wide_bundle) - peak_mb(build, bundle_folder) < 1.5 * weights_mb


def test_generating_takes_little_more_than_one_session(probe, wide_bundle):
    ids = [1, *[3] * Bundle.load(wide_bundle, verify=False).manifest.layout.total, 50, 60]

    def peak(steps, share):
        return ask(probe, "peak", bundle=str(wide_bundle), ids=ids, side=96, steps=steps, share=share)

    assert peak(8, True) <= 1.15 * peak(0, True)
    # The twin: without sharing the second copy shows, and so the limit can fail.
    assert peak(8, False) > 1.15 * peak(0, False)


def test_bench(skip_bundle, build):
    done = run(build, skip_bundle, "--image", PICTURE, "--prompt", QUESTION, "--bench", "--rounds", 2)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert (
        min(result[k] for k in ("ttft_ms", "decode_ms_per_token", "outside_ms_per_token", "peak_rss_mb")) > 0
    )


@pytest.mark.parametrize("crop", [(96, 96), (70, 120)])
def test_pixels_are_hugging_faces(crop, probe, tmp_path):
    height, width = crop
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": 96}, crop_size={"height": height, "width": width}
    )
    processor.save_pretrained(tmp_path)
    files = random_pictures(tmp_path)
    request = {"folder": str(tmp_path), "images": [str(file) for file in files]}
    assert ask(probe, "pixels", out=str(tmp_path / "out"), **request) == [height, width]
    found = np.fromfile(tmp_path / "out", np.float32).reshape(len(files), 3, height, width)
    for file, values in zip(files, found, strict=True):
        expected = processor(Image.open(file).convert("RGB"), return_tensors="np")["pixel_values"][0]
        assert np.array_equal(values, expected), file.name


def test_jpeg_pixels_are_pillows(probe, tmp_path):
    """Decoded by two builds of libjpeg-turbo; versions that differ by a level of 255 are let pass."""
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": 96},
        crop_size={"height": 96, "width": 96},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    processor.save_pretrained(tmp_path)
    picture = Image.open(PICTURE).convert("RGB").resize((203, 301))
    files = [tmp_path / f"{i}.jpg" for i in range(5)]
    for i in range(3):
        picture.save(files[i], subsampling=i)
    picture.save(files[3], progressive=True, quality=50)
    picture.convert("L").save(files[4])
    request = {"folder": str(tmp_path), "images": [str(file) for file in files]}
    ask(probe, "pixels", out=str(tmp_path / "out"), **request)
    found = np.fromfile(tmp_path / "out", np.float32).reshape(5, 3, 96, 96)
    for file, values in zip(files, found, strict=True):
        expected = processor(Image.open(file).convert("RGB"), return_tensors="np")["pixel_values"][0]
        assert np.abs(values - expected).max() <= 1.01 * 2 / 255, file.name


@pytest.mark.parametrize("kind", ["gpt2", "qwen", "llama", "metaspace"])
def test_tokens_are_hugging_faces(kind, probe, tmp_path):
    tokenizer = trained_tokenizer(kind)
    file = str(tmp_path / "tokenizer.json")
    tokenizer.save(file)
    texts = TEXTS + random_texts()
    for text, ids in zip(texts, ask(probe, "encode", tokenizer=file, texts=texts), strict=True):
        assert ids == tokenizer.encode(text).ids, text
    rng = np.random.default_rng(2)
    ids = [rng.integers(0, tokenizer.get_vocab_size(), rng.integers(1, 30)).tolist() for _ in range(300)]
    for own, pieces in zip(ids, ask(probe, "decode", tokenizer=file, ids=ids), strict=True):
        assert "".join(pieces) == tokenizer.decode(own, skip_special_tokens=True).strip(), own


def test_unit_tests(build):
    assert "passed" in call(build / "tests" / "skipvision-unit")


@only_in_full
def test_unit_tests_under_sanitizers(library):
    options = ("-DCMAKE_BUILD_TYPE=Debug", "-DSKIPVISION_SANITIZE=address,undefined")
    folder = library.parent.parent / "sanitized"
    build = configure_and_build(folder, library, *options, targets=("skipvision-unit",))
    assert "passed" in call(build / "tests" / "skipvision-unit")


def test_readme_example(build, skip_bundle, tmp_path, library):
    """Installed, found by CMake and linked, as an integrator does it."""
    call("cmake", "--install", build, "--prefix", tmp_path / "prefix")
    readme = (SOURCE / "README.md").read_text()
    blocks = dict(re.findall(r"`([\w.]+)`:\n\n```\w+\n(.*?)```", readme, re.DOTALL))
    (tmp_path / "app").mkdir()
    for name in ("answer.cpp", "CMakeLists.txt"):
        (tmp_path / "app" / name).write_text(blocks[name])
    assert len(blocks["answer.cpp"].splitlines()) <= 30
    definitions = [
        line for line in (build / "CMakeCache.txt").read_text().splitlines() if "ONNXRUNTIME_" in line
    ]
    values = [f"-D{line.split(':')[0]}={line.split('=')[1]}" for line in definitions]
    prefix = f"-DCMAKE_PREFIX_PATH={tmp_path / 'prefix'}"
    call("cmake", "-S", tmp_path / "app", "-B", tmp_path / "app" / "build", prefix, *values)
    call("cmake", "--build", tmp_path / "app" / "build")
    printed = call(tmp_path / "app" / "build" / "answer", skip_bundle, PICTURE, QUESTION)
    assert Bundle.load(skip_bundle).generate(PICTURE, QUESTION).text in printed


def truncate(file, size):
    file.write_bytes(file.read_bytes()[:size])


def renumber(file, field, number):
    file.write_text(re.sub(rf'("{field}": )\d+', rf"\g<1>{number}", file.read_text(), count=1))


DAMAGES = {
    "changed number": (lambda b: renumber(b / "skipvision.json", "image_token_id", 7), "digest"),
    "no manifest": (lambda b: (b / "skipvision.json").unlink(), "no skipvision.json"),
    "truncated manifest": (lambda b: truncate(b / "skipvision.json", 99), "truncated or no JSON"),
    "missing field": (lambda b: alter(b, lambda m: m["model"].pop("num_layers")), "model.num_layers"),
    "wrong type": (lambda b: alter(b, lambda m: m["roles"].update(layout="x")), "roles.layout"),
    "huge count": (
        lambda b: alter(b, lambda m: m["roles"]["layout"][0].__setitem__(1, 1 << 60)),
        "layout.0.1",
    ),
    "newer schema": (lambda b: alter(b, lambda m: m.update(schema_version=9)), "schema_version"),
    "outside path": (
        lambda b: alter(b, lambda m: m["graphs"]["vision_encoder"].update(file="../x.onnx")),
        "graphs.vision_encoder.file",
    ),
    "tiled": (lambda b: alter(b, lambda m: m["model"].update(tiled=True)), "model.tiled"),
    "bfloat16": (lambda b: alter(b, lambda m: m.update(dtype="bfloat16")), "dtype"),
    "layers": (lambda b: alter(b, lambda m: m["graphs"].pop("decoder_prefill")), "decoder_prefill"),
    "missing file": (lambda b: (b / "tokenizer.json").unlink(), "tokenizer.json is missing"),
    "truncated weights": (lambda b: truncate(b / "onnx/decoder.onnx_data", 1000), "truncated"),
    "altered weights": (
        lambda b: (b / "onnx/decoder.onnx_data").write_bytes(
            bytes((b / "onnx/decoder.onnx_data").stat().st_size)
        ),
        "sha256",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_bundle_is_one_line(damage, skip_bundle, build, tmp_path):
    change, part = DAMAGES[damage]
    folder = shutil.copytree(skip_bundle, tmp_path / "bundle")
    change(folder)
    expect_error(run(build, folder, "--image", PICTURE, "--prompt", QUESTION), part)


def expect_error(done, part):
    assert done.returncode == 2, (done.returncode, done.stderr)
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert part in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("--image", "missing.png", "--prompt", "x"), "does not exist"),
        (("--image", "text.png", "--prompt", "x"), "no picture"),
        (("--image", "half.png", "--prompt", "x"), "truncated"),
        (("--image", "half.jpg", "--prompt", "x"), "truncated"),
        (("--image", "flipped.png", "--prompt", "x"), "truncated or no picture"),
        (("--image", "grey16.png", "--prompt", "x"), "16 bits"),
        (("--image", "cmyk.jpg", "--prompt", "x"), "CMYK"),
        (("--image", "good.png", "--prompt", " "), "empty"),
        (("--image", "good.png", "--prompt", "<image> <image>"), "2 <image> placeholders"),
        (("--image", "good.png", "--prompt", "long " * 600), "the model reads fewer than 512"),
        (("--image", "good.png", "--prompt", "x", "--max-new-tokens", "500"), "ask for at most"),
        (("--image", "good.png", "--prompt", "x", "--max-new-tokens", "0"), "max_new_tokens"),
        (("--image", "good.png", "--prompt", "x", "--top-p", "2"), "top_p"),
        (("--image", "good.png", "--prompt", "x", "--temperature", "-1"), "temperature"),
        (("--image", "good.png", "--prompt", "x", "--nonsense"), "nonsense"),
        (("--image", "good.png", "--prompt", "x", "--engines", "e"), "has no TensorRT"),
        (("--prompt", "x"), "expected --image"),
    ],
)
def test_a_mistake_is_one_line(arguments, part, skip_bundle, build, tmp_path):
    picture = Image.open(PICTURE).convert("RGB")
    picture.save(tmp_path / "good.png")
    picture.save(tmp_path / "half.jpg")
    shutil.copy(tmp_path / "good.png", tmp_path / "half.png")
    for name in ("half.png", "half.jpg"):
        truncate(tmp_path / name, (tmp_path / name).stat().st_size // 2)
    (tmp_path / "text.png").write_text("no picture")
    data = bytearray((tmp_path / "good.png").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "flipped.png").write_bytes(data)
    Image.fromarray(np.zeros((9, 9), np.uint16)).save(tmp_path / "grey16.png")
    picture.convert("CMYK").save(tmp_path / "cmyk.jpg")
    expect_error(run(build, skip_bundle, *arguments, cwd=tmp_path), part)
