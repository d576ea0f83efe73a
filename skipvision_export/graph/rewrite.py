"""From a trace to the graphs of a bundle: every pass, in order."""

from __future__ import annotations

from dataclasses import dataclass, field

import onnx_ir as ir
import onnx_ir.passes.common as common

from skipvision_export.graph.clean import clear_inferred_types, unique_node_names
from skipvision_export.graph.passes import PassContext, passes_for, variants_for
from skipvision_export.graph.passes.names import APPEND, DECODE, PREFILL
from skipvision_export.graph.trace import Trace


@dataclass
class Rewritten:
    """The graphs of a bundle by name, and other forms of them by `NAME.FORM`, see `Manifest`."""

    graphs: dict[str, ir.Model]
    variants: dict[str, ir.Model] = field(default_factory=dict)


def rewrite(trace: Trace, context: PassContext) -> Rewritten:
    """Run the passes of every graph on a copy of the trace.

    Raises PassError where a pass refuses a graph.
    """
    result = Rewritten(trace.clone().graphs)
    # Decode's trace is that of any number of tokens behind a cache. What sees its whole prompt has no parts.
    if context.sees != "prompt":
        result.variants[APPEND] = trace.graphs[DECODE].clone()
    # Prefill first: the others share the weights that PackProjections makes there.
    every = result.graphs | result.variants
    for name, model in sorted(every.items(), key=lambda item: item[0] != PREFILL):
        for each in passes_for(name, context):
            each(model)
            # What a pass leaves unused would still look like a reader to the next.
            common.RemoveUnusedNodesPass()(model)
        for runtime, passes in variants_for(name, context).items():
            variant = model.clone()
            modified = [each(variant).modified for each in passes]
            if modified[0]:
                result.variants[f"{name}.{runtime}"] = variant
    for model in (*result.graphs.values(), *result.variants.values()):
        common.RemoveUnusedNodesPass()(model)
        clear_inferred_types(model)
        unique_node_names(model)
    return result
