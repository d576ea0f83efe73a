"""What all GPU benchmarks share: the device, timing by events, ceilings, floors, and result files.

Without a CUDA device, or with --small, everything runs at small size on the CPU, and its JSON says so.
Times are milliseconds. Two ceilings are measured first, a large matrix product and a large copy, and every
time is held against what its operations and bytes take at these.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from where import RESULTS, stamp, without_paths

Run = Callable[[], Any]


class CheckError(Exception):
    """A result is wrong: nothing is timed."""


@dataclass(frozen=True)
class Bench:
    """One benchmark's run.

    name: of the script; small: sizes for a CPU; rounds: timed after two for warming up; deadline: on
    time.monotonic(), None for none; file: JSON, None to print only.
    """

    name: str
    small: bool
    device: torch.device
    dtype: torch.dtype
    rounds: int
    deadline: float | None
    file: Path | None

    @property
    def cuda(self) -> bool:
        """Does it run on a GPU?"""
        return self.device.type == "cuda"

    def left(self) -> float:
        """Seconds until the deadline."""
        return float("inf") if self.deadline is None else self.deadline - time.monotonic()


def arguments(doc: str) -> argparse.ArgumentParser:
    """The options that every script has."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="small sizes on the CPU, also where a GPU is")
    parser.add_argument("--rounds", type=int, help="timed rounds (default: 9, small: 2)")
    parser.add_argument("--budget", type=float, help="seconds; what does not fit is left for the next run")
    parser.add_argument(
        "--json", type=Path, help="result (default on a GPU: benchmarks/results/gpu_NAME.json)"
    )
    return parser


def begin(name: str, args: argparse.Namespace) -> Bench:
    """The run that these options name."""
    small = args.small or not torch.cuda.is_available()
    file = args.json or (None if small else RESULTS / f"gpu_{name}.json")
    return Bench(
        name,
        small,
        torch.device("cpu" if small else "cuda"),
        torch.float32 if small else torch.bfloat16,
        args.rounds or (2 if small else 9),
        None if args.budget is None else time.monotonic() + args.budget,
        file,
    )


# -- results --------------------------------------------------------------------------------------------


class Results:
    """The JSON of a run, written after every cell, so that a stopped one loses nothing.

    A cell that the file holds already, of the same kind of device, versions and sources, is not measured
    again. The driver may be another one; all are listed.
    """

    def __init__(self, bench: Bench) -> None:
        """Read what is there."""
        self.bench = bench
        self.whole = stamp(bench.name, bench.small, bench.device, bench.dtype)
        self.whole |= {"ceilings": None, "cells": {}}
        self.whole["drivers"] = [str(self.whole["device"].get("driver"))]
        self.failed: list[str] = []
        self.left_out: list[str] = []
        if bench.file and bench.file.is_file():
            before = json.loads(bench.file.read_text(encoding="utf-8"))
            same = ("benchmark", "small", "dtype", "versions", "sources_sha256")
            device = before["device"]["name"] == self.whole["device"]["name"]
            if device and all(before.get(key) == self.whole[key] for key in same):
                self.whole["ceilings"], self.whole["cells"] = before["ceilings"], before["cells"]
                self.whole["drivers"] = sorted({*before["drivers"], *self.whole["drivers"]})

    @property
    def cells(self) -> dict[str, Any]:
        """What was measured, by name."""
        return self.whole["cells"]  # type: ignore[no-any-return]

    def ceilings(self) -> Ceilings:
        """Measured once for a file."""
        if self.whole["ceilings"] is None:
            self.whole["ceilings"] = vars(measure_ceilings(self.bench))
            self.save()
        return Ceilings(**self.whole["ceilings"])

    def cell(self, name: str, measure: Callable[[], dict[str, Any]], needs: float = 0) -> None:
        """Measure one cell, unless it is there, or fewer than `needs` seconds are left.

        Running out of memory is a result; any other error is kept, and makes the script exit 1.
        """
        if name in self.cells and "error" not in self.cells[name]:
            return
        if self.bench.left() < needs:
            self.left_out.append(name)
            return
        start = time.monotonic()
        try:
            row = measure()
        except torch.cuda.OutOfMemoryError as error:
            row = {"out_of_memory": str(error).splitlines()[0]}
        except Exception as error:
            traceback.print_exc()
            self.failed.append(name)
            row = {"error": without_paths(f"{type(error).__name__}: {error}".splitlines()[0])}
        row["seconds"] = round(time.monotonic() - start, 1)
        self.cells[name] = row
        self.save()
        free(self.bench)
        print(
            f"{self.bench.name}: {name} in {row['seconds']} s",
            row.get("error", ""),
            file=sys.stderr,
            flush=True,
        )

    def again(self, name: str, measure: Callable[[], dict[str, Any]]) -> None:
        """A cell that makes what others need, in every call."""
        self.cells.pop(name, None)
        self.cell(name, measure)

    def save(self) -> None:
        """Write the file."""
        if self.bench.file:
            self.bench.file.parent.mkdir(parents=True, exist_ok=True)
            part = self.bench.file.with_suffix(".part")
            part.write_text(json.dumps(self.whole, indent=1) + "\n", encoding="utf-8")
            part.replace(self.bench.file)

    def end(self, table: Callable[[dict[str, Any]], Sequence[str]]) -> int:
        """Print a table; the exit status: 1 where a cell failed, 3 where some are left for another run."""
        status = 1 if self.failed else 3 if self.left_out else 0
        self.whole["exit"] = status
        self.save()
        for line in table(self.whole):
            print(line)
        if self.left_out:
            print(f"out of time, run again for: {', '.join(self.left_out)}")
        if self.failed:
            print(f"failed: {', '.join(self.failed)}")
        return status


