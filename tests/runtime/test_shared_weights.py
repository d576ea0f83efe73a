"""Two sessions, one copy of the weights: peak memory of real processes."""

import json
import subprocess
import sys

import numpy as np
import pytest
from tiny import tiny_config, tiny_model, tiny_processor

from skipvision_export import SkipVisionConfig, export
from skipvision_export.runtime.pipeline import Bundle

# Prefill alone, or the whole loop; with or without sharing, or with referenced weights that are turned once.
CHILD = """
import json, sys
import numpy as np
from skipvision_export.benchmark.memory import own_peak_mb
from skipvision_export.runtime.pipeline import Bundle

folder, steps, how = sys.argv[1], int(sys.argv[2]), sys.argv[3]
bundle = Bundle.load(folder, verify=False, threads=1, share_weights=how != "apart")
if how == "folded":
    bundle.backend._keep_turns = False
ids = np.full((1, 8), 5, np.int64)
if steps:
    features = np.zeros((0, 64, 1024), np.float32)
    done = bundle.generator.generate(ids, None, features=features, max_new_tokens=steps)
else:
    bundle.generator.prefill(ids, None)
print(json.dumps(own_peak_mb()))
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A dense bundle of 270 MB, nearly all of it in the decoder."""
    folder = tmp_path_factory.mktemp("large")
    config = tiny_config(hidden_size=1024, intermediate_size=2816, num_hidden_layers=6)
    tiny_model(config).save_pretrained(folder / "model")
    tiny_processor().save_pretrained(folder / "model")
    return export(folder / "model", folder / "bundle", SkipVisionConfig.dense()).folder


@pytest.fixture(scope="module")
def referenced(large):
    """The same model's, with its weights where they lie."""
    out = large.parent / "referenced"
    return export(large.parent / "model", out, SkipVisionConfig.dense(), reference_weights=True).folder


def peak(folder, steps, how):
    command = [sys.executable, "-c", CHILD, str(folder), str(steps), how]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def test_generating_takes_one_copy(large):
    one = peak(large, 0, "share")
    data = (large / "onnx" / "decoder.onnx_data").stat().st_size / (1 << 20)
    assert data > 250 and one > data
    assert peak(large, 3, "share") <= 1.15 * one
    # The twin: without sharing the second copy shows, and so the limit can fail.
    assert peak(large, 3, "apart") > 1.15 * peak(large, 0, "apart")


def test_referenced_weights_are_not_turned_in_memory(large, referenced):
    assert peak(referenced, 3, "share") <= 1.05 * peak(large, 3, "share")
    # The twin: constant folding makes turned copies.
    assert peak(referenced, 3, "folded") > 1.5 * peak(referenced, 3, "share")


def test_sharing_changes_no_number(bundle_folder):
    ids = np.array([[1, 40, 50, 60]], np.int64)
    outputs = []
    for share in (True, False):
        generator = Bundle.load(bundle_folder, share_weights=share).generator
        backend, prefill = generator.backend, generator.prefill(ids, None)
        step = generator.decode(7, 4, backend.cache(prefill))
        outputs.append([backend.numpy(logits).copy() for logits in (prefill["logits"], step)])
    for shared, apart in zip(*outputs, strict=True):
        assert np.abs(shared - apart).max() <= 1e-5 * np.abs(apart).max()
