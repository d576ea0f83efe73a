"""Weights kept out of the optimizer's hands: it must not read what a graph only refers to.

The exporter's optimizer turns every Linear's weight around and looks for equal tensors, which would
read a whole checkpoint into memory. So a parameter is hidden from it (a shape, no numbers), its
Transpose is done here on the reference, and what the optimizer would have done to small parameters is
done once the graph is whole.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import onnx_ir as ir
import onnx_ir.passes.common as common
from onnxscript import optimizer
from torch import Tensor, nn

from skipvision_export.models.weights import WeightTensor

# What the optimizer folds into other operators, in elements.
SMALL = 8192


class Weights:
    """References for the parameters of a skeleton, found by the memory of its stand-ins."""

    def __init__(self, model: nn.Module, weights: Mapping[str, WeightTensor]) -> None:
        """weights: by parameter name; the model must still have all of its layers."""
        self._by_name = weights
        parameters = model.named_parameters(remove_duplicate=False)
        self._by_place = {parameter.data_ptr(): weights[name] for name, parameter in parameters}
        self._path = {id(module): name for name, module in model.named_modules()}

    def of(self, value: ir.Value) -> WeightTensor | None:
        """The weight that an initializer of the exporter stands for; None for a buffer or constant."""
        raw = getattr(value.const_value, "raw", None)
        return self._by_place.get(raw.data_ptr()) if isinstance(raw, Tensor) else None

    def of_layer(self, layers: nn.Module) -> Callable[[WeightTensor, int], WeightTensor]:
        """A function from a weight of any of `layers` to the same one of the layer of a number."""
        pattern = re.compile(rf"^{re.escape(self._path[id(layers)])}\.\d+\.")
        path = self._path[id(layers)]

        def of_layer(weight: WeightTensor, number: int) -> WeightTensor:
            name = pattern.sub(f"{path}.{number}.", weight.parameter)
            found = self._by_name[name]
            return weight if name == weight.parameter else found.transpose() if weight.transposed else found

        return of_layer


def optimize_without_weights(
    model: ir.Model, weight_of: Callable[[ir.Value], WeightTensor | None], optimize: Callable[[], object]
) -> None:
    """Run the optimizer on a graph whose parameters are hidden, then put references in their places.

    weight_of: the reference for an initializer that is a parameter, None for others.
    """
    hidden: dict[str, WeightTensor] = {}
    for value in tuple(model.graph.initializers.values()):
        weight = weight_of(value)
        if weight is not None:
            _hide(model.graph, value, weight, hidden)
    optimize()
    for name, value in model.graph.initializers.items():
        if name in hidden:
            value.const_value = hidden[name]


def settle_small(model: ir.Model) -> None:
    """Read the small parameters and let the optimizer see them, as it sees all of a loaded model."""
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if isinstance(tensor, WeightTensor) and tensor.size <= SMALL:
            value.const_value = ir.tensor(tensor.numpy(), name=value.name)
    optimizer.fold_constants_ir(model, onnx_shape_inference=False, input_size_limit=SMALL)
    for each in (
        common.RemoveUnusedNodesPass(),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
    ):
        each(model)


def _hide(graph: ir.Graph, value: ir.Value, weight: WeightTensor, hidden: dict[str, WeightTensor]) -> None:
    assert value.name is not None
    value.const_value = None
    hidden[value.name] = weight
    turns = [use.node for use in value.uses()]
    if len(turns) != 1 or turns[0].op_type != "Transpose" or len(weight.stored.shape) != 2:
        return
    out = turns[0].outputs[0]
    turned = ir.Value(name=out.name, type=value.type, shape=ir.Shape(weight.stored.shape[::-1]))
    out.name = f"{out.name}.turned"
    ir.convenience.replace_all_uses_with(out, turned)
    graph.remove(turns[0], safe=True)
    graph.initializers.pop(value.name)
    hidden.pop(value.name)
    # Where the old one stood: the order of initializers is the order of layers.
    assert turned.name is not None
    graph.initializers[turned.name] = turned
    hidden[turned.name] = weight.transpose()
