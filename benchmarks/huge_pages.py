"""A decode step alone in its process, its packed weights in small and in huge pages, and genai's graph.

The decoder of decoder_cpu.py, 1,088 cached tokens, one K/V buffer for past and present in all. Processes of
one contender each, in turn, so that none shares memory with another. genai's graph is built as
decoder_cpu.py says. Run from the repository's root on an idle machine, about two minutes:

python benchmarks/huge_pages.py --genai genai --json benchmarks/results/huge_pages.json
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from decoder_runs import SIZES, STEPS, Inputs, session, sibling, spread

from skipvision_export import SkipVisionConfig
from skipvision_export.benchmark.timing import machine
from skipvision_export.exporter import trace_skeleton
from skipvision_export.graph.passes.names import DECODE, ONNXRUNTIME
from skipvision_export.models.loading import resolve_model
from skipvision_export.runtime.huge_pages import available

CACHED, TIMES = 1088, 6
SMALL, HUGE, GENAI = "small pages", "huge pages", "genai, shared K/V"


def measure(graph: Path, huge: bool) -> tuple[float, float]:
    """Milliseconds of a decode step, the median of `TIMES` times STEPS, and seconds to load."""
    start = time.perf_counter()
    loaded = session(graph, 0, ours=huge)
    load = time.perf_counter() - start
    embeds = 0.02 * np.random.default_rng(0).standard_normal((1, 1, SIZES.hidden)).astype(np.float32)
    run = Inputs(embeds).shared(loaded, CACHED)
    run()
    times = []
    for _ in range(TIMES):
        start = time.perf_counter()
        run()
        times.append((time.perf_counter() - start) * 1e3 / STEPS)
    return float(np.median(times)), load


def compare(graphs: dict[str, Path], rounds: int) -> dict[str, Any]:
    """Each contender in a new process, in turn, every second round backwards."""
    context = multiprocessing.get_context("spawn")
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in graphs}
    for turn in range(rounds):
        print(f"round {turn + 1} of {rounds}", end="\r", flush=True)
        for name in list(graphs)[:: 1 if turn % 2 else -1]:
            with context.Pool(1) as pool:
                found[name].append(pool.apply(measure, (graphs[name], name == HUGE)))
    times = {name: np.array(values)[:, 0] for name, values in found.items()}
    return {
        "ms": {name: spread(values) for name, values in times.items()},
        "load_s": {name: float(np.median(np.array(values)[:, 1])) for name, values in found.items()},
        "speedup": {name: spread(times[name] / times[HUGE]) for name in times if name != HUGE},
    }


def main() -> None:
    """Write the JSON and print what was found."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--genai", type=Path, help="folder with fp32/ that genai's builder wrote")
    arguments = parser.parse_args()
    if not available():
        raise SystemExit("this system gives no huge pages to those who ask")
    with TemporaryDirectory() as scratch:
        source = Path(scratch) / "model"
        sibling().save_pretrained(source)
        traced = trace_skeleton(resolve_model(source))
        bundle = traced.write(Path(scratch) / "bundle", SkipVisionConfig.preset("skip-75"))
        graph = bundle.folder / bundle.manifest.variants[f"{DECODE}.{ONNXRUNTIME}"].file
        graphs = {SMALL: graph, HUGE: graph}
        if arguments.genai:
            graphs[GENAI] = arguments.genai / "fp32" / "model.onnx"
        found = compare(graphs, arguments.rounds)
    result = {"machine": machine(), "cached": CACHED, "rounds": arguments.rounds} | found
    print(json.dumps(result, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
