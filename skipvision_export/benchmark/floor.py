"""What a phase cannot be faster than on this machine: bytes over its bandwidth, operations over its rate.

Both are measured here, with as many threads as the bundle runs on, before and after the timed rounds, and
the best of all repeats counts, so that a busy machine does not lower the floor:

bandwidth    a buffer is read, by a sum and by a matrix-vector product, whichever is faster; it has about as
             many bytes as the phase reads (at most 512 MiB), because small weights stay in the caches
matrix rate  a float32 product [1024, 1024] x [1024, 1024] in ONNX Runtime and in PyTorch, the faster

Bytes are the weights as they are stored, once, and in decode the cached K/V; what activations take is not
counted. Of a mixture the share counts that one token goes through. int4 products compute with 8-bit
activations, which may be faster than the rate of float32.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import psutil

from skipvision_export.benchmark.flops import count_flops, kv_bytes
from skipvision_export.graph.passes.names import DECODE, PREFILL, VISION, ffn_dim_name
from skipvision_export.models import DecoderDims
from skipvision_export.runtime.pipeline import Bundle

LEAST_BYTES, MOST_BYTES = 1 << 16, 1 << 29
_SIDE = 1024
_SECONDS = 0.15  # for each thing that is measured, and three repeats at least


@dataclass(frozen=True)
class Work:
    """What a phase has to do at least: bytes to read, operations."""

    bytes: int
    flops: int


def phase_work(bundle: Bundle, text_tokens: int, new_tokens: int) -> dict[str, Work]:
    """Of `vision` (one picture), `prefill`, and `decode` (a step, the mean of those after prefill).

    Operations are counted over the exported graphs' nodes; raises ValueError where prefill's do not follow.
    """
    dims, sizes = decoder_dims(bundle), prefill_sizes(bundle, text_tokens)
    share = experts_share(dims)
    past = sizes["kept"] + max(0, new_tokens - 2) // 2
    step = {"batch": 1, "sequence": 1, "past_sequence": past, "total_sequence": past + 1}
    cached = kv_bytes(dims, past, bundle.manifest.dtype)
    found = {}
    for name, graph, given, cache in (
        ("vision", VISION, {"num_images": 1}, 0),
        ("prefill", PREFILL, sizes, 0),
        ("decode", DECODE, step, cached),
    ):
        model = onnx.load(bundle.folder / bundle.manifest.graphs[graph].file, load_external_data=False)
        part = 1.0 if graph == VISION else share
        # Merged tokens, and pictures of any shape, have sizes that no graph tells; prefill's all follow.
        flops = count_flops(model, given, part, known_only=graph != PREFILL)
        found[name] = Work(int(weight_bytes(model) * part) + cache, flops)
    return found


def decoder_dims(bundle: Bundle) -> DecoderDims:
    """The decoder's sizes out of the manifest."""
    values = bundle.manifest.model.model_dump()
    return DecoderDims(**{name: values[name] for name in DecoderDims.__dataclass_fields__})


def experts_share(dims: DecoderDims) -> float:
    """Of a mixture, the share of experts that a token goes through."""
    return dims.experts_per_token / dims.experts if dims.experts else 1.0


def prefill_sizes(bundle: Bundle, text_tokens: int) -> dict[str, int]:
    """The prefill graph's dimensions for one picture and `text_tokens` beside it."""
    layout = bundle.manifest.layout
    sizes = {"batch": 1, "sequence": text_tokens + layout.total, "kept": text_tokens + layout.kept_kv}
    for tier in layout.used_tiers():
        sizes[ffn_dim_name(tier)] = text_tokens + sum(layout.ffn_mask(tier))
    return sizes


def weight_bytes(model: onnx.ModelProto) -> int:
    """Bytes of all initializers as they are stored; the data need not be loaded."""
    return sum(
        math.prod(tensor.dims) * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        for tensor in model.graph.initializer
    )


