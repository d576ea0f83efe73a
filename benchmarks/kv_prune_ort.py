"""What a custom KVPrune kernel for ONNX Runtime could save at most, as a share of prefill.

Run from the repository's root on an idle machine, about two minutes on two cores:

python benchmarks/kv_prune_ort.py --json benchmarks/results/kv_prune_ort.json

The exported prefill graph, whose KVPrune is a function body of standard operators, runs in turn with the
same graph where each KVPrune is a Slice of as many rows: one contiguous copy of the bytes that any kernel
must move, and no index at all. A custom op cannot be faster than that. A custom-op library is added only if
this bound is more than 10 % of prefill.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper

from skipvision_export import SkipVisionConfig
from skipvision_export.benchmark.sibling import TEXT_TOKENS, write_sibling
from skipvision_export.benchmark.timing import bench_inputs, machine
from skipvision_export.exporter import trace_model
from skipvision_export.graph.passes.names import PREFILL
from skipvision_export.models.loading import resolve_model
from skipvision_export.runtime.pipeline import Bundle

PRESETS = ("skip-75", "quarter")
WORTH_IT = 1.10


def with_slices(file: Path, kept: int) -> Path:
    """The graph with a Slice of the first `kept` positions for each output of a KVPrune."""
    model = onnx.load(str(file), load_external_data=False)
    nodes = []
    for node in model.graph.node:
        if node.op_type != "KVPrune":
            nodes.append(node)
            continue
        for source, out in zip(node.input[:2], node.output, strict=True):
            nodes.append(helper.make_node("Slice", [source, "bound.start", "bound.end", "bound.axis"], [out]))
            nodes[-1].name = f"Bound_{out}"
    for name, value in (("start", 0), ("end", kept), ("axis", 2)):
        model.graph.initializer.append(helper.make_tensor(f"bound.{name}", TensorProto.INT64, [1], [value]))
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    out = file.with_name("decoder_prefill_bound.onnx")
    onnx.save(model, str(out))
    return out


def measure(bundle: Bundle, rounds: int) -> dict[str, Any]:
    """Both graphs in turn on the same inputs; ratios of prefill, of each round."""
    inputs = bench_inputs(bundle, TEXT_TOKENS)
    captured: dict[str, Any] = {}
    run = bundle.backend.run

    def capture(graph: str, feeds: dict[str, Any]) -> dict[str, Any]:
        if graph == PREFILL:
            captured.update(feeds)
        return run(graph, feeds)

    bundle.backend.run = capture  # type: ignore[method-assign]
    bundle.generator.generate(inputs.input_ids, inputs.pixel_values, max_new_tokens=1)
    feeds = {
        name: value.numpy() if isinstance(value, ort.OrtValue) else value for name, value in captured.items()
    }
    file = bundle.folder / bundle.manifest.graphs[PREFILL].file
    kept = feeds["kv_keep_index"].shape[1]
    sessions = [ort.InferenceSession(str(f)) for f in (file, with_slices(file, kept))]
    values = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in feeds.items()}
    names = [out.name for out in sessions[0].get_outputs()]
    times: list[list[float]] = [[], []]
    for turn in range(rounds + 3):
        for i in (0, 1) if turn % 2 else (1, 0):
            start = time.perf_counter()
            sessions[i].run_with_ort_values(names, values)
            if turn >= 3:
                times[i].append((time.perf_counter() - start) * 1e3)
    body, bound = map(np.array, times)
    ratio = body / bound
    return {
        "preset": bundle.manifest.preset,
        "layers": bundle.manifest.model.num_layers,
        "prompt_tokens": int(feeds["inputs_embeds"].shape[1]),
        "kept_tokens": kept,
        "function_body_ms": float(np.median(body)),
        "lower_bound_ms": float(np.median(bound)),
        "ratio": float(np.median(ratio)),
        "ratio_spread": [float(np.percentile(ratio, q)) for q in (10, 90)],
    }


def main() -> None:
    """Write the JSON and print a line for each preset."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=41)
    arguments = parser.parse_args()
    runs = []
    with TemporaryDirectory() as scratch:
        write_sibling(Path(scratch) / "model")
        traced = trace_model(resolve_model(Path(scratch) / "model"))
        for preset in PRESETS:
            bundle = traced.write(Path(scratch) / preset, SkipVisionConfig.preset(preset))
            runs.append(measure(bundle, arguments.rounds))
            print(f"{preset}: function body / lower bound {runs[-1]['ratio']:.3f} {runs[-1]['ratio_spread']}")
    pays = all(run["ratio"] > WORTH_IT for run in runs)
    print(f"a custom op can{'' if pays else 'not'} save more than 10 % of prefill")
    result = {"machine": machine(), "rounds": arguments.rounds, "runs": runs, "custom_op_pays": pays}
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
