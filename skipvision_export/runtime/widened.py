"""A bundle's graphs computing in float32, for comparisons that rounding must not blur."""

from __future__ import annotations

from pathlib import Path

from skipvision_export.bundle import load_graph, write_graphs
from skipvision_export.graph.passes.names import DECODE, PREFILL
from skipvision_export.graph.widen import widen
from skipvision_export.runtime.pipeline import Bundle


def widened(bundle: Bundle, folder: Path) -> Bundle:
    """Write the bundle's graphs to `folder` with every half type and every activation in float32.

    What comes back runs graphs; the processor's files stay with the bundle itself. Twice the
    bundle's bytes on disk.
    """
    graphs = {
        name: widen(load_graph(bundle.folder / info.file)) for name, info in bundle.manifest.graphs.items()
    }
    written = write_graphs(graphs, folder, (PREFILL, DECODE), "decoder.onnx_data")
    manifest = bundle.manifest.model_copy(
        update={"dtype": "float32", "graphs": written.graphs, "variants": {}}
    )
    return Bundle(folder, manifest, **bundle.backend_options)
