"""int4 weights: what they cost in accuracy, and what they save in bytes and time, with and without Skip-FFN.

Run from the repository's root on an idle machine, about fifteen minutes on two cores:

python benchmarks/int4_cpu.py --json benchmarks/results/int4_cpu.json

Accuracy is that of the committed tiny VLM on its test set: dense on the checkpoint, quarter on its fine-tune.
Times are those of a Llama of random weights under a small LLaVA, in raw ONNX Runtime, contenders in turn:
prefill of 1,088 tokens with all, or 192, of them in the FFN and the cache, and decode behind that many.

--genai adds the int4 graph that onnxruntime-genai builds of the same weights, in an environment of its own:

python benchmarks/int4_cpu.py --write-model llama
python -m onnxruntime_genai.models.builder -m llama -o genai -p int4 -e cpu \
    --extra_options prune_lm_head=true exclude_embeds=true
python benchmarks/int4_cpu.py --genai genai --json benchmarks/results/int4_cpu.json
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from skipvision_export import Bundle, SkipVisionConfig
from skipvision_export.benchmark.accuracy import BundleAnswerer, evaluate
from skipvision_export.benchmark.parity import measure_gaps, prompts_from
from skipvision_export.benchmark.sibling import SiblingSizes, sibling_model
from skipvision_export.benchmark.timing import machine
from skipvision_export.exporter import trace_model
from skipvision_export.graph.passes.names import DECODE, EMBED, PREFILL
from skipvision_export.graph.widen import widen
from skipvision_export.models.loading import resolve_model
from skipvision_export.runtime.data import load_imagefolder
from skipvision_export.runtime.torch_reference import TorchReference
from skipvision_export.validation import tensor_gap

EXAMPLE = Path("examples/tiny_vlm")
MODELS = {"dense": "checkpoint", "quarter": "finetuned"}
SIZES = SiblingSizes(hidden=1024, intermediate=2816, layers=16, heads=16, vocab=32000)
TOKENS, KEPT = 1088, 192
STEPS = 8  # of decode in a round
FULL, INT4, EXACT, GENAI = "float32", "int4", "int4, float activations", "genai int4"
Run = Callable[[], Any]


def accuracy(samples: int, compared: int) -> dict[str, Any]:
    """By preset: exact match of full and int4 bundles, and the gaps of the int4 one."""
    asked = load_imagefolder(EXAMPLE / "test", samples)
    found: dict[str, Any] = {}
    with TemporaryDirectory() as scratch:
        for preset, name in MODELS.items():
            traced = trace_model(resolve_model(EXAMPLE / name))
            config = SkipVisionConfig.dense() if preset == "dense" else SkipVisionConfig.preset(preset)
            bundles = {
                kind: traced.write(Path(scratch) / preset / kind, config, weights=weights)
                for kind, weights in ((FULL, None), (INT4, "int4"))
            }
            answers = {kind: evaluate(BundleAnswerer(b), asked) for kind, b in bundles.items()}
            pairs = zip(answers[FULL].answers, answers[INT4].answers, strict=True)
            reference = TorchReference(traced.source, traced.model)
            report = measure_gaps(bundles[INT4], reference, prompts_from(asked[:compared])).to_json()
            found[preset] = {
                "model": f"{EXAMPLE.as_posix()}/{name}",
                "questions": len(asked),
                "accuracy": {kind: each.to_json() for kind, each in answers.items()},
                "same_answers": float(np.mean([a == b for a, b in pairs])),
                "gaps": {
                    kind: {key: gap[key] for key in ("passed", "n", "max_abs", "sqnr_db", "greedy_match")}
                    for kind, gap in report["gaps"].items()
                },
                "decoder_bytes": {kind: decoder_bytes(b) for kind, b in bundles.items()},
            }
            print(preset, {kind: each.accuracy for kind, each in answers.items()})
    return found


def decoder_bytes(bundle: Bundle) -> int:
    """Of both decoder graphs and their weights."""
    files = bundle.manifest.files.items()
    return sum(info.bytes for name, info in files if Path(name).name.startswith("decoder"))


def write_llama(folder: Path) -> None:
    """The benchmark's decoder as a Llama, which genai's builder reads, with a tokenizer of one word."""
    from tokenizers import Tokenizer, models
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    model = sibling_model(SIZES)
    llama = LlamaForCausalLM(model.config.text_config)
    llama.model.load_state_dict(model.model.language_model.state_dict())
    llama.lm_head.load_state_dict(model.lm_head.state_dict())
    llama.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({"<s>": 1, "</s>": 2, "a": 4}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>").save_pretrained(folder)


def session(file: Path, threads: int) -> ort.InferenceSession:
    """On the CPU, every optimization on."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    return ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def with_float_activations(bundle: Bundle) -> None:
    """Put NAME_exact.onnx beside the decoder graphs of an int4 bundle."""
    for graph in (PREFILL, DECODE):
        file = bundle.folder / bundle.manifest.graphs[graph].file
        model = ir.load(file)
        ir.save(widen(model), file.with_name(f"{graph}_exact.onnx"))


