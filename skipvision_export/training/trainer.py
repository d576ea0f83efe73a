"""Hugging Face's Trainer with checkpoints that are whole or not there, and evaluation as decode sees it."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import Trainer, TrainerCallback

from skipvision_export.errors import ModelError
from skipvision_export.method import SkipVisionState
from skipvision_export.training.answers import AnswerRows
from skipvision_export.training.output import COMPLETE, RunFolder
from skipvision_export.training.trainable import trainable_state

WEIGHTS = "trainable.safetensors"
KEEP = 2  # whole checkpoints while running: the newest may be damaged by what stopped the run


class SkipVisionTrainer(Trainer):
    """Trains the model inside `apply_skip_vision` and `answers_only`, whose states it is given.

    Checkpoints hold the weights that train, under the names that they have here: Trainer's own go
    through `save_pretrained`, which renames a VLM's weights, and resuming would not find them.
    """

    model: Any  # always there, which Trainer's own annotation does not say

    def __init__(
        self, *, patch: SkipVisionState, answers: AnswerRows, run: RunFolder, **options: Any
    ) -> None:
        """options: those of Trainer."""
        super().__init__(**options)
        self.patch, self.answers, self.run = patch, answers, run

    def create_accelerator_and_postprocess(self) -> None:
        """Trainer's hook; shards on a CPU as well where the launcher asks for FSDP.

        accelerate takes FSDP for accelerators only and trains with DDP elsewhere without a word;
        PyTorch can shard over gloo.
        """
        super().create_accelerator_and_postprocess()
        state = self.accelerator.state
        if state.distributed_type == DistributedType.MULTI_CPU and fsdp_asked():
            state.distributed_type = DistributedType.FSDP
            state.fsdp_plugin = FullyShardedDataParallelPlugin()
            self.is_fsdp_enabled = True

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Trainer's hook for a checkpoint's weights; FSDP writes its own shards beside it."""
        if self.is_fsdp_enabled or not self.args.should_save:
            return
        folder = Path(str(output_dir or self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        state = {name: tensor.cpu().contiguous() for name, tensor in trainable_state(self.model).items()}
        save_file(state, folder / WEIGHTS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        file = Path(resume_from_checkpoint) / WEIGHTS
        state = load_file(file)
        wrong = state.keys() ^ trainable_state(self.model).keys()
        if wrong:
            raise ModelError(f"{file} holds other weights than the model trains, such as {min(wrong)}")
        self.model.load_state_dict(state, strict=False)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()  # every process writes its own random state
        if self.args.should_save:
            folder = self.run.checkpoints / f"checkpoint-{self.state.global_step}"
            (folder / COMPLETE).touch()
            self.run.drop_old(KEEP)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Loss for each token of an answer, and the share of answers whose every token is the likeliest.

        Answers see what decode sees, so that share is exact match of greedy generation.
        """
        if eval_dataset is None and self.eval_dataset is None:
            return {}
        model = self.model_wrapped
        training, seeing = model.training, self.patch.train_skip_kv
        model.eval()
        self.answers.keep, self.patch.train_skip_kv = True, self.patch.config.skip_kv
        totals: list[torch.Tensor] = []
        try:
            with torch.no_grad():
                for batch in self.get_eval_dataloader(eval_dataset):
                    totals.append(self._scores(model, self._prepare_inputs(batch)))
        finally:
            self.answers.keep, self.patch.train_skip_kv = False, seeing
            self.answers.logits = None
            model.train(training)
        loss, tokens, exact = torch.cat(totals).double().unbind(1)
        metrics = {
            "eval_loss": float(loss.sum() / tokens.sum()),
            "eval_exact_match": float(exact.mean()),
            "eval_n": len(exact),
        }
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def last_loss(self) -> float:
        """The last logged loss for each answer token; the same for a resumed run."""
        losses = [row["loss"] for row in self.state.log_history if "loss" in row]
        return float(losses[-1]) if losses else math.nan

    def last_evaluation(self) -> dict[str, float]:
        """The numbers of `evaluate` at the last step, without doing it twice."""
        for row in self.state.log_history[::-1]:
            if "eval_loss" in row and row["step"] == self.state.global_step:
                return {name: value for name, value in row.items() if name.startswith("eval_")}
        return self.evaluate()

    def whole_state(self) -> dict[str, torch.Tensor]:
        """All weights by the model's own names; under FSDP in the main process only."""
        if self.is_fsdp_enabled:
            # PyTorch's own, for both versions of FSDP: accelerate's leaves shards of the second one.
            options = StateDictOptions(full_state_dict=True, cpu_offload=True)
            state: dict[str, Any] = get_model_state_dict(self.model_wrapped, options=options)
            return state
        return dict(self.model.state_dict())

    def _scores(self, model: Any, batch: dict[str, Any]) -> torch.Tensor:
        """[B, 3]: summed loss, tokens and exact match of each sample, of all processes."""
        with self.compute_loss_context_manager():
            model(**batch, use_cache=False)
        rows, length = batch["labels"].shape
        scores = torch.stack(self.answers.scores(rows, length), dim=1)
        # A row without labels only brings a picture along; see Collator.
        return self.accelerator.gather_for_metrics(scores[scores[:, 1] > 0])


def fsdp_asked() -> bool:
    """True under a launcher that asks for FSDP, such as `accelerate launch --use_fsdp`."""
    return os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"


class Reporter(TrainerCallback):
    """Says how far training is, and writes what Trainer logs to train_log.jsonl."""

    def __init__(self, run: RunFolder, progress: Callable[[str], None]) -> None:
        """progress: shows one line."""
        self.run, self.progress = run, progress
        self.loss = math.nan

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **more: Any) -> None:
        """One JSON line with the step."""
        if not state.is_world_process_zero or not logs:
            return
        self.loss = logs.get("loss", self.loss)
        self.run.append_log({"step": state.global_step, **logs})

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """One line of progress."""
        if state.is_world_process_zero:
            self.progress(f"step {state.global_step} of {state.max_steps}, loss {self.loss:.4f}")
