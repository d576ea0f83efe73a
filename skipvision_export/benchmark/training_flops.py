"""Operations of a training step by formula; a multiply and an add are two operations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from skipvision_export.benchmark.flops import layers_flops
from skipvision_export.config import SkipVisionConfig
from skipvision_export.layout import TokenLayout
from skipvision_export.models import DecoderDims, VisionDims

if TYPE_CHECKING:
    from skipvision_export.training.plan import Plan


@dataclass(frozen=True)
class TrainingCost:
    """Forward and backward of one sample; the optimizer is not counted."""

    vision: int
    projector: int
    decoder: int
    head: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.vision + self.projector + self.decoder + self.head


def training_cost(
    dims: DecoderDims,
    vision: VisionDims,
    layout: TokenLayout,
    text_tokens: int,
    answer_tokens: int,
    *,
    images: int = 1,
    checkpointing: bool = False,
) -> TrainingCost:
    """Of a sample with `images` pictures, `text_tokens` beside them, `answer_tokens` of these labels.

    Backward costs twice the forward: gradients of inputs and of weights. The vision tower is frozen,
    forward only; the projector's first layer needs no gradient of its input. Attention counts the
    whole square of the sequence, as `layers_flops` does, and the head the answers only. With gradient
    checkpointing the decoder's layers run forward once more.
    """
    head = 2 * dims.hidden_size * dims.vocab_size
    many = TokenLayout(layout.runs * images, layout.tiers * images, layout.layer_tiers)
    forward = layers_flops(dims, many, text_tokens, last_only=False)
    first, *others = (2 * images * vision.visual_tokens * i * o for i, o in vision.projector)
    return TrainingCost(
        vision=images * vision_forward(vision),
        projector=2 * first + 3 * sum(others),
        decoder=(4 if checkpointing else 3) * forward,
        head=3 * head * answer_tokens,
    )


def vision_forward(vision: VisionDims) -> int:
    """Of one picture through the tower, as far as its features are used."""
    rows, d = vision.patches + vision.has_cls, vision.hidden_size
    layer = 2 * rows * d * (4 * d + 2 * vision.intermediate_size) + 4 * rows * rows * d
    patches = 2 * vision.patches * 3 * vision.patch_size**2 * d
    return patches + vision.num_layers * layer


def flops_share(plan: Plan) -> float:
    """A step of a plan over the same step of the dense model, for its data's mean sample."""
    source, samples = plan.source, plan.data.samples
    pictures = plan.data.images / len(samples)
    text = sum(len(sample.ids) for sample in samples) / len(samples) - pictures
    family, hf_config = source.family, source.config

    def cost(config: SkipVisionConfig) -> int:
        sizes: dict[str, Any] = {
            "images": max(1, round(pictures)) if pictures else 0,
            "checkpointing": plan.settings.gradient_checkpointing,
        }
        answers = round(plan.data.answer_tokens() / len(samples))
        return training_cost(
            family.decoder_dims(hf_config),
            family.vision_dims(hf_config),
            family.layout(hf_config, config),
            round(text),
            answers,
            **sizes,
        ).total

    return cost(plan.config) / cost(SkipVisionConfig.dense())
