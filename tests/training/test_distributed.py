"""Two processes on a CPU equal one: DDP, and FSDP 2, through accelerate's launcher."""

import json
import os
import subprocess
import sys

import pytest
from safetensors.torch import load_file

from skipvision_export.training import run

STEPS, RATE = 3, 1e-3
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--num_machines", "1"]
LAUNCH += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
SHARDED = ["--use_fsdp", "--fsdp_version", "2", "--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP"]


@pytest.fixture(scope="module")
def alone(planned, tmp_path_factory):
    """One process, batches of two."""
    out = tmp_path_factory.mktemp("alone") / "out"
    run.finetune(planned(max_steps=STEPS, batch_size=2, learning_rate=RATE), out)
    return out


def launch(kind, model, data, out, *more, env=()):
    command = [*LAUNCH, *kind, "-m", "skipvision_export", "finetune", str(model), "--data", str(data)]
    command += ["-o", str(out), "--preset", "quarter", "--max-steps", str(STEPS), "--batch-size", "1"]
    command += ["--lr", str(RATE), *more]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | dict(env)
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=200, check=False)


def gap(a, b):
    gaps = []
    for name in ("model.safetensors", "skip_vision.safetensors"):
        ours, theirs = load_file(a / name), load_file(b / name)
        assert ours.keys() == theirs.keys()
        gaps += [float((ours[key] - theirs[key]).abs().max()) for key in ours]
    return max(gaps)


@pytest.mark.parametrize("kind", [["--multi_gpu"], SHARDED], ids=["ddp", "fsdp2"])
def test_two_processes_equal_one(kind, alone, tiny_folder, questions_folder, tmp_path):
    out, result = tmp_path / "out", tmp_path / "result.json"
    more = ("--json", str(result), "--keep-checkpoints")
    done = launch(kind, tiny_folder, questions_folder, out, *more)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(result.read_text())["processes"] == 2
    last = out / "checkpoints" / f"checkpoint-{STEPS}"
    assert (last / "pytorch_model_fsdp_0").is_dir() == (kind == SHARDED)  # it did shard
    # Adam makes rounding of tiny gradients visible: 1 % of a step of the learning rate.
    assert gap(out, alone) < 0.01 * RATE
    logs = [[json.loads(line) for line in (f / "train_log.jsonl").open()] for f in (out, alone)]
    for ours, theirs in zip(*logs, strict=True):
        if "loss" in ours:
            assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)


def test_another_order_of_the_data_would_show(planned, alone, tmp_path):
    run.finetune(planned(max_steps=STEPS, batch_size=2, learning_rate=RATE, seed=1), tmp_path / "out")
    assert gap(tmp_path / "out", alone) > 0.1 * RATE


def test_fsdp_1_is_refused_on_a_cpu(planned, tmp_path, monkeypatch):
    from skipvision_export.errors import ConfigError

    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "1")
    with pytest.raises(ConfigError, match="--fsdp_version 2"):
        run.finetune(planned(max_steps=1), tmp_path / "out")
