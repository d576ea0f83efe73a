"""What answers a prompt in the comparisons of `measure_gaps`: PyTorch and ONNX Runtime, in each form."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np

from skipvision_export.benchmark.raster import RasterEncoder
from skipvision_export.bundle import Manifest
from skipvision_export.config import SkipVisionConfig
from skipvision_export.graph.passes.names import VISION
from skipvision_export.layout import TokenLayout
from skipvision_export.runtime.generation import Generator
from skipvision_export.runtime.ort import OrtBackend
from skipvision_export.runtime.pipeline import Bundle
from skipvision_export.runtime.prompt import PromptInputs
from skipvision_export.runtime.torch_reference import TorchReference
from skipvision_export.runtime.transcript import Transcript
from skipvision_export.runtime.varying import LaidPictures, Patches
from skipvision_export.runtime.widened import widened


@dataclass(frozen=True)
class Prompt:
    """A picture (a path or a PIL image), a question, and the expected answer where there is one."""

    image: Any
    question: str
    answer: str | None = None


def is_exact(manifest: Manifest) -> bool:
    """Does a bundle compute with the model's own numbers, nothing rounded?"""
    return manifest.dtype == "float32" and manifest.weights is None


class Contenders:
    """What answers a prompt, each by its method's name.

    For a float32 bundle of full weights `dense` and `patched` are the model, `ort`, `ort_all` and
    `plain` the bundle. For a half type, and for int4 weights, they hold the same rounded weights and
    compute in float32: the model's weights are rounded, the bundle's graphs widened. Then `original`
    and `half` are the patched model in float32 and wholly in the half type with the bundle's weights,
    and `real` is the bundle as it runs; `half_same` and `real_same` read the image features of
    `original` and `ort`, which must have answered the same prompt before.

    A context manager: widened graphs lie in a temporary folder that is removed on exit.
    """

    # In this order on each prompt.
    NAMES = (
        *("dense", "patched", "ort", "plain", "ort_all"),
        *("original", "half", "half_same", "real", "real_same"),
    )

    def __init__(self, bundle: Bundle, reference: TorchReference, max_new_tokens: int) -> None:
        """reference: the model in float32 with its own weights."""
        self.bundle, self.reference, self.max_new_tokens = bundle, reference, max_new_tokens
        self.dtype, self.weights = bundle.manifest.dtype, bundle.manifest.weights
        self.exact = is_exact(bundle.manifest)
        self.varies = bundle.manifest.model.merge_size is not None
        self.orders: list[list[int]] = []
        self._last: dict[str, Transcript] = {}
        self._scratch: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> Self:
        """Nothing is made before it is used."""
        return self

    def __exit__(self, *error: object) -> None:
        """Remove the widened graphs."""
        if self._scratch is not None:
            self._scratch.cleanup()

    # -- PyTorch ---------------------------------------------------------------------------------

    def dense(self, prompt: Prompt) -> Transcript:
        """The Hugging Face model as it is."""
        return self.rounded.run(self._inputs(prompt), self.max_new_tokens, keep_kv=True)[0]

    def patched(self, prompt: Prompt) -> Transcript:
        """The Hugging Face model under apply_skip_vision."""
        inputs, config = self._inputs(prompt), self.bundle.config
        done, state = self.rounded.run(inputs, self.max_new_tokens, config, keep_kv=True)
        assert state is not None and state.order is not None
        self.orders.append(state.order[0].tolist())
        return done

    def original(self, prompt: Prompt) -> Transcript:
        """Patched, in float32 with the weights as they are in the model's files."""
        self._last["original"] = self._patched(self.reference, prompt)
        return self._last["original"]

    def half(self, prompt: Prompt) -> Transcript:
        """Patched, weights and arithmetic in the bundle's type."""
        return self._patched(self.in_half, prompt)

    def half_same(self, prompt: Prompt) -> Transcript:
        """The same on the image features of `original`."""
        return self._patched(self.in_half, prompt, same=self._last["original"])

    @cached_property
    def rounded(self) -> TorchReference:
        """The model with the bundle's weights, computing in float32."""
        if self.exact:
            return self.reference
        return TorchReference(self.reference.source, weights_dtype=self.dtype, weights=self.weights)

    @cached_property
    def in_half(self) -> TorchReference:
        """The model in the bundle's type, with its weights."""
        if self.dtype == "float32":
            return self.rounded
        return TorchReference(self.reference.source, dtype=self.dtype, weights=self.weights)

    def _patched(self, reference: TorchReference, prompt: Prompt, **more: Any) -> Transcript:
        config: SkipVisionConfig = self.bundle.config
        inputs = self._inputs(prompt)
        return reference.run(inputs, self.max_new_tokens, config, keep_kv=True, keep_features=True, **more)[0]

    # -- ONNX Runtime ----------------------------------------------------------------------------

    def ort(self, prompt: Prompt) -> Transcript:
        """The bundle: as it runs in float32, else widened."""
        inputs = self._placed(prompt)
        if self.exact:
            return self._run(self.wide.generator, inputs)
        self._last["ort"] = self._with_features(self.wide, self._raster, inputs)
        return self._last["ort"]

    def plain(self, prompt: Prompt) -> Transcript:
        """The bundle with no optimization of ONNX Runtime's."""
        return self._run(self._plain, self._placed(prompt))

    def ort_all(self, prompt: Prompt) -> Transcript:
        """The bundle with nothing chosen, merged, skipped or dropped."""
        inputs = self._inputs(prompt)
        features = self.rounded.pack(self._raster(inputs.pixel_values), inputs)
        return self._run(self._everything, inputs, features=features)

    def real(self, prompt: Prompt) -> Transcript:
        """A bundle of a half type or of int4 weights as it runs."""
        return self._with_features(self.bundle, self._real_raster, self._placed(prompt))

    def real_same(self, prompt: Prompt) -> Transcript:
        """The same on the image features of `ort`."""
        seen, inputs = self._last["ort"], self._placed(prompt)
        assert seen.laid is not None
        laid: Any = seen.laid[None]
        if isinstance(inputs.pixel_values, Patches):
            laid = LaidPictures(laid, inputs.pixel_values.grids, tuple(seen.places))
        return self._run(self.bundle.generator, inputs, features=laid)

    def check_real(self) -> None:
        """Raises BackendError where ONNX Runtime has no kernels for the bundle's type."""
        self.bundle.backend.session(VISION)

    @cached_property
    def wide(self) -> Bundle:
        """The bundle's graphs in float32."""
        if self.exact:
            return self.bundle
        self._scratch = tempfile.TemporaryDirectory(prefix="skipvision-widened-")
        return widened(self.bundle, Path(self._scratch.name))

    @cached_property
    def _plain(self) -> Generator:
        wide = self.wide
        plain = OrtBackend(wide.folder, wide.manifest, optimize=False, providers=wide.backend.providers)
        return Generator(plain, wide.manifest)

    @cached_property
    def _everything(self) -> Generator:
        if self.varies:
            return Generator(self.wide.backend, self.wide.manifest, config=SkipVisionConfig.dense())
        layers = self.bundle.manifest.layout.layer_tiers
        runs = (("retained", self.reference.visual_tokens),)
        whole = TokenLayout(runs, (0,) if layers else (), layers)  # type: ignore[arg-type]
        return Generator(self.wide.backend, self.wide.manifest, whole)

    @cached_property
    def _raster(self) -> RasterEncoder:
        return RasterEncoder(self.wide)

    @cached_property
    def _real_raster(self) -> RasterEncoder:
        return RasterEncoder(self.bundle)

    def _inputs(self, prompt: Prompt) -> PromptInputs:
        return self.reference.prepare(prompt.image, prompt.question)

    def _placed(self, prompt: Prompt) -> PromptInputs:
        return self.bundle.prepare(prompt.image, prompt.question)

    def _with_features(self, bundle: Bundle, raster: RasterEncoder, inputs: PromptInputs) -> Transcript:
        """A generation that records its picture's features."""
        found, order = raster.run(inputs.pixel_values)
        laid = bundle.generator.encode(inputs.pixel_values)
        done = self._run(bundle.generator, inputs, features=laid)
        done.raster, done.order = np.concatenate(found).astype(np.float32), order
        if isinstance(laid, LaidPictures):
            done.places, read = list(laid.places), laid.features
        else:
            read = bundle.backend.numpy(laid)
        done.laid = np.concatenate(read).astype(np.float32)
        return done

    def _run(self, generator: Generator, inputs: PromptInputs, **more: Any) -> Transcript:
        return generator.generate(
            inputs.input_ids,
            inputs.pixel_values,
            max_new_tokens=self.max_new_tokens,
            eos=self.bundle.eos,
            keep_logits=True,
            keep_kv=True,
            **more,
        )
