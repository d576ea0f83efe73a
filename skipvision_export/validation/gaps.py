"""The gaps between a model and what is shipped of it, each compared apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from skipvision_export.validation.compare import Array, TensorGap, tensor_gap, worst

# Largest absolute difference of logits, keys and values that is still rounding of float32.
LIMIT = 1e-4


class Steps(Protocol):
    """What one generation left behind; see runtime.transcript.Transcript."""

    token_ids: list[int]
    logits: list[Array]
    kv: list[Array]


@dataclass(frozen=True)
class Choice:
    """How alike two sides chose the tokens of a number of pictures.

    tokens: share of the chosen tokens that both sides chose for the same group, over all pictures;
    pictures: share of pictures with exactly the same choice; limit: on tokens.
    """

    tokens: float
    pictures: float
    limit: float

    def to_json(self) -> dict[str, float]:
        """The fields as a JSON object."""
        return {"tokens": self.tokens, "pictures": self.pictures, "limit": self.limit}


@dataclass
class Gap:
    """One gap over a number of prompts.

    outputs: per output of the decoder the worst difference; greedy_match: share of prompts whose
    greedy tokens are all equal; limit: on max_abs of every output, then tokens must be equal too;
    min_db: on sqnr_db of every output, then tokens are only reported; neither: all is reported.
    not_finite: outputs with inf or nan where finite numbers were expected; dtype: what the compared
    side computed in; not_run: why nothing was compared, where that is in order.
    """

    name: str
    limit: float | None
    n: int = 0
    greedy_match: float = 1.0
    outputs: dict[str, TensorGap] = field(default_factory=dict)
    note: str = ""
    min_db: float | None = None
    choice: Choice | None = None
    not_finite: list[str] = field(default_factory=list)
    dtype: str = "float32"
    not_run: str = ""

    @property
    def passed(self) -> bool | None:
        """Nothing is over its limit; None where the gap was not run."""
        return None if self.not_run else not self.failures()

    def failures(self) -> list[str]:
        """What is over its limit, each in words; empty where the gap was not run."""
        if self.not_run or (self.limit is None and self.min_db is None):
            return []
        found = [] if self.n else ["nothing was compared"]
        if self.not_finite:
            found.append(_not_finite(self.not_finite, self.dtype))
        for name, gap in self.outputs.items():
            # Not `>`: a nan is over every limit.
            if self.limit is not None and not gap.max_abs <= self.limit:
                found.append(f"{name} max_abs {gap.max_abs:.2e}, limit {self.limit:.0e}")
            if self.min_db is not None and not gap.sqnr_db >= self.min_db:
                found.append(f"{name} {gap.sqnr_db:.1f} dB, expected {self.min_db:.0f} or more")
        if self.limit is not None and self.greedy_match != 1.0:
            found.append(f"greedy tokens equal for {self.greedy_match:.1%} of the prompts only")
        if self.choice is not None and not self.choice.tokens >= self.choice.limit:
            found.append(
                f"{self.choice.tokens:.1%} of the chosen visual tokens are the same, expected "
                f"{self.choice.limit:.0%} or more"
            )
        return found

    @property
    def overall(self) -> TensorGap:
        """The worst over all outputs."""
        return worst(list(self.outputs.values()))

    def to_json(self) -> dict[str, Any]:
        """With the worst of all outputs beside each of them; numbers are null where it was not run."""
        numbers = dict.fromkeys(("max_abs", "cosine", "sqnr_db")) if self.not_run else self.overall.to_json()
        return {
            "passed": self.passed,
            "limit": self.limit,
            "n": self.n,
            "greedy_match": None if self.not_run else self.greedy_match,
            **numbers,
            "outputs": {name: gap.to_json() for name, gap in self.outputs.items()},
            **({} if self.min_db is None else {"min_sqnr_db": self.min_db}),
            **({} if self.choice is None else {"choice": self.choice.to_json()}),
            **({"not_finite": self.not_finite} if self.not_finite else {}),
            **({"not_run": self.not_run} if self.not_run else {}),
            **({"note": self.note} if self.note else {}),
        }


def _not_finite(names: list[str], dtype: str) -> str:
    where = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    if dtype == "float16":
        return f"float16 overflowed (inf or nan in {where}; its largest number is 65504): use bfloat16"
    return f"inf or nan in {where}"


def compare_steps(
    name: str,
    pairs: Sequence[tuple[Steps, Steps]],
    limit: float | None,
    note: str = "",
    dtype: str = "float32",
) -> Gap:
    """Compare generations pairwise: logits of every step, K and V of every layer after prefill.

    Steps are compared as long as both chose the same tokens, and one step beyond: there the inputs
    were still equal. Cached K and V are compared where both sides recorded them.
    dtype: what the second of each pair computed in; it only words what failed.
    """
    found: dict[str, list[TensorGap]] = {}
    not_finite: dict[str, None] = {}
    matches = []

    def compare(output: str, a: Array, b: Array) -> None:
        found.setdefault(output, []).append(tensor_gap(a, b))
        if np.isfinite(a).all() and not np.isfinite(b).all():
            not_finite[output] = None

    for expected, actual in pairs:
        matches.append(expected.token_ids == actual.token_ids)
        for step, (a, b) in enumerate(zip(expected.logits, actual.logits, strict=False)):
            compare("logits", a, b)
            if expected.token_ids[step] != actual.token_ids[step]:
                break
        if expected.kv and actual.kv:
            # A missing layer shows as a shape that differs.
            for i in range(max(len(expected.kv), len(actual.kv))):
                a = expected.kv[i] if i < len(expected.kv) else np.zeros(0)
                b = actual.kv[i] if i < len(actual.kv) else np.zeros(0)
                compare(f"present.{i // 2}.{'value' if i % 2 else 'key'}", a, b)
    outputs = {output: worst(gaps) for output, gaps in found.items()}
    match = float(np.mean(matches)) if matches else 0.0
    return Gap(name, limit, len(pairs), match, outputs, note, not_finite=list(not_finite), dtype=dtype)


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
