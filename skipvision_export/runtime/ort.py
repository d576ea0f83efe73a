"""ONNX Runtime sessions of a bundle's graphs."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from skipvision_export.bundle import Manifest
from skipvision_export.bundle.graphs import GraphInfo
from skipvision_export.errors import BackendError, BundleError, ConfigError
from skipvision_export.graph.passes.names import DECODE, PREFILL
from skipvision_export.runtime.batch import Flags
from skipvision_export.runtime.huge_pages import huge_pages
from skipvision_export.runtime.kv_cache import JoinedCache, KVCache, SharedCache
from skipvision_export.runtime.shared_weights import SharedWeights

_CPU = ("CPUExecutionProvider",)
# By the name of the device; what CUDA has no kernels for, such as sizes, runs on the CPU.
_PROVIDERS = {"cpu": _CPU, "cuda": ("CUDAExecutionProvider", *_CPU)}
# Products in float32 as they are written: TF32 rounds their factors to 11 bits.
_PROVIDER_OPTIONS = {"CUDAExecutionProvider": {"use_tf32": "0"}}
_NUMPY = {"float": np.float32, "float16": np.float16, "int64": np.int64}


def check_providers(device: str) -> tuple[str, ...]:
    """ONNX Runtime's providers for a device, `cpu` or `cuda`.

    Raises ConfigError for another device, and BackendError where ONNX Runtime was built without it.
    """
    if device not in _PROVIDERS:
        raise ConfigError(f"device {device!r} is not one of {', '.join(_PROVIDERS)}")
    wanted, there = _PROVIDERS[device], ort.get_available_providers()
    if wanted[0] not in there:
        raise BackendError(
            f"device {device} needs ONNX Runtime's {wanted[0]}, this installation has {', '.join(there)}; "
            "install onnxruntime-gpu in place of onnxruntime, or leave out --device"
        )
    return wanted


def provider_options(providers: Sequence[str]) -> list[dict[str, str]]:
    """Of each provider, for an InferenceSession."""
    return [_PROVIDER_OPTIONS.get(provider, {}) for provider in providers]


class OrtBackend:
    """The four graphs of a bundle, each loaded when it is first run; several threads may run them at once.

    Tensors stay OrtValues between runs, so that a cache is never copied to numpy and back.
    """

    name = "onnxruntime"

    def __init__(
        self,
        folder: Path,
        manifest: Manifest,
        *,
        optimize: bool = True,
        threads: int = 0,
        providers: tuple[str, ...] = _CPU,
        share_weights: bool = True,
    ) -> None:
        """threads: 0 lets ONNX Runtime choose; optimize=False turns every graph fusion off.

        share_weights=False gives each session its own copy, packed for its kernels and in huge pages: some
        percent faster, decode most of all, see SharedWeights and huge_pages. On the CPU only, and not for
        int4 weights, which are never shared.
        """
        self.folder = folder
        self.dtype = manifest.dtype
        self.graphs: dict[str, GraphInfo] = manifest.graphs | manifest.variants
        self.providers = providers
        level = ort.GraphOptimizationLevel
        self._level = level.ORT_ENABLE_ALL if optimize else level.ORT_DISABLE_ALL
        self._threads = threads
        # Half types on the CPU are cast to float32, whose copies folding makes once for all runs.
        whole = manifest.dtype == "float32" or providers != _CPU
        self._keep_turns = bool(manifest.referenced) and whole
        # int4 products need their weights packed, and are small.
        shares = share_weights and providers == _CPU and manifest.weights is None
        self._weights = SharedWeights() if shares else None
        # Unoptimized is for comparisons with the graphs that every runtime runs.
        forms = manifest.variants if optimize and providers == _CPU else {}
        self._forms = {graph: f"{graph}.{self.name}" for graph in manifest.graphs}
        self._forms = {graph: form for graph, form in self._forms.items() if form in forms}
        self._sessions: dict[str, ort.InferenceSession] = {}
        # Threads that load at once would take shared weights from under each other.
        self._loading = threading.Lock()

    @property
    def device(self) -> str:
        """In words: CPU or CUDA."""
        return self.providers[0].removesuffix("ExecutionProvider")

    def session(self, graph: str) -> ort.InferenceSession:
        """The session of one graph.

        Raises BackendError for a type that the provider has no kernels for, and BundleError where
        ONNX Runtime refuses the file.
        """
        if self.dtype == "bfloat16" and self.providers == _CPU:
            raise BackendError(
                f"{self.folder} is bfloat16, which ONNX Runtime has no CPU kernels for; export again with "
                "--dtype float32 or float16 to run it here (bfloat16 is for TensorRT and CUDA)"
            )
        with self._loading:
            if graph not in self._sessions:
                self._sessions[graph] = self._load(self.folder / self.graphs[graph].file)
            return self._sessions[graph]

    def _load(self, file: Path) -> ort.InferenceSession:
        try:
            # Of shared weights there is nothing of the session's own to speak of.
            with huge_pages() if self._weights is None else contextlib.nullcontext():
                made = ort.InferenceSession(
                    str(file),
                    self._options(file),
                    providers=list(self.providers),
                    provider_options=provider_options(self.providers),
                )
        except Exception as error:  # onnxruntime raises its own kinds, none of them public
            first = str(error).strip().splitlines()[0]
            raise BundleError(f"ONNX Runtime cannot load {file}: {first}") from None
        # Without a driver or its libraries ONNX Runtime goes on with the next provider.
        if made.get_providers()[0] != self.providers[0]:
            raise BackendError(
                f"ONNX Runtime cannot use {self.providers[0]} here and would run on "
                f"{made.get_providers()[0]}; see its messages above for the library or driver it lacks"
            )
        return made

    def _options(self, file: Path) -> ort.SessionOptions:
        options = ort.SessionOptions()
        options.graph_optimization_level = self._level
        options.intra_op_num_threads = self._threads
        options.log_severity_level = 3
        if self._keep_turns:
            # It would turn every referenced matrix into a copy, before they become FusedMatMul.
            options.add_session_config_entry("optimization.disable_specified_optimizers", "ConstantFolding")
        if self._weights is not None:
            self._weights.give(options, file)
        return options

    def has(self, graph: str) -> bool:
        """Can it run this graph?"""
        return graph in self.graphs

    def run(self, graph: str, feeds: dict[str, Any]) -> dict[str, Any]:
        """Run one graph on numpy arrays or OrtValues; returns OrtValues by output name."""
        # The form of prefill for this runtime takes prompts without padding.
        if graph == PREFILL and PREFILL in self._forms and np.asarray(feeds["attention_mask"]).all():
            graph = self._forms[PREFILL]
        values = {
            name: value if isinstance(value, ort.OrtValue) else self._value(graph, name, value)
            for name, value in feeds.items()
        }
        names = [tensor.name for tensor in self.graphs[graph].outputs]
        return dict(zip(names, self.session(graph).run_with_ort_values(names, values), strict=True))

    def cache(self, present: dict[str, Any], kept: Flags | None = None) -> KVCache:
        """The cache that decode goes on from, of prefill's outputs; in place where the bundle can.

        kept: [B, K], which of its positions count; None for all.
        """
        if DECODE not in self._forms:
            return JoinedCache(self, present, kept)
        return SharedCache(self.session(self._forms[DECODE]), present, kept)

    def _value(self, graph: str, name: str, array: npt.NDArray[Any]) -> ort.OrtValue:
        dtype = next(t.dtype for t in self.graphs[graph].inputs if t.name == name)
        if dtype in _NUMPY:
            array = np.asarray(array, _NUMPY[dtype])
        return ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))

    @staticmethod
    def numpy(value: ort.OrtValue) -> npt.NDArray[Any]:
        """A tensor on the host."""
        return np.asarray(value.numpy())

    @staticmethod
    def shape(value: ort.OrtValue) -> list[int]:
        """Sizes of a tensor, without copying it."""
        return list(value.shape())
