"""The ONNX Runtime generation loop."""

import numpy as np
import pytest
import torch
from PIL import Image

from skipvision_export import Bundle
from skipvision_export.config import SkipVisionConfig
from skipvision_export.errors import InputError
from skipvision_export.runtime.batch import PromptBatch, prefill_indices
from skipvision_export.runtime.prompt import PromptInputs, load_image, resize_placeholders


@pytest.fixture
def picture():
    blocks = np.random.default_rng(0).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize((120, 96), Image.Resampling.NEAREST)


def test_decode_runs_on_the_pruned_cache(bundle_folder, picture):
    bundle = Bundle.load(bundle_folder, optimize=False)  # the graph that every runtime runs
    inputs = bundle.prepare(picture, "What?")
    seen = []
    decode = bundle.generator.backend.run

    def spy(graph, feeds):
        if graph == "decoder_decode":
            seen.append({k: bundle.backend.shape(v)[2] for k, v in feeds.items() if "past" in k})
        return decode(graph, feeds)

    bundle.generator.backend.run = spy
    try:
        done = bundle.run(inputs, 4)
    finally:
        del bundle.generator.backend.run
    text = inputs.input_ids.shape[1] - 64
    assert done.kv_tokens_after_prefill == text + 16
    assert [set(step.values()) for step in seen] == [{text + 16 + i} for i in range(len(seen))]
    assert len(seen[0]) == 6


def test_answer_has_the_contract_keys(bundle, picture):
    answer = bundle.generate(picture, "What is it?", max_new_tokens=3).to_json()
    assert set(answer) == {
        "text",
        "token_ids",
        "prompt_tokens",
        "retained_tokens",
        "skipped_tokens",
        "kv_tokens_after_prefill",
        "ttft_ms",
        "decode_ms_per_token",
    }
    assert answer["kv_tokens_after_prefill"] == answer["prompt_tokens"] - answer["skipped_tokens"]


def test_indices():
    layout = SkipVisionConfig.counts(1, 2).layout(3)
    ids = np.array([[7, 3, 3, 3, 8, 9]])
    found = prefill_indices(PromptBatch.join([ids], 3), 3, layout)
    assert {tier: rows.tolist() for tier, rows in found.ffn_rows.items()} == {1: [0, 1, 4, 5]}
    assert found.kv_keep.tolist() == [[0, 1, 4, 5]]


def test_each_picture_gets_the_layout_s_placeholders():
    ids = np.array([[7, 3, 3, 3, 8, *[3] * 6, 9]])
    pixels = np.zeros((3, 3, 1, 1), np.float32)
    for total, expected in (
        (2, [7, 3, 3, 8, 3, 3, 3, 3, 9]),
        (4, [7, *[3] * 4, 8, *[3] * 8, 9]),
        (3, ids[0]),
    ):
        done = resize_placeholders(PromptInputs(ids, pixels), 3, 3, total)
        assert done.input_ids.tolist() == [list(expected)]
        assert done.pixel_values is pixels
    text = PromptInputs(np.array([[7, 8]]), pixels)
    assert resize_placeholders(text, 3, 3, 5).input_ids.tolist() == [[7, 8]]
    with pytest.raises(InputError, match="multiple"):
        resize_placeholders(PromptInputs(ids[:, :-2], pixels), 3, 3, 2)


def test_the_embedding_graph_serves_prompts_and_single_tokens(bundle, reference):
    import torch

    ids = np.array([[1, 5, *[3] * 64, 9]])
    features = np.random.default_rng(0).standard_normal((1, 64, 64)).astype(np.float32)
    out = bundle.backend.numpy(bundle.generator.embed(ids, features))
    np.testing.assert_array_equal(out[0, 2:66], features[0])
    table = reference.model.get_input_embeddings()
    with torch.no_grad():
        np.testing.assert_array_equal(out[0, :2], table(torch.tensor([1, 5])).numpy())
        single = bundle.backend.numpy(bundle.generator.embed(np.array([[9]])))
        np.testing.assert_array_equal(single[0], table(torch.tensor([9])).numpy())


def test_pictures_that_cannot_be_used(tmp_path, picture):
    with pytest.raises(InputError, match="does not exist"):
        load_image(tmp_path / "none.png")
    picture.save(tmp_path / "whole.png")
    data = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "half.png").write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match="truncated"):
        load_image(tmp_path / "half.png")
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(InputError, match="no picture"):
        load_image(tmp_path / "text.png")


@pytest.mark.parametrize("prompt", ["<image><image> What?", "   "])
def test_prompts_that_cannot_be_used(bundle, picture, prompt):
    with pytest.raises(InputError, match="prompt"):
        bundle.prepare(picture, prompt)


def test_a_prompt_without_a_place_for_its_picture(bundle_folder, picture):
    other = Bundle.load(bundle_folder)
    other.processor.chat_template = None
    with pytest.raises(InputError, match="0 <image>"):
        other.prepare(picture, "What?")


def test_a_whole_prompt_is_taken_as_it_is(bundle, picture):
    asked = bundle.prepare(picture, "What?")
    whole = bundle.prepare(picture, "USER: <image>\nWhat? ASSISTANT:")
    assert asked.input_ids.tolist() == whole.input_ids.tolist()


@pytest.mark.parametrize(
    ("new", "message"), [(500, "ask for at most 4"), (0, None)], ids=["too many", "as many as there are"]
)
def test_no_position_beyond_the_models(bundle, picture, new, message):
    inputs = bundle.prepare(picture, "What?")
    room = 512 - inputs.input_ids.shape[1]
    if message is None:
        bundle.generator.generate_batch(
            [inputs.input_ids], [inputs.pixel_values], max_new_tokens=room, eos=range(280)
        )
        return
    with pytest.raises(InputError, match=f"{new} new ones are over the model's 512; {message}"):
        bundle.run(inputs, new)


def test_a_generated_placeholder_is_a_token_as_any_other(bundle, reference):
    ids = np.array([[5, 3], [3, 7]])
    want = reference.model.get_input_embeddings()(torch.from_numpy(ids)).detach().numpy()
    assert np.array_equal(bundle.backend.numpy(bundle.generator.embed(ids)), want)
