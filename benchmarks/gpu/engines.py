"""TensorRT-RTX engines: do they deserialize and run on this GPU, and are they right?

python benchmarks/gpu/engines.py                            # with skipvision-export[trt-rtx]
python benchmarks/gpu/engines.py --small                    # builds, and records why nothing runs on a CPU
python benchmarks/gpu/engines.py --plugin libskipvision_kv_prune.so     # KVPrune as a plugin layer

Engines of the tiny VLM and of a two-layer, 4096-wide decoder are built by NVIDIA's compiler, which needs no
GPU. Each then runs in a process of its own, because what is not supported may end it: the exit status and the
exact words are kept. What runs is compared with ONNX Runtime, every step's logits up to the first greedy
token that differs, and timed. The execution provider of the same package is tried on the same graph.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from common import Bench, Results, arguments, as_found, begin, relative_error, spread
from shapes import Shape
from where import ROOT, without_paths

from skipvision_export.config import SkipVisionConfig

EXAMPLE = ROOT / "examples" / "tiny_vlm" / "finetuned"
RECIPE = ROOT / "engines" / "recipes" / "rtx.toml"
WIDE = Shape(
    "llama-4096x2",
    SkipVisionConfig.preset("llava-100-156"),
    intermediate=11008,
    layers=2,
    vocab=32000,
    vision_hidden=64,
    vision_layers=3,
    vision_heads=4,
)
TOKENS = 12
# Relative to ONNX Runtime on the CPU in the same type, which computes float16 in float32.
LIMIT = {"float32": 1e-3, "float16": 3e-2}


def bundles(folder: Path, bench: Bench) -> dict[str, Path]:
    """The tiny VLM in two types, and the wide decoder in float16, as bundles."""
    from skipvision_export.exporter import export, trace_skeleton
    from skipvision_export.models.loading import resolve_model

    preset = SkipVisionConfig.preset("quarter")
    found = {}
    for dtype in ("float32", "float16"):
        out = folder / f"tiny {dtype}"
        export(EXAMPLE, out, preset, dtype=dtype)
        found[f"tiny VLM, {dtype}"] = out
    shape = WIDE.small() if bench.small else WIDE
    shape.build(bench.device, torch.float16).save_pretrained(folder / "wide model")
    traced = trace_skeleton(resolve_model(folder / "wide model"), "float16")
    found[f"{shape.layers} layers of {shape.hidden}, float16"] = traced.write(
        folder / "wide", shape.preset
    ).folder
    return found


def built(bundle: Path, out: Path, plugin: Path | None) -> dict[str, Any]:
    """Build all engines; raises CompilerError with what the compiler said."""
    from skipvision_export.tensorrt.build import build
    from skipvision_export.tensorrt.recipe import Recipe

    made = build(bundle, Recipe.load(RECIPE), out, library=plugin)
    return {
        name: {"bytes": engine.bytes, "seconds": engine.seconds, "plugin_layers": engine.plugin_layers}
        for name, engine in made.engines.items()
    } | {"builder": next(f"{e.builder} {e.builder_version}" for e in made.engines.values())}


def run(bundle: Path, engines: Path, plugin: Path | None, rounds: int) -> dict[str, Any]:
    """In a process of its own: answers of the engines beside those of ONNX Runtime."""
    from skipvision_export import Bundle
    from skipvision_export.benchmark.timing import bench_inputs

    options: dict[str, Any] = {} if plugin is None else {"library": plugin}
    on_engines, reference = Bundle.load(bundle, engines=engines, **options), Bundle.load(bundle)
    inputs = bench_inputs(reference, 64)

    def answer(one: Bundle) -> Any:
        return one.generator.generate(
            inputs.input_ids, inputs.pixel_values, max_new_tokens=TOKENS, keep_logits=True
        )

    found, wanted = answer(on_engines), answer(reference)
    same = next(
        (i for i, (a, b) in enumerate(zip(found.token_ids, wanted.token_ids, strict=False)) if a != b), None
    )
    pairs = list(zip(found.logits, wanted.logits, strict=False))[: None if same is None else same + 1]
    errors = [relative_error(torch.from_numpy(a), torch.from_numpy(b)) for a, b in pairs]
    twin = relative_error(torch.from_numpy(np.roll(found.logits[0], 1)), torch.from_numpy(wanted.logits[0]))
    limit = LIMIT[reference.manifest.dtype]
    times = [answer(on_engines) for _ in range(rounds + 2)][2:]
    return {
        "error": max(errors),
        "limit": limit,
        "right": max(errors) < limit < twin,
        "twin": twin,
        "tokens_compared": len(pairs),
        "first_other_token": same,
        "prefill_ms": spread([one.prefill_ms for one in times]),
        "ttft_ms": spread([one.ttft_ms for one in times]),
        "step_ms": spread([one.decode_ms_per_token for one in times]),
    }


def execution_provider(bundle: Path) -> dict[str, Any]:
    """In a process of its own: the prefill graph in ONNX Runtime with the package's execution provider."""
    import onnxruntime as ort
    import onnxruntime_ep_nv_tensorrt_rtx as package

    from skipvision_export import Bundle

    library = next(Path(package.__file__).parent.glob("libonnxruntime_providers_nv*.so"))
    ort.register_execution_provider_library("NvTensorRtRtx", str(library))
    devices = [device for device in ort.get_ep_devices() if "Nv" in device.ep_name]
    if not devices:
        return {
            "right": False,
            "error": f"the provider finds no device: {[d.ep_name for d in ort.get_ep_devices()]}",
        }
    options = ort.SessionOptions()
    options.add_provider_for_devices(devices[:1], {})
    whole = Bundle.load(bundle)
    file = bundle / whole.manifest.graphs["decoder_prefill"].file
    session = ort.InferenceSession(str(file), options)
    return {"right": True, "providers": session.get_providers()}


