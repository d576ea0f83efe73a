"""Lowering: what each compiler is given computes the same in ONNX Runtime."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from skipvision_export.bundle import Manifest
from skipvision_export.graph.passes.names import DECODE, PREFILL, VISION
from skipvision_export.tensorrt.library import Compiler
from skipvision_export.tensorrt.lowering import NATIVE, lower

OLD = Compiler("tensorrt", (10, 3))
NEW = Compiler("tensorrt", (11, 4))
RTX = Compiler("tensorrt-rtx", (1, 7, 1))
STANDARD = set(NATIVE["tensorrt"])


def graph(folder, name):
    return onnx.load(str(folder / Manifest.load(folder).graphs[name].file), load_external_data=False)


def kinds(model):
    return {node.op_type for node in model.graph.node}


def feeds(manifest, name):
    rng = np.random.default_rng(0)
    dims = {"batch": 1, "sequence": 90, "ffn_tokens": 40, "kept": 30, "num_images": 1}
    dims |= {"past_sequence": 12, "total_sequence": 13} if name == DECODE else {}
    dims |= {"sequence": 1} if name == DECODE else {}
    made = {}
    for tensor in manifest.graphs[name].inputs:
        shape = [n if isinstance(n, int) else dims[n] for n in tensor.shape]
        if tensor.name.endswith("index"):
            made[tensor.name] = np.sort(rng.permutation(90)[: shape[-1]]).reshape(shape)
        elif tensor.name == "position_ids":
            made[tensor.name] = np.arange(shape[1])[None] + (name == DECODE) * 40
        elif tensor.name == "attention_mask":
            made[tensor.name] = np.ones(shape, np.int64)
        else:
            made[tensor.name] = rng.standard_normal(shape).astype(np.float32)
    return made


def run(model, folder, inputs, tmp_path):
    # beside the weights, which it refers to
    file = folder / "onnx" / f"lowered_{tmp_path.name}.onnx"
    onnx.save(model, str(file))
    try:
        return ort.InferenceSession(str(file)).run(None, inputs)
    finally:
        file.unlink()


@pytest.mark.parametrize("name", [VISION, PREFILL, DECODE])
def test_old_compilers_get_the_parts_of_new_operators(bundle_folder, tmp_path, name):
    model = graph(bundle_folder, name)
    assert kinds(model) & STANDARD
    lowered = lower(model, OLD, plugin=False)
    assert not kinds(lowered) & STANDARD
    inputs = feeds(Manifest.load(bundle_folder), name)
    expected = run(model, bundle_folder, inputs, tmp_path)
    actual = run(lowered, bundle_folder, inputs, tmp_path)
    for a, b in zip(expected, actual, strict=True):
        np.testing.assert_allclose(b, a, atol=2e-5, rtol=1e-5)


def test_a_damaged_lowering_would_show(bundle_folder, tmp_path):
    model = graph(bundle_folder, PREFILL)
    lowered = lower(model, OLD, plugin=False)
    softmax = next(node for node in lowered.graph.node if node.op_type == "Softmax")
    softmax.attribute.append(onnx.helper.make_attribute("axis", 1))
    inputs = feeds(Manifest.load(bundle_folder), PREFILL)
    expected = run(model, bundle_folder, inputs, tmp_path)[0]
    assert not np.allclose(run(lowered, bundle_folder, inputs, tmp_path)[0], expected, atol=1e-3)


@pytest.mark.parametrize("compiler", [NEW, RTX], ids=str)
def test_new_compilers_keep_them_and_may_take_attention_apart(bundle_folder, compiler):
    model = graph(bundle_folder, PREFILL)
    lowered = lower(model, compiler, plugin=True)
    assert [n.op_type for n in lowered.graph.node] == [n.op_type for n in model.graph.node]
    for node in lowered.graph.node:
        allowed = {a.name: a.i for a in node.attribute if a.name == "TRT_decomposable"}
        assert allowed == ({"TRT_decomposable": 1} if node.op_type == "Attention" else {})
    # The bundle's own graph stays as ONNX Runtime wants it.
    assert not any(a.name.startswith("TRT") for n in model.graph.node for a in n.attribute)


def test_between_versions(bundle_folder):
    lowered = lower(graph(bundle_folder, PREFILL), Compiler("tensorrt", (10, 14)), plugin=True)
    assert kinds(lowered) & STANDARD == {"Attention"}


def test_kv_prune_as_function_or_plugin(bundle_folder):
    model = graph(bundle_folder, PREFILL)

    def attributes(lowered):
        return {a.name for n in lowered.graph.node if n.op_type == "KVPrune" for a in n.attribute}

    assert attributes(lower(model, NEW, plugin=True)) == {"plugin_namespace", "plugin_version"}
    assert attributes(lower(model, NEW, plugin=False)) == set()
    assert lower(model, NEW, plugin=True).functions
    # An old parser would take the function body.
    assert not lower(model, OLD, plugin=True).functions
    assert lower(model, OLD, plugin=False).functions
