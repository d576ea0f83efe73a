"""Engines of a bundle in TensorRT: device-resident tensors on one CUDA stream."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from skipvision_export.bundle import MANIFEST, sha256_of
from skipvision_export.errors import BundleError, CompilerError, InputError
from skipvision_export.runtime.batch import Flags
from skipvision_export.runtime.kv_cache import JoinedCache, KVCache
from skipvision_export.tensorrt import plugin
from skipvision_export.tensorrt.driver import require_gpu
from skipvision_export.tensorrt.library import TensorRT, find, parse_version
from skipvision_export.tensorrt.manifest import EngineInfo, EnginesManifest

if TYPE_CHECKING:
    import tensorrt as trt
    from polygraphy import cuda

Shape = tuple[int, ...]


@dataclass(frozen=True)
class DeviceTensor:
    """A tensor on the GPU; `dtype` is TensorRT's name of it."""

    buffer: cuda.DeviceArray
    shape: Shape
    dtype: str


def numpy_type(dtype: str) -> np.dtype[Any]:
    """The numpy type of TensorRT's name for one, bfloat16 included."""
    import ml_dtypes

    types: dict[str, Any] = {
        "float": np.float32,
        "half": np.float16,
        "bf16": ml_dtypes.bfloat16,
        "int64": np.int64,
        "int32": np.int32,
        "bool": np.bool_,
    }
    return np.dtype(types[dtype])


def choose_profile(info: EngineInfo, shapes: dict[str, Shape], graph: str) -> int:
    """The first profile of an engine that takes these shapes; raises InputError that names the input."""
    outside = ""
    for i, profile in enumerate(info.profiles):
        misfits = [
            f"{name} {list(shapes[name])} is outside [{low}, {high}]"
            for name, (low, _, high) in profile.items()
            if len(low) != len(shapes[name])
            or not all(a <= n <= b for a, n, b in zip(low, shapes[name], high, strict=True))
        ]
        if not misfits:
            return i
        outside = outside or misfits[0]
    raise InputError(f"{graph}: {outside} in every profile; build with a recipe whose profiles hold it")


def capacity(nbytes: int) -> int:
    """Bytes to allocate for a tensor: the next power of two, so that a growing cache rarely moves."""
    return 1 << max(8, (nbytes - 1).bit_length())


class TrtRunner:
    """Runs a bundle's engines; a backend of runtime.generation.Generator.

    Inputs are copied to the GPU, outputs stay there: keys and values go from prefill to decode and
    from step to step without leaving it. Each graph writes to two sets of buffers in turn, as decode
    reads what it wrote the step before: a tensor is good until its graph has run twice more.
    Everything is on one stream; only `numpy` waits for it. Memory and streams are polygraphy's.
    """

    name = "tensorrt"

    def __init__(self, engines: str | Path, bundle: Path, library: Path | None = None) -> None:
        """engines: a folder that `skipvision build` wrote of the folder `bundle`; library: the plugin.

        Raises BundleError for engines of another bundle, and CompilerError without a GPU, a TensorRT
        of the version that built them, or the plugin that they need.
        """
        self.folder = Path(engines)
        self.manifest = EnginesManifest.load(self.folder)
        if self.manifest.bundle.sha256 != sha256_of(bundle / MANIFEST):
            raise BundleError(f"{engines} was built from another bundle than {bundle}; build it again")
        require_gpu()  # before every byte of the engines is read
        self.manifest.verify(self.folder)
        self._library = library
        self._engines: dict[str, _Engine] = {}

    @cached_property
    def tensorrt(self) -> TensorRT:
        """The runtime, of the version that built the engines."""
        info = next(iter(self.manifest.engines.values()))
        product = "tensorrt" if self.manifest.route == "tensorrt" else "tensorrt-rtx"
        found = find(product)  # type: ignore[arg-type]
        if found.compiler.version != parse_version(info.builder_version) and not self._compatible:
            raise CompilerError(
                f"{self.folder} was built with {info.builder} {info.builder_version}, {found.compiler} is "
                "here; build it again"
            )
        if any(info.plugin_layers for info in self.manifest.engines.values()):
            if self._library is None:
                raise CompilerError(
                    f"{self.folder} needs the KVPrune plugin: give the library that plugins/kv_prune builds"
                )
            plugin.load_library(found.module, self._library)
        return found

    @property
    def _compatible(self) -> bool:
        return bool(self.manifest.recipe["builder"]["version_compatible"])

    @cached_property
    def stream(self) -> cuda.Stream:
        """The stream of all work."""
        from polygraphy import cuda

        return cuda.Stream()

    def has(self, graph: str) -> bool:
        """Can it run this graph?"""
        return graph in self.manifest.engines

    def run(self, graph: str, feeds: dict[str, Any]) -> dict[str, DeviceTensor]:
        """Run one graph on numpy arrays or DeviceTensors; returns without waiting for it."""
        if graph not in self._engines:
            info = self.manifest.engines[graph]
            self._engines[graph] = _Engine(
                graph, self.folder / info.file, info, self.tensorrt, self.stream, self._compatible
            )
        return self._engines[graph].run(feeds)

    def cache(self, present: dict[str, Any], kept: Flags | None = None) -> KVCache:
        """The cache that decode goes on from, of prefill's outputs.

        kept: [B, K], which of its positions count; None for all.
        """
        return JoinedCache(self, present, kept)

    def numpy(self, value: DeviceTensor) -> npt.NDArray[Any]:
        """A tensor on the host; waits for the stream."""
        host = np.empty(value.shape, numpy_type(value.dtype))
        if host.size:
            value.buffer.view((host.nbytes,), np.uint8).copy_to(host.reshape(-1).view(np.uint8), self.stream)
        self.stream.synchronize()
        return host

    def close(self) -> None:
        """Wait for the stream and free all buffers."""
        if self._engines:
            self.stream.synchronize()
        for engine in self._engines.values():
            engine.close()
        self._engines.clear()

    @staticmethod
    def shape(value: DeviceTensor) -> list[int]:
        """Sizes of a tensor."""
        return list(value.shape)


