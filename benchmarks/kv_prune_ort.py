"""What a custom KVPrune kernel for ONNX Runtime could save at most, as a share of prefill.

Run from the repository's root on an idle machine, about a minute on two cores:

python benchmarks/kv_prune_ort.py --json benchmarks/results/kv_prune_ort.json

KVPrune's function body alone, on keys and values of one layer's sizes, runs in turn with the whole exported
prefill graph on the same inputs. All layers' bodies together are all that any custom op could save, were it
free.
A custom-op library is added only if that is more than 10 % of prefill.
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
WORTH_IT = 0.10


def body_alone(prefill: onnx.ModelProto, heads: int, size: int) -> bytes:
    """A model of one KVPrune node with the function body of `prefill`."""
    kept = ["b", heads, "k", size]

    def tensor(name: str, kind: int, shape: list[int | str]) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, kind, shape)

    full = ["b", heads, "s", size]
    inputs = [tensor(name, TensorProto.FLOAT, full) for name in ("key", "value")]
    inputs.append(tensor("keep_index", TensorProto.INT64, ["b", "k"]))
    outputs = [tensor(name, TensorProto.FLOAT, kept) for name in ("key_out", "value_out")]
    node = helper.make_node(
        "KVPrune", [i.name for i in inputs], [o.name for o in outputs], domain="skipvision"
    )
    graph = helper.make_graph([node], "body", inputs, outputs)
    model = helper.make_model(graph, opset_imports=prefill.opset_import, functions=prefill.functions)
    model.ir_version = prefill.ir_version
    return model.SerializeToString()


def measure(bundle: Bundle, rounds: int) -> dict[str, Any]:
    """Prefill and the body alone, in turn; milliseconds, medians and [10th, 90th percentile]."""
    sizes = bundle.manifest.model
    inputs = bench_inputs(bundle, TEXT_TOKENS)
    captured: dict[str, Any] = {}
    run = bundle.backend.run

    def capture(graph: str, feeds: dict[str, Any]) -> dict[str, Any]:
        if graph == PREFILL:
            captured.update(feeds)
        return run(graph, feeds)

    bundle.backend.run = capture  # type: ignore[method-assign]
    bundle.generator.generate(inputs.input_ids, inputs.pixel_values, max_new_tokens=1)
    file = bundle.folder / bundle.manifest.graphs[PREFILL].file
    keep = captured["kv_keep_index"]
    tokens = inputs.input_ids.shape[1]
    model = onnx.load(str(file), load_external_data=False)
    body = ort.InferenceSession(body_alone(model, sizes.num_kv_heads, sizes.head_dim))
    rng = np.random.default_rng(0)
    shape = (1, sizes.num_kv_heads, tokens, sizes.head_dim)
    feeds = {name: rng.standard_normal(shape).astype(np.float32) for name in ("key", "value")}
    feeds["keep_index"] = keep
    names = ["key_out", "value_out"]
    times = np.empty((rounds, 2))
    for turn in range(-3, rounds):
        start = time.perf_counter()
        run(PREFILL, captured)
        middle = time.perf_counter()
        for _ in range(sizes.num_layers):
            body.run(names, feeds)
        if turn >= 0:
            times[turn] = middle - start, time.perf_counter() - middle
    share = times[:, 1] / times[:, 0]
    return {
        "preset": bundle.manifest.preset,
        "layers": sizes.num_layers,
        "prompt_tokens": tokens,
        "kept_tokens": keep.shape[1],
        "prefill_ms": float(np.median(times[:, 0]) * 1e3),
        "all_bodies_ms": float(np.median(times[:, 1]) * 1e3),
        "share": float(np.median(share)),
        "share_spread": [float(np.percentile(share, q)) for q in (10, 90)],
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
            low, high = runs[-1]["share_spread"]
            print(f"{preset}: all bodies are {runs[-1]['share']:.2%} [{low:.2%}, {high:.2%}] of prefill")
    pays = any(run["share"] > WORTH_IT for run in runs)
    print(f"a custom op can{'' if pays else 'not'} save more than 10 % of prefill")
    result = {"machine": machine(), "rounds": arguments.rounds, "runs": runs, "custom_op_may_pay": pays}
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
