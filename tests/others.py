"""Decoders that other programs export, of the tiny model's text part, and running them."""

from __future__ import annotations

import contextlib
import gzip
import logging
import re
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from tiny import tiny_model, tiny_processor
from transformers import AutoModelForCausalLM

from skipvision_export.graph.passes.names import present_names

# What optimum-onnx 0.1.0 wrote of the tiny text model, without its weights: it wants transformers 4, so it
# cannot stand beside this package. In an environment of its own (transformers 4.57.6, torch 2.13.0):
#   optimum-cli export onnx --model llama --task text-generation-with-past out
#   python tests/others.py out/model.onnx
OPTIMUM = Path(__file__).parent / "data" / "optimum_llama.onnx.gz"


def write_text_model(folder: Path, llava=None) -> Path:
    """The tiny model's decoder as a model of its own, with its tokenizer."""
    llava = llava or tiny_model()
    text = AutoModelForCausalLM.from_config(llava.config.text_config)
    text.model.load_state_dict(llava.model.language_model.state_dict())
    text.lm_head.load_state_dict(llava.lm_head.state_dict())
    text.save_pretrained(folder)
    tiny_processor().tokenizer.save_pretrained(folder)
    return folder


def genai_decoder(model: Path, folder: Path, precision: str, *options: str) -> Path:
    """The graph that onnxruntime-genai's builder writes of a Hugging Face folder."""
    builder = pytest.importorskip("onnxruntime_genai.models.builder")
    places = (str(model), "", str(folder), precision, "cpu", str(folder / "cache"))
    with _logging_as_it_was():
        builder.create_model(*places, **builder.parse_extra_options(*places, list(options)))
    return folder / "model.onnx"


@contextlib.contextmanager
def _logging_as_it_was():
    """The builder sets the root logger up for itself."""
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    try:
        yield
    finally:
        root.setLevel(level)
        root.handlers[:] = handlers


def optimum_decoder(folder: Path, llava=None) -> Path:
    """The graph that optimum-onnx wrote, with the weights of the tiny model."""
    proto = onnx.load_from_string(gzip.decompress(OPTIMUM.read_bytes()))
    state = (llava or tiny_model()).state_dict()
    state = {name.replace(".language_model", ""): tensor.numpy() for name, tensor in state.items()}
    products = {node.input[1]: node.name for node in proto.graph.node if node.op_type == "MatMul"}
    for tensor in proto.graph.initializer:
        name = tensor.name
        if name in products:
            path = products[name].removesuffix("/MatMul").strip("/").replace("/", ".")
            tensor.CopyFrom(onnx.numpy_helper.from_array(state[f"{path}.weight"].T.copy(), name))
        elif name in state:
            tensor.CopyFrom(onnx.numpy_helper.from_array(state[name], name))
    folder.mkdir(parents=True, exist_ok=True)
    onnx.save(proto, folder / "model.onnx")
    return folder / "model.onnx"


def dequantized_state(file: Path) -> dict[str, torch.Tensor]:
    """Hugging Face names -> the numbers that genai's int4 matrices stand for, [N, K]."""
    from onnx.numpy_helper import to_array

    proto = onnx.load(file)
    held = {tensor.name: to_array(tensor) for tensor in proto.graph.initializer}
    state = {}
    for node in proto.graph.node:
        if node.op_type != "MatMulNBits":
            continue
        sizes = {a.name: a.i for a in node.attribute}
        packed, scales = held[node.input[1]], held[node.input[2]]
        n, k = sizes["N"], sizes["K"]
        nibbles = np.stack([packed & 15, packed >> 4], -1).reshape(n, -1, sizes["block_size"])
        # Counted from 8, as there are no zero points.
        numbers = (nibbles.astype(np.float32) - 8) * scales.reshape(n, -1, 1)
        matrix = torch.from_numpy(numbers.reshape(n, -1)[:, :k].copy())
        state[re.sub(r"\.MatMul\.weight_Q4$", "", node.input[1])] = matrix
    return state


def with_int4_of(llava, file: Path):
    """The same model with the numbers of a graph's int4 matrices."""
    text, state = llava.model.language_model, dequantized_state(file)
    with torch.no_grad():
        for name, matrix in state.items():
            if name == "lm_head":
                llava.lm_head.weight.copy_(matrix)
                continue
            layer, part, module = re.fullmatch(r"model\.layers\.(\d+)\.(\w+)\.(\w+)", name).groups()
            owner = text.layers[int(layer)]
            if module == "qkv_proj":
                each = [owner.self_attn.q_proj, owner.self_attn.k_proj, owner.self_attn.v_proj]
                for linear, rows in zip(each, matrix.split([e.out_features for e in each]), strict=True):
                    linear.weight.copy_(rows)
            else:
                inside = owner.self_attn if part == "attn" else owner.mlp
                getattr(inside, module).weight.copy_(matrix)
    return llava


