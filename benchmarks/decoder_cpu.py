"""One decoder of random weights in every form that can be had of it, prefill and decode, on a CPU.

A Llama (hidden 1024, 16 layers, FFN 2816, 16/8 heads, vocabulary 32000, float32) under a small vision tower:
Hugging Face PyTorch with SDPA, torch.onnx.export as it comes, the graphs of onnxruntime-genai's builder, and
this package's dense, skipping and merged prefill and its decode, in turn on the same inputs; then the same
with int4 weights.

Run from the repository's root on an idle machine, about twenty minutes on two cores. genai's graphs are built
beforehand, in an environment of their own, for fp32 and int4:

python benchmarks/decoder_cpu.py --write-model llama
python -m onnxruntime_genai.models.builder -m llama -o genai/int4 -p int4 -e cpu \
    --extra_options prune_lm_head=true exclude_embeds=true
python benchmarks/decoder_cpu.py --genai genai --json benchmarks/results/decoder_cpu.json
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from decoder_runs import (
    KV_HEADS,
    SIZES,
    STEPS,
    HuggingFace,
    Inputs,
    Run,
    session,
    sibling,
    spread,
    write_llama,
)

from skipvision_export import Bundle, SkipVisionConfig
from skipvision_export.benchmark.floor import decoder_dims
from skipvision_export.benchmark.flops import count_flops, layers_flops
from skipvision_export.benchmark.timing import machine
from skipvision_export.bundle import write_graphs
from skipvision_export.exporter import trace_skeleton
from skipvision_export.graph.clean import clear_inferred_types, unique_node_names
from skipvision_export.graph.passes.names import DECODE, EMBED, PREFILL
from skipvision_export.models.loading import resolve_model
from skipvision_export.models.reader import SourceReader
from skipvision_export.runtime.shared_weights import SharedWeights

TOKENS, KEPT = 1088, 192  # 1,024 visual tokens of which 128 are retained, 64 of text
# 576 visual tokens and 64 of text; merged to 100 + 156 and two summaries.
DENSE_640, MERGED, MERGED_KEPT = 640, 322, 166
PAUSE_S = 0.2
CACHED = (64, 192, 512, 1088, 2048, 4096)
# The forms for ONNX Runtime on a CPU, which OrtBackend runs.
GROUPED, SHARED = f"{PREFILL}.onnxruntime", f"{DECODE}.onnxruntime"
HF, GENAI, PLAIN = "Hugging Face, sdpa", "genai", "torch.onnx.export"
GENAI_SHARED = f"{GENAI}, shared K/V"
OURS, SKIP, MERGE = "dense", "skip", "merged"
# With the weights that both graphs read, not packed for the kernels: OrtBackend's default.
ONE_COPY, SKIP_ONE_COPY = "dense, weights shared", "skip, weights shared"
# With int4 weights nobody gives the logits of full ones; random weights make them noise.
INT4, INT4_SKIP, GENAI_INT4 = "int4 dense", "int4 skip", "genai int4"


def measure(runs: dict[str, Run], rounds: int, each: int, what: str) -> dict[str, np.ndarray]:
    """Milliseconds of one of `each` repetitions, by contender and round.

    Each round begins with another contender, every second one runs backwards: none has the same one in front
    of it each time, or itself. Each waits until the threads of the one before it sleep: ONNX Runtime's spin
    for work some time after a run, which takes cores from the next contender, and from a short one the larger
    share of its time.

    Raises SystemExit where contenders that do the same do not give the same logits.
    """
    first = {name: run() for name, run in runs.items()}
    same = [name for name in first if name not in (SKIP, SKIP_ONE_COPY, MERGE) and "int4" not in name]
    for name in same[1:]:
        gap = np.abs(first[name] - first[same[0]]).max() / np.abs(first[same[0]]).max()
        if not gap < 1e-3:
            raise SystemExit(f"{what}: {name} and {same[0]} differ by {gap:.1e} of the largest logit")
    times = np.empty((rounds, len(runs)))
    for turn in range(rounds):
        print(f"{what}: round {turn + 1} of {rounds}", end="\r", flush=True)
        order = np.roll(np.arange(len(runs)), -turn)[:: 1 if turn % 2 else -1]
        for i in order:
            run = list(runs.values())[i]
            time.sleep(PAUSE_S)
            start = time.perf_counter()
            run()
            times[turn, i] = (time.perf_counter() - start) * 1e3 / each
    return dict(zip(runs, times.T, strict=True))


def against_best(times: dict[str, np.ndarray], peers: Sequence[str], ours: str) -> dict[str, Any]:
    """The peer of the lowest median over ours, round by round."""
    best = min((name for name in peers if name in times), key=lambda name: float(np.median(times[name])))
    return {"peer": best, "speedup": spread(times[best] / times[ours])}


def prefill_flops(file: Path, tokens: int, kept: int | None = None) -> int:
    """Operations of a prefill graph."""
    sizes = {"batch": 1, "sequence": tokens, "ffn_tokens": kept or tokens, "kept": kept or tokens}
    return count_flops(onnx.load(file, load_external_data=False), sizes)


def whole_flops(bundle: Bundle, tokens: int) -> int:
    """Operations of a prefill as torch.onnx.export leaves it: every row of every layer, one of the head."""
    dims, layout = decoder_dims(bundle), SkipVisionConfig.dense().layout(tokens)
    head = 2 * dims.hidden_size * dims.vocab_size
    return layers_flops(dims, layout, 0, last_only=False) + head


def with_promise(
    found: dict[str, Any], times: dict[str, np.ndarray], ours: str, flops: dict[str, int]
) -> Any:
    """What the operations promise against a peer's dense graph, and the share of it that is measured.

    saving: 1 - time over time, as a share of 1 - operations over operations.
    """
    promised = flops[PLAIN] / flops[ours]
    saved = 1 - 1 / (times[found["peer"]] / times[ours])
    return found | {
        "promised": promised,
        "of_promise": found["speedup"]["median"] / promised,
        "saving_of_promise": float(np.median(saved)) / (1 - 1 / promised),
    }


def table(times: dict[str, np.ndarray]) -> dict[str, Any]:
    """Milliseconds by contender."""
    return {name: spread(values) for name, values in times.items()}


def decoder_files(bundle: Bundle) -> dict[str, Path]:
    """The decoder's graphs in a bundle."""
    infos = bundle.manifest.graphs | bundle.manifest.variants
    return {name: bundle.folder / infos[name].file for name in (PREFILL, GROUPED, SHARED)}