def apart(*arguments: object) -> dict[str, Any]:
    """What a child process found, or how it ended and what it said."""
    command = [sys.executable, __file__, *map(str, arguments)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)
    except subprocess.TimeoutExpired:
        return {"ran": False, "exit": None, "said": ["took more than 100 s"]}
    if done.returncode == 0:
        return {"ran": True, **json.loads(done.stdout.splitlines()[-1])}
    said = without_paths(done.stderr.strip()).splitlines()
    return {"ran": False, "exit": done.returncode, "said": said[-8:]}


def table(whole: dict[str, Any]) -> list[str]:
    """For people."""
    return [as_found(name, cell) for name, cell in whole["cells"].items()]


def child(args: argparse.Namespace) -> int:
    """Run one bundle and print JSON."""
    from skipvision_export.errors import SkipVisionError

    try:
        if args.provider:
            found = execution_provider(args.provider)
        else:
            bundle, engines = args.run
            found = run(bundle, engines, args.plugin, args.rounds or 9)
    except SkipVisionError as error:
        print(error, file=sys.stderr)
        return 2
    print(json.dumps(found))
    return 0


def main() -> int:
    """Command line."""
    parser = arguments(__doc__ or "")
    parser.add_argument(
        "--plugin", type=Path, help="library of plugins/kv_prune, built with TensorRT's headers"
    )
    parser.add_argument("--run", nargs=2, type=Path, metavar=("BUNDLE", "ENGINES"), help=argparse.SUPPRESS)
    parser.add_argument("--provider", type=Path, metavar="BUNDLE", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run or args.provider:
        return child(args)
    bench = begin("engines", args)
    results = Results(bench)

    def compiler() -> dict[str, Any]:
        from skipvision_export.tensorrt.library import find

        return {"compiler": str(find("tensorrt-rtx").compiler)}

    results.again("compiler", compiler)
    if results.failed:
        return results.end(table)
    with TemporaryDirectory() as scratch:
        folder = Path(scratch)
        found: dict[str, Path] = {}

        def export() -> dict[str, Any]:
            found.update(bundles(folder, bench))
            return {"bundles": list(found)}

        results.again("export", export)  # the bundles are not kept
        options = ["--rounds", bench.rounds]
        options += [] if args.plugin is None else ["--plugin", args.plugin]
        for name, bundle in found.items():
            engines = folder / f"engines of {bundle.name}"
            results.again(f"{name}: build", lambda b=bundle, e=engines: built(b, e, args.plugin))
            if engines.is_dir():
                results.cell(f"{name}: run", lambda b=bundle, e=engines: apart("--run", b, e, *options))
            results.cell(f"{name}: execution provider", lambda b=bundle: apart("--provider", b), needs=20)
    wrong = [name for name, cell in results.cells.items() if cell.get("ran") and not cell["right"]]
    if wrong:
        results.failed += wrong
    return results.end(table)


if __name__ == "__main__":
    sys.exit(main())
