"""From a trace to the graphs of a bundle: every pass, in order."""

from __future__ import annotations

import onnx_ir.passes.common as common

from skipvision_export.graph.clean import clear_inferred_types, unique_node_names
from skipvision_export.graph.passes import PassContext, passes_for
from skipvision_export.graph.trace import Trace


def rewrite(trace: Trace, context: PassContext) -> Trace:
    """Run the passes of every graph on a copy of the trace.

    Raises PassError where a pass refuses a graph.
    """
    result = trace.clone()
    for name, model in result.graphs.items():
        for each in passes_for(name, context):
            each(model)
        common.RemoveUnusedNodesPass()(model)
        clear_inferred_types(model)
        unique_node_names(model)
    return result
