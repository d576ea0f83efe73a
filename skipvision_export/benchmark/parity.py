"""Running the contenders of the gaps on the same prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from skipvision_export.benchmark.accuracy import normalize
from skipvision_export.benchmark.contenders import Contenders, Prompt, is_exact
from skipvision_export.benchmark.layer_report import LayerReport
from skipvision_export.bundle import Manifest
from skipvision_export.errors import BackendError
from skipvision_export.runtime.data import Sample
from skipvision_export.runtime.pipeline import Bundle
from skipvision_export.runtime.torch_reference import TorchReference
from skipvision_export.runtime.transcript import Transcript
from skipvision_export.validation import (
    INT4_MIN_DB,
    LIMIT,
    Gap,
    Groups,
    compare_precision,
    compare_steps,
    layer_rows,
)

Progress = Callable[[str], None]


@dataclass
class ParityReport:
    """The gaps, the layers of the rewrite gap, and every contender's transcripts."""

    gaps: dict[str, Gap]
    transcripts: dict[str, list[Transcript]]
    orders: list[list[int]]
    accuracy: dict[str, float]
    by_layer: LayerReport | None = None

    @property
    def passed(self) -> bool:
        """No gap and no layer is over its limit; those that were not run do not count."""
        layers = self.by_layer is None or self.by_layer.verdict is None
        return layers and not any(gap.failures() for gap in self.gaps.values())

    def to_json(self) -> dict[str, Any]:
        """The contract's keys."""
        return {
            "passed": self.passed,
            "gaps": {name: gap.to_json() for name, gap in self.gaps.items()},
            "layers": self._layers(),
            "greedy_match": self.gaps["rewrite"].greedy_match,
            "accuracy": self.accuracy,
            **({} if self.by_layer is None else self.by_layer.to_json()),
        }

    def _layers(self) -> list[dict[str, Any]]:
        """K and V over all prompts, and the residual stream behind attention and FFN in one prefill."""
        rows = layer_rows(self.gaps["rewrite"])
        stream = {} if self.by_layer is None else self.by_layer.prefill()
        for row in rows:
            for part in ("attention", "ffn"):
                point = stream.get(f"layers.{row['layer']}.{part}")
                if point is not None:
                    row[part] = point.chained.to_json()
        return rows


def prompts_from(samples: Sequence[Sample]) -> list[Prompt]:
    """Prompts of a data folder."""
    return [Prompt(s.image, s.question, s.answer) for s in samples]


def synthetic_prompts(n: int, size: int, wide: bool = False) -> list[Prompt]:
    """Pictures of random blocks and plain questions, for models that come without data.

    wide: every other picture is twice as wide as high, for models that cut pictures.
    """
    rng = np.random.default_rng(0)
    asked = ["What is in the picture?", "Describe the image.", "Which colours are there?"]
    prompts = []
    for i in range(n):
        blocks = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        width = 2 * size if wide and i % 2 else size
        image = Image.fromarray(blocks).resize((width, size), Image.Resampling.BICUBIC)
        prompts.append(Prompt(image, asked[i % len(asked)]))
    return prompts


# gap -> what is expected, and what is compared with it; see measure_gaps. Of three, the second reads
# the image features of the first, the third its own.
GAPS: dict[str, tuple[str, ...]] = {
    "export": ("dense", "ort_all"),
    "rewrite": ("patched", "ort"),
    "backend": ("plain", "ort"),
    "method": ("dense", "patched"),
}
ROUNDED_GAPS = GAPS | {
    "backend": ("ort", "real_same", "real"),
    "precision": ("original", "half_same", "half"),
}
_WIDE = "weights rounded to {numbers} on both sides, computed in float32"
NOTES = {
    "backend": "ONNX Runtime on {device}, all optimizations against none",
    "method": "reported, not limited",
}
ROUNDED_NOTES = NOTES | {"export": _WIDE, "rewrite": _WIDE}


def gaps_of(manifest: Manifest) -> dict[str, tuple[str, ...]]:
    """The gaps of a bundle, and the contenders of each; `precision` is for rounded ones only."""
    return GAPS if is_exact(manifest) else ROUNDED_GAPS


def numbers_of(manifest: Manifest) -> str:
    """What a bundle's numbers are rounded to, in words."""
    half = None if manifest.dtype == "float32" else manifest.dtype
    return " and ".join(filter(None, (half, manifest.weights)))


