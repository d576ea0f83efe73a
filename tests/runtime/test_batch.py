"""Batches of prompts give what each gives alone, in ONNX Runtime and in the patched PyTorch model."""

import numpy as np
import pytest
import torch
from conftest import EXAMPLE
from damage import leave_as_it_is, longest_row_s_positions, see_the_padding, twin
from hypothesis import given, settings
from hypothesis import strategies as st

from skipvision_export import SkipVisionConfig, apply_skip_vision
from skipvision_export.benchmark.accuracy import BundleAnswerer, evaluate
from skipvision_export.errors import InputError
from skipvision_export.layout import TokenLayout
from skipvision_export.runtime import kv_cache
from skipvision_export.runtime.batch import PromptBatch, image_index, prefill_indices
from skipvision_export.runtime.data import load_imagefolder
from skipvision_export.runtime.pipeline import Bundle
from skipvision_export.runtime.prompt import PromptInputs

IMAGE = 3  # the random model's placeholder
LIMIT = 1e-4
# Tokens before and after the picture, for one to eight prompts.
PROMPTS = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 40)), min_size=1, max_size=8)


def prompts(lengths, total, seed=0):
    """Random text around a picture of `total` tokens, and random pixels."""
    rng = np.random.default_rng(seed)
    made = []
    for before, after in lengths:
        text = rng.integers(4, 280, before + after)
        ids = np.concatenate([text[:before], np.full(total, IMAGE), text[before:]])[None]
        made.append(PromptInputs(ids, rng.standard_normal((1, 3, 96, 96), np.float32)))
    return made


def worst(alone, together):
    """The largest difference of logits between transcripts; infinite where tokens differ."""
    if [t.token_ids for t in alone] != [t.token_ids for t in together]:
        return np.inf
    pairs = zip(alone, together, strict=True)
    return max(np.abs(a - b).max() for x, y in pairs for a, b in zip(x.logits, y.logits, strict=True))


def difference(bundle, inputs, **options):
    """Of a batch from its prompts one by one."""
    options = {"max_new_tokens": 5, "eos": range(4, 100), "keep_logits": True} | options

    def run(*inputs):
        ids, pixels = [one.input_ids for one in inputs], [one.pixel_values for one in inputs]
        return bundle.generator.generate_batch(ids, pixels, **options)

    return worst([run(one)[0] for one in inputs], run(*inputs))


@settings(max_examples=12, deadline=None)
@given(lengths=PROMPTS, room=st.sampled_from([1, 3, 256]), seed=st.integers(0, 99))
def test_a_batch_gives_what_each_gives_alone(form, lengths, room, seed):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kv_cache, "ROOM", room)
        assert difference(form, prompts(lengths, form.manifest.layout.total, seed)) <= LIMIT


@settings(max_examples=6, deadline=None)
@given(lengths=PROMPTS, seed=st.integers(0, 99))
def test_the_graph_of_all_runtimes(form, lengths, seed):
    plain = Bundle.load(form.folder, verify=False, optimize=False)
    assert difference(plain, prompts(lengths, form.manifest.layout.total, seed)) <= LIMIT


@settings(max_examples=6, deadline=None)
@given(lengths=PROMPTS, seed=st.integers(0, 99))
def test_the_patched_model(form, reference, lengths, seed):
    """Which takes batches padded on the left as any Hugging Face model does."""
    inputs = prompts(lengths, form.manifest.layout.total, seed)
    batch = PromptBatch.join([one.input_ids for one in inputs], IMAGE)
    found = form.run_batch(inputs, 4, keep_logits=True)
    with torch.no_grad(), apply_skip_vision(reference.model, form.config):
        out = reference.model.generate(
            input_ids=torch.from_numpy(batch.input_ids),
            attention_mask=torch.from_numpy(batch.mask.astype(np.int64)),
            pixel_values=torch.from_numpy(np.concatenate([one.pixel_values for one in inputs])),
            max_new_tokens=4,
            do_sample=False,
            eos_token_id=list(form.eos),
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
        )
    for row, done in enumerate(found):
        steps = len(done.token_ids)
        assert out.sequences[row, batch.input_ids.shape[1] :][:steps].tolist() == done.token_ids
        expected = [step[row].numpy() for step in out.logits[:steps]]
        assert np.abs(np.array(expected) - np.array(done.logits)).max() <= LIMIT


