"""Training reads the ids that inference makes."""

import json

import numpy as np
import pytest
from conftest import EXAMPLE
from tiny import tiny_processor

from skipvision_export.models.loading import load_processor, resolve_model
from skipvision_export.runtime.data import Sample, load_imagefolder
from skipvision_export.runtime.torch_reference import TorchReference
from skipvision_export.training.collate import IGNORED, Collator
from skipvision_export.training.encoding import Encoder


@pytest.fixture(scope="module")
def checkpoint():
    return TorchReference(resolve_model(EXAMPLE / "checkpoint"))


def test_ids_are_those_of_inference(checkpoint):
    """Prompt and generated tokens of the trained model, which answers most questions right."""
    samples = load_imagefolder(EXAMPLE / "test", 12)
    encoder = Encoder(checkpoint.processor, checkpoint.eos, 64, 512)
    encoded, broken = encoder.encode(samples)
    assert not broken
    batch = Collator(checkpoint.processor, 2, 0, 64)(encoded)
    right = at = 0
    for i, sample in enumerate(samples):
        inputs = checkpoint.prepare(sample.image, sample.question)
        answer = checkpoint.run(inputs, 24)[0].token_ids
        ids = batch["input_ids"][i][batch["attention_mask"][i].bool()].tolist()
        prompt = inputs.input_ids[0].tolist()
        assert ids[: len(prompt)] == prompt
        labels = batch["labels"][i]
        assert labels[labels != IGNORED].tolist() == ids[len(prompt) :]
        if checkpoint.decode_text(answer) == sample.answer:
            right += 1
            assert ids[len(prompt) :] == answer
        at += len(sample.images)
        np.testing.assert_array_equal(batch["pixel_values"][at - 1], inputs.pixel_values[0])
    assert right >= 10


def test_a_template_without_a_turn_for_the_assistant():
    processor = tiny_processor()
    (one,), _ = Encoder(processor, (2,), 64, 512).encode([Sample((), "What?", "a dog")])
    assert processor.tokenizer.decode(one.ids[one.answer_from :]) == " a dog</s>"


def test_a_template_that_goes_on_behind_the_answer(checkpoint):
    """ChatML writes the end token and a line break."""
    processor = load_processor(EXAMPLE / "checkpoint")
    processor.chat_template = checkpoint.processor.chat_template.replace("'<|eos|>'", "'<|eos|>\n'")
    ids = [
        Encoder(p, (1,), 64, 512).encode([Sample((), "what?", "it is red")])[0][0].ids
        for p in (processor, checkpoint.processor)
    ]
    assert ids[0] == ids[1] and ids[0].count(1) == 1


def test_rows_that_do_not_fit():
    encoder = Encoder(tiny_processor(), (2,), 64, 100)
    samples = [
        Sample((), "Why?", "a" * 101, line=1),
        Sample(("a.png", "b.png"), "Why?", "a", line=2),
        Sample(("a.png",), "Why <image>?", "a", line=3),
        Sample(("a.png",), "Why?", "a", line=4),
    ]
    encoded, broken = encoder.encode(samples)
    assert len(encoded) == 1
    assert [row.line for row in broken] == [1, 2, 3]
    assert "longer than the model's context of 100" in broken[0].reason
    assert "<image>" in broken[2].reason


def test_thousands_of_questions_stream(questions_folder):
    """Encoding, decoding and batching on one core must not be what training waits for."""
    import time

    rows = load_imagefolder(questions_folder) * 400
    start = time.perf_counter()
    encoder = Encoder(tiny_processor(), (2,), 27, 512)
    encoded, _ = encoder.encode(rows)
    collate = Collator(encoder.processor, 3, 0, 27)
    for i in range(0, len(encoded), 32):
        collate(encoded[i : i + 32])
    seconds = time.perf_counter() - start
    print(json.dumps({"samples": len(encoded), "seconds": round(seconds, 2)}))
    assert len(encoded) / seconds > 200
