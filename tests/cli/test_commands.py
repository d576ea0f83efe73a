"""Commands as a user types them: results, exit codes, and one clear line for each mistake."""

import json
import shutil

import numpy as np
import onnx
import pytest
from conftest import EXAMPLE
from PIL import Image
from safetensors.numpy import load_file, save_file

from skipvision_export.benchmark.floor import decoder_dims
from skipvision_export.benchmark.flops import count_flops
from skipvision_export.cli import run
from skipvision_export.graph.passes.names import PREFILL
from skipvision_export.runtime.pipeline import Bundle


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    file = tmp_path_factory.mktemp("picture") / "picture.png"
    blocks = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(blocks).resize((96, 96)).save(file)
    return file


@pytest.fixture(scope="module")
def questions(tmp_path_factory, picture):
    folder = tmp_path_factory.mktemp("data")
    shutil.copy(picture, folder / "a.png")
    rows = [{"file_name": "a.png", "question": "What?", "answer": "x", "type": t} for t in "ab"]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def ok(tmp_path, *args):
    out = tmp_path / "result.json"
    assert run([*map(str, args), "--json", str(out)]) == 0
    return json.loads(out.read_text())


def test_inspect_agrees_with_the_graph(tiny_folder, bundle_folder, dense_folder, tmp_path):
    result = ok(tmp_path, "inspect", tiny_folder, "--text-tokens", 20)
    assert (result["family"], result["num_layers"], result["visual_tokens"]) == ("llava", 3, 64)
    for folder, row in ((bundle_folder, result["presets"]["skip-75"]), (dense_folder, result["dense"])):
        kept = 20 + row["retained"]
        graph = onnx.load(folder / "onnx" / f"{PREFILL}.onnx", load_external_data=False)
        sizes = {"batch": 1, "sequence": 20 + 64, "ffn_tokens": kept, "kept": kept}
        assert row["prefill_flops"] == pytest.approx(count_flops(graph, sizes), rel=0.02)
        assert row["kv_bytes"] == 2 * 3 * 2 * 16 * kept * 4
    # and a graph of other sizes is not within two percent
    assert result["dense"]["prefill_flops"] > 1.1 * result["presets"]["skip-75"]["prefill_flops"]
    assert "llava-100-156" in result["unsupported"]


def test_export_and_generate(tiny_folder, bundle_folder, picture, tmp_path):
    more = ("--image", picture, "--image", picture)
    assert ok(tmp_path, "generate", bundle_folder, *more, "--prompt", "What?")["skipped_tokens"] == 2 * 48
    assert ok(tmp_path, "generate", bundle_folder, "--prompt", "What?")["skipped_tokens"] == 0
    result = ok(tmp_path, "generate", bundle_folder, "--image", picture, "--prompt", "What?")
    assert result["kv_tokens_after_prefill"] == result["prompt_tokens"] - 48
    dry = ok(tmp_path, "export", tiny_folder, "-o", tmp_path / "x", "--preset", "skip-50", "--dry-run")
    assert (dry["retained"], dry["skipped"]) == (32, 32)
    assert not (tmp_path / "x").exists()


def test_export_takes_what_changes_a_preset(tiny_folder, tmp_path):
    export = ("export", tiny_folder, "-o", tmp_path / "x", "--dry-run")
    plain = ok(tmp_path, *export, "--preset", "quarter")
    assert plain["layout"] == [["retained", 11], ["summary", 1], ["skipped", 10], ["summary", 1]]
    bare = ok(
        tmp_path, *export, "--preset", "quarter", "--no-summaries", "--pass-through", "last", "--strict"
    )
    assert bare["layout"] == [["retained", 11], ["skipped", 9], ["ffn_only", 1]]
    assert bare["preset"] == "quarter-strict-no-summaries-pass-last"
    counts = ok(tmp_path, *export, "--retained", 11, "--skipped", 10, "--summaries", "--selector", "dart")
    assert counts["layout"] == plain["layout"]
    assert counts["preset"] == "11-10-dart-summaries"


