"""`skipvision rewrite` as a user types it: results, a dry run, and one clear line for each mistake."""

import hashlib
import json

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from others import optimum_decoder

from skipvision_export.cli import run
from skipvision_export.graph.external import external_tensors
from skipvision_export.runtime.pipeline import Bundle


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    """optimum-onnx's, its weights in a file beside it."""
    folder = tmp_path_factory.mktemp("optimum")
    file = optimum_decoder(folder / "whole")
    how = {"save_as_external_data": True, "location": "w.bin", "size_threshold": 64}
    onnx.save(onnx.load(file), folder / "model.onnx", **how)
    return folder / "model.onnx"


def rewrite(decoder, out, *more):
    return run(["rewrite", str(decoder), "-o", str(out), *map(str, more)])


def refused(capsys, message, *args):
    assert rewrite(*args) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("skipvision: ")]
    assert len(lines) == 1
    assert message in lines[0]


def hashes(folder):
    files = (file for file in folder.iterdir() if file.is_file())
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def test_a_dry_run_lists_and_writes_nothing(decoder, tmp_path, capsys):
    assert rewrite(decoder, tmp_path / "out.onnx", "--dry-run", "--json", tmp_path / "r.json") == 0
    said = capsys.readouterr().out.splitlines()
    form = "norm of simple operators, 3 MatMul, Sigmoid; residual /model/layers.1/Add_1; ffn_index"
    assert said[1] == f"layer   1  /model/layers.1/mlp: {form}"
    assert said[3].startswith("would write") and "6 keys and values pruned" in said[3]
    assert [file.name for file in tmp_path.iterdir()] == ["r.json"]
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["layers"] == 3 and result["tiers"] == [1, 1, 1] and result["dry_run"]
    assert result["inputs"] == ["ffn_index", "kv_keep_index"]


def test_weights_are_copied_beside_the_output(decoder, tmp_path):
    before = hashes(decoder.parent)
    assert rewrite(decoder, tmp_path / "new" / "out.onnx") == 0
    assert hashes(decoder.parent) == before
    assert sorted(hashes(tmp_path / "new")) == ["out.onnx", "out.onnx_data"]
    proto = onnx.load(tmp_path / "new" / "out.onnx", load_external_data=False)
    assert {e.value for t in external_tensors(proto) for e in t.external_data if e.key == "location"} == {
        "out.onnx_data"
    }
    held, copied = (
        {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(file).graph.initializer}
        for file in (decoder, tmp_path / "new" / "out.onnx")
    )
    assert held.keys() <= copied.keys()
    for name in held:
        np.testing.assert_array_equal(copied[name], held[name])
    onnx.checker.check_model(str(tmp_path / "new" / "out.onnx"), full_check=True)


def test_beside_the_input(decoder, tmp_path):
    """In one folder with it, nothing is mixed up."""
    out = decoder.parent / "skip.onnx"
    before = hashes(decoder.parent)
    assert rewrite(decoder, out) == 0
    after = hashes(decoder.parent)
    assert {name: after[name] for name in before} == before
    for name in after.keys() - before.keys():
        (decoder.parent / name).unlink()


def test_two_graphs_share_the_weights(decoder, tmp_path, capsys):
    assert rewrite(decoder, tmp_path / "out.onnx", "--decode", tmp_path / "decode.onnx") == 0
    assert sorted(hashes(tmp_path)) == ["decode.onnx", "out.onnx", "out.onnx_data"]
    assert (tmp_path / "out.onnx_data").stat().st_size < 1.2 * (decoder.parent / "w.bin").stat().st_size
    onnx.checker.check_model(str(tmp_path / "decode.onnx"), full_check=True)
    wrong = ("--decode", tmp_path / "elsewhere" / "decode.onnx", "--force")
    refused(capsys, "must be another file in the folder of", decoder, tmp_path / "out.onnx", *wrong)
    wrong = ("--decode", tmp_path / "new.onnx", "--force", "--keep-kv")
    refused(capsys, "a decode graph is for pruned keys", decoder, tmp_path / "out.onnx", *wrong)


def test_a_policy_and_whole_keys(decoder, tmp_path):
    policy = tmp_path / "policy.json"
    policy.write_text(json.dumps({"layer_shares": [0.75, 0.0, 0.5], "kv_share": 0.5}))
    given = ("--policy", policy, "--visual-tokens", 64, "--keep-kv", "--json", tmp_path / "r.json")
    assert rewrite(decoder, tmp_path / "out.onnx", *given) == 0
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["tiers"] == [1, 0, 2] and result["skipped"] == {"1": 48, "2": 32}
    assert result["inputs"] == ["ffn_index", "ffn_index.2"] and result["kv_names"] == []


