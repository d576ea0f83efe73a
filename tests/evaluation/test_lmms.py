"""The model class for lmms-eval, by lmms-eval itself: a task's answers and scores are the bundle's."""

import pytest
from conftest import EXAMPLE
from PIL import Image

from skipvision_export import Bundle
from skipvision_export.errors import ConfigError, InputError
from skipvision_export.runtime.data import load_imagefolder

pytest.importorskip("lmms_eval", reason="needs the package lmms-eval, which needs torchvision and more")

from lmms_eval.api.instance import Instance, unwrap_generation_output
from lmms_eval.models import MODEL_REGISTRY_V2, get_model

from skipvision_export.evaluation import lmms_manifest

TASK, SPLIT = "pictures", "test"
SAMPLES = load_imagefolder(EXAMPLE / "test", 8)


def messages_of(doc):
    """As a task's doc_to_messages makes them."""
    content = [{"type": "image", "url": Image.open(doc.image)}, {"type": "text", "text": doc.question}]
    return [{"role": "user", "content": content}]


def requests(options, docs=SAMPLES, make=messages_of):
    return [
        Instance(
            "generate_until",
            (doc.question, make, options, i, TASK, SPLIT),
            0,
            {"task": TASK, "doc_id": i, "repeats": 1},
        )
        for i, doc in enumerate(docs)
    ]


@pytest.fixture(scope="module")
def folder(example_in):
    return example_in("float32")


@pytest.fixture(scope="module")
def model(folder):
    MODEL_REGISTRY_V2.register_manifest(lmms_manifest(), overwrite=True)
    made = get_model("skipvision").create_from_arg_string(
        f"bundle={folder}", {"batch_size": 1, "device": None}
    )
    made.task_dict = {TASK: {SPLIT: SAMPLES}}
    return made


def test_answers_are_the_bundle_s(model, folder):
    options = {"max_new_tokens": 16, "temperature": 0, "top_p": None, "num_beams": 1, "do_sample": False}
    results = model.generate_until(requests(options))
    bundle = Bundle.load(folder)
    expected = [bundle.generate(doc.image, doc.question, 16) for doc in SAMPLES]
    found = [unwrap_generation_output(result) for result in results]
    assert [text for text, _ in found] == [answer.text for answer in expected]
    assert [counts.to_dict() for _, counts in found] == [
        {"input_tokens": answer.prompt_tokens, "output_tokens": len(answer.token_ids)} for answer in expected
    ]
    right = sum(text == doc.answer for (text, _), doc in zip(found, SAMPLES, strict=True))
    assert right >= len(SAMPLES) / 2


def test_a_stop_string_ends_an_answer(model):
    (whole,) = model.generate_until(requests({"max_new_tokens": 16}, SAMPLES[:1]))
    until = whole.text[1:3]
    for given in (until, ["\n\n", until]):
        (cut,) = model.generate_until(requests({"max_new_tokens": 16, "until": given}, SAMPLES[:1]))
        assert cut.text == whole.text[: whole.text.find(until)]


def test_what_it_cannot_do_is_said(model, folder):
    def with_video(doc):
        return [{"role": "user", "content": [{"type": "video", "url": "a.mp4"}]}]

    with pytest.raises(InputError, match="a message holds video"):
        model.generate_until(requests({}, SAMPLES[:1], with_video))
    with pytest.raises(ConfigError, match="wants 4 beams"):
        model.generate_until(requests({"num_beams": 4}, SAMPLES[:1]))
    with pytest.raises(NotImplementedError, match="generate_until"):
        model.loglikelihood([])
    with pytest.raises(ConfigError, match="batch_size is 4"):
        type(model)(str(folder), batch_size=4)
