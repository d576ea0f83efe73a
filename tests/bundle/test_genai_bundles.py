"""Dense bundles in onnxruntime-genai: every step's logits are Hugging Face's, broken twins are not."""

import json

import numpy as np
import onnx_ir as ir
import pytest
from damage import held, instead_of_input, twin
from other_runtimes import IMAGE, STEPS, VISUAL, check_int4, in_pytorch, prompt, strided_positions

from skipvision_export import Bundle, SkipVisionConfig
from skipvision_export.bundle.genai import check_genai
from skipvision_export.errors import ConfigError
from skipvision_export.models import family_of

LIMIT = 1e-4
DENSE = SkipVisionConfig.dense()


@pytest.fixture(scope="module")
def folder(traced, tmp_path_factory):
    return traced.write(tmp_path_factory.mktemp("genai") / "dense", DENSE, target="genai").folder


def in_genai(folder, ids, pixels, steps=STEPS):
    """Logits [STEPS, vocab] and ids; tensors of the picture as Hugging Face's processor makes them."""
    genai = pytest.importorskip("onnxruntime_genai")
    model = genai.Model(str(folder))
    params = genai.GeneratorParams(model)
    params.set_search_options(max_length=len(ids) + steps)
    generator = genai.Generator(model, params)
    tensors = genai.NamedTensors()
    tensors["input_ids"] = ids[None].astype(np.int32)
    if pixels is not None:
        tensors["pixel_values"] = pixels
        tensors["num_image_tokens"] = np.array([(ids == IMAGE).sum()])
    generator.set_inputs(tensors)
    logits = []
    for _ in range(steps):
        logits.append(np.array(generator.get_logits()).reshape(-1))
        generator.generate_next_token()
    return np.array(logits), list(generator.get_sequence(0))[len(ids) :]


@pytest.mark.parametrize("pictures", [0, 1, 2])
def test_genai_answers_as_hugging_face(pictures, folder, traced):
    ids, pixels = prompt(pictures)
    found, expected = in_genai(folder, ids, pixels), in_pytorch(traced.model, ids, pixels)
    assert found[1] == expected[1]
    assert np.abs(found[0] - expected[0]).max() <= LIMIT


def test_int4(traced, tmp_path):
    bundle = traced.write(tmp_path / "int4", DENSE, weights="int4", target="genai")
    ids, pixels = prompt(1)
    check_int4(traced, ids, pixels, in_genai(bundle.folder, ids, pixels)[0])


def swapped_rows(graph):
    """The features come in another order."""
    index = held(graph, "index", np.roll(np.arange(VISUAL), 1))
    instead_of_input(graph, "image_features", lambda flat: [ir.node("Gather", [flat, index])])


@pytest.mark.parametrize(
    ("name", "damage"), [("decoder_decode", strided_positions), ("embed_tokens.genai", swapped_rows)]
)
def test_broken_twins_are_caught(name, damage, folder, traced, tmp_path):
    broken = twin(Bundle.load(folder, verify=False), tmp_path, damage, name).folder
    ids, pixels = prompt(1)
    # The first step alone: decode gets no rows that could be swapped.
    found, expected = in_genai(broken, ids, pixels, 1)[0], in_pytorch(traced.model, ids, pixels)[0][:1]
    assert np.abs(found - expected).max() > 100 * LIMIT


def test_large_graphs_share_their_weights_with_their_forms(traced, tmp_path, monkeypatch):
    monkeypatch.setattr("skipvision_export.bundle.graphs._MAX_INLINE_TOTAL", 0)
    folder = traced.write(tmp_path / "large", DENSE, target="genai").folder
    names = {file.name for file in (folder / "onnx").glob("*.onnx_data")}
    assert names == {"decoder.onnx_data", "vision_encoder.onnx_data", "embed_tokens.onnx_data"}
    assert (folder / "onnx" / "vision_encoder.genai.onnx").stat().st_size < 100_000
    ids, pixels = prompt(1)
    assert np.abs(in_genai(folder, ids, pixels)[0] - in_pytorch(traced.model, ids, pixels)[0]).max() <= LIMIT


def test_what_is_written(folder, dense_folder):
    """Beside a dense bundle's own files, all of them in the manifest."""
    more = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    more -= {str(p.relative_to(dense_folder)) for p in dense_folder.rglob("*") if p.is_file()}
    assert more == {"genai_config.json", "onnx/vision_encoder.genai.onnx", "onnx/embed_tokens.genai.onnx"}
    assert more <= set(json.loads((folder / "skipvision.json").read_text())["files"])
    model = json.loads((folder / "genai_config.json").read_text())["model"]
    for part in ("decoder", "embedding", "vision"):
        assert (folder / model[part]["filename"]).is_file()


def test_what_genai_cannot_run_is_refused(traced, tmp_path):
    with pytest.raises(ConfigError, match=r"dense exports only.*positions count"):
        traced.write(tmp_path / "out", SkipVisionConfig.preset("skip-75"), target="genai")
    with pytest.raises(ConfigError, match="no CPU kernels for bfloat16"):
        check_genai(DENSE.layout(16), traced.source.family, "bfloat16")
    with pytest.raises(ConfigError, match=r"supported: onnxruntime, genai, transformers\.js"):
        traced.write(tmp_path / "out", DENSE, target="tensorrt")
    assert not (tmp_path / "out").exists()


def test_prompts_that_see_later_tokens_are_refused():
    with pytest.raises(ConfigError, match="prompts see their whole prompt"):
        check_genai(DENSE.layout(16), family_of(["PaliGemmaForConditionalGeneration"], ""), "float32")
