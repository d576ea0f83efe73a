"""Several pictures, none, and several turns, in ONNX Runtime and in the patched PyTorch model."""

import numpy as np
import pytest
import torch
from conftest import EXAMPLE
from damage import count_positions_one_further, leave_as_it_is, twin
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from PIL import Image
from turns import ort_turns

from skipvision_export import Bundle, apply_skip_vision
from skipvision_export.benchmark.accuracy import BundleAnswerer, TorchAnswerer
from skipvision_export.errors import InputError
from skipvision_export.runtime import kv_cache
from skipvision_export.runtime.batch import PromptBatch
from skipvision_export.runtime.data import load_imagefolder

IMAGE = 3  # the random model's placeholder
LIMIT = 1e-4
# Shrinking runs the models hundreds of times; an example as it was found says as much.
settings.register_profile("as found", phases=[Phase.explicit, Phase.reuse, Phase.generate], deadline=None)
AS_FOUND = settings.get_profile("as found")
# Text tokens before each of some pictures, and behind the last one.
PARTS = st.tuples(st.lists(st.integers(0, 5), max_size=2), st.integers(1, 9))
PICTURES = [EXAMPLE / "test" / f"{i:03}.png" for i in range(2)]


def part(befores, behind, total, rng):
    """input_ids [S] and pixel_values [N, 3, 96, 96] of text around pictures."""
    ids = []
    for before in befores:
        ids += [*rng.integers(4, 280, before), *[IMAGE] * total]
    ids += [*rng.integers(4, 280, behind)]
    return np.array(ids), rng.standard_normal((len(befores), 3, 96, 96), np.float32)


def as_torch(pixels):
    return {"pixel_values": torch.from_numpy(pixels)} if len(pixels) else {}


# -- batches whose rows have different numbers of pictures ---------------------------------------------


@settings(AS_FOUND, max_examples=6)
@given(rows=st.lists(PARTS, min_size=1, max_size=8), seed=st.integers(0, 99))
def test_rows_with_several_pictures_or_none(form, reference, rows, seed):
    rng = np.random.default_rng(seed)
    made = [part(*row, form.manifest.layout.total, rng) for row in rows]
    ids, pixels = [own[None] for own, _ in made], [own for _, own in made]
    found = form.generator.generate_batch(ids, pixels, max_new_tokens=3, keep_logits=True)
    batch = PromptBatch.join(ids, IMAGE)
    with torch.no_grad(), apply_skip_vision(reference.model, form.config):
        out = reference.model.generate(
            input_ids=torch.from_numpy(batch.input_ids),
            attention_mask=torch.from_numpy(batch.mask.astype(np.int64)),
            **as_torch(np.concatenate(pixels)),
            max_new_tokens=3,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
        )
    for row, done in enumerate(found):
        want = np.array([step[row].numpy() for step in out.logits])
        assert np.abs(want - np.array(done.logits)).max() <= LIMIT
        assert out.sequences[row, -3:].tolist() == done.token_ids
        kept = form.manifest.layout.total - form.manifest.layout.kept_kv
        assert done.kv_tokens_after_prefill == done.prompt_tokens - len(pixels[row]) * kept


# -- turns -------------------------------------------------------------------------------------------


def torch_turns(reference, config, parts, steps):
    """Logits [turns * steps, vocab] of greedy turns on one cache of the patched model, and its length."""
    found, cache, last = [], None, None
    with torch.no_grad(), apply_skip_vision(reference.model, config):
        for ids, pixels in parts:
            new = torch.from_numpy(ids if last is None else np.concatenate([[last], ids]))[None]
            more = as_torch(pixels)
            for _ in range(steps):
                out = reference.model(input_ids=new, past_key_values=cache, use_cache=True, **more)
                cache, more = out.past_key_values, {}
                found.append(out.logits[0, -1].numpy())
                last = int(found[-1].argmax())
                new = torch.tensor([[last]])
    return np.array(found), cache.get_seq_length()


