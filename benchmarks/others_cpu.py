"""Decoders of onnxruntime-genai's builder before and after `skipvision rewrite`, on a CPU.

The model and the graphs are those of benchmarks/decoder_cpu.py (hidden 1024, 16 layers, 1,088 tokens of which
192 stay): its docstring says how to make them. Every graph takes its turn on the same inputs.

Run from the repository's root on an idle machine, about two minutes on two cores:

python benchmarks/others_cpu.py --genai genai --json benchmarks/results/others_cpu.json
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from decoder_runs import HEAD_DIM, STEPS, Run, session, spread

from skipvision_export.benchmark.timing import machine
from skipvision_export.graph.passes.names import past_name
from skipvision_export.rewriting import rewrite_decoder

TOKENS, KEPT = 1088, 192


class Graph:
    """A decoder graph and what it is fed."""

    def __init__(self, file: Path, threads: int) -> None:
        """threads: of ONNX Runtime."""
        self.session = session(file, threads)
        self.shapes = {value.name: value.shape for value in self.session.get_inputs()}
        self.present = [v.name for v in self.session.get_outputs() if v.name.startswith("present.")]
        rng = np.random.default_rng(0)
        width = self.shapes["inputs_embeds"][2]
        self.embeds = rng.standard_normal((1, TOKENS, width)).astype(np.float32) * 0.02

    def prefill(self, kept: int = TOKENS) -> Run:
        """All tokens, `kept` of which go through the FFNs and stay."""
        rows = np.linspace(0, TOKENS - 1, kept).astype(np.int64)
        feeds = self._feeds(0, TOKENS, rows, rows)
        return lambda: self.session.run(None, feeds)[0]

    def decode(self, cached: int) -> Run:
        """STEPS steps of one token behind `cached` ones, in the manner of a loop without a shared buffer."""
        feeds = self._feeds(cached, 1, np.zeros(1, np.int64), np.arange(cached + 1))
        feeds["position_ids"] = np.full((1, 1), TOKENS)
        feeds = {name: array for name, array in feeds.items() if name in self.shapes}

        def run() -> Any:
            for _ in range(STEPS):
                out = self.session.run(None, feeds)
            return out[0]

        return run

    def _feeds(self, cached: int, new: int, rows: np.ndarray, keep: np.ndarray) -> dict[str, Any]:
        feeds = {
            "inputs_embeds": self.embeds[:, :new],
            "attention_mask": np.ones((1, cached + new), np.int64),
            "position_ids": np.arange(cached, cached + new)[None],
            "ffn_index": rows,
            "kv_keep_index": keep[None],
        }
        for name in self.present:
            heads = self.shapes[past_name(name)][1]
            feeds[past_name(name)] = np.zeros((1, heads, cached, HEAD_DIM), np.float32)
        return {name: np.ascontiguousarray(array) for name, array in feeds.items() if name in self.shapes}


def measure(runs: dict[str, Run], rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds of each, median and 10th to 90th percentile, taken in turn."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 2):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if turn >= 2:  # after the warm-up
                times[name].append(1000 * (time.perf_counter() - start))
    return {name: spread(values) for name, values in times.items()}


def compare(file: Path, rounds: int, threads: int, scratch: Path) -> dict[str, Any]:
    """One graph before and after; a decode run is STEPS steps."""
    alone = scratch / "decode.onnx"
    made = rewrite_decoder(file, scratch / "skip.onnx", decode=alone, force=True)
    before, after = Graph(file, threads), Graph(scratch / "skip.onnx", threads)
    prefill = {
        "as exported": before.prefill(),
        "rewritten, every row": after.prefill(),
        "rewritten, skipping": after.prefill(KEPT),
    }
    gap = np.abs(prefill["as exported"]() - prefill["rewritten, every row"]()).max()
    decode = {
        "as exported, all cached": before.decode(TOKENS),
        "rewritten, all cached": after.decode(TOKENS),
        "rewritten, pruned cache": after.decode(KEPT),
        "graph for decode, pruned cache": Graph(alone, threads).decode(KEPT),
    }
    return {
        "ffns": len(made.ffns),
        "form": made.ffns[0].form,
        "max_abs_every_row": float(gap),
        "prefill_ms": measure(prefill, rounds),
        "decode_steps": STEPS,
        "decode_ms": measure(decode, rounds),
    }


def main() -> None:
    """Write the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--genai", type=Path, required=True, help="folder with the builder's fp32 and int4")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    result: dict[str, Any] = {"machine": machine(), "tokens": TOKENS, "kept": KEPT}
    with TemporaryDirectory() as scratch:
        for kind in ("fp32", "int4"):
            file = arguments.genai / kind / "model.onnx"
            result[kind] = compare(file, arguments.rounds, arguments.threads, Path(scratch))
            print(kind, json.dumps(result[kind], indent=1), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
