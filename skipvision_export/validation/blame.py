"""Which tensor is the first that is not what it should be, and whether it broke there or error only grew."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from skipvision_export.validation.compare import Array, TensorGap, tensor_gap

# Least signal to noise, in dB, of a tensor computed from the reference's own values. A rounding of float32
# (24 bits) leaves 144 dB, of float16 (11) 66, of bfloat16 (8) 48. What adds up between two tensors, sums of
# some thousand products, a softmax and cancellation in the residual sum, costs up to 30 dB in float32, whose
# sums are rounded too; half types are summed in float32 and lose less. Least found in any family: 116 and 63.
ALONE_DB = {"float32": 100.0, "float16": 50.0, "bfloat16": 32.0}
# From the picture on each layer adds to what it was given; 20 dB are a hundred layers of equal noise. In half
# types near ties of the choice of tokens turn round on the way, which the precision gap measures.
CHAINED_DB = {"float32": 80.0}

Kind = Literal["break", "rounding"]


@dataclass(frozen=True)
class Point:
    """One tensor of one graph on both sides.

    name: `image_features`, `inputs_embeds`, `layers.3.attention` (the residual stream behind it),
    `layers.3.ffn`, `present.3.key`, `logits`, ...; alone: computed from the reference's own values on, so
    that nothing before it counts; chained: computed from the picture on.
    """

    graph: str
    name: str
    alone: TensorGap
    chained: TensorGap

    @property
    def layer(self) -> int | None:
        """The layer that computes it, where it is of one."""
        parts = self.name.split(".")
        return next((int(part) for part in parts if part.isdigit()), None)

    @property
    def in_attention(self) -> bool:
        """Is it computed before a layer's FFN?"""
        return self.layer is not None and not self.name.endswith(".ffn")

    def to_json(self) -> dict[str, Any]:
        """With both gaps."""
        return {
            "graph": self.graph,
            "tensor": self.name,
            "layer": self.layer,
            "alone": self.alone.to_json(),
            "chained": self.chained.to_json(),
        }


@dataclass(frozen=True)
class Verdict:
    """The first point over its limit.

    kind: `break` where it is wrong though what it was computed from is right; `rounding` where every tensor
    is right by itself and error grew on the way. shared: every layer of the graph breaks alike, so what they
    share is at fault, such as positions or the mask.
    """

    kind: Kind
    point: Point
    limit_db: float
    shared: bool = False


def same_rows(expected: Array, actual: Array) -> Array:
    """`expected` in the shape of `actual`: its last row where only that one was computed."""
    if actual.ndim >= 2 and actual.shape[-2] == 1 and expected.ndim >= 2 and expected.shape[-2] != 1:
        expected = expected[..., -1:, :]
    return expected.reshape(actual.shape) if expected.size == actual.size else expected


def point(graph: str, name: str, expected: Array, alone: Array, chained: Array) -> Point:
    """Compare one tensor."""
    gaps = [tensor_gap(same_rows(expected, actual), actual) for actual in (alone, chained)]
    return Point(graph, name, *gaps)


def blame(points: Sequence[Point], dtype: str = "float32") -> Verdict | None:
    """The first tensor that broke, in the order in which they are computed; else the first over the limit of
    grown error; None where nothing is.
    """
    broken = [p for p in points if not p.alone.sqnr_db >= ALONE_DB[dtype]]
    if broken:
        first = broken[0]
        of_graph = [p for p in points if p.graph == first.graph and p.in_attention]
        layers = {p.layer for p in of_graph}
        hit = {p.layer for p in broken if p.graph == first.graph and p.in_attention}
        return Verdict(
            "break", first, ALONE_DB[dtype], first.in_attention and len(layers) > 1 and hit == layers
        )
    if dtype in CHAINED_DB:
        for p in points:
            if not p.chained.sqnr_db >= CHAINED_DB[dtype]:
                return Verdict("rounding", p, CHAINED_DB[dtype])
    return None
