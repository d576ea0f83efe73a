"""What export writes, and how reading it fails."""

import json
import re
import resource
import shutil
import signal

import onnx
import pytest

from skipvision_export import Bundle, SkipVisionConfig
from skipvision_export.bundle import MANIFEST, atomic_folder
from skipvision_export.errors import BundleError, OutputError
from skipvision_export.graph.passes.names import DECODE, EMBED, PREFILL, VISION

CONFIG = SkipVisionConfig.preset("skip-75")


@pytest.fixture
def copy(bundle_folder, tmp_path):
    return shutil.copytree(bundle_folder, tmp_path / "copy")


def test_manifest_says_what_is_there(bundle_folder):
    manifest = Bundle.load(bundle_folder).manifest
    assert manifest.preset == "skip-75"
    assert manifest.roles.layout == [("retained", 16), ("skipped", 48)]
    assert set(manifest.graphs) == {VISION, EMBED, PREFILL, DECODE}
    names = [tensor.name for tensor in manifest.graphs[PREFILL].inputs]
    assert names == ["inputs_embeds", "attention_mask", "position_ids", "ffn_index", "kv_keep_index"]
    files = {p.relative_to(bundle_folder).as_posix() for p in bundle_folder.rglob("*") if p.is_file()}
    assert files == set(manifest.files) | {MANIFEST}
    assert {"config.json", "generation_config.json", "tokenizer.json"} <= files
    assert SkipVisionConfig.from_json(manifest.config) == CONFIG


def test_no_local_path_and_no_tracer_symbol(bundle_folder):
    for file in bundle_folder.rglob("*"):
        if file.is_file():
            data = file.read_bytes()
            assert not re.search(rb"/(root|tmp|work|home|usr)/", data), file
            assert b"site-packages" not in data, file
    for file in (bundle_folder / "onnx").glob("*.onnx"):
        model = onnx.load(file, load_external_data=False)
        dims = {
            dim.dim_param
            for value in (*model.graph.input, *model.graph.output, *model.graph.value_info)
            for dim in value.type.tensor_type.shape.dim
        }
        assert not [dim for dim in dims if re.fullmatch(r".*\b[su]\d+\b.*", dim)], file
        assert {o.domain: o.version for o in model.opset_import}[""] == 23


def test_dimensions_are_tied_by_name(bundle_folder):
    model = onnx.load(bundle_folder / "onnx" / f"{PREFILL}.onnx", load_external_data=False)
    dims = {
        v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim]
        for v in (*model.graph.input, *model.graph.output)
    }
    assert dims["inputs_embeds"] == ["batch", "sequence", 64]
    assert dims["ffn_index"] == ["ffn_tokens"]
    assert dims["kv_keep_index"] == ["batch", "kept"]
    assert dims["present.2.value"] == ["batch", 2, "kept", 16]
    assert dims["logits"] == ["batch", 1, 280]


def test_decoder_weights_stand_once(bundle_folder, traced):
    data = (bundle_folder / "onnx" / "decoder.onnx_data").stat().st_size
    decoder = [*traced.model.model.language_model.layers.parameters(), *traced.model.lm_head.parameters()]
    assert data < 1.05 * sum(p.numel() * 4 for p in decoder)
    for graph in (PREFILL, DECODE):
        model = onnx.load(bundle_folder / "onnx" / f"{graph}.onnx", load_external_data=False)
        places = {e.value for t in model.graph.initializer for e in t.external_data if e.key == "location"}
        assert places == {"decoder.onnx_data"}


def test_every_layer_is_rewritten(bundle_folder):
    model = onnx.load(bundle_folder / "onnx" / f"{PREFILL}.onnx", load_external_data=False)
    kinds = [node.op_type for node in model.graph.node]
    # of the last layer one row is left, which is not scattered but chosen
    assert kinds.count("KVPrune") == kinds.count("ScatterND") + kinds.count("Where") == 3
    assert "Expand" not in [
        n.op_type for n in model.graph.node if any(o.endswith("_unsafe_view") for o in n.output)
    ]
    assert len({node.name for node in model.graph.node}) == len(kinds)


@pytest.mark.parametrize("name", ["onnx/decoder.onnx_data", "onnx/decoder_decode.onnx", "tokenizer.json"])
@pytest.mark.parametrize("damage", ["missing", "truncated", "altered"])
def test_damage_is_named(copy, name, damage):
    file = copy / name
    data = file.read_bytes()
    if damage == "missing":
        file.unlink()
    elif damage == "truncated":
        file.write_bytes(data[: len(data) // 2])
    else:
        file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(BundleError, match=f"{re.escape(name)} is {damage}"):
        Bundle.load(copy)


def test_a_truncated_manifest(copy):
    file = copy / MANIFEST
    file.write_text(file.read_text()[:100])
    with pytest.raises(BundleError, match="truncated"):
        Bundle.load(copy)


def test_an_altered_manifest(copy):
    data = json.loads((copy / MANIFEST).read_text())
    (copy / MANIFEST).write_text(json.dumps(data | {"roles": 3}))
    with pytest.raises(BundleError, match="altered: roles"):
        Bundle.load(copy)
    (copy / MANIFEST).write_text(json.dumps(data | {"schema_version": 99}))
    with pytest.raises(BundleError, match="schema version 99"):
        Bundle.load(copy)


def test_no_bundle(tmp_path):
    with pytest.raises(BundleError, match="no bundle"):
        Bundle.load(tmp_path)
    with pytest.raises(BundleError, match="not a folder"):
        Bundle.load(tmp_path / "nowhere")


def test_an_existing_folder_needs_force(traced, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("mine")
    with pytest.raises(OutputError, match="--force"):
        traced.write(tmp_path / "out", CONFIG)
    assert (tmp_path / "out" / "precious").read_text() == "mine"
    traced.write(tmp_path / "out", CONFIG, force=True)
    assert not (tmp_path / "out" / "precious").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_full_disk_leaves_nothing(traced, tmp_path):
    # A limit on file size fails writes in the middle, as a full disk does.
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "precious").write_text("mine")
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, before[1]))
        for name in ("new", "old"):
            with pytest.raises(OutputError, match="no space left"):
                traced.write(tmp_path / name, CONFIG, force=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert [p.name for p in tmp_path.rglob("*")] == ["old", "precious"]


def test_an_unwritable_place(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="not a folder"), atomic_folder(tmp_path / "file" / "out"):
        pass
    with pytest.raises(OutputError, match="not a folder"), atomic_folder(tmp_path / "file"):
        pass


def test_an_interrupted_block_leaves_nothing(tmp_path):
    def interrupted():
        with atomic_folder(tmp_path / "a" / "b") as folder:
            (folder / "half").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not list(tmp_path.iterdir())
