"""What a user can get wrong: exit 2 and one line, before weights are loaded."""

import json
import shutil

import pytest
from questions import write_rows

from skipvision_export.cli import run

GOOD = {"file_name": "0.png", "question": "What?", "answer": "a"}


@pytest.fixture
def folder(questions_folder, tmp_path):
    return shutil.copytree(questions_folder, tmp_path / "data")


def finetune(model, data, out, *args):
    return run(["finetune", str(model), "--data", str(data), "-o", str(out), *map(str, args)])


def refused(capsys, words, *args):
    capsys.readouterr()
    assert finetune(*args) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("skipvision: ")]
    assert len(error) == 1
    for word in [words] if isinstance(words, str) else words:
        assert word in error[0]
    assert not args[2].exists()


BROKEN = [
    ("no json", "no JSON"),
    ([1, 2], "no JSON object"),
    ({"question": "What?", "answer": "a"}, "null for a question without a picture"),
    (GOOD | {"file_names": ["1.png"]}, "not both"),
    ({"file_name": "0.png", "answer": "a"}, "no question"),
    ({"file_name": "0.png", "question": "What?"}, "no answer"),
    (GOOD | {"answer": " "}, "the answer is empty"),
    (GOOD | {"answer": None}, "answer is None"),
    (GOOD | {"question": ["What?"]}, "expected text"),
    (GOOD | {"file_name": "gone.png"}, "does not exist"),
    (GOOD | {"file_name": 7}, "names of picture files"),
    (GOOD | {"file_name": "cut.png"}, "truncated or no picture"),
    (GOOD | {"file_name": "text.png"}, "truncated or no picture"),
    (GOOD | {"answer": "a" * 600}, "context of 512"),
    (GOOD | {"answer": "<image>"}, "stands for pictures"),
    (
        '{"file_name": "0.png", "question": "a", "question": "b", "answer": "c"}',
        "'question' stands there twice",
    ),
]


def test_broken_rows(capsys, tiny_folder, folder, tmp_path):
    (folder / "cut.png").write_bytes((folder / "0.png").read_bytes()[:300])
    (folder / "text.png").write_text("no picture")
    options = ("--preset", "quarter")
    for row, words in BROKEN:
        write_rows(folder, [GOOD, row, GOOD])
        refused(capsys, ["1 broken row", "line 2", words], tiny_folder, folder, tmp_path / "out", *options)
    # all of them at once: the first is named, and how many there are
    write_rows(folder, [GOOD, *[row for row, _ in BROKEN], GOOD])
    words = [f"{len(BROKEN)} broken rows", "the first is line 2", "--skip-broken"]
    refused(capsys, words, tiny_folder, folder, tmp_path / "out", *options)
    result = tmp_path / "result.json"
    skipping = (*options, "--skip-broken", "--dry-run", "--json", result)
    assert finetune(tiny_folder, folder, tmp_path / "out", *skipping) == 0
    told = json.loads(result.read_text())
    assert told["samples"] == 2
    assert [row["line"] for row in told["broken"]] == list(range(2, 2 + len(BROKEN)))
    assert "left out 16 broken rows" in capsys.readouterr().out
    write_rows(folder, [row for row, _ in BROKEN])
    refused(capsys, "no row that can be used", tiny_folder, folder, tmp_path / "out", *skipping)


def test_bad_folders(capsys, tiny_folder, folder, tmp_path):
    out = tmp_path / "out"
    refused(capsys, "no metadata.jsonl", tiny_folder, tmp_path, out, "--preset", "quarter")
    (folder / "metadata.jsonl").write_text("\n")
    refused(capsys, "holds no questions", tiny_folder, folder, out, "--preset", "quarter")
    (folder / "metadata.jsonl").write_bytes(b"\xff\xfe\x00")
    refused(capsys, "UTF-8", tiny_folder, folder, out, "--preset", "quarter")
    refused(capsys, "does not exist", tmp_path / "gone", folder, out, "--preset", "quarter")


def test_a_preset_for_another_model(capsys, tiny_folder, folder, tmp_path):
    bare = tmp_path / "bare"  # without weights: they are not looked for
    shutil.copytree(tiny_folder, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    for preset, words in (("llava-100-156", "576 visual tokens"), ("nope", "unknown preset")):
        refused(capsys, words, bare, folder, tmp_path / "out", "--preset", preset)


def test_bad_options(capsys, tiny_folder, folder, tmp_path):
    for options, words in (
        (("--lr", 0), "learning rate"),
        (("--lr", "nan"), "learning rate"),
        (("--epochs", 0), "epochs"),
        (("--max-steps", 0), "max steps"),
        (("--batch-size", 0), "batch size"),
        (("--warmup", 1), "warm-up"),
        (("--dtype", "float16"), "dtype"),
        (("--lora-rank", -1), "LoRA rank"),
        (("--dense",), "exactly one"),
        (("--policy", folder / "x.json"), "exactly one"),
        (("--resume",), "no interrupted run"),
    ):
        args = ("--preset", "quarter", *options)
        refused(capsys, words, tiny_folder, folder, tmp_path / "out", *args)
    refused(capsys, "configuration", tiny_folder, folder, tmp_path / "out", "--policy", folder / "x.json")


def test_a_policy_trains(tiny_folder, questions_folder, tmp_path):
    """Per layer a share of its own, as `calibrate` writes it."""
    file, out = tmp_path / "policy.json", tmp_path / "out"
    file.write_text(json.dumps({"name": "mine", "layer_shares": [0.0, 0.5, 0.75]}))
    assert finetune(tiny_folder, questions_folder, out, "--policy", file, "--max-steps", 1) == 0
    saved = json.loads((out / "skip_vision_config.json").read_text())
    assert saved["layer_shares"] == [0.0, 0.5, 0.75]


def test_dry_run(capsys, tiny_folder, questions_folder, tmp_path):
    result = tmp_path / "result.json"
    args = ("--preset", "quarter", "--dry-run", "--batch-size", 2, "--accumulate", 2, "--epochs", 2)
    assert finetune(tiny_folder, questions_folder, tmp_path / "out", *args, "--json", result) == 0
    told = json.loads(result.read_text())
    assert (told["samples"], told["images"], told["steps"]) == (10, 10, 6)
    assert 0.2 < told["flops_share"] < 0.9
    assert not (tmp_path / "out").exists()
    assert "would train: quarter, 10 questions about 10 pictures, 6 steps" in capsys.readouterr().out


def test_a_run_through_the_command(capsys, tiny_folder, questions_folder, tmp_path):
    out, result = tmp_path / "out", tmp_path / "result.json"
    args = ("--skipped", 20, "--retained", 44, "--max-steps", 1, "--eval-data", questions_folder)
    assert finetune(tiny_folder, questions_folder, out, *args, "--json", result) == 0
    told = json.loads(result.read_text())
    assert {"steps", "train_loss", "eval_loss", "eval_exact_match", "eval_n", "output"} <= told.keys()
    assert (out / "skip_vision_config.json").is_file() and not (out / "skip_vision.safetensors").exists()
    said = capsys.readouterr()
    assert f"next: skipvision export {out} -o BUNDLE" in said.out
    assert finetune(tiny_folder, questions_folder, out, *args) == 2
    assert finetune(tiny_folder, questions_folder, out, *args, "--force") == 0
