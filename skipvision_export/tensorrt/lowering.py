"""What a graph must look like for a compiler: the one place that knows which operators each takes."""

from __future__ import annotations

import onnx
import onnx.inliner

from skipvision_export.graph.passes.names import DOMAIN
from skipvision_export.tensorrt.library import Compiler

# Operators of opset 23 and the first version whose parser takes each; older ones get the operator's
# function body of the ONNX standard. TensorRT: its release notes. TensorRT-RTX: the version measured.
NATIVE: dict[str, dict[str, tuple[int, ...]]] = {
    "tensorrt": {"Attention": (10, 14), "RotaryEmbedding": (10, 15), "RMSNormalization": (10, 15)},
    "tensorrt-rtx": {"Attention": (1, 7), "RotaryEmbedding": (1, 7), "RMSNormalization": (1, 7)},
}

# Before this version of TensorRT a function body wins over a plugin of the same name.
_PLUGIN_WINS = {"tensorrt": (10, 7), "tensorrt-rtx": (1, 0)}

# TensorRT's own attribute, which its parser hands to IAttention::setDecomposable.
_DECOMPOSABLE = "TRT_decomposable"


def lower(model: onnx.ModelProto, compiler: Compiler, *, plugin: bool) -> onnx.ModelProto:
    """A copy of `model` for `compiler`; weights in external files stay where they are.

    Attention stays one operator where the parser knows it, and is allowed to fall apart where the
    compiler has no fused kernel for its type and head size: without that permission such a build
    fails. KVPrune becomes a plugin layer, or its function body where `plugin` is False.
    """
    old = [op for op, since in NATIVE[compiler.product].items() if compiler.version < since]
    if old:
        lowered = onnx.inliner.inline_selected_functions(
            model, [("", op) for op in old], inline_schema_functions=True
        )
        lowered = _folded(lowered)
    else:
        lowered = onnx.ModelProto()
        lowered.CopyFrom(model)
    for node in lowered.graph.node:
        if node.domain in ("", "ai.onnx") and node.op_type == "Attention":
            node.attribute.append(onnx.helper.make_attribute(_DECOMPOSABLE, 1))
        elif node.domain == DOMAIN and not plugin:
            # With a namespace the parser would take any plugin of that name that is loaded.
            kept = [a for a in node.attribute if not a.name.startswith("plugin_")]
            del node.attribute[:]
            node.attribute.extend(kept)
    if plugin and compiler.version < _PLUGIN_WINS[compiler.product]:
        others = [function for function in lowered.functions if function.domain != DOMAIN]
        del lowered.functions[:]
        lowered.functions.extend(others)
    return lowered


def _folded(model: onnx.ModelProto) -> onnx.ModelProto:
    """With constants computed: parsers want the axes of a reduction to be one, not arithmetic on shapes."""
    import onnx_ir as ir
    import onnxscript.optimizer

    graph = ir.from_proto(model)
    onnxscript.optimizer.fold_constants(graph, onnx_shape_inference=True)
    return ir.to_proto(graph)