class Decoder:
    """A decoder graph of any exporter in ONNX Runtime, rewritten or not."""

    def __init__(self, file: Path, embed: np.ndarray, head_size: int = 16) -> None:
        """embed: the table [vocab, D], for graphs that take embedded tokens; head_size: not in genai's."""
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        self.session = ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        self.inputs = {value.name: value.shape for value in self.session.get_inputs()}
        self.outputs = [value.name for value in self.session.get_outputs()]
        self.layers = sum(name.endswith(".key") for name in self.outputs)
        self.embed, self.head_size = embed, head_size

    def run(self, ids, past=None, rows=None, keep=None, position: int | None = None) -> dict[str, np.ndarray]:
        """New tokens ids [B, S] behind `past`.

        rows: what goes through the FFNs, every row by default (an array, or a dictionary by input);
        keep: [B, K] positions that stay, all by default; position: of the first new token.
        """
        ids = np.asarray(ids)
        batch, new = ids.shape
        cached = 0 if past is None else past["present.0.key"].shape[2]
        position = cached if position is None else position
        if not isinstance(rows, dict):
            index = np.arange(batch * new) if rows is None else np.asarray(rows)
            rows = {name: index for name in self.inputs if name.startswith("ffn_index")}
        if keep is None:
            keep = np.tile(np.arange(cached + new), (batch, 1))
        feeds = {
            "input_ids": ids,
            "inputs_embeds": self.embed[ids],
            "attention_mask": np.ones((batch, cached + new), np.int64),
            "position_ids": np.tile(np.arange(position, position + new), (batch, 1)),
            "kv_keep_index": keep,
            **rows,
        }
        for name in present_names("present", self.layers):
            taken = name.replace("present", "past_key_values")
            _, heads, _, size = self.inputs[taken]
            size = size if isinstance(size, int) else self.head_size
            empty = np.zeros((batch, heads, 0, size), np.float32)
            feeds[taken] = empty if past is None else past[name]
        feeds = {name: value for name, value in feeds.items() if name in self.inputs}
        return dict(zip(self.outputs, self.session.run(None, feeds), strict=True))

    def generate(self, ids, steps: int, rows=None, keep=None, shift: int = 0, decode: Decoder | None = None):
        """Greedy: ids, last logits [vocab] of each step, and what prefill gave.

        shift: what decode's positions are off by; decode: another graph for it.
        """
        out = self.run(ids, rows=rows, keep=keep)
        prefill, tokens, logits = out, [], []
        for step in range(steps):
            logits.append(out["logits"][0, -1])
            tokens.append(int(logits[-1].argmax()))
            if step < steps - 1:
                out = (decode or self).run([[tokens[-1]]], past=out, position=np.shape(ids)[1] + step + shift)
        return tokens, np.array(logits), prefill


def generate_in_one_buffer(decoder: Decoder, ids: np.ndarray, steps: int, rows: np.ndarray) -> np.ndarray:
    """Logits [steps, vocab] of ids [1, S] with one buffer for past and present, as genai runs a graph."""
    room, cached, logits = ids.shape[1] + steps, 0, []
    buffers = {}
    for name, shape in decoder.inputs.items():
        if name.startswith("past_key_values."):
            empty = np.zeros((1, shape[1], room, decoder.head_size), np.float32)
            buffers[name] = ort.OrtValue.ortvalue_from_numpy(empty)
    while len(logits) < steps:
        binding = decoder.session.io_binding()
        binding.bind_cpu_input("inputs_embeds", decoder.embed[ids])
        binding.bind_cpu_input("attention_mask", np.ones((1, cached + ids.shape[1]), np.int64))
        binding.bind_cpu_input("ffn_index", np.arange(1) if cached else rows)
        binding.bind_output("logits")
        for name, buffer in buffers.items():
            binding.bind_ortvalue_input(name, buffer)
            binding.bind_ortvalue_output(name.replace("past_key_values", "present"), buffer)
        decoder.session.run_with_iobinding(binding)
        cached += ids.shape[1]
        logits.append(binding.get_outputs()[0].numpy()[0, -1])
        ids = logits[-1].argmax().reshape(1, 1)
    return np.array(logits)


def store_without_weights(file: str) -> None:
    """Keep an export of optimum's as OPTIMUM."""
    proto = onnx.load(file)
    for tensor in proto.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT:
            tensor.ClearField("raw_data")
    OPTIMUM.write_bytes(gzip.compress(proto.SerializeToString(), 9, mtime=0))


if __name__ == "__main__":
    store_without_weights(sys.argv[1])
