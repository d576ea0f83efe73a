"""The four gaps between a model and what is shipped of it, each compared apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from skipvision_export.validation.compare import Array, TensorGap, tensor_gap, worst

# Largest absolute difference of logits, keys and values that is still rounding, by type.
LIMITS = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 2e-1}


class Steps(Protocol):
    """What one generation left behind; see runtime.generation.Transcript."""

    token_ids: list[int]
    logits: list[Array]
    kv: list[Array]


@dataclass
class Gap:
    """One gap over a number of prompts.

    outputs: per output of the decoder the worst difference; greedy_match: share of prompts whose
    greedy tokens are all equal; limit: on max_abs of every output, None where it is only reported.
    """

    name: str
    limit: float | None
    n: int = 0
    greedy_match: float = 1.0
    outputs: dict[str, TensorGap] = field(default_factory=dict)
    note: str = ""

    @property
    def passed(self) -> bool:
        """All tokens equal and every output within the limit."""
        if self.limit is None:
            return True
        within = all(gap.max_abs <= self.limit for gap in self.outputs.values())
        return within and self.greedy_match == 1.0 and self.n > 0

    @property
    def overall(self) -> TensorGap:
        """The worst over all outputs."""
        return worst(list(self.outputs.values()))

    def to_json(self) -> dict[str, Any]:
        """With the worst of all outputs beside each of them."""
        return {
            "passed": self.passed,
            "limit": self.limit,
            "n": self.n,
            "greedy_match": self.greedy_match,
            **self.overall.to_json(),
            "outputs": {name: gap.to_json() for name, gap in self.outputs.items()},
            **({"note": self.note} if self.note else {}),
        }


def compare_steps(
    name: str, pairs: Sequence[tuple[Steps, Steps]], limit: float | None, note: str = ""
) -> Gap:
    """Compare generations pairwise: logits of every step, K and V of every layer after prefill.

    Steps are compared as long as both chose the same tokens, and one step beyond: there the inputs
    were still equal. Cached K and V are compared where both sides recorded them.
    """
    logits: list[TensorGap] = []
    layers: dict[str, list[TensorGap]] = {}
    matches = []
    for expected, actual in pairs:
        matches.append(expected.token_ids == actual.token_ids)
        for step, (a, b) in enumerate(zip(expected.logits, actual.logits, strict=False)):
            logits.append(tensor_gap(a, b))
            if expected.token_ids[step] != actual.token_ids[step]:
                break
        if expected.kv and actual.kv:
            # A missing layer shows as a shape that differs.
            for i in range(max(len(expected.kv), len(actual.kv))):
                a = expected.kv[i] if i < len(expected.kv) else np.zeros(0)
                b = actual.kv[i] if i < len(actual.kv) else np.zeros(0)
                key = f"present.{i // 2}.{'value' if i % 2 else 'key'}"
                layers.setdefault(key, []).append(tensor_gap(a, b))
    outputs = {"logits": worst(logits)} if logits else {}
    outputs |= {key: worst(gaps) for key, gaps in layers.items()}
    return Gap(name, limit, len(pairs), float(np.mean(matches)), outputs, note)


def layer_rows(gap: Gap) -> list[dict[str, Any]]:
    """Keys and values of each layer in a row: where a difference begins."""
    count = sum(name.endswith(".key") for name in gap.outputs)
    return [
        {
            "layer": i,
            **{
                kind: gap.outputs[f"present.{i}.{kind}"].to_json()
                for kind in ("key", "value")
                if f"present.{i}.{kind}" in gap.outputs
            },
        }
        for i in range(count)
    ]