def as_found(name: str, cell: dict[str, Any]) -> str:
    """The line of a table for a cell that holds no times to lay out."""
    return f"{name}: { ({k: v for k, v in cell.items() if k != 'seconds'}) }"


def fits(run: Run) -> bool:
    """Does run() find the memory that it takes? Of a run that does not, nothing is held when this returns."""
    try:
        run()
    except torch.cuda.OutOfMemoryError:
        return False
    return True


def free(bench: Bench) -> None:
    """Give cached memory back."""
    gc.collect()
    if bench.cuda:
        torch.cuda.empty_cache()


# -- time -----------------------------------------------------------------------------------------------


def elapsed(bench: Bench, run: Run) -> float:
    """Milliseconds of run(), by CUDA events, or by the clock on a CPU."""
    if not bench.cuda:
        start = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - start)
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()  # what was queued before is not timed
    first.record()
    run()
    last.record()
    last.synchronize()
    return first.elapsed_time(last)


def interleave(bench: Bench, runs: dict[str, Run], seconds: float = 20) -> dict[str, list[float]]:
    """Milliseconds of each run and round, taken in turn, so that a change of clocks meets all alike.

    Each round begins with another contender and every second one goes backwards. Of long runs, as many rounds
    as `seconds` hold, three at least, behind one for warming up in place of two.
    """
    names, rounds, warmup = list(runs), bench.rounds, 2
    times: dict[str, list[float]] = {name: [] for name in names}
    turn = 0
    while turn < warmup + rounds:
        start, shift = time.monotonic(), turn % len(names)
        order = names[shift:] + names[:shift]
        for name in order if turn % 2 else reversed(order):
            taken = elapsed(bench, runs[name])
            if turn >= warmup:
                times[name].append(taken)
        if turn == 0 and (took := time.monotonic() - start) > 1:
            warmup, rounds = 1, min(rounds, max(3, int(seconds / took)))
        turn += 1
    return times


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, 10th and 90th percentile."""
    low, median, high = np.percentile(values, [10, 50, 90])
    return {"median": round(float(median), 5), "p10": round(float(low), 5), "p90": round(float(high), 5)}


def median(values: Sequence[float]) -> float:
    """Of a list."""
    return float(np.median(values))


def captured(bench: Bench, run: Run, pool: Any = None, warmed: bool = False) -> Run:
    """run() as a CUDA graph, which is replayed without the host's part; on a CPU run() itself.

    pool: memory shared with other graphs, none of whose inner tensors are read after another was replayed;
    warmed: its kernels ran before, and what libraries make at first use, which a capture forbids, is there.
    """
    if not bench.cuda:
        return run
    if not warmed:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            run()
        torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        run()
    return graph.replay


def graph_pool(bench: Bench) -> Any:
    """Memory that graphs share."""
    return torch.cuda.graph_pool_handle() if bench.cuda else None


def peak_bytes(bench: Bench, run: Run) -> int | None:
    """Bytes that run() takes beyond what is held before it; None on a CPU."""
    if not bench.cuda:
        run()
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


# -- what is possible -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ceilings:
    """Measured: operations a second of a product of random matrices, bytes (read and written) of a copy."""

    flops_per_s: float
    bytes_per_s: float

    def ms(self, flops: float = 0.0, nbytes: float = 0.0) -> float:
        """The least time of one phase, bound by its operations or by its bytes."""
        return 1e3 * max(flops / self.flops_per_s, nbytes / self.bytes_per_s)


def measure_ceilings(bench: Bench) -> Ceilings:
    """A square product in the run's type, and a copy far larger than any cache."""
    size, count = (8192, 1 << 30) if bench.cuda else (512, 1 << 22)
    a, b = (torch.randn(size, size, device=bench.device, dtype=bench.dtype) for _ in range(2))
    out = torch.empty_like(a)
    product = [elapsed(bench, lambda: torch.mm(a, b, out=out)) for _ in range(13)][3:]
    source = torch.randint(0, 255, (count,), dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    copy = [elapsed(bench, lambda: target.copy_(source)) for _ in range(13)][3:]
    return Ceilings(2e3 * size**3 / median(product), 2e3 * count / median(copy))


def share_of_saving(dense: float, ours: float, dense_floor: float, floor: float) -> float | None:
    """Time saved against dense as a share of what is saved at the floors; None where nothing can be."""
    promised = 1 - floor / dense_floor
    return None if promised <= 0 else (1 - ours / dense) / promised


def relative_error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """||found - wanted|| / ||wanted|| in float64; infinite where a number is not finite."""
    found, wanted = found.detach().double(), wanted.detach().to(found.device).double()
    if found.shape != wanted.shape or not bool(found.isfinite().all()):
        return float("inf")
    return float((found - wanted).norm() / wanted.norm().clamp(min=1e-30))


def require(what: str, error: float, limit: float) -> float:
    """The error; raises CheckError where it is not below the limit."""
    if not error < limit:
        raise CheckError(f"{what}: error {error:.2e}, limit {limit:.0e}")
    return error


def require_noticed(what: str, error: float, limit: float) -> float:
    """The error of a twin that is broken on purpose; raises CheckError where the limit would let it pass."""
    if not error > limit:
        raise CheckError(f"{what}: a broken twin's error is {error:.2e}, within the limit {limit:.0e}")
    return error
