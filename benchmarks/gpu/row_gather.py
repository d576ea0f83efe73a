"""What it costs to let only some rows through an FFN, apart from the FFN: gather, scatter and residual.

python benchmarks/gpu/row_gather.py

A norm and an MLP of LLaMA-3-8B and Vicuna-7B widths, 64 to 23,552 tokens, of which a quarter to a half
go through: all rows; the rows alone, with no gather (the least there could be); gathered and written back as
the reference's hooks do (a zeroed output, then transformers adds it to every row); and as forward.py and the
exported graphs do (only the rows are read and written). The overhead must stay below what the FFN saves.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from common import (
    Bench,
    Results,
    arguments,
    begin,
    captured,
    interleave,
    median,
    relative_error,
    require,
    require_noticed,
    spread,
)
from torch import Tensor, nn

WIDTHS = {"llava-llama3-8b": (4096, 14336), "llava-1.5-7b": (4096, 11008)}
SMALL = {"small": (64, 192)}
# Sequences, and the rows of them that go through: short prompts, the presets, and eight HD prompts at once.
SIZES = ((64, 16), (128, 32), (256, 64), (322, 166), (640, 208), (640, 320), (1218, 642), (2944, 1472))
LARGE = ((8 * 322, 8 * 166), (8 * 1218, 8 * 642), (8 * 2944, 8 * 1472))
LIMIT = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


class Layer:
    """Norm and MLP as transformers' Llama has them, and the ways to run some rows."""

    def __init__(self, hidden: int, intermediate: int, bench: Bench) -> None:
        """Random weights."""
        from transformers import LlamaConfig
        from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

        config: Any = LlamaConfig(hidden_size=hidden, intermediate_size=intermediate)
        torch.manual_seed(0)
        with torch.device(bench.device):
            self.mlp: nn.Module = LlamaMLP(config).to(bench.dtype)
            self.norm: nn.Module = LlamaRMSNorm(hidden).to(bench.dtype)

    def ffn(self, x: Tensor) -> Tensor:
        """[M, D] -> [M, D], without the residual."""
        out: Tensor = self.mlp(self.norm(x))
        return out

    def all_rows(self, h: Tensor, rows: Tensor) -> Tensor:
        """The dense layer."""
        return h + self.ffn(h)

    def alone(self, h: Tensor, rows: Tensor) -> Tensor:
        """As many rows, those that lie in front: no gather at all."""
        x = h[: len(rows)]
        return x + self.ffn(x)

    def hooks(self, h: Tensor, rows: Tensor) -> Tensor:
        """As skipvision_export.method.state: what the residual is added to has all rows."""
        out = self.ffn(h.index_select(0, rows))
        return h + out.new_zeros(h.shape).index_copy_(0, rows, out)

    def in_place(self, h: Tensor, rows: Tensor) -> Tensor:
        """As forward.py: nothing but the rows is touched."""
        x = h.index_select(0, rows)
        return h.index_copy_(0, rows, x + self.ffn(x))


@torch.no_grad()
def measure(layer: Layer, hidden: int, size: tuple[int, int], bench: Bench) -> dict[str, Any]:
    """One sequence length: milliseconds, overheads and whether they are below the saving."""
    length, count = size
    h = torch.randn(length, hidden, device=bench.device, dtype=bench.dtype)
    generator = torch.Generator().manual_seed(length)
    rows = torch.randperm(length, generator=generator)[:count].sort().values.to(bench.device)
    wanted = h.clone().float()
    wanted[rows] += _wide(layer, h[rows])
    limit = LIMIT[bench.dtype]
    errors = {}
    for name in ("hooks", "in_place"):
        errors[name] = require(name, relative_error(getattr(layer, name)(h.clone(), rows), wanted), limit)
    twin = layer.in_place(h.clone(), (rows + 1) % length)
    errors["twin"] = require_noticed("rows off by one", relative_error(twin, wanted), limit)
    runs: dict[str, Callable[[], Any]] = {}
    for name in ("all_rows", "alone", "hooks", "in_place"):
        runs[name] = captured(bench, _many(getattr(layer, name), h.clone(), rows))
    times = {name: [ms / REPEATS for ms in values] for name, values in interleave(bench, runs).items()}
    middle = {name: median(values) for name, values in times.items()}
    saved = middle["all_rows"] - middle["alone"]
    overhead = {name: middle[name] - middle["alone"] for name in ("hooks", "in_place")}
    return {
        "rows": count,
        "errors": errors,
        "ms": {name: spread(values) for name, values in times.items()},
        "saved_ms": saved,
        "overhead_ms": overhead,
        "overhead_of_saving": {name: cost / saved for name, cost in overhead.items()} if saved > 0 else None,
        "pays": {name: middle[name] < middle["all_rows"] for name in overhead},
    }


REPEATS = 8


def _many(run: Callable[[Tensor, Tensor], Tensor], h: Tensor, rows: Tensor) -> Callable[[], None]:
    def repeated() -> None:
        for _ in range(REPEATS):
            run(h, rows)

    return repeated


def _wide(layer: Layer, x: Tensor) -> Tensor:
    """The FFN of [M, D] in float32."""
    dtype = x.dtype
    wide = layer.mlp.float()(layer.norm.float()(x.float()))
    layer.mlp.to(dtype), layer.norm.to(dtype)
    return wide  # type: ignore[no-any-return]


def goals(cells: dict[str, Any]) -> list[dict[str, Any]]:
    """Does gathering pay, at every size?"""
    found = []
    for name, cell in cells.items():
        if "pays" in cell:
            pays = cell["pays"]["in_place"]
            found.append({"goal": f"row gather pays, {name}", "wanted": 1, "measured": pays, "reached": pays})
    return found


def table(whole: dict[str, Any]) -> list[str]:
    """For people."""
    lines = []
    for name, cell in whole["cells"].items():
        if "ms" not in cell:
            lines.append(f"{name}: {cell.get('error') or cell.get('out_of_memory')}")
            continue
        ms = {way: f"{row['median']:.3f}" for way, row in cell["ms"].items()}
        lines.append(
            f"{name}: ms {ms}, overhead {cell['overhead_of_saving']} of the saving, pays {cell['pays']}"
        )
    return lines


def main() -> int:
    """Command line."""
    bench = begin("row_gather", arguments(__doc__ or "").parse_args())
    results = Results(bench)
    results.ceilings()
    for name, (hidden, intermediate) in (SMALL if bench.small else WIDTHS).items():
        layer = Layer(hidden, intermediate, bench)
        for size in SIZES if bench.small else SIZES + LARGE:
            key = f"{name}, {size[1]} of {size[0]} rows"
            results.cell(key, lambda y=layer, h=hidden, s=size: measure(y, h, s, bench), needs=2)
    results.whole["goals"] = [] if bench.small else goals(results.cells)
    return results.end(table)


if __name__ == "__main__":
    sys.exit(main())