def groups_of(manifest: Manifest) -> Groups:
    """Sizes of the groups that a picture's tokens are chosen for, by their number."""

    def groups(visual: int) -> Sequence[int]:
        if manifest.model.merge_size is None:
            return manifest.layout.selection_sizes()
        return manifest.skip_config.layout(visual, varies=True).selection_sizes()

    return groups


def measure_gaps(
    bundle: Bundle,
    reference: TorchReference,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int = 16,
    gaps: Sequence[str] | None = None,
    progress: Progress = lambda _: None,
    contenders: Contenders | None = None,
) -> ParityReport:
    """Compare a bundle with the model it came from, on each prompt.

    export    dense PyTorch against the bundle's graphs with every visual token as it comes out of
              the projector, every row and every K/V kept
    rewrite   patched PyTorch against the bundle as it runs
    backend   the bundle with every ONNX Runtime optimization off against the bundle as it runs
    method    patched PyTorch against dense PyTorch; only reported

    For a bundle of a half type or with int4 weights, rounding is measured apart from structure. The
    export, rewrite and method gaps have the same rounded weights on both sides and compute in float32,
    the bundle's graphs being widened, so that the limit of float32 holds; and

    backend    the widened graphs against the bundle as it runs, where the provider has kernels for it
    precision  patched PyTorch in float32 against patched PyTorch wholly in the half type, and with the
               numbers of int4 weights where the bundle has those

    are limited in signal to noise, by `compare_precision`; what int4 weights cost is only reported.
    Both need the model's own weights, as `reference.source` has them; up to three copies of the model
    are in memory then, and the widened graphs, twice as large as the bundle, in a temporary folder.

    gaps: names of those to measure, by default all; what only the others need does not run.
    contenders: those to use instead of the bundle's and the reference's own, for tests.
    """
    manifest, dtype, exact = bundle.manifest, bundle.manifest.dtype, is_exact(bundle.manifest)
    table = gaps_of(manifest)
    wanted = list(table if gaps is None else gaps)
    found: dict[str, Gap] = {}
    contenders = contenders or Contenders(bundle, reference, max_new_tokens)
    if not exact and "backend" in wanted:
        try:
            contenders.check_real()
        except BackendError as error:
            found["backend"] = Gap("backend", None, not_run=str(error), dtype=dtype)
    needed = {name for gap in wanted if gap not in found for name in table[gap]}
    names = [name for name in Contenders.NAMES if name in needed]
    made: dict[str, list[Transcript]] = {name: [] for name in names}
    with contenders:
        for i, prompt in enumerate(prompts):
            progress(f"prompt {i + 1} of {len(prompts)}")
            for name in names:
                made[name].append(getattr(contenders, name)(prompt))

    def words(note: str) -> str:
        return note.format(numbers=numbers_of(manifest), device=bundle.backend.device)

    def gap(name: str) -> Gap:
        sets: list[tuple[Any, ...]] = list(zip(*(made[side] for side in table[name]), strict=True))
        if len(table[name]) == 3:
            found = compare_precision(name, sets, dtype, groups_of(manifest))
            if manifest.weights is not None:
                found.min_db = INT4_MIN_DB[name]
            return found
        notes = NOTES if exact else ROUNDED_NOTES
        limit = None if name == "method" else LIMIT
        done = compare_steps(name, sets, limit, words(notes.get(name, "")))
        return _without_kv(done) if name == "method" else done

    return ParityReport(
        {name: found.get(name) or gap(name) for name in wanted},
        made,
        contenders.orders,
        _accuracy(reference, prompts, made),
    )


def _without_kv(gap: Gap) -> Gap:
    """The method gap compares caches of different lengths on purpose: only logits mean anything."""
    gap.outputs = {name: value for name, value in gap.outputs.items() if name == "logits"}
    return gap


def _accuracy(
    reference: TorchReference, prompts: Sequence[Prompt], made: dict[str, list[Transcript]]
) -> dict[str, float]:
    """Exact match of each contender's own answers, where answers are known."""
    if any(prompt.answer is None for prompt in prompts):
        return {}
    return {
        name: float(
            np.mean(
                [
                    normalize(reference.decode_text(t.token_ids)) == normalize(str(p.answer))
                    for t, p in zip(made[name], prompts, strict=True)
                ]
            )
        )
        for name in ("dense", "patched", "ort", "original", "half", "real")
        if name in made
    }
