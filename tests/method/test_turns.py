"""Further turns of a conversation on a pruned cache, in the patched PyTorch model.

With strict masks nothing outside of a picture ever sees its skipped tokens, so what a turn gives on the
pruned cache is exactly what one prefill of the whole conversation gives.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_model

from skipvision_export import SkipVisionConfig, apply_skip_vision

IMAGE, TOTAL = 3, 42
STRICT = SkipVisionConfig.counts(16, 24, selector="dart", summaries=True, strict=True)
LOOSE = SkipVisionConfig.counts(16, 24, selector="dart", summaries=True)
# A turn: text tokens before and behind its pictures, and how many there are.
TURNS = st.lists(st.tuples(st.integers(1, 6), st.integers(0, 2), st.integers(1, 9)), min_size=2, max_size=4)


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def conversation(turns, seed):
    """input_ids [1, S] and pixel_values [N, 3, 96, 96], or None, of each turn."""
    rng = torch.Generator().manual_seed(seed)
    made = []
    for before, pictures, behind in turns:
        text = torch.randint(4, 280, (before + behind,), generator=rng)
        ids = torch.cat([text[:before], torch.full((pictures * TOTAL,), IMAGE), text[before:]])[None]
        made.append((ids, torch.randn(pictures, 3, 96, 96, generator=rng) if pictures else None))
    return made


@torch.no_grad()
def turn_by_turn(model, turns):
    """Logits [vocab] of the last position of each turn, on one cache; and its length after each."""
    cache, found, lengths = None, [], []
    for ids, pixels in turns:
        out = model(input_ids=ids, pixel_values=pixels, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        found.append(out.logits[0, -1])
        lengths.append(cache.get_seq_length())
    return found, lengths


@torch.no_grad()
def at_once(model, turns):
    """The same of one prefill up to each turn's end."""
    found = []
    for n in range(1, len(turns) + 1):
        pixels = [own for _, own in turns[:n] if own is not None]
        ids = torch.cat([ids for ids, _ in turns[:n]], 1)
        found.append(model(input_ids=ids, pixel_values=torch.cat(pixels) if pixels else None).logits[0, -1])
    return found


def worst(a, b):
    return max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True))


@settings(max_examples=15, deadline=None)
@given(turns=TURNS, seed=st.integers(0, 99))
def test_turns_on_a_pruned_cache_are_one_conversation(model, turns, seed):
    turns = conversation(turns, seed)
    with apply_skip_vision(model, STRICT):
        found, lengths = turn_by_turn(model, turns)
    with apply_skip_vision(model, STRICT):
        assert worst(found, at_once(model, turns)) < 1e-4
    kept = [ids.shape[1] - 24 * int((ids == IMAGE).sum()) // TOTAL for ids, _ in turns]
    assert lengths == [sum(kept[: n + 1]) for n in range(len(kept))]


def test_without_strict_masks_it_is_not(model):
    """The twin: text of the same turn sees the skipped tokens, text of a later one no longer."""
    turns = conversation([(2, 1, 4), (2, 1, 3)], 0)
    with apply_skip_vision(model, LOOSE):
        found, _ = turn_by_turn(model, turns)
    with apply_skip_vision(model, LOOSE):
        whole = at_once(model, turns)
    assert worst(found[:1], whole[:1]) < 1e-4
    assert worst(found[1:], whole[1:]) > 1e-2


def test_what_is_generated_between_turns_counts(model):
    """Tokens that were decoded one by one stand between the turns, at their own positions."""
    first, second, third = conversation([(2, 1, 4), (1, 0, 3), (2, 1, 3)], 1)
    with apply_skip_vision(model, STRICT), torch.no_grad():
        cache = model(input_ids=first[0], pixel_values=first[1], use_cache=True).past_key_values
        for i in range(second[0].shape[1]):
            model(input_ids=second[0][:, i : i + 1], past_key_values=cache, use_cache=True)
        found = model(input_ids=third[0], pixel_values=third[1], past_key_values=cache).logits[0, -1]
    with apply_skip_vision(model, STRICT):
        assert worst([found], at_once(model, [first, second, third])[2:]) < 1e-4
