"""ONNX Runtime's CUDA provider: a 1.2B-shaped decoder in float16, dense and skipping, beside its peers.

python benchmarks/gpu/ort_cuda.py               # with onnxruntime-gpu
python benchmarks/gpu/ort_cuda.py --small       # a float32 twin on the CPU

One bundle is exported of random weights; its graphs run with all rows (dense) and with a preset's, in the
plain form and in the one with GroupQueryAttention, and beside them the graph of onnxruntime-genai's builder
and PyTorch (sdpa). Everything is bound to the device. First, against float32 PyTorch, teacher-forced: greedy
tokens must be PyTorch's own in the same type wherever the two best logits are further apart than its error.
Nodes that ONNX Runtime puts on the CPU are listed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from common import (
    Bench,
    CheckError,
    Results,
    arguments,
    as_found,
    begin,
    captured,
    free,
    interleave,
    relative_error,
    require,
    require_noticed,
    spread,
)
from forward import Runner
from ort_graphs import Graph, Steps, missing
from shapes import Contender, Shape

from skipvision_export.config import SkipVisionConfig

SHAPE = Shape(
    "llama-1.2b",
    SkipVisionConfig.preset("llava-100-156"),
    hidden=2048,
    intermediate=5632,
    layers=22,
    heads=16,
    kv_heads=8,
    vocab=32000,
    vision_hidden=256,
    vision_layers=4,
    vision_heads=4,
)
DENSE, SKIP = Contender("dense"), Contender("skip", SHAPE.preset)
CHECKED_STEPS, ROOM = 8, 32
PREFILLS, DECODES = (
    ("decoder_prefill", "decoder_prefill.onnxruntime"),
    (
        "decoder_decode",
        "decoder_decode.onnxruntime",
    ),
)
# float32 on a CPU; in float16 a multiple of what PyTorch itself is off by: other kernels round elsewhere.
LIMIT, MORE = 1e-4, 3.0


@dataclass
class Case:
    """Dense or skipping: what PyTorch did, teacher-forced on its own greedy tokens.

    embeds [B, S, D], rows and keep as inputs of a graph; steps: embeddings [B, 1, D] of the tokens;
    logits of all steps in the run's type and in float32.
    """

    runner: Runner
    embeds: np.ndarray
    steps: list[np.ndarray]
    logits: list[np.ndarray]
    wanted: list[np.ndarray]

    def feeds(self) -> dict[str, np.ndarray]:
        """Of a prefill graph."""
        runner, batch, length = self.runner, self.runner.batch, self.runner.length
        rows = np.arange(batch * length) if runner.rows is None else runner.rows.cpu().numpy()
        keep = np.arange(length) if runner.cache.keep is None else runner.cache.keep.cpu().numpy()
        return {
            "inputs_embeds": self.embeds,
            "attention_mask": np.ones((batch, length)),
            "position_ids": np.tile(np.arange(length), (batch, 1)),
            "ffn_index": rows,
            "kv_keep_index": np.tile(keep, (batch, 1)),
        }

    def own_error(self) -> float:
        """Of PyTorch in the run's type."""
        return _error(self.logits, self.wanted)


def _error(found: list[np.ndarray], wanted: list[np.ndarray]) -> float:
    pairs = zip(found, wanted, strict=True)
    return max(relative_error(torch.from_numpy(a), torch.from_numpy(b)) for a, b in pairs)


def case(model: Any, wide: Any, shape: Shape, contender: Contender, batch: int) -> Case:
    """Run PyTorch in both types."""
    runner = Runner(model, shape, contender, batch, ROOM)
    features = runner.features()
    embed = model.get_input_embeddings()
    with torch.no_grad():
        embeds = embed(runner.ids)
        embeds[:, runner.place] = features
    logits, steps = [runner.prefill(features).float().cpu().numpy()], []
    tokens = []
    for step in range(CHECKED_STEPS):
        tokens.append(runner.token.clone())
        with torch.no_grad():
            steps.append(embed(runner.token).float().cpu().numpy())
        logits.append(runner.decode(step).float().cpu().numpy())
    other = Runner(wide, shape, contender, batch, ROOM)
    wanted = [other.prefill(features.float()).cpu().numpy()]
    for step, token in enumerate(tokens):
        other.token.copy_(token)
        wanted.append(other.decode(step).cpu().numpy())
    return Case(runner, embeds.float().cpu().numpy(), steps, logits, wanted)


