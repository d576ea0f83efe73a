"""The vision encoder up to its layout pass: what a dense model's decoder reads, and the choice."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnx_ir.passes.common as common
import onnxruntime as ort

from skipvision_export.graph.passes.names import PLACES, RASTER_FEATURES, TOKEN_ORDER, VISION
from skipvision_export.runtime.generation import Pixels
from skipvision_export.runtime.ort import provider_options
from skipvision_export.runtime.pipeline import Bundle
from skipvision_export.runtime.varying import LaidPictures, Patches, VaryingPictures


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
            ir.to_proto(model).SerializeToString(),
            options,
            providers=list(bundle.backend.providers),
            provider_options=provider_options(bundle.backend.providers),
        )

    def __call__(self, pixel_values: Pixels) -> Any:
        """[N, 3, h, w] -> [N, V, D] in raster order; patches of pictures of any shape -> LaidPictures."""
        features, _ = self.run(pixel_values)
        if not isinstance(pixel_values, Patches):
            return features
        assert self._varying is not None
        places = [np.arange(visual) for visual, _ in self._varying.sizes(pixel_values)]
        return LaidPictures(features, pixel_values.grids, tuple(places))

    def run(self, pixel_values: Pixels) -> tuple[npt.NDArray[Any], list[list[int]]]:
        """The features, and the chosen order of each image's tokens: [N, V], empty where it is a constant.

        Of pictures of any shape the features are [1, V of all, W].
        """
        if not isinstance(pixel_values, Patches):
            return self._run({"pixel_values": pixel_values})
        assert self._varying is not None
        each = [self._run(self._varying.feeds(*picture)) for picture in pixel_values.each()]
        return np.concatenate([found for found, _ in each], axis=1), [row for _, rows in each for row in rows]

    def _run(self, feeds: dict[str, npt.NDArray[Any]]) -> tuple[npt.NDArray[Any], list[list[int]]]:
        taken = {
            value.name: feeds[value.name].astype(np.float16)
            if value.type == "tensor(float16)"
            else feeds[value.name]
            for value in self._session.get_inputs()
        }
        raster, *order = self._session.run(None, taken)
        return np.asarray(raster), order[0].tolist() if order else []
