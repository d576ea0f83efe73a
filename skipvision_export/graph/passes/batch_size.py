"""The batch under the name by which transformers.js knows it."""

from __future__ import annotations

import onnx_ir as ir

_OURS, _THEIRS = "batch", "batch_size"


class BatchSizePass(ir.passes.InPlacePass):
    """Rename the dimension `batch` of inputs and outputs to `batch_size`.

    transformers.js makes an empty cache by the names of its inputs' dimensions: of those that it does not
    know the size is zero.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Rewrite in place."""
        modified = False
        for value in (*model.graph.inputs, *model.graph.outputs):
            sizes = list(value.shape or ())
            if any(isinstance(size, ir.SymbolicDim) and size.value == _OURS for size in sizes):
                named = [
                    _THEIRS if isinstance(size, ir.SymbolicDim) and size.value == _OURS else size
                    for size in sizes
                ]
                value.shape, modified = ir.Shape(named), True
        return ir.passes.PassResult(model, modified=modified)