def decoder_bytes(bundle: Bundle) -> int:
    """Of the decoder's graphs and their weights."""
    files = bundle.manifest.files.items()
    return sum(info.bytes for name, info in files if Path(name).name.startswith("decoder"))


def plain_export(traced: Any, folder: Path, reader: SourceReader) -> dict[str, Path]:
    """The graphs as torch.onnx.export leaves them."""
    graphs: dict[str, ir.Model] = {name: traced.trace.graphs[name].clone() for name in (PREFILL, DECODE)}
    for model in graphs.values():
        clear_inferred_types(model)
        unique_node_names(model)
    folder.mkdir()
    written = write_graphs(graphs, folder, (PREFILL, DECODE), "decoder.onnx_data", reader)
    return {name: folder / info.file for name, info in written.graphs.items()}


@dataclass(frozen=True)
class Decoding:
    """What a process of decode needs: graphs by contender, the model's folder, embeddings [1, S, D]."""

    graphs: dict[str, Path]
    source: Path
    embeds: np.ndarray
    threads: int


def decode_times(task: Decoding, rounds: int) -> dict[int, dict[str, np.ndarray]]:
    """Milliseconds of a decode step by cached tokens, contender and round.

    A decode step is as fast as its weights can be read, and how fast that is depends on where in memory they
    came to lie: of equal graphs in one process those that load first were found 10 % slower than those that
    load last. So each process loads the contenders in another order, and every contender has every place.
    """
    order = list(task.graphs)
    orders = [order[n:] + order[:n] for n in range(len(order))]
    each = max(2, round(rounds / len(orders)))
    context = multiprocessing.get_context("spawn")
    found = []
    for n, names in enumerate(orders):
        print(f"decode: process {n + 1} of {len(orders)}")
        with context.Pool(1) as pool:
            found.append(pool.apply(decode_in, (task, names, each)))
    return {
        cached: {name: np.concatenate([one[cached][name] for one in found]) for name in found[0][cached]}
        for cached in CACHED
    }


