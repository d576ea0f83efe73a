"""A decoder of random weights as each program runs it: sessions, inputs, and Hugging Face's own model."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch

from skipvision_export.benchmark.sibling import SiblingSizes, sibling_model
from skipvision_export.runtime.huge_pages import huge_pages
from skipvision_export.runtime.kv_cache import SharedCache
from skipvision_export.runtime.shared_weights import SharedWeights

SIZES = SiblingSizes(hidden=1024, intermediate=2816, layers=16, heads=16, vocab=32000)
KV_HEADS, HEAD_DIM = 8, 64
MAX_POSITIONS = 8192  # twice of what is cached at most
STEPS = 8  # decode steps of one measurement
Run = Callable[[], Any]


def sibling() -> Any:
    """The VLM that the decoder is of; rotations are tabulated for as many positions as the model names."""
    model = sibling_model(SIZES)
    model.config.text_config.max_position_embeddings = MAX_POSITIONS
    return model.eval()


def write_llama(vlm: Any, folder: Path) -> None:
    """The decoder of a LLaVA as a Llama, which genai's builder reads, with a tokenizer of one word."""
    from tokenizers import Tokenizer, models
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    llama = LlamaForCausalLM(vlm.config.text_config).to(vlm.dtype)
    llama.model.load_state_dict(vlm.model.language_model.state_dict())
    llama.lm_head.load_state_dict(vlm.lm_head.state_dict())
    llama.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({"<s>": 1, "</s>": 2, "a": 4}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>").save_pretrained(folder)


def session(
    file: Path, threads: int, weights: SharedWeights | None = None, *, ours: bool = False
) -> ort.InferenceSession:
    """On the CPU, every optimization on.

    weights: shared with other sessions; ours: with what OrtBackend does for sessions that share none.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    if weights is not None:
        weights.give(options, file)
    with huge_pages() if ours and weights is None else contextlib.nullcontext():
        return ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


class Inputs:
    """Inputs of any decoder graph, by the names that genai and this package share."""

    def __init__(self, embeds: np.ndarray) -> None:
        """embeds: [1, S, D]."""
        self.embeds = embeds

    def known(self, graph: ort.InferenceSession, cached: int, new: int, kept: int = 0) -> dict[str, Any]:
        """What a graph takes beside K/V, for `new` tokens behind `cached` ones; `kept` rows skip nothing."""
        rows = np.linspace(0, new - 1, kept).astype(np.int64) if kept else np.arange(new)
        every = {
            "inputs_embeds": self.embeds[:, :new],
            "attention_mask": np.ones((1, cached + new), np.int64),
            "position_ids": np.arange(cached, cached + new)[None],
            "ffn_index": rows,
            "kv_keep_index": rows[None],
        }
        names = {value.name for value in graph.get_inputs()}
        return {name: np.ascontiguousarray(array) for name, array in every.items() if name in names}

    def prefill(self, graph: ort.InferenceSession, tokens: int, kept: int = 0) -> Run:
        """Runs a graph on an empty cache; returns logits [vocab]."""
        return _run(graph, self.known(graph, 0, tokens, kept) | _cache(graph, 0))

    def joined(self, graph: ort.InferenceSession, cached: int) -> Run:
        """A decode graph that joins its cache anew in each step."""
        return _run(graph, self.known(graph, cached, 1) | _cache(graph, cached), STEPS)

    def shared(self, graph: ort.InferenceSession, cached: int) -> Run:
        """A decode graph over one buffer; every step is at the same place."""
        past = {
            name.replace("past_key_values", "present"): ort.OrtValue.ortvalue_from_numpy(array)
            for name, array in _cache(graph, cached).items()
        }
        cache = SharedCache(graph, past)
        feeds = self.known(graph, cached, 1)

        def run() -> Any:
            for _ in range(STEPS):
                cache.length = cached
                logits = cache.step(feeds)
            return logits.numpy()[0, -1].copy()

        return run


def _cache(graph: ort.InferenceSession, cached: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(1)
    names = sorted(v.name for v in graph.get_inputs() if v.name.startswith("past_key_values"))
    shape = (1, KV_HEADS, cached, HEAD_DIM)
    return {name: 0.1 * rng.standard_normal(shape).astype(np.float32) for name in names}


def _run(graph: ort.InferenceSession, feeds: dict[str, np.ndarray], times: int = 1) -> Run:
    """OrtValues in and out: nothing is copied to numpy but the logits."""
    values = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in feeds.items()}
    names = [value.name for value in graph.get_outputs()]

    def run() -> Any:
        for _ in range(times):
            done = graph.run_with_ort_values(names, values)
        return done[names.index("logits")].numpy()[0, -1].copy()

    return run


class HuggingFace:
    """The model itself."""

    def __init__(self, model: Any, embeds: np.ndarray) -> None:
        """embeds: [1, S, D]."""
        self.decoder, self.head = model.model.language_model, model.lm_head
        self.embeds = torch.from_numpy(embeds)

    @torch.no_grad()
    def _forward(self, tokens: int, cache: Any = None, position: int = 0) -> Any:
        out = self.decoder(
            inputs_embeds=self.embeds[:, :tokens],
            position_ids=torch.arange(position, position + tokens)[None],
            past_key_values=cache,
            use_cache=True,
        )
        return self.head(out.last_hidden_state[:, -1:])[0, -1].numpy()

    def prefill(self, tokens: int) -> Run:
        """Runs on an empty cache; returns logits [vocab]."""
        return lambda: self._forward(tokens)

    def decode(self, cached: int) -> Run:
        """Steps on the cache that other graphs read, cropped after each."""
        from transformers import DynamicCache

        rng = np.random.default_rng(1)
        shape = (1, KV_HEADS, cached, HEAD_DIM)
        names = sorted(
            f"past_key_values.{i}.{kind}" for i in range(SIZES.layers) for kind in ("key", "value")
        )
        arrays = {name: 0.1 * rng.standard_normal(shape).astype(np.float32) for name in names}
        cache: Any = DynamicCache()
        for i in range(SIZES.layers):
            k, v = (torch.from_numpy(arrays[f"past_key_values.{i}.{kind}"]) for kind in ("key", "value"))
            cache.update(k, v, i)

        def run() -> Any:
            for _ in range(STEPS):
                logits = self._forward(1, cache, cached)
                cache.crop(-1)
            return logits

        return run


def spread(values: Sequence[float] | np.ndarray) -> dict[str, float]:
    """Median, 10th and 90th percentile."""
    low, median, high = np.percentile(values, [10, 50, 90])
    return {"median": float(median), "p10": float(low), "p90": float(high)}
