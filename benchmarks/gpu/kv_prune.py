"""The KVPrune kernel: correct, clean under compute-sanitizer, and how near it comes to a plain copy.

python benchmarks/gpu/kv_prune.py               # on a GPU with nvcc
python benchmarks/gpu/kv_prune.py --small       # on a CPU: builds, emulates, and runs Triton's interpreter

Beside it torch's index_select and a Triton kernel, and a device-to-device copy of the bytes that are kept.
Every launch of a timed graph reads and writes another set of tensors, together several times the L2 cache.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from common import (
    Bench,
    CheckError,
    Results,
    arguments,
    as_found,
    begin,
    captured,
    interleave,
    require_noticed,
    spread,
)
from kv_prune_library import SOURCE, KVPrune, build, build_test
from shapes import SHAPES, TEXT, TEXT_BEFORE

# heads of K and V, head size
MODELS = {"llava-1.5-7b": (32, 128), "llava-llama3-8b": (8, 128)}
BATCHES = (1, 4, 8, 16, 32)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
WANTED = 0.85
MOST_SETS = 512
Prune = Callable[..., None]


# -- what is pruned -------------------------------------------------------------------------------------


def preset_keep(name: str) -> tuple[int, torch.Tensor]:
    """Positions of a prompt with one picture, and those kept [K]: in runs, as layouts have them."""
    layout = SHAPES[name].layout(SHAPES[name].preset)
    flags = [True] * TEXT_BEFORE + layout.kv_mask() + [True] * (TEXT - TEXT_BEFORE)
    return len(flags), torch.tensor(flags).nonzero().squeeze(1)


def scattered_keep(sequence: int, kept: int, batch: int = 1) -> torch.Tensor:
    """[B, K] int64, ascending, anywhere."""
    generator = torch.Generator().manual_seed(sequence + kept)
    rows = [torch.randperm(sequence, generator=generator)[:kept].sort().values for _ in range(batch)]
    return torch.stack(rows) if rows else torch.zeros(0, kept, dtype=torch.int64)


def cases() -> dict[str, tuple[int, int, int, torch.Tensor]]:
    """Name -> heads, head size, S, kept [K]."""
    found = {}
    for model, (heads, size) in MODELS.items():
        found[f"{model}, llava-100-156"] = (heads, size, *preset_keep("llava-1.5-7b"))
        found[f"{model}, 208 of 640"] = (heads, size, 640, scattered_keep(640, 208)[0])
    found["llava-llama3-8b, llava-hd-576-576"] = (8, 128, *preset_keep("llava-hd"))
    return found


# -- correctness ----------------------------------------------------------------------------------------


def expected(x: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
    """[B, H, S, Dh], [B, K] -> [B, H, K, Dh], by plain indexing."""
    rows = [x[b][:, keep[b]] for b in range(x.shape[0])]
    return torch.stack(rows) if rows else x[:, :, : keep.shape[1]]


def check(prune: Prune, device: torch.device, *, layouts: bool, powers: bool = False) -> dict[str, Any]:
    """Bit for bit against indexing, outputs poisoned before; raises CheckError with the case.

    layouts: in place as well, as a view and packed; powers: head sizes are powers of two only.
    """
    sizes = [(1, 1, 1, 1), (2, 3, 17, 5), (1, 8, 322, 166), (3, 2, 64, 64), (2, 4, 50, 0), (4, 2, 300, 299)]
    dims = (16, 128) if powers else (8, 80, 128, 3)
    count = 0
    for dtype in DTYPES:
        for batch, heads, sequence, kept in sizes:
            for size in dims:
                shape = (batch, heads, sequence, size)
                key, value = (torch.randn(shape).to(device, dtype) for _ in range(2))
                keep = scattered_keep(sequence, kept, batch).to(device)
                wanted = expected(key, keep), expected(value, keep)
                for layout in ("out", "view", "packed") if layouts else ("out",):
                    found = _pruned(prune, key.clone(), value.clone(), keep, layout)
                    equal = [torch.equal(_bits(a), _bits(b)) for a, b in zip(found, wanted, strict=True)]
                    if not all(equal):
                        raise CheckError(f"{shape}, {kept} kept, {dtype}, {layout}: not what indexing gives")
                    count += 1
    # A twin: one position off must be noticed.
    other = expected(key, (keep + 1).clamp(max=sequence - 1))
    error = float((_pruned(prune, key, value, keep, "out")[0].float() - other.float()).abs().max())
    return {"cases": count, "twin": require_noticed("kept positions off by one", error, 0.0)}


def _bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(torch.int16 if x.element_size() == 2 else torch.int32)


def _pruned(
    prune: Prune, key: torch.Tensor, value: torch.Tensor, keep: torch.Tensor, layout: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V after a call in one of the kernel's layouts."""
    batch, heads, sequence, size = key.shape
    kept = keep.shape[1]
    if layout == "out":
        outs = [torch.full((batch, heads, kept, size), float("nan"), device=key.device, dtype=key.dtype)]
        outs.append(outs[0].clone())
        prune(key, value, keep, *outs)
        return outs[0], outs[1]
    prune(key, value, keep, key, value, sequence if layout == "view" else kept)
    if layout == "view":
        return key[:, :, :kept], value[:, :, :kept]
    front = batch * heads * kept * size
    shape = (batch, heads, kept, size)
    return key.flatten()[:front].view(shape), value.flatten()[:front].view(shape)


