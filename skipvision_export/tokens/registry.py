"""What a selector and a merge are, and the names by which configurations call them.

Shapes: N images, V visual tokens of an image, D hidden size, K tokens after merging.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import numpy.typing as npt

from skipvision_export.errors import ConfigError

if TYPE_CHECKING:
    import onnx_ir as ir
    import torch
    from onnx_ir import tape
    from torch import Tensor


@dataclass(frozen=True)
class TorchImage:
    """What a selector may look at in PyTorch.

    features: [N, V, D], after the projector; cls_attention: gives [N, V] float32, the CLS row's
    softmax probabilities at the feature layer, heads summed; seed: of the configuration.
    """

    features: Tensor
    cls_attention: Callable[[], Tensor]
    seed: int = 0


@dataclass(frozen=True)
class GraphImage:
    """What a selector may look at in a vision encoder's graph: the same, as graph values.

    visual_tokens: [1] int64 where it varies with the picture.
    """

    features: ir.Value
    cls_attention: Callable[[tape.Tape], ir.Value]
    visual_tokens: int | ir.Value


class Selector:
    """Ranks an image's visual tokens by importance; the highest scores are retained.

    A new selector is one file with a subclass, and one row in this package's `__init__`.
    """

    name: ClassVar[str]
    static: ClassVar[bool] = False  # does not look at the picture: a graph needs no scores

    def scores(self, image: TorchImage) -> Tensor:
        """[N, V] float32 without a gradient; ties go to the lower index."""
        raise NotImplementedError

    def graph_scores(self, t: tape.Tape, image: GraphImage) -> ir.Value:
        """The same in ONNX: [N, V] float32, no shape that depends on data."""
        raise NotImplementedError

    def static_scores(self, visual_tokens: int, seed: int) -> npt.NDArray[np.float32]:
        """[V] float32, for selectors that do not look at the picture."""
        raise ConfigError(f"selector {self.name!r} looks at the picture: it has no static scores")


class StaticSelector(Selector):
    """A selector whose scores depend on the number of tokens only; give `static_scores`."""

    static = True

    def scores(self, image: TorchImage) -> Tensor:
        """The static scores for each image."""
        n, v, _ = image.features.shape
        return _on_device(self, v, image.seed, image.features.device).expand(n, v)


# Kept, as a copy to a GPU waits for it, and cannot be made while a CUDA graph is captured.
@functools.lru_cache(maxsize=32)
def _on_device(chooser: StaticSelector, visual_tokens: int, seed: int, device: torch.device) -> Tensor:
    import torch

    return torch.tensor(chooser.static_scores(visual_tokens, seed), device=device)


class Merge:
    """Turns an image's N tokens into K; a new one is one file and one row."""

    name: ClassVar[str]

    def merge(self, x: Tensor, keep: int, by: Tensor | None = None) -> Tensor:
        """[B, N, D] -> [B, keep, D]; values carry gradients, choices do not.

        by: [B, N, D'], what choices are made by, where it is not x itself.
        """
        raise NotImplementedError

    def destinations(self, x: Tensor, keep: int) -> Tensor:
        """[B, N, D] -> [B, keep] int64: the token that each of the merged ones stands for."""
        raise NotImplementedError

    def graph_merge(
        self, t: tape.Tape, x: ir.Value, keep: int | ir.Value, by: ir.Value | None = None
    ) -> tuple[ir.Value, ir.Value]:
        """Both in ONNX, for a number of tokens that may be dynamic but is at least `keep`, an int or [1]."""
        raise NotImplementedError


_SELECTORS: dict[str, Selector] = {}
_MERGES: dict[str, Merge] = {}


def register_selector(one: Selector) -> None:
    """Make a selector known by its name."""
    _SELECTORS[one.name] = one


def register_merge(one: Merge) -> None:
    """Make a merge known by its name."""
    _MERGES[one.name] = one


def selector_names() -> list[str]:
    """Names for `SkipVisionConfig.selector`."""
    return sorted(_SELECTORS)


def merge_names() -> list[str]:
    """Names for `SkipVisionConfig.merge`."""
    return sorted(_MERGES)


def selector(name: str) -> Selector:
    """A selector by its name; raises ConfigError with the names there are."""
    if name not in _SELECTORS:
        raise ConfigError(f"selector {name!r} is not one of {', '.join(selector_names())}")
    return _SELECTORS[name]


def merge(name: str) -> Merge:
    """A merge by its name; raises ConfigError with the names there are."""
    if name not in _MERGES:
        raise ConfigError(f"merge {name!r} is not one of {', '.join(merge_names())}")
    return _MERGES[name]
