"""Optimization profiles: from a recipe and a bundle to the sizes of every input of every graph.

Symbols: B batch, S tokens of a prompt, M rows of an FFN, K cached tokens after prefill, P cached tokens
before a decode step.
"""

from __future__ import annotations

from dataclasses import dataclass

from skipvision_export.bundle import GraphInfo, Manifest
from skipvision_export.errors import ConfigError
from skipvision_export.graph.passes.names import DECODE, EMBED, PREFILL, VISION, ffn_dim_name
from skipvision_export.layout import TokenLayout
from skipvision_export.tensorrt.recipe import ProfileSettings

Range = tuple[int, int, int]
Shapes = dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]


@dataclass(frozen=True)
class Sizes:
    """[min, opt, max] of all that is dynamic, as one profile of a bundle has it."""

    batch: Range
    images: Range
    prompt: Range
    kept: Range
    cache: Range
    ffn: dict[int, Range]  # by tier
    crops: Range = (1, 1, 1)  # of an image that is cut into tiles, its thumbnail included


def sizes(
    profile: ProfileSettings, manifest: Manifest, max_positions: int | None, max_crops: int = 1
) -> Sizes:
    """Complete a recipe's profile for a bundle.

    max_positions: the longest sequence of the model; what is derived ends there, what the recipe says
    and exceeds it is refused. max_crops: the most crops of an image, where it is cut into tiles.
    Raises ConfigError for sizes that the model cannot have.
    """
    layout = manifest.layout
    total, limit = layout.total, max_positions or 1 << 30
    _check("text", profile.text, 1, 1 << 30, "a prompt has text")
    low, opt, high = profile.text
    # What is derived leaves room for the tokens that decode adds.
    room = max(limit - profile.new_tokens, total + 1)
    prompt = profile.prompt or _capped((low, opt + total, high + total), room)
    _check("prompt", prompt, 1, limit, f"the model has {limit} positions")
    if prompt[2] <= total:
        raise ConfigError(
            f"profile: prompt: at most {prompt[2]} tokens cannot hold a picture of {total} visual tokens "
            "and text; expected a larger max"
        )
    kept = profile.kept or _left(prompt, total, total - layout.kept_kv)
    _check("kept", kept, 1, prompt[2], f"no more tokens are kept than the prompt's {prompt[2]}")
    grown = (kept[0], kept[1] + profile.new_tokens // 2, kept[2] + profile.new_tokens)
    # The last position is that of the token that a step adds.
    cache = profile.cache or _capped(grown, limit - 1)
    _check("cache", cache, 1, limit - 1, f"the model has {limit} positions")
    if cache[2] < min(kept[2], limit - 1):
        raise ConfigError(
            f"profile: cache: at most {cache[2]} tokens, but prefill keeps up to {kept[2]}; "
            "expected a larger max"
        )
    batch = profile.batch
    _check("batch", batch, 1, 1 << 20, "an engine runs at least one prompt")
    ffn = {}
    for tier in layout.used_tiers():
        rows = _left(prompt, total, total - sum(layout.ffn_mask(tier)))
        ffn[tier] = (batch[0] * rows[0], batch[1] * rows[1], batch[2] * rows[2])
    crops = (min(2, max_crops), max_crops, max_crops)
    return Sizes(batch, profile.images or batch, prompt, kept, cache, ffn, crops)


def _capped(sizes: Range, limit: int) -> Range:
    low, opt, high = (min(size, limit) for size in sizes)
    return low, opt, high


def _left(prompt: Range, total: int, dropped: int) -> Range:
    """Tokens of a prompt without those dropped of one picture; a prompt of text alone drops none."""
    low, opt, high = prompt
    return (max(1, low - dropped), opt - dropped if opt > total else opt, high)


def _check(name: str, sizes: Range, lowest: int, highest: int, why: str) -> None:
    if sizes[0] < lowest or sizes[2] > highest:
        raise ConfigError(
            f"profile: {name}: {list(sizes)} is outside [{lowest}, {highest}]: {why}; change the recipe"
        )


def shapes(graph: str, info: GraphInfo, sizes: Sizes, layout: TokenLayout) -> Shapes:
    """[min, opt, max] shape of each input of a graph; raises ConfigError for an unknown dimension."""
    known = _dimensions(graph, sizes, layout)

    def size(name: int | str) -> Range:
        if isinstance(name, int):
            return (name, name, name)
        if name not in known:
            raise ConfigError(f"{graph}: nothing is known of the dimension {name!r}; export again")
        return known[name]

    found: Shapes = {}
    for tensor in info.inputs:
        low, opt, high = zip(*map(size, tensor.shape), strict=True)
        found[tensor.name] = (low, opt, high)
    return found


def _dimensions(graph: str, sizes: Sizes, layout: TokenLayout) -> dict[str, Range]:
    one, total = (1, 1, 1), layout.total
    if graph == VISION:
        low, opt, high = (max(1, n) for n in sizes.images)
        return {"num_images": (low, opt, high), "num_crops": sizes.crops}
    if graph == EMBED:
        # Decode embeds one token and no picture with the same engine.
        return {
            "batch": sizes.batch,
            "sequence": (1, *sizes.prompt[1:]),
            "num_images": (0, *sizes.images[1:]),
            "visual_tokens": (total, total, total),
        }
    if graph == PREFILL:
        rows = {ffn_dim_name(tier): size for tier, size in sizes.ffn.items()}
        return {"batch": sizes.batch, "sequence": sizes.prompt, "kept": sizes.kept, **rows}
    assert graph == DECODE
    low, opt, high = sizes.cache
    return {
        "batch": sizes.batch,
        "sequence": one,
        "past_sequence": sizes.cache,
        "total_sequence": (low + 1, opt + 1, high + 1),
    }
