"""The model class for lmms-eval, by lmms-eval itself: a task's answers and scores are the bundle's."""

import json
import os
import subprocess
import sys

import pytest
from conftest import EXAMPLE
from PIL import Image

from skipvision_export import Bundle
from skipvision_export.benchmark.accuracy import BundleAnswerer, evaluate
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


TASK_FILE = """
task: skipvision_pictures
dataset_path: imagefolder
dataset_kwargs: {{data_dir: {data}}}
test_split: train
output_type: generate_until
doc_to_visual: !function pictures.visual
doc_to_text: !function pictures.text
doc_to_target: answer
process_results: !function pictures.score
generation_kwargs: {{max_new_tokens: 16, temperature: 0, do_sample: false}}
metric_list: [{{metric: exact, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 0.0}}
"""
TASK_CODE = """
def visual(doc): return [doc["image"].convert("RGB")]
def text(doc, lmms_eval_specific_kwargs=None): return doc["question"]
def score(doc, results): return {"exact": float(results[0] == doc["answer"])}
"""
PROGRAM = """
import json, sys
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.models import MODEL_REGISTRY_V2
from lmms_eval.tasks import TaskManager
from skipvision_export.evaluation import lmms_manifest
MODEL_REGISTRY_V2.register_manifest(lmms_manifest(), overwrite=True)
folder, tasks = sys.argv[1:]
found = simple_evaluate(
    model="skipvision", model_args=f"bundle={folder}", tasks=["skipvision_pictures"], limit=20, batch_size=1,
    task_manager=TaskManager(include_path=tasks, include_defaults=False),
    bootstrap_iters=0, log_samples=False,
)
print(json.dumps(found["results"]["skipvision_pictures"]))
"""


def test_a_task_s_score_is_that_of_evaluate(folder, tmp_path):
    """The whole of lmms-eval on a task of ours, in a process of its own: it sets up logging and caches."""
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "pictures.yaml").write_text(TASK_FILE.format(data=EXAMPLE / "test"))
    (tasks / "pictures.py").write_text(TASK_CODE)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, folder, tasks],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    score = json.loads(done.stdout.splitlines()[-1])["exact,none"]
    samples = load_imagefolder(EXAMPLE / "test", 20)
    expected = evaluate(BundleAnswerer(Bundle.load(folder), 16), samples)
    assert score == pytest.approx(expected.accuracy)
    assert score > 0.5
