"""The head at the answers only: B samples, S sequence, M tokens of answers, D hidden size."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from skipvision_export.method.state import IGNORED


class AnswerRows:
    """Which rows of the last call the head saw.

    rows: [M] int64 in the flattened [B*S], the positions whose next token is one of an answer;
    targets: [M] int64, these tokens; logits: [1, M, vocab], kept where `keep` is set.
    """

    def __init__(self) -> None:
        """Nothing yet."""
        self.keep = False
        self.rows: Tensor | None = None
        self.targets: Tensor | None = None
        self.logits: Tensor | None = None

    def on_call(self, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        """Pre-hook on the whole model: give the loss the targets of the head's rows."""
        labels = kwargs.get("labels")
        self.rows = self.targets = self.logits = None
        if labels is None:
            return None
        following = nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED).flatten()
        self.rows = (following != IGNORED).nonzero().squeeze(1)
        self.targets = following[self.rows]
        kwargs["shift_labels"] = self.targets
        return args, kwargs

    def on_head(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        """Pre-hook on the head: [B, S, D] -> [1, M, D]."""
        if self.rows is None:
            return None
        return (args[0].flatten(0, 1).index_select(0, self.rows).unsqueeze(0), *args[1:])

    def after_head(self, module: nn.Module, args: Any, out: Tensor) -> None:
        """Hook on the head: keep its output for `scores`."""
        if self.keep:
            self.logits = out.detach()

    def scores(self, samples: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
        """Of the last call: summed loss, tokens, and whether all tokens are the likeliest, [B] each."""
        assert self.rows is not None and self.targets is not None and self.logits is not None
        logits = self.logits[0].float()
        losses = nn.functional.cross_entropy(logits, self.targets, reduction="none")
        wrong = (logits.argmax(-1) != self.targets).float()
        owner = self.rows // length

        def by_sample(values: Tensor) -> Tensor:
            return values.new_zeros(samples).index_add(0, owner, values)

        tokens = by_sample(torch.ones_like(losses))
        return by_sample(losses), tokens, (by_sample(wrong) == 0).float()


@contextmanager
def answers_only(model: nn.Module) -> Iterator[AnswerRows]:
    """Compute the head and the loss of a Hugging Face model at the labels that count, and nowhere else.

    The loss is the one of all rows, the same in value and gradient. Enter it inside of
    `apply_skip_vision`, whose hooks may change the labels.
    """
    state = AnswerRows()
    head: nn.Module = model.get_output_embeddings()  # type: ignore[operator]
    handles: list[Any] = [
        model.register_forward_pre_hook(state.on_call, with_kwargs=True),
        head.register_forward_pre_hook(state.on_head),
        head.register_forward_hook(state.after_head),
    ]
    try:
        yield state
    finally:
        for handle in handles:
            handle.remove()