# -- broken twins -------------------------------------------------------------------------------------

UNEVEN = [(2, 3), (4, 40), (1, 9)]


@pytest.mark.parametrize(
    ("damage", "graph"),
    [(see_the_padding, "decoder_prefill"), (longest_row_s_positions, "decoder_decode.onnxruntime")],
)
def test_broken_graphs_are_caught(bundle, tmp_path, damage, graph):
    inputs = prompts(UNEVEN, bundle.manifest.layout.total)
    assert difference(twin(bundle, tmp_path, damage, graph), inputs, eos=()) > 100 * LIMIT
    assert difference(twin(bundle, tmp_path, leave_as_it_is, graph), inputs, eos=()) <= LIMIT


def test_padding_left_in_the_buffer_is_caught(bundle, monkeypatch):
    inputs = prompts(UNEVEN, bundle.manifest.layout.total)
    cache = bundle.backend.cache
    monkeypatch.setattr(bundle.backend, "cache", lambda out, kept: cache(out))
    assert difference(bundle, inputs, eos=()) > 100 * LIMIT


# -- what prefill is fed, whole answers ---------------------------------------------------------------


def test_rows_with_fewer_pictures_are_filled_up():
    layout = SkipVisionConfig.counts(1, 2).layout(3)
    one, two = np.array([[7, 3, 3, 3, 8]]), np.array([[3, 3, 3, 7, 3, 3, 3, 8]])
    batch = PromptBatch.join([one, two], IMAGE)
    assert batch.input_ids[0].tolist() == [0, 0, 0, 7, 3, 3, 3, 8]
    assert batch.mask.sum(1).tolist() == batch.lengths.tolist() == [5, 8]
    assert batch.positions[0].tolist() == [0, 0, 0, 0, 1, 2, 3, 4]
    found = prefill_indices(batch, IMAGE, layout)
    assert found.ffn_rows[1].tolist() == [3, 4, 7, 8, 11, 12, 15]
    assert found.kv_keep.tolist() == [[0, 3, 4, 7], [0, 3, 4, 7]]
    assert found.kv_mask.tolist() == [[False, True, True, True], [True] * 4]
    assert image_index(batch, IMAGE, layout)[1].tolist() == [1, -1, -1, 0, 2, -2, -2, 0]


def test_a_picture_s_placeholder_may_be_id_0():
    layout = TokenLayout((("retained", 1),))
    batch = PromptBatch.join([np.array([[0, 5]]), np.array([[0, 5, 6]])], 0)
    assert batch.input_ids.tolist() == [[1, 0, 5], [0, 5, 6]]
    assert prefill_indices(batch, 0, layout).kv_mask.tolist() == [[False, True, True], [True] * 3]


@pytest.mark.parametrize("dtype", ["float32", "float16", "int4"])
def test_answers_are_those_of_one_by_one(dtype, example_in, finetuned, tmp_path):
    if dtype == "int4":
        folder = finetuned.write(tmp_path / "b", SkipVisionConfig.preset("quarter"), weights="int4").folder
    else:
        folder = example_in(dtype)
    bundle = Bundle.load(folder, verify=False)
    requests = [(sample.image, sample.question) for sample in load_imagefolder(EXAMPLE / "test", 21)]
    alone = [bundle.generate(*request) for request in requests]
    for found, expected in zip(bundle.generate_batch(requests, max_batch=8), alone, strict=True):
        assert (found.text, found.token_ids) == (expected.text, expected.token_ids)
        assert found.prompt_tokens == expected.prompt_tokens
        assert found.kv_tokens_after_prefill == expected.kv_tokens_after_prefill
    assert len({len(answer.token_ids) for answer in alone}) > 1
    assert bundle.generate_batch([]) == []
    with pytest.raises(InputError, match="max_batch"):
        bundle.generate_batch(requests, max_batch=0)


def test_evaluating_in_batches(example_in):
    bundle = Bundle.load(example_in("float32"), verify=False)
    samples = load_imagefolder(EXAMPLE / "test", 30)
    found = [evaluate(BundleAnswerer(bundle, batch=batch), samples) for batch in (1, 7)]
    assert found[0].answers == found[1].answers
    assert found[0].accuracy > 0.5
