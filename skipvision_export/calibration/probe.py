"""Measuring a policy's effect on the output: teacher-forced, on the real patched model.

Shapes: S prompt length, A answer tokens, V visual tokens, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from skipvision_export.calibration.samples import ForcedSample
from skipvision_export.config import SkipVisionConfig
from skipvision_export.method import apply_skip_vision
from skipvision_export.models.loading import ModelSource


class Probe:
    """A model and its samples; the dense answers are computed once, and so is each picture's encoding.

    Use it inside `with probe.cached_vision():`, or without, which is slower and the same.
    """

    def __init__(self, source: ModelSource, model: nn.Module, samples: Sequence[ForcedSample]) -> None:
        """model: loaded from `source`, in evaluation mode, where it shall run."""
        self.source, self.model, self.samples = source, model, samples
        weights = next(source.family.projector(model).parameters())
        self.device, self.dtype = weights.device, weights.dtype
        self._dense: list[Tensor] = []
        self._picture: Path | None = None

    def divergence(self, config: SkipVisionConfig) -> float:
        """Mean KL(dense || skipped) of next-token probabilities in nats, over all answer tokens.

        Compared are the logits of the last prompt position and of the answer's positions, computed
        as in generation: one prefill of the prompt, then the answer over what is left of its K/V.
        """
        if not self._dense:
            self._dense = [self._log_probs(sample) for sample in self.samples]
        total, count = 0.0, 0
        with apply_skip_vision(self.model, config):
            for sample, dense in zip(self.samples, self._dense, strict=True):
                skipped = self._log_probs(sample)
                total += float((dense.exp() * (dense - skipped)).sum())
                count += dense.shape[0]
        return total / count

    def prompt(self, sample: ForcedSample) -> dict[str, Tensor]:
        """Arguments of the model for a prompt and its picture."""
        self._picture = sample.image
        ids = torch.from_numpy(sample.prompt.input_ids).to(self.device)
        pixels = torch.from_numpy(sample.prompt.pixel_values).to(self.device, self.dtype)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}

    @torch.no_grad()
    def _log_probs(self, sample: ForcedSample) -> Tensor:
        """[A, vocabulary] float64: a small divergence would drown in the rounding of float32."""
        answer = torch.from_numpy(sample.answer).to(self.device)
        out = self.model(**self.prompt(sample), use_cache=True, logits_to_keep=1)
        logits = [out.logits[0]]
        if answer.shape[1] > 1:
            cache = out.past_key_values
            logits.append(
                self.model(input_ids=answer[:, :-1], past_key_values=cache, use_cache=True).logits[0]
            )
        return torch.cat(logits).double().log_softmax(-1)

    @contextmanager
    def cached_vision(self) -> Iterator[None]:
        """Run the vision tower once for each picture, and give its output back afterwards.

        Projector, selection and layout still run each time, by the patch's own hooks. On a repeat
        the feature layer's q_proj and k_proj run again as well, as selectors listen to them.
        """
        family, hf_config = self.source.family, self.source.config
        tower: Any = family.vision_tower(self.model)
        vision = family.vision_dims(hf_config)
        attention: Any = family.vision_layers(self.model)[vision.feature_layer].self_attn
        run, before = tower.forward, dict(vars(tower))
        seen: dict[Path | None, tuple[Any, Tensor]] = {}

        def forward(*args: Any, **kwargs: Any) -> Any:
            if self._picture in seen:
                output, query = seen[self._picture]
                attention.q_proj(query)
                attention.k_proj(query)
                return type(output)(**output)  # a copy: the model writes into what it gets
            inputs: list[Tensor] = []
            handle = attention.q_proj.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
            try:
                output = run(*args, **kwargs)
            finally:
                handle.remove()
            output = _trimmed(output, vision.feature_layer + 1)
            seen[self._picture] = output, inputs[0]
            return type(output)(**output)

        tower.__dict__["forward"] = forward
        try:
            yield
        finally:
            del tower.__dict__["forward"]
            if "forward" in before:
                tower.__dict__["forward"] = before["forward"]


def _trimmed(output: Any, used: int) -> Any:
    """A tower's output with one layer's hidden states only: a few dozen pictures have to fit."""
    states = output.hidden_states
    if states is not None:
        output.hidden_states = tuple(h if i == used else None for i, h in enumerate(states))
    return output
