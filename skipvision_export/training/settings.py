"""What a training run is told, beside model, data and configuration."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from skipvision_export.errors import ConfigError

DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class FinetuneSettings:
    """Defaults are those of visual instruction tuning (Skip-Vision, section "training").

    batch_size: samples of one process at a time; accumulate: batches of each optimizer step
    epochs, max_steps: the latter wins where it is set
    warmup: share of the steps with a rising learning rate; it falls as a cosine after that
    lora_rank: 0 trains all of decoder and projector; above, adapters of that rank on the decoder's
        linear layers, and the projector
    dtype: "bfloat16" computes under autocast; weights and optimizer stay float32
    train_skip_kv: answers do not see skipped tokens in training, as in decode
    save_every: steps between checkpoints, 0 for a tenth of the run
    workers: processes that load pictures, 0 for none beside the training's own
    """

    learning_rate: float = 1e-5
    epochs: float = 1.0
    max_steps: int | None = None
    batch_size: int = 8
    accumulate: int = 1
    warmup: float = 0.03
    lora_rank: int = 0
    dtype: str = "float32"
    gradient_checkpointing: bool = False
    train_vision: bool = False
    train_skip_kv: bool = False
    seed: int = 0
    save_every: int = 0
    workers: int = 0

    def __post_init__(self) -> None:
        """Refuse what makes no sense; raises ConfigError."""
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype {self.dtype!r} is not one of {', '.join(DTYPES)}")
        for label, value, least in (
            ("batch size", self.batch_size, 1),
            ("accumulate", self.accumulate, 1),
            ("LoRA rank", self.lora_rank, 0),
            ("save every", self.save_every, 0),
            ("workers", self.workers, 0),
            ("max steps", 1 if self.max_steps is None else self.max_steps, 1),
        ):
            if value < least:
                raise ConfigError(f"{label} {value} must be at least {least}")
        if not 0 < self.learning_rate < float("inf"):
            raise ConfigError(f"learning rate {self.learning_rate} must be above 0")
        if not 0 < self.epochs < float("inf"):
            raise ConfigError(f"epochs {self.epochs} must be above 0")
        if not 0 <= self.warmup < 1:
            raise ConfigError(f"warm-up {self.warmup} is a share of the steps: expected 0 to below 1")

    def to_json(self) -> dict[str, Any]:
        """The fields as a JSON object."""
        return asdict(self)