def decode_in(task: Decoding, names: Sequence[str], rounds: int) -> dict[int, dict[str, np.ndarray]]:
    """The same of one process, which loads the graphs in this order."""
    if task.threads:
        torch.set_num_threads(task.threads)
    from transformers import LlavaForConditionalGeneration

    model = LlavaForConditionalGeneration.from_pretrained(task.source, dtype="float32").eval()
    inputs, hugging_face, weights = Inputs(task.embeds), HuggingFace(model, task.embeds), SharedWeights()
    shares = {ONE_COPY: weights}
    mine = (OURS, ONE_COPY, INT4)
    graphs = {
        name: session(task.graphs[name], task.threads, shares.get(name), ours=name in mine) for name in names
    }
    found = {}
    for cached in CACHED:
        runs: dict[str, Run] = {HF: hugging_face.decode(cached)}
        for name, graph in graphs.items():
            runs[name] = (inputs.joined if name in (PLAIN, GENAI) else inputs.shared)(graph, cached)
            if name == GENAI:
                runs[GENAI_SHARED] = inputs.shared(graph, cached)
        found[cached] = measure(runs, rounds, STEPS, f"decode at {cached}")
    return found


def compare(rounds: int, threads: int, genai: Path | None, scratch: Path) -> dict[str, Any]:
    """All measurements."""
    if threads:
        torch.set_num_threads(threads)
    source = scratch / "model"
    model = sibling()
    model.save_pretrained(source)
    start = time.perf_counter()
    traced = trace_skeleton(resolve_model(source))
    config = SkipVisionConfig.preset("skip-75")
    bundle: Bundle = traced.write(scratch / "bundle", config)
    export_s = time.perf_counter() - start
    print(f"exported in {export_s:.1f} s")
    int4: Bundle = traced.write(scratch / "int4", config, weights="int4")
    files = plain_export(traced, scratch / "plain", SourceReader(source))
    own, small = decoder_files(bundle), decoder_files(int4)
    ids = np.random.default_rng(0).integers(4, SIZES.vocab, (1, TOKENS))
    none = np.zeros((0, 576, SIZES.hidden), np.float32)
    features = bundle.backend.run(EMBED, {"input_ids": ids, "image_features": none})
    inputs = Inputs(features["inputs_embeds"].numpy())
    hugging_face = HuggingFace(model, inputs.embeds)
    del traced, model

    prefill = {PLAIN: session(files[PREFILL], threads), OURS: session(own[GROUPED], threads, ours=True)}
    if genai:
        prefill[GENAI] = session(genai / "fp32" / "model.onnx", threads)
    peers = [HF, GENAI, PLAIN]
    runs = {HF: hugging_face.prefill(TOKENS)}
    runs |= {name: inputs.prefill(graph, TOKENS) for name, graph in prefill.items()}
    runs[SKIP] = inputs.prefill(prefill[OURS], TOKENS, KEPT)
    weights = SharedWeights()
    one_copy = session(own[GROUPED], threads, weights)
    runs[ONE_COPY] = inputs.prefill(one_copy, TOKENS)
    runs[SKIP_ONE_COPY] = inputs.prefill(one_copy, TOKENS, KEPT)
    flops = {
        PLAIN: whole_flops(bundle, TOKENS),
        OURS: prefill_flops(own[PREFILL], TOKENS),
        SKIP: prefill_flops(own[PREFILL], TOKENS, KEPT),
    }
    times = measure(runs, rounds, 1, f"prefill of {TOKENS}")
    result: dict[str, Any] = {
        "export_s": export_s,
        "prefill": {
            str(TOKENS): {
                "tokens_in_ffn": {OURS: TOKENS, SKIP: KEPT},
                "ms": table(times),
                "flops": flops,
                "dense": against_best(times, peers, OURS),
                "skip": with_promise(against_best(times, peers, SKIP), times, SKIP, flops),
                "dense, weights shared": against_best(times, peers, ONE_COPY),
                "skip, weights shared": against_best(times, peers, SKIP_ONE_COPY),
            }
        },
    }
    runs = {name: inputs.prefill(graph, DENSE_640) for name, graph in prefill.items()}
    runs[MERGE] = inputs.prefill(prefill[OURS], MERGED, MERGED_KEPT)
    flops = {
        PLAIN: whole_flops(bundle, DENSE_640),
        OURS: prefill_flops(own[PREFILL], DENSE_640),
        MERGE: prefill_flops(own[PREFILL], MERGED, MERGED_KEPT),
    }
    times = measure(runs, rounds, 1, f"prefill of {DENSE_640}")
    result["prefill"][str(DENSE_640)] = {
        "tokens": {OURS: DENSE_640, MERGE: MERGED},
        "tokens_in_ffn": {OURS: DENSE_640, MERGE: MERGED_KEPT},
        "ms": table(times),
        "flops": flops,
        "dense": against_best(times, peers, OURS),
        "merged": with_promise(against_best(times, peers, MERGE), times, MERGE, flops),
    }
    genai_graph = prefill.get(GENAI)
    dense = prefill[OURS]
    del prefill, runs
    prefill = {OURS: dense, INT4: session(small[GROUPED], threads, ours=True)}
    if genai:
        prefill[GENAI_INT4] = session(genai / "int4" / "model.onnx", threads)
    runs = {name: inputs.prefill(graph, TOKENS) for name, graph in prefill.items()}
    runs[INT4_SKIP] = inputs.prefill(prefill[INT4], TOKENS, KEPT)
    times = measure(runs, rounds, 1, f"int4 prefill of {TOKENS}")
    result["int4"] = {
        "decoder_bytes": {OURS: decoder_bytes(bundle), INT4: decoder_bytes(int4)},
        "prefill_ms": table(times),
        "dense": against_best(times, [GENAI_INT4, OURS], INT4),
        "skip": against_best(times, [GENAI_INT4, OURS], INT4_SKIP),
    }
    genai_int4 = prefill.get(GENAI_INT4)
    del prefill, runs, dense

    del genai_graph, genai_int4, one_copy, weights, bundle, int4, hugging_face
    graphs = {PLAIN: files[DECODE], OURS: own[SHARED], ONE_COPY: own[SHARED], INT4: small[SHARED]}
    if genai:
        graphs |= {GENAI: genai / "fp32" / "model.onnx", GENAI_INT4: genai / "int4" / "model.onnx"}
    decode: dict[str, Any] = {}
    for cached, times in decode_times(Decoding(graphs, source, inputs.embeds, threads), rounds).items():
        decode[str(cached)] = {
            "ms": table(times),
            "dense": against_best(times, [*peers, GENAI_SHARED], OURS),
            "dense, weights shared": against_best(times, [*peers, GENAI_SHARED], ONE_COPY),
            "int4": against_best(times, [GENAI_INT4, OURS], INT4),
            "int4 over float32": spread(times[OURS] / times[INT4]),
        }
    return result | {"decode": decode}


def main() -> None:
    """Write the JSON and print what was found."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--genai", type=Path, help="folder with fp32/ and int4/ that genai's builder wrote")
    parser.add_argument("--write-model", type=Path, help="only write the model that it is built of")
    arguments = parser.parse_args()
    if arguments.write_model:
        write_llama(sibling(), arguments.write_model)
        return
    with TemporaryDirectory() as scratch:
        found = compare(arguments.rounds, arguments.threads, arguments.genai, Path(scratch))
    sizes = {key: getattr(SIZES, key) for key in ("hidden", "intermediate", "layers", "heads", "vocab")}
    result = {
        "machine": machine(),
        "rounds": arguments.rounds,
        "sizes": sizes | {"kv_heads": KV_HEADS},
    } | found
    print(json.dumps(found, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
