"""Turns of a chat through a template: what it refuses or leaves out is said."""

import re

import pytest
from tiny import TEMPLATE, tiny_processor

from skipvision_export.errors import InputError
from skipvision_export.runtime.prompt import turns_text, user_turn

SAID = {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]}


def rendered(turns, images, template=TEMPLATE):
    processor = tiny_processor()
    processor.chat_template = template
    return turns_text(processor, turns, images)


def test_turns_come_in_their_order():
    turns = [user_turn("What?", 1), SAID, user_turn("And these?", 2)]
    expected = "USER: <image>\nWhat?A cat.<image>\n<image>\nAnd these? ASSISTANT:"
    assert rendered(turns, 3) == expected


@pytest.mark.parametrize(
    ("turns", "images", "template", "message"),
    [
        ([SAID], 0, None, "has no chat template"),
        ([SAID], 0, "{{ raise_exception('users first') }}", "template refuses these turns: users first"),
        ([SAID], 0, "{{ messages[0].content + 'x' }}", "template refuses these turns: can only concatenate"),
        ([SAID], 0, "{{ messages[7].role.upper() }}", "template refuses these turns"),
        ([user_turn("What?", 2)], 2, "<image>{{ messages[0].role }}", "makes 1 places of 2 pictures"),
        ([user_turn("Is <image> it?", 0)], 1, TEMPLATE, "leave <image> out"),
    ],
)
def test_what_a_template_does_not_take(turns, images, template, message):
    with pytest.raises(InputError, match=re.escape(message)):
        rendered(turns, images, template)
