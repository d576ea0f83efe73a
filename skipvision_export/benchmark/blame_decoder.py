"""Layer by layer: dense PyTorch and a decoder that another program exported of the same model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnx_ir.passes.common as common

from skipvision_export.benchmark.blame import STEPS, place, residual_stream
from skipvision_export.benchmark.contenders import Prompt
from skipvision_export.benchmark.layer_report import LayerReport
from skipvision_export.errors import ModelError, PassError
from skipvision_export.graph.others import kv_names
from skipvision_export.graph.passes.names import TOKEN_INPUTS, past_name
from skipvision_export.graph.passes.skip_ffn import token_input
from skipvision_export.graph.passes.split_norm import SplitNormPass
from skipvision_export.graph.taps import Tap, structure_taps
from skipvision_export.runtime.tapped import TappedGraph
from skipvision_export.runtime.torch_reference import TorchReference
from skipvision_export.runtime.torch_taps import TorchTaps
from skipvision_export.validation.blame import Point, blame, point, same_rows

Array = npt.NDArray[Any]
CPU = ("CPUExecutionProvider",)


def read(file: Path) -> ir.Model:
    """The graph with its functions inlined and fused residual sums apart from their norms."""
    if not file.is_file():
        raise ModelError(f"{file} does not exist; expected an ONNX decoder")
    try:
        model = ir.load(file)
    except Exception as error:  # protobuf's own kinds
        raise ModelError(f"{file} is no readable ONNX file: {error}") from None
    common.InlinePass()(model)
    SplitNormPass()(model)
    return model


def compare_decoder(
    file: Path, reference: TorchReference, prompt: Prompt, providers: Sequence[str] = CPU
) -> LayerReport:
    """Compare the layers of a decoder, found by structure, with those of the model, nothing skipped.

    Prefill, and a step of decode behind the cache that PyTorch left. A graph that takes token ids is given a
    prompt without a picture. Raises ModelError for what is no ONNX file, PassError where no layers are found
    or their number is not the model's.
    """
    if reference.source.family.dynamic:
        raise ModelError(
            f"positions of {reference.source.family.name} have three axes, and others' decoders are fed one; "
            "export the model here to compare it"
        )
    graph = read(file).graph
    takes_ids = token_input(graph).name == TOKEN_INPUTS[1]
    names = kv_names(graph)
    given = reference.prepare(None if takes_ids else prompt.image, prompt.question)
    with TorchTaps(reference.model, reference.source.family) as taps:
        done, _ = reference.run(given, STEPS, keep_kv=True, min_new_tokens=STEPS)

    def find(graph: ir.Graph) -> list[Tap]:
        found = structure_taps(graph)
        if len(found) != 2 * len(taps.paths.ffns):
            raise PassError(
                f"{file} has {len(found) // 2} layers, the model has {len(taps.paths.ffns)}: it is another "
                "model's"
            )
        return found

    tapped = TappedGraph(file, find, providers, read)
    ids, tokens = given.input_ids, np.array([done.token_ids[:1]], np.int64)
    cached = done.kv_tokens_after_prefill
    kv = {name: array[None] for name, array in zip(names, done.kv, strict=True)}
    newer = {
        name: tensor[:, :, cached : cached + 1].float().numpy()
        for i, layer in enumerate(taps.cache.layers)
        for name, tensor in zip(names[2 * i : 2 * i + 2], (layer.keys, layer.values), strict=True)
    }
    points: list[Point] = []
    first = reference.source.family.first_position
    for step, (call, token_ids, start) in enumerate(zip(taps.steps, (ids, tokens), (0, cached), strict=True)):
        expected = residual_stream(taps, call) | (newer if step else kv) | {"logits": done.logits[step]}
        new = token_ids.shape[1]
        past = {past_name(name): array[:, :, :start] for name, array in kv.items()}
        feeds = past | {
            TOKEN_INPUTS[0]: call.entered[TOKEN_INPUTS[0]],
            TOKEN_INPUTS[1]: token_ids,
            "attention_mask": np.ones((1, start + new), np.int64),
            "position_ids": np.arange(start, start + new)[None] + first,
        }
        points += _points(tapped, f"{file.name}, {'decode' if step else 'prefill'}", feeds, expected, start)
    return LayerReport(points, blame(points))


def _points(
    tapped: TappedGraph, graph: str, feeds: dict[str, Array], expected: dict[str, Array], start: int
) -> list[Point]:
    chained = tapped.run(feeds)
    given = {name: same_rows(expected[name], chained[name]) for name in tapped.names}
    alone, _ = tapped.from_given(feeds, given)

    def own(name: str, array: Array) -> Array:
        """K and V of the new positions; logits of the last one."""
        if name == "logits":
            return array[:, -1:]
        return array[:, :, start:] if name in expected and array.ndim == 4 else array

    return [
        point(graph, name, expected[name], own(name, alone[name]), own(name, chained[name]))
        for name in sorted(expected.keys() & alone.keys(), key=place)
    ]