@settings(AS_FOUND, max_examples=6)
@given(
    turns=st.lists(PARTS, min_size=2, max_size=3),
    steps=st.integers(1, 3),
    room=st.sampled_from([1, 256]),
    seed=st.integers(0, 99),
)
def test_turns_are_those_of_the_patched_model(form, reference, turns, steps, room, seed):
    rng = np.random.default_rng(seed)
    parts = [part(*turn, form.manifest.layout.total, rng) for turn in turns]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kv_cache, "ROOM", room)
        found, cached = ort_turns(form, parts, steps)
    want, expected = torch_turns(reference, form.config, parts, steps)
    assert np.abs(found - want).max() <= LIMIT
    assert cached == expected


def test_the_graph_of_all_runtimes(form, reference):
    plain = Bundle.load(form.folder, verify=False, optimize=False)
    parts = [part([2], 4, form.manifest.layout.total, np.random.default_rng(i)) for i in range(2)]
    found, _ = ort_turns(plain, parts, 2)
    assert np.abs(found - torch_turns(reference, form.config, parts, 2)[0]).max() <= LIMIT


def test_a_broken_graph_is_caught(bundle, reference, tmp_path):
    parts = [part([2], 4, bundle.manifest.layout.total, np.random.default_rng(i)) for i in range(2)]
    want, _ = torch_turns(reference, bundle.config, parts, 2)
    for damage, least, most in (
        (leave_as_it_is, 0, LIMIT),
        (count_positions_one_further, 100 * LIMIT, np.inf),
    ):
        broken = twin(bundle, tmp_path / damage.__name__, damage, "decoder_prefill.append")
        assert least <= np.abs(ort_turns(broken, parts, 2)[0] - want).max() <= most


# -- with words and files ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def example(example_in):
    return Bundle.load(example_in("float32"), verify=False)


def test_a_conversation_feeds_what_is_new(example):
    talk = example.conversation()
    first = talk.ask("which digit is in the bottom right?", PICTURES[0])
    assert first.token_ids == example.generate(PICTURES[0], "which digit is in the bottom right?").token_ids
    second = talk.ask("which digit is in the top left?", PICTURES[1])
    third = talk.ask("what is it?")
    assert talk.fed_again == 0
    assert second.skipped_tokens == first.skipped_tokens > third.skipped_tokens == 0
    assert second.prompt_tokens < first.prompt_tokens + 8
    assert third.prompt_tokens < 24
    with pytest.raises(InputError, match="leave <image> out"):
        talk.ask("<image> what?", PICTURES[0])
    assert talk.ask("what is it?").prompt_tokens < 24


def test_what_is_written_otherwise_is_fed_again(example, monkeypatch):
    talk = example.conversation()
    talk.ask("which digit is in the bottom right?", PICTURES[0])
    monkeypatch.setattr(example, "decode_text", lambda ids: "another answer")
    talk.ask("what is it?")
    assert talk.fed_again == 0  # only the answer differs, and behind the picture
    talk._turns[0]["content"][-1]["text"] = "another question"
    talk.ask("what is it?")
    assert talk.fed_again == 1


@pytest.mark.parametrize("batch", [1, 4])
def test_data_with_several_pictures_or_none(bundle, reference, questions_folder, batch):
    samples = load_imagefolder(questions_folder)
    assert {len(sample.images) for sample in samples} == {0, 1, 2}
    found = list(BundleAnswerer(bundle, 4, batch).answers(samples))
    assert found == list(TorchAnswerer(reference, 4, bundle.config).answers(samples))
    assert len(set(found)) > 1


def test_several_pictures_and_none(example):
    both = example.generate(PICTURES, "which digit is in the bottom right?", 2)
    one = example.generate(PICTURES[0], "which digit is in the bottom right?", 2)
    none = example.generate(None, "which digit is in the bottom right?", 2)
    assert both.skipped_tokens == 2 * one.skipped_tokens and none.skipped_tokens == 0
    for answer in (both, one, none):
        assert answer.kv_tokens_after_prefill == answer.prompt_tokens - answer.skipped_tokens
    assert none.prompt_tokens < one.prompt_tokens < both.prompt_tokens
    placed = example.generate(
        [Image.open(PICTURES[0]), PICTURES[1]], "USER: <image> and <image>? ASSISTANT:", 2
    )
    assert placed.skipped_tokens == both.skipped_tokens
    with pytest.raises(InputError, match="has 1 <image> placeholders, expected 2"):
        example.generate(PICTURES, "USER: <image>? ASSISTANT:")
