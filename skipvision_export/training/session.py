"""A training run's model, Trainer and finished weights."""

from __future__ import annotations

import os
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch

from skipvision_export.errors import ConfigError, SkipVisionError
from skipvision_export.method import (
    apply_skip_vision,
    attach_summary,
    save_skip_vision,
    saved_summary,
)
from skipvision_export.method.summary import SummaryTokens
from skipvision_export.models.loading import copy_companions, load_model, quiet
from skipvision_export.training.answers import answers_only
from skipvision_export.training.collate import Collator
from skipvision_export.training.output import RunFolder
from skipvision_export.training.plan import Plan, Progress
from skipvision_export.training.trainable import choose_trainable, merge_lora, split_summary


class Session:
    """One process's part of a run."""

    def __init__(self, plan: Plan, run: RunFolder, progress: Progress) -> None:
        """Nothing is loaded or written yet."""
        self.plan, self.run, self.progress = plan, run, progress

    def train(self, resume: bool, keep_checkpoints: bool, callbacks: Sequence[Any]) -> dict[str, Any]:
        """Load, train, save; returns the result of the command."""
        plan, settings = self.plan, self.plan.settings
        try:
            from transformers import set_seed

            from skipvision_export.training.trainer import Reporter, SkipVisionTrainer
        except ImportError as error:
            raise SkipVisionError(f"training needs {error.name}; install skipvision-export[train]") from None
        _check_fsdp()
        self.progress("loading weights")
        model = self._model()
        set_seed(settings.seed)  # adapters begin at random
        choose_trainable(
            model, plan.source.family, lora_rank=settings.lora_rank, train_vision=settings.train_vision
        )
        _wrap_decoder_layers(plan.source.family.decoder_layers(model))
        with (
            quiet(),
            apply_skip_vision(model, plan.config, train_skip_kv=settings.train_skip_kv) as patch,
            answers_only(model) as answers,
        ):
            args = self._arguments()
            last = self._start(args, resume)
            trainer = SkipVisionTrainer(
                patch=patch,
                answers=answers,
                run=self.run,
                model=model,
                args=args,
                data_collator=self._collator(),
                train_dataset=plan.data.samples,
                eval_dataset=None if plan.eval_data is None else plan.eval_data.samples,
                callbacks=[Reporter(self.run, self.progress), *callbacks],
            )
            _without_printing(trainer)
            trainer.train(resume_from_checkpoint=str(last) if last else None)
            metrics = trainer.last_evaluation()
            state = trainer.whole_state()
            if trainer.is_world_process_zero():
                self._write(state, keep_checkpoints)
            trainer.accelerator.wait_for_everyone()
        return {"steps": trainer.state.global_step, "train_loss": trainer.last_loss(), **metrics}

    def _model(self) -> Any:
        """The model in float32, with the summary tokens that the layout needs."""
        plan = self.plan
        model = load_model(plan.source)
        if plan.layout.summaries:
            attach_summary(model, saved_summary(plan.source.folder))
        return model

    def _collator(self) -> Collator:
        plan = self.plan
        text = plan.source.config.text_config
        token = plan.source.family.image_token_id(plan.source.config)
        return Collator(plan.processor, token, text.pad_token_id or 0, plan.layout.total)

    def _start(self, args: Any, resume: bool) -> Path | None:
        """Prepare the folder in one process, before any other goes on."""
        with args.main_process_first(local=False):
            if args.process_index == 0:
                return self.run.start(resume, self.plan.identity())
            return self.run.last_checkpoint()

    def _arguments(self) -> Any:
        from transformers import TrainingArguments

        plan, s = self.plan, self.plan.settings
        every = s.save_every or max(1, plan.steps // 10)
        evaluating = plan.eval_data is not None
        return TrainingArguments(
            output_dir=str(self.run.checkpoints),
            per_device_train_batch_size=s.batch_size,
            per_device_eval_batch_size=s.batch_size,
            gradient_accumulation_steps=s.accumulate,
            num_train_epochs=s.epochs,
            max_steps=plan.steps,
            learning_rate=s.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=s.warmup,
            weight_decay=0.0,
            bf16=s.dtype == "bfloat16",
            **_checkpointing(s.gradient_checkpointing),
            seed=s.seed,
            data_seed=s.seed,
            dataloader_num_workers=s.workers,
            dataloader_pin_memory=torch.cuda.is_available(),
            remove_unused_columns=False,
            # The unused layers behind the tower's feature layer are frozen; everything else is used.
            ddp_find_unused_parameters=False,
            save_strategy="steps",
            save_steps=every,
            eval_strategy="steps" if evaluating else "no",
            eval_steps=every if evaluating else None,
            logging_steps=max(1, min(10, plan.steps // 20)),
            logging_first_step=True,
            disable_tqdm=True,
            report_to="none",
            use_cpu=not torch.cuda.is_available(),
        )

    def _write(self, state: dict[str, Any], keep_checkpoints: bool) -> None:
        """The finished model, in the type of the one it came from."""
        plan = self.plan
        own, summary_state = split_summary(merge_lora(state))
        dtype = plan.source.config.dtype or torch.float32
        own = {name: tensor.to("cpu", dtype) for name, tensor in own.items()}
        summary = None
        if summary_state:
            summary = SummaryTokens(plan.source.family.decoder_dims(plan.source.config).hidden_size)
            summary.load_state_dict({name: tensor.cpu() for name, tensor in summary_state.items()})
        with self.run.scratch() as scratch:
            folder = Path(scratch)
            _save_weights(plan, own, folder)
            copy_companions(plan.source.folder, folder)
            save_skip_vision(folder, plan.config, summary)
            self.run.finish(folder, keep_checkpoints)


def _save_weights(plan: Plan, state: dict[str, Any], folder: Path) -> None:
    """Write weights through an empty model of the same class: the trained one may be wrapped."""
    from transformers import AutoModelForImageTextToText

    loader: Any = AutoModelForImageTextToText
    with torch.device("meta"):
        model = loader.from_config(deepcopy(plan.source.config))  # saving changes it
    model.load_state_dict(state, assign=True)
    model.tie_weights()
    model.save_pretrained(folder)


def _checkpointing(on: bool) -> dict[str, Any]:
    """Trainer's options for it, which newer versions of transformers renamed."""
    from transformers import TrainingArguments

    kind = "activation" if hasattr(TrainingArguments, "activation_checkpointing") else "gradient"
    return {f"{kind}_checkpointing": on, f"{kind}_checkpointing_kwargs": {"use_reentrant": False}}


def _check_fsdp() -> None:
    """Raise ConfigError for what PyTorch cannot do without an accelerator."""
    asked = os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true"
    if asked and not torch.cuda.is_available() and os.environ.get("FSDP_VERSION", "1") != "2":
        raise ConfigError("FSDP 1 needs a GPU, PyTorch cannot shard with it on a CPU; use --fsdp_version 2")


def _wrap_decoder_layers(layers: Any) -> None:
    """Have FSDP shard by decoder layers, unless the launcher names something else."""
    os.environ.setdefault("FSDP_TRANSFORMER_CLS_TO_WRAP", type(layers[0]).__name__)


def _without_printing(trainer: Any) -> None:
    from transformers.trainer_callback import PrinterCallback

    trainer.remove_callback(PrinterCallback)