def prefilled(graph: Graph, one: Case, shape: Shape, other: dict[str, np.ndarray] | None = None) -> Any:
    """A binding that ran; other: inputs in place of the case's."""
    past = graph.empty_past(one.runner.batch, shape.hidden // shape.heads, shape.kv_heads)
    binding = graph.bound(one.feeds() | (other or {}), past, shared=False)
    graph.run(binding)
    return binding


def compared(prefill: Graph, decode: Graph, one: Case, shape: Shape, shared: bool) -> dict[str, Any]:
    """Logits of prefill and steps, and greedy tokens where they are clear; raises CheckError."""
    binding = prefilled(prefill, one, shape)
    found = [prefill.logits(binding)]
    steps = Steps(decode, prefill.present(binding), one.runner.length, ROOM, shared)
    found += [steps.step(embeds) for embeds in one.steps]
    limit = LIMIT if one.runner.dtype == torch.float32 else MORE * one.own_error()
    error = require("ONNX Runtime against float32", _error(found, one.wanted), limit)
    clear = wrong = 0
    for ours, theirs, wanted in zip(found, one.logits, one.wanted, strict=True):
        best = np.sort(wanted, axis=1)[:, -2:]
        noise = np.abs(theirs - wanted).max(1) + np.abs(ours - wanted).max(1)
        apart = best[:, 1] - best[:, 0] > noise
        clear += int(apart.sum())
        wrong += int((ours.argmax(1) != theirs.argmax(1))[apart].sum())
    if wrong:
        raise CheckError(f"{wrong} of {clear} clear greedy tokens differ from PyTorch's")
    row = {"error": error, "pytorch_error": one.own_error(), "limit": limit, "clear_tokens": clear}
    if one.runner.rows is not None:
        rows = np.arange(len(one.runner.rows))  # a twin: the last tokens skip, not the preset's
        twin = prefill.logits(prefilled(prefill, one, shape, {"ffn_index": rows}))
        row["twin"] = require_noticed("other rows", _error([twin], one.wanted[:1]), limit)
    return row


def check(
    graphs: dict[str, Graph], form: str, names: tuple[str, str], cases: dict[str, Case], shape: Shape
) -> dict[str, Any]:
    """One form, dense and skipping where it can; raises CheckError."""
    first, second = (graphs[name] for name in names)
    kinds = ["dense"] if form == "genai" else list(cases)
    return {kind: compared(first, second, cases[kind], shape, form != "plain") for kind in kinds}


def measure(
    graphs: dict[str, Graph], right: list[str], cases: dict[str, Case], shape: Shape, bench: Bench
) -> dict[str, Any]:
    """Milliseconds of prefill and of a step by contender, in turn; right: forms that passed their check."""
    prefills: dict[str, Callable[[], Any]] = {}
    steps: dict[str, Callable[[], Any]] = {}
    for kind, one in cases.items():
        prefills[f"PyTorch, {kind}"] = captured(bench, lambda c=one: c.runner.prefill(_features(c)))
        steps[f"PyTorch, {kind}"] = captured(bench, lambda c=one: c.runner.decode(0))
        for form, (first, second) in pairs(graphs).items():
            if form not in right or (form == "genai" and kind != "dense"):
                continue
            past = graphs[first].empty_past(one.runner.batch, shape.hidden // shape.heads, shape.kv_heads)
            binding = graphs[first].bound(one.feeds(), past, shared=False)
            prefills[f"{form}, {kind}"] = lambda g=graphs[first], b=binding: g.run(b)
            graphs[first].run(binding)
            shared = form != "plain"
            decoding = Steps(graphs[second], graphs[first].present(binding), one.runner.length, ROOM, shared)
            step = decoding.binding(one.steps[0])
            steps[f"{form}, {kind}"] = lambda g=graphs[second], b=step: g.run(b)
    return {
        "prefill_ms": {name: spread(times) for name, times in interleave(bench, prefills).items()},
        "step_ms": {name: spread(times) for name, times in interleave(bench, steps).items()},
        "flops": {kind: shape.prefill_flops(one.runner.layout) for kind, one in cases.items()},
        "cached": {kind: one.runner.lengths[0] for kind, one in cases.items()},
    }


def _features(one: Case) -> torch.Tensor:
    """The visual tokens out of what the decoder reads."""
    if not hasattr(one, "held"):
        visual = torch.from_numpy(one.embeds[:, one.runner.place])
        one.held = visual.to(one.runner.device, one.runner.dtype)  # type: ignore[attr-defined]
    return one.held  # type: ignore[attr-defined,no-any-return]


def pairs(graphs: dict[str, Graph]) -> dict[str, tuple[str, str]]:
    """Name of a form -> its prefill and decode graphs."""
    found = {"plain": (PREFILLS[0], DECODES[0]), "grouped": (PREFILLS[1], DECODES[1])}
    if "genai" in graphs:
        found["genai"] = ("genai", "genai")
    return {form: names for form, names in found.items() if all(name in graphs for name in names)}


def exported(model: Any, folder: Path, dtype: str) -> dict[str, Path]:
    """A bundle's decoder graphs, of weights that are written first."""
    from skipvision_export.exporter import trace_skeleton
    from skipvision_export.models.loading import resolve_model

    model.save_pretrained(folder / "model")
    traced = trace_skeleton(resolve_model(folder / "model"), dtype)
    bundle = traced.write(folder / "bundle", SHAPE.preset)
    infos = bundle.manifest.graphs | bundle.manifest.variants
    return {name: bundle.folder / infos[name].file for name in (*PREFILLS, *DECODES) if name in infos}


def genai_graph(model: Any, folder: Path, precision: str, provider: str) -> Path:
    """What onnxruntime-genai's builder writes of the decoder; raises ImportError without it."""
    from decoder_runs import write_llama
    from onnxruntime_genai.models import builder

    write_llama(model, folder / "llama")
    places = (str(folder / "llama"), "", str(folder / "genai"), precision, provider, str(folder / "cache"))
    options = ["prune_lm_head=true", "exclude_embeds=true"]
    builder.create_model(*places, **builder.parse_extra_options(*places, options))
    return folder / "genai" / "model.onnx"


def table(whole: dict[str, Any]) -> list[str]:
    """For people."""
    lines = []
    for name, cell in whole["cells"].items():
        if "prefill_ms" not in cell:
            lines.append(as_found(name, cell))
            continue
        for contender, row in cell["prefill_ms"].items():
            step = cell["step_ms"][contender]["median"]
            lines.append(f"{name}, {contender:<20} prefill {row['median']:8.2f} ms, step {step:7.3f} ms")
    return lines


def main() -> int:
    """Command line."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--batches", nargs="+", type=int)
    args = parser.parse_args()
    bench = begin("ort_cuda", args)
    shape = SHAPE.small() if bench.small else SHAPE
    dtype = torch.float32 if bench.small else torch.float16
    bench = replace(bench, dtype=dtype)
    results = Results(bench)
    if why := missing(bench.cuda):
        results.cells["export"], results.failed = {"error": why}, ["export"]
        return results.end(table)
    results.ceilings()
    model = shape.build(bench.device, dtype)
    wide = shape.build(bench.device, torch.float32)
    wide.load_state_dict({name: tensor.float() for name, tensor in model.state_dict().items()})
    graphs: dict[str, Graph] = {}
    with TemporaryDirectory() as scratch:
        folder = Path(scratch)

        def load(name: str, file: Path) -> dict[str, Any]:
            graphs[name] = Graph(file, bench.cuda)
            return {"onnxruntime": ort.__version__}

        def genai() -> dict[str, Any]:
            kind = ("fp32", "cpu") if bench.small else ("fp16", "cuda")
            try:
                return load("genai", genai_graph(model, folder, *kind))
            except ImportError as error:
                return {"not_run": f"needs onnxruntime-genai: {error}"}

        def export() -> dict[str, Any]:
            files.update(exported(model, folder, str(dtype).removeprefix("torch.")))
            return {"graphs": list(files)}

        files: dict[str, Path] = {}
        # The graphs are not kept, so these are made in every call.
        results.again("export", export)
        for name, file in files.items():
            results.again(f"load {name}", lambda n=name, f=file: load(n, f))
        results.again("genai builder", genai)
        for batch in args.batches or ([1] if bench.small else [1, 8]):
            cases = {one.name: case(model, wide, shape, one, batch) for one in (DENSE, SKIP)}
            right = []
            for form, names in pairs(graphs).items():
                key = f"check batch {batch}, {form}"
                results.cell(key, lambda f=form, n=names, c=cases: check(graphs, f, n, c, shape))
                right += [form] if "error" not in results.cells[key] else []
            results.cell(
                f"time batch {batch}", lambda c=cases, r=right: measure(graphs, r, c, shape, bench), needs=30
            )
            if batch == 1 and graphs:
                results.cell("placement", lambda c=cases: placement(graphs, c["skip"], shape, bench))
            free(bench)
    return results.end(table)


def placement(graphs: dict[str, Graph], one: Case, shape: Shape, bench: Bench) -> dict[str, Any]:
    """Where the nodes of each prefill ran."""
    found = {}
    for name in PREFILLS:
        if name in graphs:
            graph = Graph(Path(graphs[name].session._model_path), bench.cuda, profile=True)
            prefilled(graph, one, shape)
            found[name] = graph.placed()
    return found


if __name__ == "__main__":
    sys.exit(main())
