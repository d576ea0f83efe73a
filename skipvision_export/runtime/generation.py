"""The generation loop over a bundle's graphs: one prefill, then decode on the pruned cache."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from skipvision_export.bundle import Manifest
from skipvision_export.graph.passes.names import (
    EMBED,
    IMAGE_INDEX,
    KV_KEEP_INDEX,
    PREFILL,
    VISION,
    ffn_index_name,
    present_names,
)
from skipvision_export.layout import TokenLayout
from skipvision_export.runtime.kv_cache import KVCache

Ints = npt.NDArray[np.int64]
Choose = Callable[[npt.NDArray[np.float32]], int]


class Backend(Protocol):
    """What runs the graphs: named arrays in, named tensors out, of a kind that run() takes again."""

    name: str

    def run(self, graph: str, feeds: dict[str, Any]) -> dict[str, Any]:
        """Run one graph."""

    def cache(self, present: dict[str, Any]) -> KVCache:
        """The cache that decode goes on from, of prefill's outputs."""

    def numpy(self, value: Any) -> npt.NDArray[Any]:
        """A tensor on the host."""

    def shape(self, value: Any) -> list[int]:
        """Sizes of a tensor."""


@dataclass
class Transcript:
    """What one generation did.

    token_ids: generated ids, the end token included; logits: one [vocab] float32 row for each of
    them, where asked for; kv: [K or V of each layer in turn], [H, K, Dh] right after prefill, where
    asked for; raster, laid: the picture's features [V, D] and [layout.total, D], before and after they
    are laid out, and order: the tokens as they were chosen, [V], empty where nothing had to be chosen;
    all three only where asked for.
    """

    token_ids: list[int] = field(default_factory=list)
    logits: list[npt.NDArray[np.float32]] = field(default_factory=list)
    kv: list[npt.NDArray[np.float32]] = field(default_factory=list)
    raster: npt.NDArray[np.float32] | None = None
    laid: npt.NDArray[np.float32] | None = None
    order: list[int] = field(default_factory=list)
    prompt_tokens: int = 0
    kv_tokens_after_prefill: int = 0
    vision_ms: float = 0.0
    prefill_ms: float = 0.0
    decode_ms: list[float] = field(default_factory=list)

    @property
    def ttft_ms(self) -> float:
        """Time to the first token: vision encoder, embeddings and prefill."""
        return self.vision_ms + self.prefill_ms

    @property
    def decode_ms_per_token(self) -> float:
        """Median over decode steps; 0 where there was none."""
        return float(np.median(self.decode_ms)) if self.decode_ms else 0.0


def prefill_indices(input_ids: Ints, image_token: int, layout: TokenLayout) -> tuple[dict[int, Ints], Ints]:
    """Rows that go through the FFN, for each tier of layers, and positions whose K/V stay.

    input_ids: [1, S] with `layout.total` placeholders for each image -> ffn_index [M] by tier and
    kv_keep_index [1, K], all ascending.
    """
    ids = input_ids[0]
    places = np.flatnonzero(ids == image_token)

    def kept(flags: list[bool]) -> Ints:
        keep = np.ones(ids.shape, bool)
        if places.size:
            keep[places] = np.resize(flags, places.size)
        return np.flatnonzero(keep).astype(np.int64)

    rows = {tier: kept(layout.ffn_mask(tier)) for tier in layout.used_tiers()}
    return rows, kept(layout.kv_mask())[None, :]


def image_index(input_ids: Ints, image_token: int, layout: TokenLayout) -> Ints:
    """The input of strict masking, [1, S]: 0 for text, i or -i for the i-th picture's tokens.

    Negative where K and V are dropped; see StrictMaskPass.
    """
    index = np.zeros(input_ids.shape, np.int64)
    places = np.flatnonzero(input_ids[0] == image_token)
    picture = 1 + np.arange(places.size) // layout.total
    index[0, places] = np.where(np.resize(layout.kv_mask(), places.size), picture, -picture)
    return index