class Feeds:
    """Inputs of any decoder graph, by the names that genai and this package share."""

    def __init__(self, ids: Any, embeds: Any) -> None:
        """ids [1, S] and their embeddings [1, S, D]."""
        self.ids, self.embeds = ids, embeds
        self.rng = np.random.default_rng(1)

    def prefill(self, graph: ort.InferenceSession, kept: int) -> dict[str, ort.OrtValue]:
        """An empty cache; `kept` rows go through the FFN and stay in the cache."""
        rows = np.sort(np.random.default_rng(0).permutation(TOKENS)[:kept])
        # The last position is always one of them: its logits are read.
        rows[-1] = TOKENS - 1
        own = {"ffn_index": rows, "kv_keep_index": rows[None]}
        return self._make(graph, np.arange(TOKENS)[None], 0, own)

    def decode(self, graph: ort.InferenceSession, cached: int) -> dict[str, ort.OrtValue]:
        """One token behind `cached` ones, at position TOKENS."""
        return self._make(graph, np.array([[TOKENS]]), cached, {})

    def _make(self, graph: Any, positions: Any, cached: int, own: dict[str, Any]) -> dict[str, ort.OrtValue]:
        new = positions.shape[1]
        known = own | {
            "input_ids": self.ids[:, :new],
            "inputs_embeds": self.embeds[:, :new],
            "attention_mask": np.ones((1, cached + new), np.int64),
            "position_ids": positions,
        }
        feeds = {}
        for value in graph.get_inputs():
            if value.name in known:
                array = known[value.name]
            else:  # past_key_values.%d.key / .value [B, H, P, Dh]
                shape = [1, SIZES.heads // 2, cached, SIZES.hidden // SIZES.heads]
                array = 0.1 * self.rng.standard_normal(shape).astype(np.float32)
            feeds[value.name] = ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))
        return feeds


def runner(graph: ort.InferenceSession, feeds: dict[str, ort.OrtValue], times: int = 1) -> Run:
    """Runs a graph `times` times; OrtValues in and out, nothing copied to numpy."""
    names = [value.name for value in graph.get_outputs()]

    def run() -> Any:
        for _ in range(times):
            done = graph.run_with_ort_values(names, feeds)
        return done[names.index("logits")].numpy()

    return run