class _Engine:
    """A deserialized engine, its execution context and its buffers."""

    def __init__(
        self,
        graph: str,
        file: Path,
        info: EngineInfo,
        tensorrt: TensorRT,
        stream: cuda.Stream,
        host_code: bool,
    ) -> None:
        self.graph, self.info, self.stream = graph, info, stream
        module = tensorrt.module
        self._runtime: trt.Runtime = module.Runtime(module.Logger(module.Logger.ERROR))
        # Version-compatible engines bring a runtime along; the manifest's hash vouches for it.
        self._runtime.engine_host_code_allowed = host_code
        engine = self._runtime.deserialize_cuda_engine(file.read_bytes())
        if engine is None:
            raise CompilerError(f"{file} cannot be loaded by {tensorrt.compiler}; build it again on this GPU")
        self.engine: trt.ICudaEngine = engine
        self.context: trt.IExecutionContext = engine.create_execution_context()
        self.dtypes = {tensor.name: tensor.dtype for tensor in (*info.inputs, *info.outputs)}
        self._buffers: dict[tuple[str, int], cuda.DeviceArray] = {}
        self._host: list[npt.NDArray[Any]] = []  # alive until the stream has read them
        self._profile, self._turn = 0, 0

    def run(self, feeds: dict[str, Any]) -> dict[str, DeviceTensor]:
        inputs = {
            name: value if isinstance(value, DeviceTensor) else self._host_array(name, value)
            for name, value in feeds.items()
        }
        shapes = {name: tuple(value.shape) for name, value in inputs.items()}
        self._use_profile(choose_profile(self.info, shapes, self.graph))
        self._turn ^= 1
        self._host = []
        for name, value in inputs.items():
            self.context.set_input_shape(name, shapes[name])
            self.context.set_tensor_address(name, self._address(name, value))
        missing = self.context.infer_shapes()
        if missing:
            raise CompilerError(f"{self.graph}: not enough to know the shapes of {', '.join(missing)}")
        outputs = {tensor.name: self._output(tensor.name) for tensor in self.info.outputs}
        if not self.context.execute_async_v3(self.stream.ptr):
            raise CompilerError(f"{self.graph}: TensorRT could not run the engine; see its messages above")
        return outputs

    def _use_profile(self, index: int) -> None:
        if index != self._profile:
            self.context.set_optimization_profile_async(index, self.stream.ptr)
            self._profile = index

    def _host_array(self, name: str, value: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return np.ascontiguousarray(np.asarray(value).astype(numpy_type(self.dtypes[name]), copy=False))

    def _address(self, name: str, value: DeviceTensor | npt.NDArray[Any]) -> int:
        if isinstance(value, DeviceTensor):
            return int(value.buffer.ptr)
        self._host.append(value)
        if self.engine.is_shape_inference_io(name):
            return int(value.ctypes.data)
        buffer = self._buffer(name, value.nbytes)
        if value.size:
            buffer.copy_from(value.reshape(-1).view(np.uint8), self.stream)
        return int(buffer.ptr)

    def _output(self, name: str) -> DeviceTensor:
        dims: Any = self.context.get_tensor_shape(name)
        shape = tuple(dims)
        dtype = self.dtypes[name]
        buffer = self._buffer(name, int(np.prod(shape)) * numpy_type(dtype).itemsize)
        self.context.set_tensor_address(name, buffer.ptr)
        return DeviceTensor(buffer, shape, dtype)

    def _buffer(self, name: str, nbytes: int) -> cuda.DeviceArray:
        """A buffer of this turn that holds `nbytes`; what the other turn wrote may still be read."""
        from polygraphy import cuda

        key = (name, self._turn)
        old = self._buffers.get(key)
        if old is not None and old.nbytes >= nbytes:
            return old
        if old is not None:  # polygraphy frees nothing by itself
            self.stream.synchronize()
            old.free()
        self._buffers[key] = cuda.DeviceArray.raw((capacity(nbytes),))
        return self._buffers[key]

    def close(self) -> None:
        """Free the buffers."""
        for buffer in self._buffers.values():
            buffer.free()
        self._buffers.clear()
