"""Layer by layer: patched PyTorch and a bundle's engines that were built to show what each layer computes."""

from __future__ import annotations

from functools import partial
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from skipvision_export.benchmark.blame import STEPS, Comparison, Recorded, place, record, telling
from skipvision_export.benchmark.contenders import Contenders, Prompt
from skipvision_export.benchmark.layer_report import LayerReport
from skipvision_export.errors import BundleError
from skipvision_export.runtime.pipeline import Bundle
from skipvision_export.runtime.tapped import TappedGraph
from skipvision_export.runtime.torch_reference import TorchReference
from skipvision_export.runtime.torch_taps import Call
from skipvision_export.validation import tensor_gap
from skipvision_export.validation.blame import Point, same_rows

Array = npt.NDArray[Any]


class Runner(Protocol):
    """What runs engines, such as TrtRunner."""

    def run(self, graph: str, feeds: dict[str, Any]) -> dict[str, Any]:
        """Run one graph; all of its outputs, by name."""

    def numpy(self, value: Any) -> Array:
        """A tensor on the host."""


def compare_engines(bundle: Bundle, runner: Runner, reference: TorchReference, prompt: Prompt) -> LayerReport:
    """Compare every layer of a bundle's engines on one prompt, in prefill and one step of decode.

    An engine cannot start in its middle. So what a layer makes of its own is told by ONNX Runtime, which
    computes each part in float32 from what the engine itself gave before it; and the chain from the picture
    on is compared with the patched model, as of graphs. Raises BundleError for engines without taps, and
    InputError for a prompt that no profile of theirs holds.
    """
    with Contenders(bundle, reference, STEPS) as contenders:
        recorded = record(bundle, contenders.rounded, prompt)
        return _Engines(contenders.wide, recorded, runner, bundle.manifest.dtype).report()


class _Engines(Comparison):
    def __init__(self, wide: Bundle, recorded: Recorded, runner: Runner, dtype: str) -> None:
        super().__init__(wide, recorded)
        self.runner, self.dtype = runner, dtype

    def forms(self, graph: str) -> list[str]:
        """Engines are built of the graph that every runtime runs."""
        return [graph]

    def compare(
        self,
        tapped: TappedGraph,
        graph: str,
        feeds: dict[str, Array],
        chain: dict[str, Array] | None,
        expected: dict[str, Array],
        call: Call,
        scopes: dict[str, tuple[str, ...]],
        new: int = 0,
    ) -> dict[str, Array]:
        """Points of one engine; alone: beside ONNX Runtime on the engine's own tensors before it."""
        chain = feeds if chain is None else chain
        wanted = [tensor.name for tensor in self.bundle.manifest.graphs[graph].inputs]
        out = self.runner.run(graph, {name: chain[name] for name in wanted})
        found = {name: np.asarray(self.runner.numpy(value)).astype(np.float32) for name, value in out.items()}
        missing = [name for name in tapped.names if name not in found]
        if missing:
            raise BundleError(
                f"the engine of {graph} does not give {missing[0]}; build again with --taps to compare layers"
            )
        own, _ = tapped.from_given(chain, {name: found[name] for name in tapped.names})
        for name in sorted((name for name in expected if name in own), key=place):
            one, other = own[name], found[name]
            if new and name.startswith("present."):
                one, other = one[:, :, new : new + 1], other[:, :, new : new + 1]
            gaps = [tensor_gap(same_rows(array, other), other) for array in (one, expected[name])]
            self.points.append(Point(graph, name, *gaps))
            self.behind[graph, name] = partial(_behind, tapped, name, scopes.get(name, ("",))[0])
        return found


def _behind(tapped: TappedGraph, name: str, scope: str) -> tuple[str, list[str]]:
    """The module that computes a tensor, and the nodes that its engine's part was made of."""
    return scope, telling(tapped.behind(name))