class Generator:
    """Runs prompts of one image through a backend."""

    def __init__(self, backend: Backend, manifest: Manifest, layout: TokenLayout | None = None):
        """layout: another one than the bundle's, such as all rows kept, for comparisons."""
        self.backend = backend
        self.manifest = manifest
        self.layout = layout or manifest.layout
        self.image_token = manifest.model.image_token_id
        self._inputs = {tensor.name for tensor in manifest.graphs[PREFILL].inputs}
        self._present = present_names("present", manifest.model.num_layers)

    def encode(self, pixel_values: npt.NDArray[np.float32]) -> Any:
        """pixel_values [1, 3, h, w] -> image_features [1, layout.total, D] in layout order."""
        return self.backend.run(VISION, {"pixel_values": pixel_values})["image_features"]

    def embed(self, input_ids: Ints, features: Any = None) -> Any:
        """input_ids [1, S] -> inputs_embeds [1, S, D]; features only where the ids hold an image."""
        if features is None:
            model = self.manifest.model
            features = np.zeros((0, model.visual_tokens, model.hidden_size), np.float32)
        feeds = {"input_ids": input_ids, "image_features": features}
        return self.backend.run(EMBED, feeds)["inputs_embeds"]

    def prefill(self, input_ids: Ints, features: Any) -> dict[str, Any]:
        """The outputs of decoder_prefill for a prompt [1, S]."""
        rows, keep = prefill_indices(input_ids, self.image_token, self.layout)
        length = input_ids.shape[1]
        feeds = {
            "inputs_embeds": self.embed(input_ids, features),
            "attention_mask": np.ones((1, length), np.int64),
            "position_ids": np.arange(length, dtype=np.int64)[None],
            **{ffn_index_name(tier): index for tier, index in rows.items()},
            KV_KEEP_INDEX: keep,
        }
        if IMAGE_INDEX in self._inputs:
            feeds[IMAGE_INDEX] = image_index(input_ids, self.image_token, self.layout)
        return self.backend.run(PREFILL, feeds)

    def decode(self, token: int, position: int, cache: KVCache) -> Any:
        """One step on a cache of any length -> logits; `position` counts the whole original sequence."""
        return cache.step(
            {
                "inputs_embeds": self.embed(np.array([[token]], np.int64)),
                "attention_mask": np.ones((1, cache.length + 1), np.int64),
                "position_ids": np.array([[position]], np.int64),
            }
        )

    def generate(
        self,
        input_ids: Ints,
        pixel_values: npt.NDArray[np.float32] | None,
        *,
        max_new_tokens: int,
        eos: Sequence[int] = (),
        choose: Choose = lambda logits: int(logits.argmax()),
        features: Any = None,
        keep_logits: bool = False,
        keep_kv: bool = False,
    ) -> Transcript:
        """Generate until an end token or `max_new_tokens`; give pixel_values or features."""
        done = Transcript(prompt_tokens=input_ids.shape[1])
        start = time.perf_counter()
        if features is None:
            features = self.encode(pixel_values)  # type: ignore[arg-type]
        done.vision_ms = (time.perf_counter() - start) * 1e3
        start = time.perf_counter()
        out = self.prefill(input_ids, features)
        logits = self._logits(out["logits"])
        done.prefill_ms = (time.perf_counter() - start) * 1e3
        done.kv_tokens_after_prefill = self.backend.shape(out[self._present[0]])[2]
        if keep_kv:
            done.kv = [self.backend.numpy(out[name])[0].copy() for name in self._present]
        # Decode goes on from the original length, not from the cache's.
        position = input_ids.shape[1]
        cache = None
        while True:
            token = choose(logits)
            done.token_ids.append(token)
            if keep_logits:
                done.logits.append(logits)
            if token in eos or len(done.token_ids) >= max_new_tokens:
                return done
            start = time.perf_counter()
            cache = cache or self.backend.cache(out)
            logits = self._logits(self.decode(token, position, cache))
            done.decode_ms.append((time.perf_counter() - start) * 1e3)
            position += 1

    def _logits(self, value: Any) -> npt.NDArray[np.float32]:
        """[vocab] of the last position, on the host; a backend that works ahead is waited for here."""
        # A copy: the backend's memory may be gone with its tensor.
        return np.array(self.backend.numpy(value)[0, -1], np.float32)
