"""ONNX snippets that several selectors and merges share; N images, V tokens, D features."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir import tape

# Rows shorter than this count as zero: their cosine similarities are 0, not NaN.
EPS = 1e-12


def constant(t: tape.Tape, *values: float, dtype: type = np.int64) -> ir.Value:
    """A one-dimensional Constant."""
    return t.op("Constant", [], {"value": ir.tensor(np.array(values, dtype))})


def topk(t: tape.Tape, scores: ir.Value, k: ir.Value, largest: int = 1) -> tuple[ir.Value, ir.Value]:
    """TopK along the last axis, sorted, ties to the lower index (ONNX TopK): values and indices."""
    values, indices = t.op_multi_out(
        "TopK", [scores, k], {"axis": -1, "largest": largest, "sorted": 1}, num_outputs=2
    )
    return values, indices


def take_rows(t: tape.Tape, x: ir.Value, index: ir.Value) -> ir.Value:
    """[N, V, D] and [N, R] int64 -> [N, R, D]."""
    return t.op("GatherND", [x, t.op("Unsqueeze", [index, constant(t, -1)])], {"batch_dims": 1})


def unit_rows(t: tape.Tape, x: ir.Value) -> ir.Value:
    """[N, V, D] of any float type -> the rows at length 1, float32; zero rows stay zero."""
    x = t.op("Cast", [x], {"to": ir.DataType.FLOAT})
    length = t.op("ReduceL2", [x, constant(t, -1)], {"keepdims": 1})
    return t.op("Div", [x, t.op("Max", [length, constant(t, EPS, dtype=np.float32)])])


def transposed(t: tape.Tape, x: ir.Value) -> ir.Value:
    """[N, A, B] -> [N, B, A]."""
    return t.op("Transpose", [x], {"perm": [0, 2, 1]})