def by_index_select(
    key: torch.Tensor,
    value: torch.Tensor,
    keep: torch.Tensor,
    key_out: torch.Tensor,
    value_out: torch.Tensor,
) -> None:
    """torch's way where every sample keeps the same positions: index_select twice."""
    torch.index_select(key, 2, keep[0], out=key_out)
    torch.index_select(value, 2, keep[0], out=value_out)


def triton_prune() -> Prune | None:
    """The Triton kernel, or None where there is no triton."""
    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")
    try:
        from kv_prune_triton import kv_prune
    except ImportError:
        return None
    return kv_prune


def sanitized(program: Path, bench: Bench) -> dict[str, Any]:
    """compute-sanitizer's verdict on the kernel's own test program, by tool."""
    limit = max(30.0, min(240.0, bench.left() / 2))
    tool = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(tool).is_file():
        return {"not_run": "compute-sanitizer is not here"}
    found: dict[str, Any] = {}
    for check_name in ("memcheck", "racecheck"):
        command = [tool, "--tool", check_name, "--error-exitcode", "9", str(program), "--quick"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=limit)
        except subprocess.TimeoutExpired:
            found[check_name] = {"not_run": f"took more than {limit:.0f} s"}
            continue
        lines = (done.stdout + done.stderr).strip().splitlines()
        found[check_name] = {"exit": done.returncode, "clean": done.returncode == 0, "last": lines[-1]}
    return found


def own_test(program: Path) -> dict[str, Any]:
    """kernel_test against its plain loop, and its broken twin; raises CheckError."""
    right = subprocess.run([program, "--quick"], capture_output=True, text=True, check=False, timeout=300)
    broken = subprocess.run(
        [program, "--quick", "--break"], capture_output=True, text=True, check=False, timeout=300
    )
    if right.returncode or broken.returncode != 1:
        raise CheckError(f"kernel_test: {right.stdout[-500:]} (exit {right.returncode}, {broken.returncode})")
    return {"said": right.stdout.strip().splitlines()[-1], "twin_exit": broken.returncode}


def emulated(folder: Path) -> dict[str, Any]:
    """The kernel's walk on a CPU, and its broken twin."""
    compiler = shutil.which("g++")
    if compiler is None:
        return {"not_run": "needs g++"}
    program = folder / "emulation"
    source = SOURCE / "tests" / "host_emulation.cpp"
    subprocess.run([compiler, "-std=c++17", "-O1", str(source), "-o", str(program)], check=True)
    right = subprocess.run([program], capture_output=True, text=True, check=False)
    broken = subprocess.run([program, "--break", "shift"], capture_output=True, text=True, check=False)
    if right.returncode or broken.returncode != 1:
        raise CheckError(f"emulation: {right.stdout[-500:]}")
    return {"said": right.stdout.strip().splitlines()[-1], "twin_exit": broken.returncode}


# -- time -----------------------------------------------------------------------------------------------


