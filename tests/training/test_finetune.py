"""Whole runs: the finished folder, resuming, the output folder's states."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from skipvision_export.config import SkipVisionConfig
from skipvision_export.errors import OutputError
from skipvision_export.method import saved_config, saved_summary
from skipvision_export.models.loading import load_model, load_processor, resolve_model
from skipvision_export.training import run

# Five steps an epoch, and a checkpoint at step 4 of the second epoch's six.
SETTINGS = {"max_steps": 9, "batch_size": 1, "accumulate": 2, "learning_rate": 1e-3, "save_every": 3}


class KillAt(TrainerCallback):
    """Stops the process's work in the middle of a step, as a signal would."""

    def __init__(self, step):
        self.step = step

    def on_substep_end(self, args, state, control, **more):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def weights(folder):
    return load_file(folder / "model.safetensors") | load_file(folder / "skip_vision.safetensors")


@pytest.fixture(scope="module")
def finished(planned, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "out"
    run.finetune(planned(**SETTINGS), folder)
    return folder


def test_the_finished_folder_is_a_plain_model(finished, tiny_folder):
    source = resolve_model(finished)
    model = load_model(source)
    before = load_model(resolve_model(tiny_folder)).state_dict()
    after = model.state_dict()
    assert after.keys() == before.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert not any("vision_tower" in name for name in changed)
    assert any("projector" in name for name in changed) and any("mlp" in name for name in changed)
    assert saved_config(finished) == SkipVisionConfig.preset("quarter")
    assert saved_summary(finished).ada[1].weight.abs().max() > 0
    assert load_processor(finished).chat_template
    config, old = (json.loads((f / "config.json").read_text()) for f in (finished, tiny_folder))
    assert config == old
    assert model.generation_config.eos_token_id == 2
    assert not (finished / "checkpoints").exists()
    steps = [json.loads(line)["step"] for line in (finished / "train_log.jsonl").read_text().splitlines()]
    assert steps == sorted(steps) and steps[-1] == 9


@pytest.mark.parametrize("settings", [{}, {"lora_rank": 2, "gradient_checkpointing": True}])
def test_resuming_is_as_if_nothing_had_happened(planned, finished, tmp_path, settings):
    plan = planned(**SETTINGS, **settings)
    whole = finished
    if settings:
        whole = tmp_path / "whole"
        run.finetune(plan, whole)
    out = tmp_path / "out"
    # Between checkpoint 6 and 9, in the middle of the second epoch and of an optimizer step.
    with pytest.raises(KeyboardInterrupt):
        run.finetune(plan, out, callbacks=[KillAt(7)])
    assert not (out / "config.json").exists()
    with pytest.raises(OutputError, match="interrupted; --resume to go on, or --force"):
        run.finetune(plan, out)
    with pytest.raises(OutputError, match="another learning_rate"):
        run.finetune(planned(**SETTINGS | settings | {"learning_rate": 2e-3}), out, resume=True)
    (out / "checkpoints" / "checkpoint-8").mkdir()  # killed while it was written
    if not settings:
        lost = tmp_path / "lost"  # the twin without the optimizer's moments ends elsewhere
        shutil.copytree(out, lost)
        state = torch.load(lost / "checkpoints" / "checkpoint-6" / "optimizer.pt")
        for moments in state["state"].values():
            moments["exp_avg"] *= 0.9
        torch.save(state, lost / "checkpoints" / "checkpoint-6" / "optimizer.pt")
        run.finetune(plan, lost, resume=True)
        assert any(not torch.equal(weights(lost)[n], t) for n, t in weights(whole).items())
    run.finetune(plan, out, resume=True)
    expected, resumed = weights(whole), weights(out)
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)
    steps = [json.loads(line)["step"] for line in (out / "train_log.jsonl").read_text().splitlines()]
    assert steps == sorted(steps) and steps[-1] == 9


def test_killed_before_the_first_checkpoint(planned, finished, tmp_path):
    plan = planned(**SETTINGS)
    with pytest.raises(KeyboardInterrupt):
        run.finetune(plan, tmp_path / "out", callbacks=[KillAt(1)])
    run.finetune(plan, tmp_path / "out", resume=True, keep_checkpoints=True)
    expected, resumed = weights(finished), weights(tmp_path / "out")
    assert all(torch.equal(expected[name], resumed[name]) for name in expected)
    kept = {folder.name for folder in (tmp_path / "out" / "checkpoints").glob("checkpoint-*")}
    assert kept == {"checkpoint-6", "checkpoint-9"}


def test_a_finished_folder_is_not_touched(planned, finished):
    with pytest.raises(OutputError, match="not empty"):
        run.finetune(planned(**SETTINGS), finished)
    with pytest.raises(OutputError, match="no interrupted run"):
        run.finetune(planned(**SETTINGS), finished, resume=True)
    assert (finished / "config.json").is_file()


def test_fine_tuning_goes_on_from_its_own_result(planned, finished, questions_folder, tmp_path):
    """The trained summary tokens are where the next run begins."""
    config = SkipVisionConfig.preset("quarter")
    plan = run.plan(
        resolve_model(finished), config, planned(max_steps=1, learning_rate=1e-9).settings, questions_folder
    )
    run.finetune(plan, tmp_path / "out")
    for name, tensor in saved_summary(finished).state_dict().items():
        torch.testing.assert_close(saved_summary(tmp_path / "out").state_dict()[name], tensor)


def test_bfloat16_and_held_out_data(planned, questions_folder, tiny_folder, tmp_path):
    plan = run.plan(
        resolve_model(tiny_folder),
        SkipVisionConfig.preset("skip-75"),
        planned(max_steps=3, batch_size=4, dtype="bfloat16", learning_rate=1e-3).settings,
        questions_folder,
        questions_folder,
    )
    result = run.finetune(plan, tmp_path / "out")
    assert result["eval_n"] == 10 and 0 <= result["eval_exact_match"] <= 1
    assert 0 < result["eval_loss"] < 6
    assert load_file(tmp_path / "out" / "model.safetensors")["language_model.lm_head.weight"].dtype == (
        torch.float32
    )


def test_exact_match_is_that_of_generation(planned, tmp_path):
    """On the trained checkpoint: teacher-forced exact match against greedy decode without skipped K/V."""
    from conftest import EXAMPLE

    from skipvision_export.benchmark.accuracy import TorchAnswerer, evaluate
    from skipvision_export.runtime.data import load_imagefolder
    from skipvision_export.runtime.torch_reference import TorchReference

    source, config = resolve_model(EXAMPLE / "checkpoint"), SkipVisionConfig(skip_share=0.9)
    held_out = tmp_path / "held-out"
    shutil.copytree(EXAMPLE / "test", held_out, ignore=lambda d, names: [n for n in names if n > "010.png"])
    rows = (EXAMPLE / "test" / "metadata.jsonl").read_text().splitlines()[:24]
    (held_out / "metadata.jsonl").write_text("\n".join(rows))
    settings = planned(max_steps=1, learning_rate=1e-12, batch_size=8).settings
    result = run.finetune(run.plan(source, config, settings, held_out, held_out), tmp_path / "out")
    reference = TorchReference(source)
    generated = evaluate(TorchAnswerer(reference, config=config), load_imagefolder(held_out))
    assert result["eval_exact_match"] == pytest.approx(generated.accuracy)
    assert generated.accuracy < 1  # something can go wrong at all
