"""The vision encoder without its layout pass: what a dense model's decoder reads."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnx_ir.passes.common as common
import onnxruntime as ort

from skipvision_export.graph.passes.names import RASTER_FEATURES, VISION
from skipvision_export.runtime.pipeline import Bundle


class RasterEncoder:
    """Runs a bundle's own vision encoder up to the features before anything is chosen or merged."""

    def __init__(self, bundle: Bundle) -> None:
        """Cut the graph in memory; weights in a file of their own stay there."""
        file = bundle.folder / bundle.manifest.graphs[VISION].file
        model = ir.load(file)
        graph = model.graph
        inside = [v for node in graph for v in node.outputs if v.name == RASTER_FEATURES]
        if inside:
            graph.outputs[0] = inside[0]
            inside[0].type = inside[0].type or ir.TensorType(ir.DataType[bundle.manifest.dtype.upper()])
        common.RemoveUnusedNodesPass()(model)
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(file.parent)
        )
        self._session = ort.InferenceSession(
            ir.to_proto(model).SerializeToString(), options, providers=list(bundle.backend.providers)
        )

    def __call__(self, pixel_values: npt.NDArray[np.float32]) -> npt.NDArray[Any]:
        """[1, 3, h, w] -> [1, V, D] in raster order."""
        feed = self._session.get_inputs()[0]
        dtype = np.float16 if feed.type == "tensor(float16)" else np.float32
        return np.asarray(self._session.run(None, {feed.name: pixel_values.astype(dtype)})[0])
