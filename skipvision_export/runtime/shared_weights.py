"""One copy of a bundle's weights in memory for all ONNX Runtime sessions that read them."""

from __future__ import annotations

import math
import mmap
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort

from skipvision_export.errors import BundleError


class SharedWeights:
    """Maps of data files, from which sessions take their weights as they lie there.

    Without it every session reads its own copy, and another one that MLAS packs for its kernels. So
    packing is off in a session that shares: its products pack a panel at a time, as they go, which costs some
    percent of a prefill and more of a decode step: "weights shared" in benchmarks/results/decoder_cpu.json.
    """

    def __init__(self) -> None:
        """Nothing is mapped yet."""
        self._maps: dict[Path, mmap.mmap] = {}
        # ONNX Runtime refers to these and does not own them.
        self._values: dict[tuple[Path, int, int, tuple[int, ...]], ort.OrtValue] = {}

    def give(self, options: ort.SessionOptions, graph: Path) -> None:
        """Let a session of `graph`, an .onnx file, take its external tensors from the maps."""
        model = onnx.load(graph, load_external_data=False)
        shared = False
        for tensor in model.graph.initializer:
            if tensor.data_location == onnx.TensorProto.EXTERNAL and math.prod(tensor.dims):
                options.add_initializer(tensor.name, self._value(graph.parent, tensor))
                shared = True
        if shared:
            options.add_session_config_entry("session.disable_prepacking", "1")

    def _value(self, folder: Path, tensor: onnx.TensorProto) -> ort.OrtValue:
        where = {entry.key: entry.value for entry in tensor.external_data}
        if Path(where["location"]).name != where["location"]:
            raise BundleError(
                f"{folder} holds a graph whose weight {tensor.name} lies in {where['location']!r}, outside "
                "of its folder; export again"
            )
        file, offset, shape = folder / where["location"], int(where["offset"]), tuple(tensor.dims)
        key = (file, offset, tensor.data_type, shape)
        if key not in self._values:
            data = np.frombuffer(self._map(file), np.uint8, int(where["length"]), offset)
            kind = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
            array = data.view(kind).reshape(shape)
            self._values[key] = ort.OrtValue.ortvalue_from_numpy(array)
        return self._values[key]

    def _map(self, file: Path) -> mmap.mmap:
        if file not in self._maps:
            with file.open("rb") as stream:
                self._maps[file] = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        return self._maps[file]