def measure(
    prunes: dict[str, Prune], bench: Bench, case: tuple[int, int, int, torch.Tensor], batch: int
) -> dict[str, Any]:
    """Microseconds of one layer by contender, and of a copy of the same bytes."""
    heads, size, sequence, kept = case
    keep = kept.expand(batch, -1).contiguous().to(bench.device)
    numbers = batch * heads * len(kept) * size
    width = torch.empty(0, dtype=bench.dtype).element_size()
    l2 = getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 0) if bench.cuda else 0
    sets = min(MOST_SETS, max(2, -(-4 * l2 // (2 * 2 * numbers * width))))
    shape, out = (batch, heads, sequence, size), (batch, heads, len(kept), size)

    def new(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes, device=bench.device, dtype=bench.dtype)

    tensors = [(new(*shape), new(*shape), keep, new(*out), new(*out)) for _ in range(sets)]
    # The copy reads what the kernels wrote: as many bytes, in one piece for K and V.
    flat = [(new(2 * numbers), new(2 * numbers)) for _ in range(sets)]

    def all_sets(prune: Prune) -> Callable[[], None]:
        def run() -> None:
            for one in tensors:
                prune(*one)

        return run

    def copies() -> None:
        for source, target in flat:
            target.copy_(source)

    runs = {name: captured(bench, all_sets(prune)) for name, prune in prunes.items()}
    runs["copy"] = captured(bench, copies)
    times = interleave(bench, runs)
    moved = 2 * 2 * numbers * width
    rows: dict[str, Any] = {}
    for name, values in times.items():
        each = [1e3 * ms / sets for ms in values]
        rows[name] = {"us": spread(each), "gb_per_s": moved / spread(each)["median"] / 1e3}
    for row in rows.values():
        row["of_copy"] = rows["copy"]["us"]["median"] / row["us"]["median"]
    return {"batch": batch, "bytes": moved, "sets": sets, "contenders": rows}


def goals(cells: dict[str, Any]) -> list[dict[str, Any]]:
    """Share of a copy's speed by case."""
    found = []
    for name, cell in cells.items():
        if "cuda" in cell.get("contenders", {}):
            share = cell["contenders"]["cuda"]["of_copy"]
            what = f"KVPrune, {name}: bytes per second of a copy"
            found.append({"goal": what, "wanted": WANTED, "measured": share, "reached": share >= WANTED})
    return found


def table(whole: dict[str, Any]) -> list[str]:
    """For people."""
    lines = []
    for name, cell in whole["cells"].items():
        if "contenders" not in cell:
            lines.append(as_found(name, cell))
            continue
        each = (
            f"{contender} {row['us']['median']:.2f} us ({row['of_copy']:.0%})"
            for contender, row in cell["contenders"].items()
        )
        lines.append(f"{name}: " + ", ".join(each))
    return lines


def main() -> int:
    """Command line."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--no-sanitizer", action="store_true")
    args = parser.parse_args()
    bench = begin("kv_prune", args)
    results = Results(bench)
    results.ceilings()
    prunes: dict[str, Prune] = {"index_select": by_index_select}
    with TemporaryDirectory() as scratch:
        folder = Path(scratch)
        kernel: list[KVPrune] = []

        def built() -> dict[str, Any]:
            capability = results.whole["device"].get("capability", "9.0")
            library = build(folder, capability)
            kernel.append(KVPrune(library))
            row = {"version": kernel[0].version, "bytes": library.stat().st_size, "capability": capability}
            if bench.cuda:
                row |= {"own_test": own_test(build_test(folder, library))}
                row |= {"torch": check(kernel[0], bench.device, layouts=True)}
            return row

        if bench.small and shutil.which("nvcc") is None:
            results.cells["build"] = {"not_run": "needs nvcc"}
        else:
            results.again("build", built)  # the library is not kept
        if bench.small:
            results.cell("emulation", lambda: emulated(folder))
        elif kernel and "error" not in results.cells["build"]:
            prunes = {"cuda": kernel[0], **prunes}
        triton = triton_prune()
        if triton is None:
            results.cells["triton"] = {"not_run": "needs triton"}
        else:
            results.cell("triton", lambda: check(triton, bench.device, layouts=False, powers=True))
            if bench.cuda and "twin" in results.cells["triton"]:
                prunes["triton"] = triton
        for name, case in cases().items() if "error" not in results.cells["build"] else ():
            for batch in [1] if bench.small else BATCHES:
                key = f"{name}, batch {batch}"
                results.cell(key, lambda c=case, b=batch: measure(prunes, bench, c, b), needs=5)
        if bench.cuda and kernel and not args.no_sanitizer:
            program = folder / "kernel_test"
            results.cell("sanitizer", lambda: sanitized(program, bench), needs=90)
    results.whole["goals"] = [] if bench.small else goals(results.cells)
    return results.end(table)


if __name__ == "__main__":
    sys.exit(main())