def test_a_failed_rewrite_leaves_nothing(decoder, tmp_path, capsys, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("skipvision_export.graph.external._copy", full)
    refused(capsys, "no space left", decoder, tmp_path / "new" / "out.onnx")
    assert not list(tmp_path.iterdir())


def test_no_decoder(capsys, tmp_path, bundle_folder, dense_folder):
    onnx_folder, out = dense_folder / "onnx", tmp_path / "out.onnx"
    refused(capsys, "is no file; expected an ONNX decoder", tmp_path / "none.onnx", out)
    (tmp_path / "text.onnx").write_text("no graph")
    refused(capsys, "no ONNX file", tmp_path / "text.onnx", out)
    (tmp_path / "empty.onnx").write_bytes(b"")
    refused(capsys, "no ONNX file", tmp_path / "empty.onnx", out)
    refused(capsys, "takes neither inputs_embeds nor input_ids", onnx_folder / "vision_encoder.onnx", out)
    refused(capsys, "no decoder that can be split", onnx_folder / "embed_tokens.onnx", out)
    done = bundle_folder / "onnx" / "decoder_prefill.onnx"
    refused(capsys, "rewritten already: the graph takes ffn_index", done, out)
    assert not out.exists()


def test_our_own_dense_decoder_is_one_too(dense_folder, tmp_path):
    """The decode graph, found without its metadata."""
    proto = onnx.load(dense_folder / "onnx" / "decoder_decode.onnx")
    for i, node in enumerate(proto.graph.node):
        del node.metadata_props[:]
        node.name = f"node_{i}"
    onnx.save(proto, tmp_path / "model.onnx")
    assert rewrite(tmp_path / "model.onnx", tmp_path / "out.onnx", "--json", tmp_path / "r.json") == 0
    result = json.loads((tmp_path / "r.json").read_text())
    assert len(result["ffns"]) == Bundle.load(dense_folder).manifest.model.num_layers


def test_missing_weights(capsys, decoder, tmp_path):
    (tmp_path / "model.onnx").write_bytes(decoder.read_bytes())
    refused(capsys, "w.bin is missing", tmp_path / "model.onnx", tmp_path / "out.onnx")
    data = (decoder.parent / "w.bin").read_bytes()
    (tmp_path / "w.bin").write_bytes(data[: len(data) // 2])
    refused(capsys, "is cut off", tmp_path / "model.onnx", tmp_path / "out.onnx")
    proto = onnx.load(tmp_path / "model.onnx", load_external_data=False)
    for tensor in external_tensors(proto):
        tensor.external_data[0].value = "../w.bin"
    (tmp_path / "model.onnx").write_bytes(proto.SerializeToString())
    refused(capsys, "not beside the graph", tmp_path / "model.onnx", tmp_path / "out.onnx")
    assert not (tmp_path / "out.onnx").exists()


def test_outputs(capsys, decoder, tmp_path):
    refused(capsys, "belongs to the graph that is read", decoder, decoder, "--force")
    (tmp_path / "out.onnx").write_text("mine")
    refused(capsys, "--force to replace", decoder, tmp_path / "out.onnx")
    (tmp_path / "x.onnx_data").write_text("mine")
    refused(capsys, "x.onnx_data exists", decoder, tmp_path / "x.onnx")
    assert rewrite(decoder, tmp_path / "out.onnx", "--force") == 0


def test_policies_that_do_not_fit(capsys, decoder, tmp_path):
    policy, out = tmp_path / "policy.json", tmp_path / "out.onnx"
    policy.write_text(json.dumps({"layer_shares": [0.75, 0.5]}))
    refused(capsys, "2 layers", decoder, out, "--policy", policy)
    policy.write_text(json.dumps({"layer_shares": [0.0, 0.0, 0.0], "kv_share": 0.5}))
    refused(capsys, "nothing to rewrite", decoder, out, "--policy", policy)


# -- graphs that are refused by the name of what they lack --------------------------------------------


def altered(decoder, tmp_path, change=lambda graph: None, opset=None):
    """The decoder after change(GraphProto)."""
    proto = onnx.load(decoder)
    change(proto.graph)
    if opset:
        next(o for o in proto.opset_import if o.domain == "").version = opset
    onnx.save(proto, tmp_path / "altered.onnx")
    return tmp_path / "altered.onnx"


def node(graph, name):
    return next(each for each in graph.node if each.name == name)


def test_old_opsets(capsys, decoder, tmp_path):
    old = altered(decoder, tmp_path, opset=12)
    refused(capsys, "opset 12; Skip-FFN puts in operators of opset 13", old, tmp_path / "o.onnx")
    old = altered(decoder, tmp_path, opset=14)
    refused(capsys, "opset 14; Skip-KV puts in operators of opset 15", old, tmp_path / "o.onnx")
    assert rewrite(old, tmp_path / "o.onnx", "--keep-kv", "--dry-run") == 0


def test_two_candidates(capsys, decoder, tmp_path):
    """A second residual branch with weights in the same layer."""

    def adapter(graph):
        end = node(graph, "/model/layers.1/Add_1")
        old, end.output[0] = end.output[0], "before_adapter"
        weights = np.eye(64, dtype=np.float32)
        graph.initializer.append(onnx.numpy_helper.from_array(weights, "adapter"))
        at = list(graph.node).index(end)
        product = helper.make_node("MatMul", ["before_adapter", "adapter"], ["down"], "adapter")
        graph.node.insert(at + 1, product)
        graph.node.insert(at + 2, helper.make_node("Add", ["before_adapter", "down"], [old], "adapter_add"))

    file = altered(decoder, tmp_path, adapter)
    said = "two candidates for the FFN of layer 1: /model/layers.1/mlp and adapter"
    refused(capsys, said, file, tmp_path / "o.onnx")


def test_a_layer_without(capsys, decoder, tmp_path):
    def by_attention(graph):
        """The MLP reads the mask."""
        read = node(graph, "/model/layers.1/mlp/Mul")
        graph.input.append(helper.make_tensor_value_info("gate", TensorProto.FLOAT, [1]))
        read.input[1] = "gate"

    file = altered(decoder, tmp_path, by_attention)
    refused(capsys, "found 2 FFNs in a decoder of 3 layers: layer 1 has none", file, tmp_path / "o.onnx")


def test_a_mixing_operator_is_named(capsys, decoder, tmp_path):
    def softmax(graph):
        read = node(graph, "/model/layers.1/mlp/act_fn/Sigmoid")
        read.op_type = "Softmax"
        read.attribute.append(helper.make_attribute("axis", 1))

    file = altered(decoder, tmp_path, softmax)
    said = "node /model/layers.1/mlp/act_fn/Sigmoid (Softmax) works along axis 1"
    refused(capsys, said, file, tmp_path / "o.onnx")


def test_a_cache_that_cannot_be_pruned(capsys, decoder, tmp_path):
    def counted(graph):
        """Positions follow from the number of cached tokens."""
        for each in graph.node:
            for i, name in enumerate(each.input):
                if name == "position_ids":
                    each.input[i] = "counted"
        shape = helper.make_node("Shape", ["attention_mask"], ["size"], "size")
        graph.node.insert(0, shape)
        graph.node.insert(1, helper.make_node("Unsqueeze", ["size", "axis"], ["counted"], "counted"))
        graph.initializer.append(onnx.numpy_helper.from_array(np.array([0]), "axis"))

    file = altered(decoder, tmp_path, counted)
    refused(capsys, "rotates by positions that are not position_ids", file, tmp_path / "o.onnx")
    assert rewrite(file, tmp_path / "o.onnx", "--keep-kv") == 0


def test_two_keys_of_one_layer(capsys, decoder, tmp_path):
    """As of an encoder and a decoder."""

    def cross(graph):
        graph.node.append(helper.make_node("Identity", ["present.0.key"], ["present.0.encoder.key"]))
        graph.output.append(helper.make_tensor_value_info("present.0.encoder.key", TensorProto.FLOAT, None))

    said = "present.0.key and present.0.encoder.key are both the key of a layer"
    refused(capsys, said, altered(decoder, tmp_path, cross), tmp_path / "o.onnx")


def test_a_cache_by_other_names(capsys, decoder, tmp_path):
    def renamed(graph):
        for value in graph.output:
            old, value.name = value.name, value.name.replace("present", "cache")
            for each in graph.node:
                each.output[:] = [value.name if name == old else name for name in each.output]
                each.input[:] = [value.name if name == old else name for name in each.input]

    file = altered(decoder, tmp_path, renamed)
    said = "cache.0.key may be keys or values, but is not named present.N.key"
    refused(capsys, said, file, tmp_path / "o.onnx")
    assert rewrite(file, tmp_path / "o.onnx", "--keep-kv", "--dry-run") == 0


def test_help_teaches(capsys):
    assert run(["rewrite", "--help"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "Example: skipvision rewrite" in said
    assert "past_present_share_buffer" in said
    assert "in decode give every row and every position" in said