def interleaved(runs: dict[str, Run], rounds: int, each: int, what: str) -> dict[str, Any]:
    """Milliseconds of one of `each` repetitions, by contender and round; back and forth."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(-1, rounds):
        print(f"{what}: round {turn + 1} of {rounds}", end="\r", flush=True)
        for name in sorted(runs, reverse=bool(turn % 2)):
            start = time.perf_counter()
            runs[name]()
            if turn >= 0:
                times[name].append((time.perf_counter() - start) * 1e3 / each)
    return {name: spread(values) | {"rounds": len(values)} for name, values in times.items()} | {
        "ratios": {
            f"{over} / {name}": spread(np.array(times[over]) / np.array(times[name]))
            for over in (FULL, f"{FULL} dense", GENAI)
            for name in runs
            if over in runs and over != name
        }
    }


def spread(values: Sequence[float] | Any) -> dict[str, float]:
    """Median, 10th and 90th percentile."""
    low, median, high = np.percentile(values, [10, 50, 90])
    return {"median": float(median), "p10": float(low), "p90": float(high)}


def speed(rounds: int, threads: int, genai: Path | None) -> dict[str, Any]:
    """Bytes, milliseconds and ratios of every contender, and how far their logits are apart."""
    with TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        sibling_model(SIZES).save_pretrained(folder)
        traced = trace_model(resolve_model(folder))
        config = SkipVisionConfig.preset("skip-75")
        bundles = {
            kind: traced.write(Path(scratch) / kind, config, weights=weights)
            for kind, weights in ((FULL, None), (INT4, "int4"))
        }
        del traced
        shutil.rmtree(folder)
        with_float_activations(bundles[INT4])
        files = {kind: b.folder / "onnx" for kind, b in bundles.items()}
        names = {FULL: (FULL, ""), INT4: (INT4, ""), EXACT: (INT4, "_exact")}
        graphs = {
            kind: {g: session(files[where] / f"{g}{suffix}.onnx", threads) for g in (PREFILL, DECODE)}
            for kind, (where, suffix) in names.items()
        }
        sizes = {kind: decoder_bytes(b) for kind, b in bundles.items()}
        ids = np.random.default_rng(0).integers(4, SIZES.vocab, (1, TOKENS))
        none = np.zeros((0, 576, SIZES.hidden), np.float32)
        embeds = bundles[FULL].backend.run(EMBED, {"input_ids": ids, "image_features": none})
        feeds = Feeds(ids, embeds["inputs_embeds"].numpy())
        if genai is not None:
            whole = session(genai / "model.onnx", threads)
            graphs[GENAI] = {PREFILL: whole, DECODE: whole}
            sizes[GENAI] = sum(file.stat().st_size for file in genai.glob("model.onnx*"))
        prefill = {
            f"{kind} {how}": runner(graph[PREFILL], feeds.prefill(graph[PREFILL], kept))
            for kind, graph in graphs.items()
            for how, kept in (("dense", TOKENS), ("skip", KEPT))
            if not (kind == GENAI and how == "skip")
        }
        if genai is not None:
            prefill[GENAI] = prefill.pop(f"{GENAI} dense")
        logits = {name: run()[0, -1] for name, run in prefill.items() if "skip" not in name}
        result: dict[str, Any] = {
            "sizes": {
                **{
                    key: getattr(SIZES, key) for key in ("hidden", "intermediate", "layers", "heads", "vocab")
                },
                "tokens": TOKENS,
                "tokens_in_ffn": KEPT,
            },
            "decoder_bytes": sizes,
            # Of random weights, whose logits are noise: that contenders compute the same, no more.
            "logits_sqnr_db": {
                name: tensor_gap(logits[f"{FULL} dense"], found).sqnr_db
                for name, found in logits.items()
                if name != f"{FULL} dense"
            },
            "prefill_ms": interleaved(prefill, rounds, 1, "prefill"),
        }
        for cached in (TOKENS, KEPT):
            decode = {
                kind: runner(graph[DECODE], feeds.decode(graph[DECODE], cached), STEPS)
                for kind, graph in graphs.items()
            }
            what = f"decode at {cached}"
            result[f"decode_ms_at_{cached}"] = interleaved(decode, rounds, STEPS, what)
    return result


def main() -> None:
    """Write the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--compared", type=int, default=50, help="questions of the gaps")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--genai", type=Path, help="folder of the graph that genai's builder wrote")
    parser.add_argument("--write-model", type=Path, help="only write the model that it is built of")
    arguments = parser.parse_args()
    if arguments.write_model:
        write_llama(arguments.write_model)
        return
    timed = speed(arguments.rounds, arguments.threads, arguments.genai)
    result = {
        "machine": machine(),
        "threads": arguments.threads,
        "tiny_vlm": accuracy(arguments.samples, arguments.compared),
        "speed": timed,
    }
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
