"""How a mixture's experts are traced: each on the rows that chose it, in operators that every runtime has."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from skipvision_export.models.experts import experts_of

_NAME = "skipvision_by_rows"


def _by_rows(experts: Any, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """What transformers' experts compute, without a loop over those that are hit: all, maybe on no row.

    hidden [N, D]; index [N, K] int64, the experts that each row chose, and weights [N, K] -> [N, D].
    """
    out = torch.zeros_like(hidden)
    for number in range(experts.num_experts):
        own = torch.where(index == number, weights, 0.0).sum(-1, keepdim=True)
        rows = torch.nonzero(own)[:, 0]
        both = hidden[rows] @ experts.gate_up_of[number]
        made = experts._apply_gate(both) @ experts.down_of[number]
        out = out.index_add(0, rows, (made * own[rows]).to(out.dtype))
    return out


@contextlib.contextmanager
def traced_by_rows(model: nn.Module) -> Iterator[None]:
    """While it lasts, a model computes its experts so, if it has any; each has matrices of its own."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    mixtures = experts_of(model)
    if not mixtures:
        yield
        return
    config = mixtures[0].config
    before = config._experts_implementation
    ALL_EXPERTS_FUNCTIONS.register(_NAME, _by_rows)
    try:
        for each in mixtures:
            each.gate_up_of = nn.ParameterList(_matrices(each.gate_up_proj))
            each.down_of = nn.ParameterList(_matrices(each.down_proj))
        config._experts_implementation = _NAME
        yield
    finally:
        config._experts_implementation = before
        for each in mixtures:
            del each.gate_up_of, each.down_of


def _matrices(experts: Tensor) -> list[nn.Parameter]:
    """[E, out, in] as E matrices [in, out], in the same memory."""
    return [nn.Parameter(matrix.t(), requires_grad=False) for matrix in experts.data]