def test_export_and_inspect_take_policies(tiny_folder, tmp_path):
    file = tmp_path / "policy.json"
    file.write_text(json.dumps({"config": {"name": "mine", "layer_shares": [0, 0.5, 0.75]}}))
    done = ok(tmp_path, "export", tiny_folder, "-o", tmp_path / "x", "--policy", file, "--dry-run")
    assert (done["preset"], done["retained"], done["skipped"]) == ("mine", 16, 48)
    row = ok(tmp_path, "inspect", tiny_folder, "--policy", file)["presets"]["mine"]
    # 64 tokens in 3 layers, of which 32 and 48 skip an FFN that is 3 * 64 * 128 of 36864 weights
    ffn = 3 * 64 * 128
    all_of_them = ffn + 2 * 64 * (64 + 32)
    assert row["visual_flops_share"] == pytest.approx(1 - (32 + 48) * ffn / (3 * 64 * all_of_them))


def test_a_fine_tuned_model_carries_its_preset(tiny_folder, tmp_path, capsys):
    from skipvision_export import SkipVisionConfig, export
    from skipvision_export.errors import ConfigError
    from skipvision_export.method import SummaryTokens, save_skip_vision

    folder = shutil.copytree(tiny_folder, tmp_path / "tuned")
    with pytest.raises(ConfigError, match="carries no configuration"):
        export(folder, tmp_path / "none")
    config = SkipVisionConfig.counts(5, 7, summaries=True)
    save_skip_vision(folder, config, SummaryTokens(64))
    command = ("export", folder, "-o", tmp_path / "x", "--dry-run")
    assert ok(tmp_path, *command)["preset"] == "5-7"
    assert ok(tmp_path, *command, "--strict")["preset"] == "5-7-strict"
    assert ok(tmp_path, *command, "--preset", "skip-50")["preset"] == "skip-50"
    assert "5-7" in ok(tmp_path, "inspect", folder)["presets"]
    bundle = export(folder, tmp_path / "bundle")
    assert bundle.config == config
    assert not list(bundle.folder.glob("skip_vision*"))
    save_skip_vision(folder, config, SummaryTokens(32))
    refused(capsys, "hidden size of 32", "export", folder, "-o", tmp_path / "y")


def test_validate(tiny_folder, bundle_folder, tmp_path):
    result = ok(tmp_path, "validate", bundle_folder, "--model", tiny_folder, "--samples", 2)
    assert result["passed"]
    assert set(result["gaps"]) == {"export", "rewrite", "backend", "method"}
    assert len(result["layers"]) == 3
    assert set(result["gaps"]["rewrite"]["outputs"]["logits"]) == {"max_abs", "cosine", "sqnr_db"}


def test_validate_fails_on_a_broken_bundle(tiny_folder, bundle_folder, tmp_path, capsys):
    from skipvision_export.bundle.manifest import MANIFEST, file_table, seal

    twin = shutil.copytree(bundle_folder, tmp_path / "twin")
    data = twin / "onnx" / "decoder.onnx_data"
    weights = np.fromfile(data, np.float32)
    weights[1000:3000] *= 1.02
    weights.tofile(data)
    manifest = json.loads((twin / MANIFEST).read_text())
    manifest["files"] = {name: info.model_dump() for name, info in file_table(twin).items()}
    (twin / MANIFEST).write_text(seal(manifest))
    assert run(["validate", str(twin), "--model", str(tiny_folder), "--samples", "1"]) == 1
    assert "over the limit: export, rewrite" in capsys.readouterr().err


def test_bench(bundle_folder, dense_folder, tmp_path):
    args = ("--against", dense_folder, "--rounds", 2, "--new-tokens", "1,3", "--concurrency", 2)
    result = ok(tmp_path, "bench", bundle_folder, *args)
    assert len(result["runs"]) == 2
    for row in result["runs"]:
        assert row["prefill_ms"] > 0
        assert row["peak_rss_mb"] > 10
        assert {"backend", "dtype", "decode_ms_per_token", "kv_bytes", "flops"} <= set(row)
        first, last = row["end_to_end"]
        assert (first["new_tokens"], last["new_tokens"]) == (1, 3)
        assert first["ms"] == row["ttft_ms"] < last["ms"]
        assert set(row["floor"]) == {"vision", "prefill", "decode"}
        for floor in row["floor"].values():
            assert floor["multiple"] * floor["floor_ms"] > 0
    (point,) = result["load"]
    assert (point["batch"], point["concurrency"], point["new_tokens"]) == (1, 2, 3)
    assert [row["bundle"] for row in point["runs"]] == [row["bundle"] for row in result["runs"]]
    for row in point["runs"]:
        assert row["tokens_per_s"] == pytest.approx(3 * row["requests_per_s"])
        assert row["latency_p95_ms"] >= row["latency_ms"] > row["ttft_ms"]
        assert row["peak_rss_mb"] > 10
    low, high = point["ratio_spread"]["tokens_per_s"]
    assert low <= point["ratios"]["tokens_per_s"] <= high
    low, high = result["ratio_spread"]["prefill"]
    assert low <= result["ratios"]["prefill"] <= high
    dims = decoder_dims(Bundle.load(bundle_folder))
    assert result["ratios"]["kv_bytes"] == pytest.approx(128 / 80)
    assert dims.num_layers == 3


