"""The chat template in the manifest gives the prompts that Python's own rendering gives."""

import pytest
from tiny import TEMPLATE, tiny_processor

from skipvision_export.bundle import Manifest
from skipvision_export.runtime.chat import chat_info, read_chat
from skipvision_export.runtime.prompt import prompt_text

QUESTIONS = ["What is this?", "  spaces around  ", "two\nlines", "{{ x }} <b> 'q' \"q\"", "日本語 ☃"]


def joined(info, question):
    return info.before + (question.strip() if info.strips else question) + info.after


@pytest.mark.parametrize("strips", [False, True])
def test_pieces_give_the_same_prompts(strips):
    processor = tiny_processor()
    if strips:
        processor.chat_template = TEMPLATE.replace("c['text']", "c['text'] | trim")
    info = chat_info(processor)
    assert info is not None and info.strips == strips
    assert (info.before + info.after).count("<image>") == 1
    for question in QUESTIONS:
        assert joined(info, question) == prompt_text(processor, question)


@pytest.mark.parametrize(
    "change",
    [
        ("c['text']", "c['text'] | upper"),
        ("c['text']", "c['text'] ~ c['text']"),
        ("c['text']", "c['text'] | replace('\"', '')"),
        ("<image>", ""),
        ("c['text']", "raise_exception('no')"),
    ],
)
def test_a_template_that_does_more_is_left_out(change):
    processor = tiny_processor()
    processor.chat_template = TEMPLATE.replace(*change)
    assert chat_info(processor) is None


def test_no_template():
    processor = tiny_processor()
    processor.chat_template = None
    assert chat_info(processor) is None


def test_no_processor(tmp_path):
    assert read_chat(tmp_path) is None


def test_export_writes_it(bundle_folder, tiny_folder):
    assert Manifest.load(bundle_folder).prompt == read_chat(tiny_folder) is not None
