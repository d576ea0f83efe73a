"""Turns with pictures of any shape on a pruned cache: positions go on from those of all pictures so far."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from damage import count_positions_one_further, leave_as_it_is, twin
from family_check import LIMIT, drop_deepstack, picture, take_rows_for_columns
from full import FULL
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from turns import ort_turns

from skipvision_export import SkipVisionConfig, apply_skip_vision
from skipvision_export.errors import InputError
from skipvision_export.graph.passes.names import APPEND, GRID
from skipvision_export.runtime.pipeline import Bundle
from skipvision_export.runtime.varying import Patches

IMAGE = 3  # the random models' placeholder
# Of 4 to 70 visual tokens; whole pictures of these are large enough for every configuration here.
SIZES = ((96, 96), (200, 90), (48, 144))
STRICT = SkipVisionConfig(skip_share=0.5, summaries=True, strict=True)
# Without shrinking: an example as it was found says as much.
FEW = settings(
    max_examples=15 if FULL else 5, phases=[Phase.explicit, Phase.reuse, Phase.generate], deadline=None
)
# A turn: the sizes of its pictures, with text tokens before each, and text tokens behind them.
PICTURE = st.tuples(st.integers(1, 4), st.sampled_from(SIZES))
TURN = st.tuples(st.lists(PICTURE, max_size=2), st.integers(1, 6))
TURNS = st.lists(TURN, min_size=2, max_size=3)


@pytest.fixture(scope="module")
def subject(any_shape):
    return any_shape


@pytest.fixture(scope="module")
def bundles(subject, any_shape_dense, tmp_path_factory):
    """Dense, with skip, prune and summaries, and with strict masks too."""
    strict = subject.traced.write(tmp_path_factory.mktemp("strict") / "bundle", STRICT)
    return {"dense": any_shape_dense, "skip": subject.skip, "strict": strict}


@pytest.fixture(scope="module")
def pictures(subject):
    """Patches of a picture of each size."""
    prompt = "<|vision_start|><image><|vision_end|>"
    return {size: subject.reference.prepare(picture(size), prompt).pixel_values for size in SIZES}


def part(bundle, turn, pictures, rng):
    """input_ids [S] with the layouts' placeholders, and the pictures' patches, of one turn."""
    asked, behind = turn
    ids = []
    for before, size in asked:
        total = bundle.generator.varying.layout(pictures[size].grids[0]).total
        ids += [*rng.integers(5, 270, before), *[IMAGE] * total]
    ids += [*rng.integers(5, 270, behind)]
    return np.array(ids), joined([pictures[SIZES[0]][:0], *(pictures[size] for _, size in asked)])


def joined(patches):
    """Pictures of several prompts."""
    return Patches(
        np.concatenate([own.pixel_values for own in patches]), np.concatenate([own.grids for own in patches])
    )


def parts_of(bundle, turns, pictures, seed=0):
    rng = np.random.default_rng(seed)
    return [part(bundle, turn, pictures, rng) for turn in turns]


def best(logits):
    """The next token of [vocab]: greedily, but no placeholder."""
    return 5 + int(logits[5:].argmax())


def forward(model, ids, pictures, **options):
    """One call with ids [S]."""
    ids = torch.from_numpy(np.asarray(ids))[None]
    if len(pictures):
        pixels, grids = (torch.from_numpy(x) for x in (pictures.pixel_values, pictures.grids))
        options |= {"pixel_values": pixels, GRID: grids, "mm_token_type_ids": (ids == IMAGE).int()}
    return model(input_ids=ids, use_cache=True, **options)


@torch.no_grad()
def torch_turns(subject, config, parts, steps):
    """Logits [turns * steps, vocab] of greedy turns on one cache of the patched model, and its length."""
    found, cache, last = [], None, []
    model, none = subject.reference.model, parts[0][1][:0]
    with apply_skip_vision(model, config):
        for ids, pictures in parts:
            new = [*last, *ids]
            for _ in range(steps):
                out = forward(model, new, pictures, past_key_values=cache)
                cache, pictures = out.past_key_values, none
                found.append(out.logits[0, -1].numpy())
                last = new = [best(found[-1])]
    return np.array(found), cache.get_seq_length()


best_turns = partial(ort_turns, choose=best)


# -- what is right ------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["dense", "skip", "strict"])
@settings(FEW)
@given(turns=TURNS, steps=st.integers(1, 3), seed=st.integers(0, 99))
def test_turns_are_those_of_the_patched_model(subject, bundles, pictures, form, turns, steps, seed):
    parts = parts_of(bundles[form], turns, pictures, seed)
    found, cached = best_turns(bundles[form], parts, steps)
    want, expected = torch_turns(subject, bundles[form].config, parts, steps)
    assert np.abs(found - want).max() <= LIMIT
    assert cached == expected


@settings(FEW)
@given(turns=TURNS, seed=st.integers(0, 99))
def test_dense_turns_are_one_prompt_of_the_model_as_it_is(subject, bundles, pictures, turns, seed):
    """Whose positions are its own code's."""
    parts = parts_of(bundles["dense"], turns, pictures, seed)
    found, _ = best_turns(bundles["dense"], parts, 1)
    so_far, given = np.zeros(0, np.int64), []
    for logits, (ids, own) in zip(found, parts, strict=True):
        so_far, given = np.concatenate([so_far, ids]), [*given, own]
        subject.reference.model.model.rope_deltas = None
        with torch.no_grad():
            want = forward(subject.reference.model, so_far, joined(given)).logits[0, -1].numpy()
        assert np.abs(logits - want).max() <= LIMIT
        so_far = np.concatenate([so_far, [best(logits)]])