@pytest.mark.parametrize("kind", ["bundle", "model"])
def test_evaluate(kind, tiny_folder, bundle_folder, questions, tmp_path):
    target = bundle_folder if kind == "bundle" else tiny_folder
    more = ("--batch", 2) if kind == "bundle" else ()
    result = ok(tmp_path, "evaluate", target, "--data", questions, "--max-new-tokens", 2, *more)
    assert result == {"accuracy": 0.0, "n": 2, "by_type": {"a": 0.0, "b": 0.0}}


def test_loyalty(bundle_folder, dense_folder, questions, tmp_path):
    """Answers alike: all with itself; with another those that are, right or wrong."""
    asked = ("--data", questions, "--max-new-tokens", 6)
    own = ok(tmp_path, "evaluate", bundle_folder, *asked, "--against", bundle_folder)
    assert (own["loyalty"], own["loyalty_by_type"]) == (1.0, {"a": 1.0, "b": 1.0})
    other = ok(tmp_path, "evaluate", bundle_folder, *asked, "--against", dense_folder)
    assert other["loyalty"] < 1  # a random model answers differently when its tokens skip
    assert other["against"]["n"] == own["n"] == 2


# -- mistakes ----------------------------------------------------------------------------------------


def refused(capsys, message, *args):
    capsys.readouterr()
    assert run([*map(str, args)]) == 2
    err = capsys.readouterr().err.strip().splitlines()
    assert message in err[-1]
    # on a slow machine lines of progress stand before it
    assert [line.startswith("skipvision: ") for line in err] == [False] * (len(err) - 1) + [True]
    assert not any("Traceback" in line for line in err)


def test_no_model(capsys, tmp_path):
    out = tmp_path / "out"
    refused(capsys, "no config.json", "export", tmp_path, "-o", out, "--dense")
    refused(capsys, "does not exist", "inspect", tmp_path / "nowhere")
    (tmp_path / "config.json").write_text("{ no json")
    refused(capsys, "no readable JSON", "inspect", tmp_path)
    (tmp_path / "config.json").write_text('{"architectures": ["BertModel"]}')
    refused(
        capsys,
        "BertModel, which is not supported; supported: ",
        "export",
        tmp_path,
        "-o",
        out,
        "--dense",
    )
    assert not out.exists()


def test_batches_are_a_bundle_s(capsys, tiny_folder, questions):
    refused(capsys, "leave out --batch", "evaluate", tiny_folder, "--data", questions, "--batch", 2)


