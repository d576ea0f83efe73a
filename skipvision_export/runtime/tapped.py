"""Graphs of ONNX Runtime that show what they compute inside, from the start or from given values on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime as ort

from skipvision_export.errors import BackendError
from skipvision_export.graph.taps import GIVEN, Tap, cut, show, values_of
from skipvision_export.runtime.ort import provider_options

Array = npt.NDArray[Any]
_NUMPY = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


class TappedGraph:
    """One graph file with taps in it; a session is made for each run, and freed again.

    find: the taps of the graph, in graph order.
    """

    def __init__(
        self,
        file: Path,
        find: Callable[[ir.Graph], Sequence[Tap]],
        providers: Sequence[str],
        read: Callable[[Path], ir.Model] = ir.load,
    ) -> None:
        """Raises PassError where taps are not found."""
        self._file, self._find, self._providers, self._read = file, find, list(providers), read
        self.names = [tap.name for tap in find(read(file).graph)]

    def run(self, feeds: dict[str, Array]) -> dict[str, Array]:
        """From the graph's inputs on: its outputs, and the values of taps by their names."""
        model = self._read(self._file)
        taps = self._find(model.graph)
        show(model, [tap.value for tap in taps])
        return self._named(self._run(model, feeds), taps, feeds)

    def from_given(
        self,
        feeds: dict[str, Array],
        given: dict[str, Array],
        inside: Callable[[ir.Node], bool] | None = None,
    ) -> tuple[dict[str, Array], list[tuple[ir.Node, str, Array]]]:
        """The same where everything that reads a tap reads `given` [by name] instead.

        inside: nodes whose float outputs are returned as well, (node, value's name, array) in graph order.
        """
        model = self._read(self._file)
        taps = self._find(model.graph)
        cut(model, taps)
        values = values_of(model.graph, inside) if inside is not None else []
        show(model, values)
        inputs = {value.name for value in model.graph.inputs}
        feeds = feeds | {
            f"{tap.value.name}{GIVEN}": given[tap.name]
            for tap in taps
            if f"{tap.value.name}{GIVEN}" in inputs
        }
        out = self._run(model, feeds)
        found = [(value.producer(), value.name, out[str(value.name)]) for value in values]
        return self._named(out, taps, feeds), [
            (node, str(name), array)
            for node, name, array in found
            if node is not None and np.issubdtype(array.dtype, np.floating)
        ]

    def nodes(self) -> list[ir.Node]:
        """Its nodes, in order."""
        return list(self._read(self._file).graph)

    def behind(self, name: str) -> list[ir.Node]:
        """Nodes that an output or a tap is computed by, the last first."""
        graph = self._read(self._file).graph
        taps = {tap.name: tap.value for tap in self._find(graph)}
        value = taps.get(name) or next(value for value in graph.outputs if value.name == name)
        found, waiting = dict[ir.Node, None](), [value.producer()]
        while waiting:
            node = waiting.pop(0)
            if node is not None and node not in found:
                found[node] = None
                waiting += [part.producer() for part in node.inputs if part is not None]
        return list(found)

    def _run(self, model: ir.Model, feeds: dict[str, Array]) -> dict[str, Array]:
        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(self._file.parent)
        )
        try:
            session = ort.InferenceSession(
                ir.to_proto(model).SerializeToString(),
                options,
                providers=self._providers,
                provider_options=provider_options(self._providers),
            )
            names = [value.name for value in session.get_outputs()]
            given = {
                value.name: feeds[value.name].astype(_NUMPY.get(value.type, feeds[value.name].dtype))
                for value in session.get_inputs()
            }
            return {
                name: array.astype(np.float32) if array.dtype == np.float16 else array
                for name, array in zip(names, session.run(names, given), strict=True)
            }
        except Exception as error:  # onnxruntime raises its own kinds, none of them public
            first = str(error).strip().splitlines()[0]
            raise BackendError(f"ONNX Runtime cannot run {self._file.name} with taps: {first}") from None

    @staticmethod
    def _named(out: dict[str, Array], taps: Sequence[Tap], feeds: dict[str, Array]) -> dict[str, Array]:
        """Outputs, and taps by their own names."""
        shown = {tap.value.name: tap.name for tap in taps}
        named = {shown.get(name, name): array for name, array in out.items()}
        for tap in taps:
            if tap.value.name in feeds:
                named[tap.name] = feeds[str(tap.value.name)]
        return named
