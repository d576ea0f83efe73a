"""Rows that are picked for an expert of a mixture, and what is known of a region's values on the way.

Some rows [B*S, F] are picked, by NonZero of one number for each row, and added to the rest again at their
places: row-wise, as each row alone says whether it is picked. Between, a value is a part of the rows, and
only parts of one pick may meet.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import onnx_ir as ir

from skipvision_export.graph.passes.matching import constant_ints
from skipvision_export.graph.passes.sizes import Sizes


class NotRowwiseError(Exception):
    """Why one node mixes tokens, or cannot be shown not to."""


@dataclass
class KnownRows:
    """What is proved so far: the rank of each row-wise value, and the sizes that some values hold."""

    ranks: dict[ir.Value, int]
    sizes: dict[ir.Value, Sizes] = field(default_factory=dict)
    # Of a part of the rows: the NonZero's output that picked them. And what else is made of that output.
    parts: dict[ir.Value, ir.Value] = field(default_factory=dict)
    picks: dict[ir.Value, tuple[ir.Value, str]] = field(default_factory=dict)

    def __contains__(self, value: ir.Value | None) -> bool:
        """Is it row-wise?"""
        return value in self.ranks

    def rank(self, node: ir.Node) -> int:
        """Of a node's row-wise inputs; they must agree."""
        rows = [value for value in node.inputs if value is not None and value in self.ranks]
        ranks = {self.ranks[value] for value in rows}
        if len(ranks) != 1:
            raise NotRowwiseError("joins tokens [B, S, F] and rows [B*S, F]" if ranks else "reads no tokens")
        if len({self.parts.get(value) for value in rows}) != 1:
            raise NotRowwiseError("joins rows that were picked apart")
        return ranks.pop()


# What an index of picked rows goes through from NonZero on, [2, P] -> [P, 2] -> [P] -> [P, 1].
_INDEX = {"Transpose": ("found", "turned"), "Gather": ("turned", "rows"), "Unsqueeze": ("rows", "column")}


def pick_rows(node: ir.Node, known: KnownRows) -> None:
    """NonZero, and what reads what is made of its output; raises NotRowwiseError."""
    kind, out, data = node.op_type, node.outputs[0], node.inputs[0]
    assert data is not None
    if kind == "NonZero":
        column = data.shape is not None and len(data.shape) == 2 and data.shape[1] == 1
        if known.ranks.get(data) != 2 or data in known.parts or not column:
            raise NotRowwiseError("looks for something else than one number of each row")
        known.picks[out] = out, "found"
        return
    if kind in _INDEX and data in known.picks:
        pick, stage = known.picks[data]
        before, after = _INDEX[kind]
        given = constant_ints(node.inputs[1]) if len(node.inputs) > 1 else None
        fits = {
            "Transpose": list(node.attributes.get_ints("perm", [1, 0]) or []) == [1, 0],
            "Gather": node.attributes.get_int("axis", 0) == 1 and given == [0],
            "Unsqueeze": given in ([1], [-1]),
        }
        if stage == before and fits[kind]:
            known.picks[out] = pick, after
            return
    if kind in ("GatherND", "ScatterND") and known.ranks.get(data) == 2 and data not in known.parts:
        pick, stage = known.picks.get(node.inputs[1], (None, ""))  # type: ignore[arg-type]
        if pick is not None and stage == "column":
            if kind == "GatherND" and not node.attributes.get_int("batch_dims", 0):
                known.ranks[out], known.parts[out] = 2, pick
                return
            if kind == "ScatterND" and known.parts.get(node.inputs[2]) is pick:  # type: ignore[arg-type]
                known.ranks[out] = 2
                return
    raise NotRowwiseError("does more with picked rows than to take them and put them back")