@dataclass
class Rates:
    """What this machine reached: operations and bytes per second, the latter by bytes of the buffer."""

    threads: int
    matrix_flops_per_s: float = 0.0
    matrix_by: str = ""
    bytes_per_s: dict[int, float] = field(default_factory=dict)

    @classmethod
    def of(cls, threads: int) -> Rates:
        """Nothing measured yet; threads: 0 for ONNX Runtime's own choice, one for each physical core."""
        return cls(threads or psutil.cpu_count(logical=False) or psutil.cpu_count() or 1)

    def measure(self, works: list[Work]) -> None:
        """Measure, for these phases' bytes; called again, the better of both counts."""
        import torch

        with _torch_threads(self.threads):
            for size in {buffer_bytes(work.bytes) for work in works}:
                rows = torch.ones(size // 4 // 256, 256)
                column = torch.ones(256)
                best = min(_best(rows.sum), _best(lambda m=rows, v=column: m.mv(v)))  # type: ignore[misc]
                self.bytes_per_s[size] = max(self.bytes_per_s.get(size, 0.0), size / best)
            square = torch.rand(_SIDE, _SIDE)
            found = {"PyTorch": _best(lambda: square @ square)}
        session, feeds = _ort_product(self.threads)
        found["ONNX Runtime"] = _best(lambda: session.run(None, feeds))
        for name, seconds in found.items():
            rate = 2 * _SIDE**3 / seconds
            if rate > self.matrix_flops_per_s:
                self.matrix_flops_per_s, self.matrix_by = rate, name

    def floor(self, work: Work, measured_ms: float) -> dict[str, Any]:
        """The work with `floor_ms`, its `bound` (bytes or flops), and `multiple`, measured over floor."""
        by_bytes = work.bytes / self.bytes_per_s[buffer_bytes(work.bytes)] * 1e3
        by_flops = work.flops / self.matrix_flops_per_s * 1e3
        least = max(by_bytes, by_flops)
        return {
            "bytes": work.bytes,
            "flops": work.flops,
            "floor_ms": least,
            "bound": "flops" if by_flops > by_bytes else "bytes",
            "multiple": measured_ms / least,
        }

    def to_json(self) -> dict[str, Any]:
        """With the sizes of buffers as text."""
        return {
            "threads": self.threads,
            "matrix_flops_per_s": self.matrix_flops_per_s,
            "matrix_by": self.matrix_by,
            "bytes_per_s": {str(size): rate for size, rate in sorted(self.bytes_per_s.items())},
        }


def buffer_bytes(wanted: int) -> int:
    """The power of two below, so that the buffer is in no slower memory than what it stands for."""
    return min(MOST_BYTES, max(LEAST_BYTES, 1 << (max(1, wanted).bit_length() - 1)))


def _best(run: Callable[[], Any]) -> float:
    """Seconds of the fastest of some repeats, the first left out."""
    run()
    least, begun, repeats = math.inf, time.perf_counter(), 0
    while repeats < 3 or time.perf_counter() - begun < _SECONDS:
        start = time.perf_counter()
        run()
        least, repeats = min(least, time.perf_counter() - start), repeats + 1
    return least


@contextmanager
def _torch_threads(count: int) -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _ort_product(threads: int) -> tuple[Any, dict[str, Any]]:
    import onnxruntime as ort

    square = np.random.default_rng(0).random((_SIDE, _SIDE), np.float32)
    value = onnx.helper.make_tensor_value_info
    shape = [_SIDE, _SIDE]
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("MatMul", ["x", "w"], ["y"])],
        "product",
        [value("x", onnx.TensorProto.FLOAT, shape)],
        [value("y", onnx.TensorProto.FLOAT, shape)],
        [onnx.numpy_helper.from_array(square, "w")],
    )
    opset = [onnx.helper.make_opsetid("", 18)]
    model = onnx.helper.make_model(graph, opset_imports=opset, ir_version=9)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session, {"x": square}