def test_bad_weights(capsys, tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    file = folder / "model.safetensors"
    weights = load_file(file)
    name = next(n for n in weights if n.endswith("layers.1.mlp.up_proj.weight"))
    bad = weights | {name: np.full_like(weights[name], np.nan)}
    save_file(bad, file, {"format": "pt"})
    refused(capsys, "NaN", "export", folder, "-o", tmp_path / "out", "--dense")
    del bad[name]
    save_file(bad, file, {"format": "pt"})
    refused(capsys, "lack 1 tensors", "export", folder, "-o", tmp_path / "out", "--dense")
    file.write_bytes(file.read_bytes()[:5000])
    refused(capsys, "is truncated", "export", folder, "-o", tmp_path / "out", "--dense")
    file.unlink()
    refused(capsys, "no *.safetensors", "export", folder, "-o", tmp_path / "out", "--dense")
    assert not (tmp_path / "out").exists()


def test_bad_pictures_and_prompts(capsys, bundle_folder, picture, tmp_path):
    ask = ("generate", bundle_folder, "--prompt", "What?")
    refused(capsys, "does not exist", *ask, "--image", tmp_path / "none.png")
    (tmp_path / "half.png").write_bytes(picture.read_bytes()[:100])
    refused(capsys, "truncated", *ask, "--image", tmp_path / "half.png")
    one_place = ("generate", bundle_folder, "--prompt", "<image>", "--image", picture, "--image", picture)
    refused(capsys, "has 1 <image> placeholders, expected 2", *one_place)
    two = ("generate", bundle_folder, "--prompt", "<image><image>", "--image", picture)
    refused(capsys, "2 <image> placeholders", *two)


def test_bad_bundles(capsys, bundle_folder, picture, tmp_path, tiny_folder):
    ask = ("--prompt", "What?", "--image", picture)
    refused(capsys, "no bundle", "generate", tmp_path, *ask)
    twin = shutil.copytree(bundle_folder, tmp_path / "twin")
    (twin / "onnx" / "decoder.onnx_data").unlink()
    for command in ("generate", twin, *ask), ("bench", twin), ("validate", twin, "--model", tiny_folder):
        refused(capsys, "decoder.onnx_data is missing", *command)


def test_validate_against_another_model(capsys, bundle_folder, tiny_folder, tmp_path):
    other = shutil.copytree(tiny_folder, tmp_path / "model")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"note": 1}))
    refused(capsys, "another model", "validate", bundle_folder, "--model", other)


def test_bad_outputs(capsys, tiny_folder, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    export = ("export", tiny_folder, "--dense", "-o")
    refused(capsys, "--force", *export, tmp_path / "full")
    refused(capsys, "not a folder", *export, tmp_path / "full" / "file" / "out")


def test_bad_choices(capsys, tiny_folder, tmp_path):
    export = ("export", tiny_folder, "-o", tmp_path / "out")
    refused(capsys, "choose exactly one", *export)
    refused(capsys, "choose exactly one", *export, "--dense", "--preset", "skip-50")
    refused(capsys, "unknown preset", *export, "--preset", "nope")
    refused(capsys, "576 visual tokens", *export, "--preset", "llava-100-156")
    refused(capsys, "more than", *export, "--retained", "60", "--skipped", "60")
    refused(capsys, "belong together", *export, "--retained", "60")
    refused(capsys, "choose exactly one", *export, "--policy", "p.json", "--preset", "skip-50")
    refused(capsys, "no readable configuration", *export, "--policy", tmp_path / "none.json")
    refused(capsys, "choose exactly one", *export, "--strict")
    refused(capsys, "skips nothing", *export, "--dense", "--strict")
    refused(capsys, "selector 'nose'", *export, "--preset", "skip-50", "--selector", "nose")
    refused(capsys, "pass_through 'all'", *export, "--preset", "skip-50", "--pass-through", "all")
    refused(capsys, "dtype", *export, "--dense", "--dtype", "int3")
    refused(capsys, "target", *export, "--dense", "--target", "toaster")


def test_bad_lists_of_numbers(capsys, bundle_folder):
    for given in "0", "2000", "8,x", "":
        refused(capsys, "expected numbers from 1", "bench", bundle_folder, "--batch", given)
    refused(capsys, "2 or more", "bench", bundle_folder, "--new-tokens", "1")


def test_usage(capsys):
    refused(capsys, "No such command", "nothing")
    refused(capsys, "Missing argument", "export")
    refused(capsys, "No such option", "inspect", "x", "--colour")


def test_bad_data(capsys, bundle_folder, tmp_path):
    refused(capsys, "no metadata.jsonl", "evaluate", bundle_folder, "--data", tmp_path)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png"}')
    refused(capsys, "line 1", "evaluate", bundle_folder, "--data", tmp_path)


def test_evaluate_runs_a_model_as_it_was_fine_tuned(capsys, tmp_path, bundle_folder, questions):
    """The committed fine-tune answers with the preset it carries, and otherwise when asked to."""
    data = ("--data", EXAMPLE / "test", "--limit", 24)
    finetuned = EXAMPLE / "finetuned"
    ours = ok(tmp_path, "evaluate", finetuned, *data)
    named = ok(tmp_path, "evaluate", finetuned, *data, "--preset", "quarter")
    other = ok(tmp_path, "evaluate", finetuned, *data, "--preset", "skip-90")
    assert ours == named
    assert ours["accuracy"] > other["accuracy"]
    refused(capsys, "as it was exported", "evaluate", bundle_folder, "--data", questions, "--dense")
