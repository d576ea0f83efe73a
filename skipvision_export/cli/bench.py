"""`skipvision bench`: time, memory, and how far both are from what the machine could do."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from skipvision_export.cli.common import BundleArgument, JsonOption, Progress, ThreadsOption, finish, si
from skipvision_export.errors import ConfigError

_MOST = 1024


def bench(
    bundle: BundleArgument,
    against: Annotated[
        Path | None, typer.Option(metavar="BUNDLE", help="A second bundle, such as a dense one.")
    ] = None,
    text_tokens: Annotated[int, typer.Option(min=4, help="Text tokens of the prompt.")] = 64,
    new_tokens: Annotated[
        str, typer.Option(metavar="N,...", help="Lengths of answers; the longest is decoded.")
    ] = "16",
    rounds: Annotated[int, typer.Option(min=1, help="Timed rounds.")] = 15,
    batch: Annotated[
        str | None, typer.Option(metavar="N,...", help="Also so many prompts in one run: 1,8,32.")
    ] = None,
    concurrency: Annotated[
        str | None, typer.Option(metavar="N,...", help="Also so many requests at the same time: 1,8,32.")
    ] = None,
    threads: ThreadsOption = 0,
    json: JsonOption = None,
) -> None:
    """Time BUNDLE: prefill, time per token, memory; with --against, interleaved, as ratios.

    Ratios are the other bundle over this one: 1.5 means this one is 1.5 times faster or smaller.

    Each phase is also told as a multiple of its floor on this machine: the bytes that it must read over the
    bandwidth, or its operations over the rate of matrix products, both measured here.

    --batch and --concurrency tell throughput, latency (median and 95th percentile) and peak memory at each
    number, with answers of the longest length.
    """
    from skipvision_export.benchmark.load import measure_load, points
    from skipvision_export.benchmark.timing import BenchSettings
    from skipvision_export.benchmark.timing import bench as run_bench
    from skipvision_export.runtime.pipeline import Bundle

    lengths = counts(new_tokens, "--new-tokens")
    if max(lengths) < 2:
        raise ConfigError(f"--new-tokens is {new_tokens}: expected a length of 2 or more, to time decoding")
    wanted = points(counts(batch, "--batch"), counts(concurrency, "--concurrency"))
    folders = [bundle] if against is None else [bundle, against]
    bundles = [Bundle.load(folder, threads=threads) for folder in folders]
    settings = BenchSettings(text_tokens, max(lengths), rounds, threads=threads, lengths=lengths)
    progress = Progress()
    result = run_bench(bundles, settings, progress)
    progress("")
    for run in result["runs"]:
        print(bench_line(run))
        print(f"  {floor_line(run, result['rates'])}")
    for name, ratio in result["ratios"].items():
        print(f"{name:<14} {ratio:.2f} x{_between(result['ratio_spread'].get(name))}")
    if wanted:
        result["load"] = []
        for point in measure_load(bundles, wanted, settings, progress):
            progress("")
            result["load"].append(point)
            for line in load_lines(point):
                print(line)
    finish(result, json)


def counts(text: str | None, option: str) -> tuple[int, ...]:
    """Numbers out of "1,8,32", ascending; none of None. Raises ConfigError for what is no such list."""
    if text is None:
        return ()
    try:
        found = sorted({int(part) for part in text.split(",")})
    except ValueError:
        found = []
    if not found or not 1 <= found[0] <= found[-1] <= _MOST:
        raise ConfigError(f"{option} is {text!r}: expected numbers from 1 to {_MOST}, such as 1,8,32")
    return tuple(found)


def bench_line(run: dict[str, Any]) -> str:
    """One bundle's numbers in a line."""
    kind = run["dtype"] + (f", {run['weights']} weights" if run["weights"] else "")
    whole = ", ".join(f"{one['new_tokens']} tokens {one['ms']:.1f} ms" for one in run["end_to_end"])
    return (
        f"{run['bundle']} ({run['preset']}, {run['backend']}, {kind}): prefill "
        f"{run['prefill_ms']:.1f} ms{_between(run['prefill_ms_spread'], 1)}, "
        f"{run['decode_ms_per_token']:.2f} ms a token, end to end {whole}, peak {run['peak_rss_mb']:.0f} MB, "
        f"K/V {si(run['kv_bytes'], 'B')}, {si(run['flops'], 'FLOP')}"
    )


def floor_line(run: dict[str, Any], rates: dict[str, Any]) -> str:
    """How many times its floor each phase takes, and what the floor comes from."""
    found = []
    for phase, floor in run["floor"].items():
        work = si(floor["flops"], "FLOP") if floor["bound"] == "flops" else si(floor["bytes"], "B")
        found.append(f"{phase} {floor['multiple']:.2f} x of {floor['floor_ms']:.3g} ms ({work})")
    fastest = max(rates["bytes_per_s"].values())
    return (
        f"over the floor: {', '.join(found)}; {rates['threads']} threads reach "
        f"{si(rates['matrix_flops_per_s'], 'FLOP/s')} and up to {si(fastest, 'B/s')}"
    )


def load_lines(point: dict[str, Any]) -> list[str]:
    """A point's numbers, a line for each bundle."""
    from skipvision_export.benchmark.load import point_name

    name, lines = point_name(point["batch"], point["concurrency"]), []
    for run in point["runs"]:
        tokens = f"{run['tokens_per_s']:.1f} tokens/s{_between(run['tokens_per_s_spread'], 1)}"
        lines.append(
            f"{name}, {run['bundle']}: {tokens}, {run['requests_per_s']:.2f} requests/s, latency "
            f"{run['latency_ms']:.1f} ms, 95th percentile {run['latency_p95_ms']:.1f}, peak "
            f"{run['peak_rss_mb']:.0f} MB, K/V {si(run['kv_bytes'], 'B')}"
        )
    if "ratios" in point:
        ratio, spread = point["ratios"]["tokens_per_s"], point["ratio_spread"]["tokens_per_s"]
        lines.append(f"{name}, throughput {ratio:.2f} x{_between(spread)}")
    return lines


def _between(spread: tuple[float, float] | None, digits: int = 2) -> str:
    return f" [{spread[0]:.{digits}f}, {spread[1]:.{digits}f}]" if spread else ""
