"""`validate` names the layer at fault."""

import json

import onnx_ir as ir
import pytest
from damage import twin

from skipvision_export.cli import run
from skipvision_export.graph.passes.regions import module_path


def break_a_norm(graph):
    """The second layer's FFN norm adds ten thousand times its epsilon."""
    path = "decoder.layers.1.post_attention_layernorm"
    node = next(n for n in graph if module_path(n) == path and n.op_type == "RMSNormalization")
    right = node.attributes["epsilon"].as_float()
    node.attributes["epsilon"] = ir.AttrFloat32("epsilon", 1e4 * right)


def validate(bundle, model, tmp_path):
    report = tmp_path / "report.json"
    options = ["--model", str(model), "--samples", "1", "--max-new-tokens", "2", "--json", str(report)]
    return run(["validate", str(bundle), *options]), json.loads(report.read_text())


def test_a_sound_bundle_has_nobody_to_blame(bundle_folder, tiny_folder, tmp_path, capsys):
    code, report = validate(bundle_folder, tiny_folder, tmp_path)
    assert (code, report["passed"], report["blame"]) == (0, True, None)
    assert {"key", "value", "attention", "ffn"} <= report["layers"][1].keys()
    assert "no tensor of any layer is over its limit" in capsys.readouterr().out


def test_the_broken_module_is_named(bundle, tiny_folder, tmp_path, capsys, monkeypatch):
    # The file is changed behind the hashes' back, as a fault of an exporter would be.
    monkeypatch.setattr("skipvision_export.bundle.Manifest.verify", lambda self, folder: None)
    broken = twin(bundle, tmp_path, break_a_norm)
    code, report = validate(broken.folder, tiny_folder, tmp_path)
    assert (code, report["passed"]) == (1, False)
    blame = report["blame"]
    assert (blame["graph"], blame["tensor"], blame["kind"]) == ("decoder_prefill", "layers.1.ffn", "break")
    assert blame["module"] == "decoder.layers.1.post_attention_layernorm"
    assert blame["nodes"] and blame["nodes"][0].startswith("RMSNormalization")
    assert "layers.1.ffn of decoder_prefill breaks" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "says"), [(None, "does not exist"), (b"no graph", "no readable ONNX file")]
)
def test_what_is_no_decoder_is_refused(content, says, tiny_folder, tmp_path, capsys):
    file = tmp_path / "decoder.onnx"
    if content is not None:
        file.write_bytes(content)
    assert run(["validate", str(file), "--model", str(tiny_folder)]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert says in error
