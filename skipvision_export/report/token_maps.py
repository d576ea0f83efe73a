"""Pictures as a bundle sees them: which patches it retains, and what it answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from skipvision_export.benchmark.accuracy import normalize
from skipvision_export.benchmark.raster import RasterEncoder
from skipvision_export.bundle import Manifest
from skipvision_export.report.overlay import data_uri, draw_shares
from skipvision_export.runtime.data import Sample
from skipvision_export.runtime.pipeline import Bundle
from skipvision_export.runtime.prompt import load_image
from skipvision_export.runtime.varying import Patches
from skipvision_export.tokens import selector


def picture_cards(
    bundle: Bundle, samples: Sequence[Sample], answers: dict[str, Sequence[str]], limit: int
) -> list[dict[str, Any]]:
    """A card for each of the first pictures: {"image" (a data URL), "map" (is it a token map), "rows"}.

    answers: by contender, to the first of `samples`. The map is drawn over what the processor makes of a
    picture; of a model that cuts pictures, or keeps their shape, the picture is shown as it is. A row is a
    question with what was expected, and of each contender its answer and whether that is right.
    """
    encoder = cache(lambda: RasterEncoder(bundle))
    cards: dict[Any, dict[str, Any]] = {}
    for i in range(min(map(len, answers.values()))):
        sample = samples[i]
        if len(sample.images) != 1:
            continue
        if sample.image not in cards:
            if len(cards) == limit:
                break
            cards[sample.image] = _picture(bundle, encoder, sample) | {"rows": []}
        given = {name: found[i] for name, found in answers.items()}
        cards[sample.image]["rows"].append(
            {
                "question": sample.question,
                "expected": sample.answer,
                "answers": [
                    {"name": name, "text": text, "right": normalize(text) == normalize(sample.answer)}
                    for name, text in given.items()
                ],
            }
        )
    return list(cards.values())


def skip_shares(manifest: Manifest, order: Sequence[int]) -> npt.NDArray[np.float64]:
    """[V], of each patch in raster order the share of decoder layers whose FFN it skips, merged ones 1.

    order: the patches as the vision encoder stands them, most important first, empty where a selector
    that does not look at the picture chose them. Raises ValueError unless there is one for each.
    """
    layout, config, visual = manifest.layout, manifest.skip_config, manifest.model.visual_tokens
    layers = manifest.model.num_layers
    through = np.array([layout.ffn_mask(layout.layer_tier(layer)) for layer in range(layers)], np.float64)
    skipped = 1 - through.mean(0)
    patches = np.array([role != "summary" for role, n in layout.runs for _ in range(n)])
    in_layout = skipped[patches]
    if config.is_dense or config.order == "raster":
        return in_layout if len(in_layout) == visual else np.zeros(visual)
    if not len(order):
        sizes = layout.selection_sizes()
        scores = selector(config.selector)
        found = np.arange(visual)
        if scores.static and sum(size > 0 for size in sizes) > 1:
            # Groups by importance, each in raster order, as LayOutPass stands them.
            group = np.repeat(np.arange(len(sizes)), [*sizes[:-1], visual - sum(sizes[:-1])])
            of_patch = np.empty(visual, np.int64)
            of_patch[np.argsort(-scores.static_scores(visual, config.seed), kind="stable")] = group
            found = np.argsort(of_patch, kind="stable")
        order = found.tolist()
    if sorted(order) != list(range(visual)):
        raise ValueError(f"an order of {len(order)} patches, expected each of {visual} once")
    shares = np.ones(visual)  # what was merged skips everywhere
    kept = layout.retained if len(in_layout) < visual else visual
    shares[np.asarray(order)[:kept]] = in_layout[:kept]
    return shares


def _picture(bundle: Bundle, encoder: Callable[[], RasterEncoder], sample: Sample) -> dict[str, Any]:
    pixels = bundle.prepare(sample.images, sample.question).pixel_values
    visual = bundle.manifest.model.visual_tokens
    grid = round(visual**0.5)
    if isinstance(pixels, Patches) or len(pixels) != 1 or pixels.ndim != 4 or grid**2 != visual:
        picture = load_image(sample.image)
        picture.thumbnail((288, 288))
        return {"image": data_uri(picture), "map": False}
    _, order = encoder().run(pixels)
    shares = skip_shares(bundle.manifest, order[0] if order else [])
    return {"image": data_uri(draw_shares(_seen(bundle, pixels[0]), grid, shares.tolist())), "map": True}


def _seen(bundle: Bundle, pixels: npt.NDArray[np.float32]) -> Image.Image:
    """[3, h, w] as the model reads them -> the picture, cropped and scaled as the processor did."""
    processor = bundle.processor.image_processor
    mean, std = (np.array(value, np.float32).reshape(-1, 1, 1) for value in _scaling(processor))
    colours = np.clip((pixels * std + mean) * 255, 0, 255).round().astype(np.uint8)
    return Image.fromarray(colours.transpose(1, 2, 0))


def _scaling(processor: Any) -> tuple[Any, Any]:
    if getattr(processor, "do_normalize", True):
        return processor.image_mean, processor.image_std
    return [0.0] * 3, [1.0] * 3
