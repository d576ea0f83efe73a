"""Layer by layer: patched PyTorch and a bundle's graphs, each part alone and all in a chain."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from skipvision_export.benchmark.contenders import Contenders, Prompt
from skipvision_export.benchmark.layer_report import LayerReport
from skipvision_export.graph.passes.names import (
    DECODE,
    EMBED,
    IMAGE_FEATURES,
    ONNXRUNTIME,
    PLACES,
    PREFILL,
    RASTER_FEATURES,
    VISION,
    past_name,
    present_names,
)
from skipvision_export.graph.passes.regions import is_product, module_path
from skipvision_export.runtime.batch import PromptBatch
from skipvision_export.runtime.pipeline import Bundle
from skipvision_export.runtime.prompt import PromptInputs
from skipvision_export.runtime.tapped import TappedGraph
from skipvision_export.runtime.torch_reference import TorchReference
from skipvision_export.runtime.torch_taps import Call, TorchTaps
from skipvision_export.runtime.transcript import Transcript
from skipvision_export.runtime.varying import LaidPictures, Patches
from skipvision_export.validation import tensor_gap
from skipvision_export.validation.blame import ALONE_DB, Point, blame, point, same_rows

Array = npt.NDArray[Any]
STEPS = 2  # prefill and one step of decode
# Shapes are no reason for anything: of the nodes that may be at fault these are named first.
_TELLING = (
    "Attention",
    "GroupQueryAttention",
    "RotaryEmbedding",
    "RMSNormalization",
    "LayerNormalization",
    "Conv",
    "KVPrune",
)


@dataclass(frozen=True)
class Recorded:
    """What the model computed on one prompt, layer by layer, patched as a bundle is."""

    done: Transcript
    taps: TorchTaps
    placed: PromptInputs


def record(bundle: Bundle, reference: TorchReference, prompt: Prompt) -> Recorded:
    """Run the patched model; reference: with the numbers that the bundle computes with."""
    given = reference.prepare(prompt.image, prompt.question)
    with TorchTaps(reference.model, reference.source.family) as taps:
        done, _ = reference.run(
            given, STEPS, bundle.config, keep_kv=True, keep_features=True, min_new_tokens=STEPS
        )
    return Recorded(done, taps, bundle.prepare(prompt.image, prompt.question))


def compare_layers(bundle: Bundle, reference: TorchReference, prompt: Prompt) -> LayerReport:
    """Compare every layer on one prompt, in prefill and one step of decode, and name the first at fault.

    Each part is computed alone, from the reference's own values, and in the chain from the picture on. A
    bundle of a half type, or with int4 weights, is compared with the model's weights rounded: its graphs
    widened to float32 first, as in the rewrite gap, then float16 as it runs.
    Raises PassError where the graphs' layers are not those of the model.
    """
    with Contenders(bundle, reference, STEPS) as contenders:
        recorded = record(bundle, contenders.rounded, prompt)
        report = judge(contenders.wide, recorded)
        if report.verdict is None and bundle.manifest.dtype == "float16" and bundle.manifest.weights is None:
            report = judge(bundle, recorded)
        return report


def judge(bundle: Bundle, recorded: Recorded) -> LayerReport:
    """Compare a bundle with what was recorded, within the limits of its type; raises as `compare_layers`."""
    return Comparison(bundle, recorded).report()


def residual_stream(taps: TorchTaps, call: Call) -> dict[str, Array]:
    """The residual stream behind attention and FFN of each layer, [B, S, D]."""
    paths, found = taps.paths, {}
    behind = [*paths.decoder_layers[1:], paths.last_norm]
    for i, (ffn, after) in enumerate(zip(paths.ffns, behind, strict=True)):
        found[f"layers.{i}.attention"] = call.entered[ffn]
        found[f"layers.{i}.ffn"] = call.entered[after]
    return found


class Comparison:
    """A bundle's graphs beside what was recorded of the model."""

    def __init__(self, bundle: Bundle, recorded: Recorded) -> None:
        """Nothing runs yet."""
        self.bundle, self.dtype = bundle, bundle.manifest.dtype
        self.done, self.taps, self.placed = recorded.done, recorded.taps, recorded.placed
        self.points: list[Point] = []
        self.behind: dict[tuple[str, str], Callable[[], tuple[str, list[str]]]] = {}
        info = self.bundle.manifest
        self._files = {
            name: self.bundle.folder / graph.file for name, graph in (info.graphs | info.variants).items()
        }
        self._present = present_names("present", info.model.num_layers)

    def report(self) -> LayerReport:
        """Run all graphs and judge."""
        out = self._vision()
        features = out[IMAGE_FEATURES]
        assert self.done.laid is not None
        laid = self.done.laid.reshape(features.shape)
        prompt = PromptBatch(self.placed.input_ids, np.zeros(1, np.int64))
        pictures: Array | LaidPictures = laid
        if isinstance(self.placed.pixel_values, Patches):
            places = out[PLACES] if PLACES in out else np.arange(features.shape[1])[None]
            pictures = LaidPictures(laid, self.placed.pixel_values.grids, tuple(places))
        feeds, kept = self.bundle.generator.prefill_feeds(prompt, pictures)
        own = self.bundle.backend.numpy
        feeds = {name: x if isinstance(x, np.ndarray) else own(x) for name, x in feeds.items()}
        embeds = self._embed(laid, features)
        cache = self._prefill(feeds, embeds)
        self._decode(cache, kept, self.bundle.generator.next_positions(prompt, pictures))
        verdict = blame(self.points, self.dtype)
        if verdict is None or verdict.kind == "rounding":
            return LayerReport(self.points, verdict)
        at = verdict.point
        module, nodes = self.behind[at.graph, at.name]() if not verdict.shared else ("", [])
        return LayerReport(self.points, verdict, module, nodes)

    # -- graphs ----------------------------------------------------------------------------------

    def _vision(self) -> dict[str, Array]:
        """Compare the vision encoder; returns what it gives in the chain."""
        call, paths = self.taps.vision, self.taps.paths.vision_layers
        expected = {f"vision.layers.{i}": call.left[path] for i, path in enumerate(paths)}

        tapped = self._tapped(VISION)
        assert self.done.raster is not None and self.done.laid is not None
        expected |= {RASTER_FEATURES: self.done.raster, IMAGE_FEATURES: self.done.laid}
        scopes: dict[str, tuple[str, ...]] = {
            name: (path,) for name, path in zip(expected, paths, strict=False)
        }
        scopes[RASTER_FEATURES] = scopes[IMAGE_FEATURES] = ("projector",)
        return self.compare(tapped, VISION, self._picture(), None, expected, call, scopes)

    def _picture(self) -> dict[str, Array]:
        """The vision encoder's inputs."""
        pixels, varying = self.placed.pixel_values, self.bundle.generator.varying
        if not isinstance(pixels, Patches):
            return {"pixel_values": pixels}
        assert varying is not None
        return varying.feeds(*next(pixels.each()))

    def _embed(self, laid: Array, features: Array) -> Array:
        """Compare embeddings; returns those in the chain."""
        tapped = self._tapped(EMBED)
        feeds = {"input_ids": self.placed.input_ids, "image_features": laid}
        expected = {"inputs_embeds": self.taps.steps[0].entered["inputs_embeds"]}
        chain = feeds | {"image_features": features}
        chained = self.compare(tapped, EMBED, feeds, chain, expected, self.taps.steps[0], {})
        return chained["inputs_embeds"]

    def _prefill(self, feeds: dict[str, Array], embeds: Array) -> dict[str, Array]:
        """Compare each form of prefill; returns K and V in the chain, of the form that ONNX Runtime runs."""
        call = self.taps.steps[0]
        expected = residual_stream(self.taps, call)
        expected |= {name: kv[None] for name, kv in zip(self._present, self.done.kv, strict=True)}
        expected["logits"] = self.done.logits[0]
        given = feeds | {"inputs_embeds": call.entered["inputs_embeds"]}
        chained: dict[str, Array] = {}
        for graph in self.forms(PREFILL):
            tapped = self._tapped(graph)
            chain = feeds | {"inputs_embeds": embeds}
            chained = self.compare(tapped, graph, given, chain, expected, call, self._scopes())
        return {name: chained[name] for name in self._present}

    def _decode(self, cache: dict[str, Array], kept: Array, position: Array) -> None:
        """Compare each form of decode, on the cache that the reference's prefill left, and on the chain's."""
        call, generator = self.taps.steps[1], self.bundle.generator
        cached = self.done.kv_tokens_after_prefill
        expected = residual_stream(self.taps, call)
        layers = self.taps.cache.layers
        for i, layer in enumerate(layers):
            for kind, tensor in (("key", layer.keys), ("value", layer.values)):
                expected[f"present.{i}.{kind}"] = tensor[:, :, cached : cached + 1].float().numpy()
        expected["logits"] = self.done.logits[1]
        token = np.array([[self.done.token_ids[0]]], np.int64)
        feeds = {
            "attention_mask": np.ones((1, cached + 1), np.int64),
            "position_ids": generator.position_ids(position),
        }
        own = np.asarray(generator.backend.numpy(generator.embed(token)))
        given = {name: kv[None] for name, kv in zip(self._present, self.done.kv, strict=True)}
        cache = {name: array[:, :, kept[0]] for name, array in cache.items()}
        for graph in self.forms(DECODE):
            # A form over one buffer needs room for the new position, and gives the buffer out.
            room = int(graph != DECODE)

            def past(arrays: dict[str, Array], room: int = room) -> dict[str, Array]:
                pads = ((0, 0), (0, 0), (0, room), (0, 0))
                return {past_name(name): np.pad(array, pads) for name, array in arrays.items()}

            tapped = self._tapped(graph)
            alone = feeds | past(given) | {"inputs_embeds": call.entered["inputs_embeds"]}
            chain = feeds | past(cache) | {"inputs_embeds": own}
            self.compare(tapped, graph, alone, chain, expected, call, self._scopes(), new=cached)

    # -- parts -----------------------------------------------------------------------------------

    def forms(self, graph: str) -> list[str]:
        """The graph, and its form for ONNX Runtime where there is one."""
        return [name for name in (graph, f"{graph}.{ONNXRUNTIME}") if name in self._files]

    def _tapped(self, graph: str) -> TappedGraph:
        find = partial(self.taps.paths.taps, graph)
        return TappedGraph(self._files[graph], find, self.bundle.backend.providers)

    def _scopes(self) -> dict[str, tuple[str, ...]]:
        """Which modules may be behind each tensor."""
        found: dict[str, tuple[str, ...]] = {"logits": (self.taps.paths.last_norm, "head")}
        for i, path in enumerate(self.taps.paths.decoder_layers):
            names = (f"present.{i}.key", f"present.{i}.value", f"layers.{i}.attention", f"layers.{i}.ffn")
            found |= dict.fromkeys(names, (path,))
        return found

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
        """Points of one graph; new: the first position of K and V that it computed itself."""
        chained = tapped.run(feeds if chain is None else chain)
        given = {name: same_rows(expected[name], chained[name]) for name in tapped.names}
        alone, _ = tapped.from_given(feeds, given)
        for name in sorted((name for name in expected if name in alone), key=place):
            rows = (
                {
                    side: out[name][:, :, new : new + 1]
                    for side, out in (("alone", alone), ("chained", chained))
                }
                if new and name.startswith("present.")
                else {"alone": alone[name], "chained": chained[name]}
            )
            self.points.append(point(graph, name, expected[name], **rows))
            self.behind[graph, name] = partial(
                self._zoom, tapped, feeds, given, call, scopes.get(name, ()), name
            )
        return chained

    def _zoom(
        self,
        tapped: TappedGraph,
        feeds: dict[str, Array],
        given: dict[str, Array],
        call: Call,
        scopes: tuple[str, ...],
        name: str,
    ) -> tuple[str, list[str]]:
        """The first module whose result is nowhere in the graph's part, and the nodes that compute it."""

        def inside(node: ir.Node) -> bool:
            path = module_path(node)
            return any(path == scope or path.startswith(f"{scope}.") for scope in scopes)

        values = tapped.from_given(feeds, given, inside)[1]
        nodes = [node for node in tapped.nodes() if inside(node)]
        steps = [step for step in call.checkpoints if _within(step[0], scopes)]
        ffn = next((path for path in self.taps.paths.ffns if _within(path, scopes)), None)
        at = next((i for i, step in enumerate(steps) if step[0] == ffn), len(steps))
        limit = ALONE_DB[self.bundle.manifest.dtype]
        steps = steps[at:] if name.endswith(".ffn") else steps[:at]
        for path, kind, array in steps:
            if not any(_matches(array, value, limit) for _, _, value in values):
                if kind == "input":  # between modules: the last of the nodes in the one around them
                    module = path.rpartition(".")[0]
                    return module, telling([node for node in nodes if module_path(node) == module][::-1])
                # Projections that are packed as one stand in the module of the first.
                own = [node for node in nodes if module_path(node) == path]
                return path, telling(own or [node for node in nodes if is_product(node)])
        return ", ".join(scopes[:1]), telling(tapped.behind(name))


def _within(path: str, scopes: Sequence[str]) -> bool:
    return any(path == scope or path.startswith(f"{scope}.") for scope in scopes)


def _matches(expected: Array, actual: Array, limit: float) -> bool:
    """Do they hold the same numbers, or one of them the last row of the other?"""
    if expected.size != actual.size and expected.ndim >= 2:
        expected = expected[..., -1:, :]
    if expected.size != actual.size:
        return False
    return tensor_gap(expected.ravel(), actual.ravel()).sqnr_db >= limit


def telling(nodes: Sequence[ir.Node]) -> list[str]:
    """Names of the nodes that tell most."""
    telling = [node for node in nodes if is_product(node) or node.op_type in _TELLING]
    return [str(node.name) for node in (telling or nodes)[:3]]


def place(name: str) -> tuple[int, int]:
    """Where a tensor stands in the order of computation."""
    parts = name.split(".")
    layer = next((int(part) for part in parts if part.isdigit()), None)
    ends = {IMAGE_FEATURES: 2, RASTER_FEATURES: 1}
    if layer is None:
        return 1 << 30, ends.get(name, 3)
    return layer, {"key": 0, "value": 1, "attention": 2, "ffn": 3}.get(parts[-1], 0)
