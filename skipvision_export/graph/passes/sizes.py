"""What a graph says about the sizes of its own tensors, as symbols: enough to prove a Reshape harmless.

Some exporters flatten tokens for a Gemm, [B, S, D] to [B*S, D], and take the sizes to go back from a
Shape. Those stay right where a region gets fewer rows, as long as none of them is a number.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from skipvision_export.graph.passes.matching import constant_ints
from skipvision_export.graph.passes.regions import is_constant

BATCH, TOKENS, ROWS = "batch", "tokens", "batch*tokens"
# A number, one of the symbols above, or None: not known.
Size = int | str | None
Sizes = tuple[Size, ...]


class UnknownSizesError(Exception):
    """Why the sizes that a node makes cannot be told."""


def sizes_of(rank: int, value: ir.Value) -> Sizes:
    """Of tokens [B, S, F] (rank 3) or of rows [B*S, F] (rank 2)."""
    last = value.shape[-1] if value.shape is not None and len(value.shape) else None
    features = last if isinstance(last, int) else None
    return (BATCH, TOKENS, features) if rank == 3 else (ROWS, features)


def follow(node: ir.Node, known: dict[ir.Value, Sizes]) -> Sizes:
    """What a node makes of sizes: Gather, Slice, Concat, Mul and what only changes their form.

    known: of its inputs that are no constants. Raises UnknownSizesError.
    """
    kind = node.op_type
    given = [_read(value, known) for value in node.inputs if value is not None]
    if kind in ("Cast", "Identity", "Unsqueeze", "Squeeze"):
        return given[0]
    if kind == "Reshape" and len(given[1]) <= 1:
        return given[0]
    if kind == "Concat":
        return tuple(size for part in given for size in part)
    if kind == "Gather" and all(isinstance(i, int) for i in given[1]):
        return tuple(given[0][int(i)] for i in given[1])  # type: ignore[arg-type]
    if kind == "Slice" and given[3:4] in ([], [(0,)]) and given[4:5] in ([], [(1,)]):
        start, end = given[1][0], given[2][0]
        if isinstance(start, int) and isinstance(end, int):
            return given[0][start:end]
    if kind == "Mul" and all(len(part) == 1 for part in given):
        return (_product(given[0][0], given[1][0]),)
    raise UnknownSizesError("makes a size in a way that is not followed")


def reshaped(before: Sizes, target: Sequence[Size], copies_zero: bool) -> int:
    """Rank of tokens of sizes `before` after a Reshape to `target`: 3, or 2 where they are flattened.

    copies_zero: a 0 stands for the size that was there. Raises UnknownSizesError where the last axis
    would change, or where a number stands for the tokens.
    """
    sizes = [
        before[i] if size == 0 and copies_zero and i < len(before) else size for i, size in enumerate(target)
    ]
    wanted: Sequence[Size] = (BATCH, TOKENS) if len(sizes) == 3 else (ROWS,)
    free = sizes.count(-1)
    same = all(size in (want, -1) for size, want in zip(sizes[:-1], wanted, strict=False))
    features = before[-1]
    last = features is not None and (sizes[-1] == features or sizes[-1] == -1)
    if len(sizes) not in (2, 3) or not same or not last or free > 1:
        raise UnknownSizesError(f"reshapes tokens {_text(before)} to {_text(target)}, which may mix them")
    return len(sizes)


def _read(value: ir.Value, known: dict[ir.Value, Sizes]) -> Sizes:
    if value in known:
        return known[value]
    numbers = constant_ints(value) if is_constant(value) else None
    if numbers is None:
        raise UnknownSizesError(f"takes {value.name}, which is neither a constant nor a size")
    return tuple(numbers)


def _product(one: Size, two: Size) -> Size:
    if isinstance(one, int) and isinstance(two, int):
        return one * two
    if {one, two} == {BATCH, TOKENS}:
        return ROWS
    return one if two == 1 else two if one == 1 else None


def _text(sizes: Sequence[Size]) -> str:
    return f"[{', '.join('?' if size is None else str(size) for size in sizes)}]"
