"""Decoder graphs in ONNX Runtime, everything bound to the device: prefill, and steps on a cache."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

NUMPY = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
}


def missing(cuda: bool) -> str | None:
    """Why nothing can run on the GPU."""
    if not cuda:
        return None
    if hasattr(ort, "preload_dlls"):
        ort.preload_dlls()  # CUDA and cuDNN as PyTorch's packages have them
    if "CUDAExecutionProvider" in ort.get_available_providers():
        return None
    return f"onnxruntime {ort.__version__} has no CUDA provider: install onnxruntime-gpu"


class Graph:
    """One graph's session; K/V may be joined in new tensors, or one buffer that a step appends to."""

    def __init__(self, file: Path, cuda: bool, *, profile: bool = False) -> None:
        """profile: to ask once where its nodes ran."""
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.enable_profiling = profile
        options.profile_file_prefix = str(file.parent / "profile")
        if not cuda:
            options.intra_op_num_threads = 1
        providers = ["CUDAExecutionProvider"] if cuda else []
        self.session = ort.InferenceSession(
            str(file), options, providers=[*providers, "CPUExecutionProvider"]
        )
        if cuda and "CUDAExecutionProvider" not in self.session.get_providers():
            raise RuntimeError("ONNX Runtime took the CPU: its CUDA provider did not load")
        self.device = "cuda" if cuda else "cpu"
        self.types = {value.name: NUMPY[value.type] for value in self.session.get_inputs()}
        self.shapes = {value.name: value.shape for value in self.session.get_inputs()}
        self.outputs = [value.name for value in self.session.get_outputs()]

    def value(self, name: str, array: np.ndarray) -> ort.OrtValue:
        """An array on the device, in the type of an input."""
        typed = np.ascontiguousarray(array, self.types[name])
        return ort.OrtValue.ortvalue_from_numpy(typed, self.device, 0)

    def bound(
        self, feeds: dict[str, np.ndarray], past: dict[str, ort.OrtValue], shared: bool
    ) -> ort.IOBinding:
        """Inputs that the graph has, and its outputs on the device; shared: present is past's memory."""
        binding = self.session.io_binding()
        for name, array in feeds.items():
            if name in self.types:
                binding.bind_ortvalue_input(name, self.value(name, array))
        for name, value in past.items():
            binding.bind_ortvalue_input(name, value)
        for name in self.outputs:
            own = past.get(name.replace("present", "past_key_values"))
            if shared and own is not None:
                binding.bind_ortvalue_output(name, own)
            else:
                binding.bind_output(name, self.device, 0)
        return binding

    def empty_past(self, batch: int, size: int, heads: int, length: int = 0) -> dict[str, ort.OrtValue]:
        """Zeros [B, H, length, Dh] for every past input."""
        return {
            name: self.value(name, np.zeros((batch, heads, length, size)))
            for name in self.types
            if name.startswith("past_key_values.")
        }

    def run(self, binding: ort.IOBinding) -> None:
        """Run and wait."""
        self.session.run_with_iobinding(binding)

    def logits(self, binding: ort.IOBinding) -> np.ndarray:
        """[B, vocab] float32 of the last position."""
        found: np.ndarray = binding.get_outputs()[self.outputs.index("logits")].numpy()
        return found[:, -1].astype(np.float32)

    def present(self, binding: ort.IOBinding) -> dict[str, ort.OrtValue]:
        """K and V after a run, by the names that a decode graph takes."""
        values = dict(zip(self.outputs, binding.get_outputs(), strict=True))
        names = [name for name in values if name.startswith("present.")]
        return {name.replace("present", "past_key_values"): values[name] for name in names}

    def placed(self) -> dict[str, Any]:
        """Of a profiled session: nodes by provider, and what kinds of them ran on the CPU."""
        events = json.loads(Path(self.session.end_profiling()).read_text())
        nodes = [e["args"] for e in events if e.get("cat") == "Node" and "provider" in e.get("args", {})]
        on_cpu = Counter(n["op_name"] for n in nodes if n["provider"] == "CPUExecutionProvider")
        return {"by_provider": Counter(n["provider"] for n in nodes), "on_cpu": dict(on_cpu.most_common(12))}


class Steps:
    """Decode from a prefill's K/V, joined step by step or in one buffer of `room` more positions."""

    def __init__(
        self, graph: Graph, present: dict[str, ort.OrtValue], position: int, room: int, shared: bool
    ):
        """position: of the first new token."""
        self.graph, self.shared, self.position = graph, shared, position
        first = next(iter(present.values()))
        self.batch, _, self.length, _ = first.shape()
        self.past = (
            {name: self._roomy(name, value, room) for name, value in present.items()} if shared else present
        )

    def _roomy(self, name: str, value: ort.OrtValue, room: int) -> ort.OrtValue:
        array = value.numpy()
        return self.graph.value(name, np.pad(array, ((0, 0), (0, 0), (0, room), (0, 0))))

    def binding(self, embeds: np.ndarray) -> ort.IOBinding:
        """Of the next step; embeds: [B, 1, D]."""
        feeds = {
            "inputs_embeds": embeds,
            "attention_mask": np.ones((self.batch, self.length + 1)),
            "position_ids": np.full((self.batch, 1), self.position),
        }
        return self.graph.bound(feeds, self.past, self.shared)

    def step(self, embeds: np.ndarray) -> np.ndarray:
        """Logits [B, vocab]."""
        binding = self.binding(embeds)
        self.graph.run(binding)
        logits = self.graph.logits(binding)
        if not self.shared:
            self.past = self.graph.present(binding)
        self.length, self.position = self.length + 1, self.position + 1
        return logits
