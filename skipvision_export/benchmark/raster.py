"""The vision encoder up to its layout pass: what a dense model's decoder reads, and the choice."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnx_ir.passes.common as common
import onnxruntime as ort

from skipvision_export.graph.passes.names import IMAGE_FEATURES, PLACES, RASTER_FEATURES, TOKEN_ORDER, VISION
from skipvision_export.runtime.generation import Pixels
from skipvision_export.runtime.pipeline import Bundle
from skipvision_export.runtime.varying import Patches, VaryingPictures


class RasterEncoder:
    """Runs a bundle's own vision encoder up to the features before anything is merged."""

    def __init__(self, bundle: Bundle) -> None:
        """Cut the graph in memory; weights in a file of their own stay there."""
        file = bundle.folder / bundle.manifest.graphs[VISION].file
        model = ir.load(file)
        graph = model.graph
        manifest = bundle.manifest
        self._varying = VaryingPictures(manifest) if manifest.model.merge_size else None
        for value in [v for v in graph.outputs if v.name == PLACES]:
            graph.outputs.remove(value)
        inside = {v.name: v for node in graph for v in node.outputs}
        raster = inside.get(RASTER_FEATURES)
        if raster is not None:
            graph.outputs[0] = raster
            raster.type = raster.type or ir.TensorType(ir.DataType[bundle.manifest.dtype.upper()])
        order = inside.get(TOKEN_ORDER)
        if order is not None:
            order.type = ir.TensorType(ir.DataType.INT64)
            graph.outputs.append(order)
        common.RemoveUnusedNodesPass()(model)
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(file.parent)
        )
        self._session = ort.InferenceSession(
            ir.to_proto(model).SerializeToString(), options, providers=list(bundle.backend.providers)
        )

    def __call__(self, pixel_values: Pixels) -> Any:
        """[N, 3, h, w] -> [N, V, D] in raster order; patches of pictures of any shape -> LaidPictures."""
        if isinstance(pixel_values, Patches):
            assert self._varying is not None
            return self._varying.encode(self._run_one, pixel_values)
        return self.run(pixel_values)[0]

    def _run_one(self, feeds: dict[str, Any]) -> dict[str, Any]:
        names = [value.name for value in self._session.get_inputs()]
        raster = self._session.run(None, {name: feeds[name] for name in names})[0]
        return {IMAGE_FEATURES: raster}

    def run(self, pixel_values: npt.NDArray[np.float32]) -> tuple[npt.NDArray[Any], list[list[int]]]:
        """The same, and the chosen order of each image's tokens: [N, V], empty where it is a constant."""
        feed = self._session.get_inputs()[0]
        dtype = np.float16 if feed.type == "tensor(float16)" else np.float32
        raster, *order = self._session.run(None, {feed.name: pixel_values.astype(dtype)})
        return np.asarray(raster), order[0].tolist() if order else []
