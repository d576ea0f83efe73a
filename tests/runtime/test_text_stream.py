"""Text in pieces, and tokens drawn from logits."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from skipvision_export.runtime.sampling import sampler
from skipvision_export.runtime.text_stream import TextStream


def decode(ids):
    return bytes(ids).decode(errors="replace")


@given(
    text=st.text(alphabet="aé😀 \n.", max_size=30), stops=st.lists(st.text("aé. ", max_size=3), max_size=3)
)
def test_pieces_are_the_whole_text_up_to_a_stop(text, stops):
    stream, pieces = TextStream(decode, stops), []
    for token in text.encode():
        pieces.append(stream.push(token))
        if stream.stopped:
            break
    pieces.append(stream.end())
    # The first stop to be complete ends the text.
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop and stop in text]
    cut = min(at for end, at in ends if end == min(ends)[0]) if ends else len(text)
    assert "".join(pieces) == text[:cut].strip()
    assert stream.stopped == bool(ends)


def test_what_may_become_a_stop_is_held_back():
    stream = TextStream(decode, ["END"])
    assert [stream.push(token) for token in b"aENx"] == ["a", "", "", "ENx"]
    stream = TextStream(decode, ["END"])
    assert "".join(stream.push(token) for token in b"a E") == "a"
    assert stream.end() == " E"


def test_half_a_character_is_held_back():
    stream = TextStream(decode)
    assert [stream.push(token) for token in "é!".encode()] == ["", "é", "!"]


def test_a_decoder_that_takes_back_is_waited_for():
    words = {1: "a", 2: "a .", 3: "a. b"}
    stream = TextStream(lambda ids: words[len(ids)])
    assert [stream.push(0) for _ in range(3)] == ["a", " .", ""]


LOGITS = np.log(np.array([0.1, 0.4, 0.2, 0.3], np.float32))


def shares(choose, n=4000):
    return np.bincount([choose(LOGITS) for _ in range(n)], minlength=4) / n


@pytest.mark.parametrize(
    ("temperature", "top_p", "expected"),
    [
        (1.0, 1.0, [0.1, 0.4, 0.2, 0.3]),
        (1.0, 0.65, [0, 4 / 7, 0, 3 / 7]),
        (1.0, 0.4, [0, 1, 0, 0]),
        (0.5, 1.0, [1 / 30, 16 / 30, 4 / 30, 9 / 30]),
        (0.0, 1.0, [0, 1, 0, 0]),
        (1.0, 1e-9, [0, 1, 0, 0]),
        (1e-6, 1.0, [0, 1, 0, 0]),
    ],
)
def test_tokens_are_drawn_by_their_probabilities(temperature, top_p, expected):
    np.testing.assert_allclose(shares(sampler(temperature, top_p, 0)), expected, atol=0.03)


def test_a_seed_draws_the_same_again():
    first, same, other = (sampler(1.0, 1.0, seed) for seed in (1, 1, 2))
    drawn = [[choose(LOGITS) for _ in range(20)] for choose in (first, same, other)]
    assert drawn[0] == drawn[1] != drawn[2]