@settings(FEW)
@given(turns=TURNS, seed=st.integers(0, 99))
def test_strict_turns_are_one_prompt(subject, bundles, pictures, turns, seed):
    """Nothing outside of a picture sees what is skipped of it, so the cache holds all that counts."""
    parts = parts_of(bundles["strict"], turns, pictures, seed)
    found, _ = torch_turns(subject, STRICT, parts, 1)
    so_far, given = np.zeros(0, np.int64), []
    for logits, (ids, own) in zip(found, parts, strict=True):
        so_far, given = np.concatenate([so_far, ids]), [*given, own]
        with torch.no_grad(), apply_skip_vision(subject.reference.model, STRICT):
            want = forward(subject.reference.model, so_far, joined(given)).logits[0, -1].numpy()
        assert np.abs(logits - want).max() <= LIMIT
        so_far = np.concatenate([so_far, [best(logits)]])


# -- what is wrong ------------------------------------------------------------------------------------

TWO = [([(2, SIZES[1])], 3), ([(1, SIZES[0])], 3)]


def test_a_broken_graph_is_caught(subject, pictures, tmp_path):
    parts = parts_of(subject.skip, TWO, pictures)
    want, _ = torch_turns(subject, subject.skip.config, parts, 2)
    damages = [count_positions_one_further, take_rows_for_columns]
    if subject.traced.source.family.deepstack_layers(subject.traced.source.config):
        damages.append(drop_deepstack)
    intact = twin(subject.skip, tmp_path, leave_as_it_is, APPEND)
    assert np.abs(best_turns(intact, parts, 2)[0] - want).max() <= LIMIT
    for damage in damages:
        broken = twin(subject.skip, tmp_path, damage, APPEND)
        assert np.abs(best_turns(broken, parts, 2)[0] - want).max() > 100 * LIMIT, damage.__name__


@pytest.mark.parametrize("counted", ["tokens", "cache", "rows"])
def test_another_next_position_is_caught(subject, pictures, monkeypatch, counted):
    """As of other families, as the cache has it, and as after a picture's first axis."""
    parts = parts_of(subject.skip, TWO, pictures)
    want, _ = torch_turns(subject, subject.skip.config, parts, 2)
    generator, append = subject.skip.generator, subject.skip.generator.append
    tokens = len(parts[0][0]) + 1
    rows, columns = generator.varying.tokens(parts[0][1].grids[0])

    def wrong(prompt, features, before):
        at = {"tokens": tokens, "cache": before.cached, "rows": before.next_position - columns + rows}
        assert at[counted] != before.next_position
        return append(prompt, features, replace(before, next_position=at[counted]))

    monkeypatch.setattr(generator, "append", wrong)
    found, _ = best_turns(subject.skip, parts, 2)
    assert np.abs(found[:2] - want[:2]).max() <= LIMIT
    assert np.abs(found[2:] - want[2:]).max() > 100 * LIMIT


def test_a_cache_of_the_model_as_it_is_is_refused(subject, bundles, pictures):
    """Its length does not tell the next position."""
    (ids, own), (more, other) = parts_of(bundles["dense"], TWO, pictures)
    model = subject.reference.model
    with torch.no_grad():
        cache = forward(model, ids, own).past_key_values
        with (
            apply_skip_vision(model, SkipVisionConfig.dense()),
            pytest.raises(InputError, match="inside of it"),
        ):
            forward(model, more, other, past_key_values=cache)


# -- with words and files -----------------------------------------------------------------------------

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}:{% for c in m['content'] %}{% if c['type'] == 'image' %}"
    "<|vision_start|><image><|vision_end|>{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endfor %}"
    "assistant:"
)


def test_a_conversation_feeds_what_is_new(subject):
    bundle = Bundle.load(subject.skip.folder)
    bundle.processor.chat_template = TEMPLATE
    talk = bundle.conversation()
    first = talk.ask("What?", picture(SIZES[0]), 2)
    second = talk.ask("And this?", picture(SIZES[1]), 2)
    third = talk.ask("Which?", None, 2)
    assert talk.fed_again == 0
    assert first.skipped_tokens > 0 and second.skipped_tokens > 0 and third.skipped_tokens == 0
    assert third.prompt_tokens < 24
    own = bundle.prepare(picture(SIZES[1]), "And this?").input_ids.shape[1]
    assert second.prompt_tokens < own + 12
