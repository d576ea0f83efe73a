"""The generation loop over a bundle's graphs: one prefill, then decode on the pruned cache."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from skipvision_export.bundle import Manifest
from skipvision_export.config import SkipVisionConfig
from skipvision_export.errors import InputError
from skipvision_export.graph.passes.names import (
    APPEND,
    EMBED,
    IMAGE_INDEX,
    KV_KEEP_INDEX,
    PREFILL,
    VISION,
    ffn_index_name,
    present_names,
)
from skipvision_export.layout import TokenLayout
from skipvision_export.runtime.batch import (
    Flags,
    Ints,
    Layouts,
    PromptBatch,
    image_index,
    prefill_indices,
)
from skipvision_export.runtime.kv_cache import KVCache
from skipvision_export.runtime.transcript import Transcript
from skipvision_export.runtime.varying import LaidPictures, Patches, VaryingPictures, positions_of

# Of a prompt's pictures: pixel_values [N, 3, h, w], or, where they have any shape, patches.
Pixels = npt.NDArray[np.float32] | Patches
Choose = Callable[[npt.NDArray[np.float32]], int]


class Backend(Protocol):
    """What runs the graphs: named arrays in, named tensors out, of a kind that run() takes again."""

    name: str

    def has(self, graph: str) -> bool:
        """Can it run this graph?"""

    def run(self, graph: str, feeds: dict[str, Any]) -> dict[str, Any]:
        """Run one graph."""

    def cache(self, present: dict[str, Any], kept: Flags | None = None) -> KVCache:
        """The cache that decode goes on from, of prefill's outputs.

        kept: [B, K], which of its positions count; None for all.
        """

    def numpy(self, value: Any) -> npt.NDArray[Any]:
        """A tensor on the host."""

    def shape(self, value: Any) -> list[int]:
        """Sizes of a tensor."""


@dataclass(frozen=True)
class Limits:
    """How a generation goes on, and what of it is kept in its transcript.

    eos: tokens that end it, and are its last ones; choose: the next token of logits [vocab].
    """

    max_new_tokens: int
    eos: Sequence[int] = ()
    choose: Choose = lambda logits: int(logits.argmax())
    keep_logits: bool = False
    keep_kv: bool = False


@dataclass(frozen=True)
class Before:
    """What a part of a prompt comes behind: the first `cached` positions of a cache, and the position that it
    goes on at, dropped tokens counted. It is the same on all axes: what comes before ends in text.
    """

    cache: KVCache
    cached: int
    next_position: int


class Generator:
    """Runs prompts through a backend, one or a batch of them."""

    def __init__(
        self,
        backend: Backend,
        manifest: Manifest,
        layout: TokenLayout | None = None,
        config: SkipVisionConfig | None = None,
    ) -> None:
        """layout: another one than the bundle's, such as all rows kept, for comparisons.

        config: the same where pictures have any shape, and with it each a layout of its own.
        """
        self.backend = backend
        self.manifest = manifest
        self.layout = layout or manifest.layout
        self.varying = VaryingPictures(manifest, config) if manifest.model.merge_size else None
        self.image_token = manifest.model.image_token_id
        self._inputs = {tensor.name for tensor in manifest.graphs[PREFILL].inputs}
        self._present = present_names("present", manifest.model.num_layers)

    def encode(self, pixel_values: Pixels) -> Any:
        """pixel_values [N, 3, h, w] -> image_features [N, layout.total, D] in layout order.

        Patches of pictures of any shape -> LaidPictures, on the host.
        """
        if self.varying is not None:
            assert isinstance(pixel_values, Patches)
            return self.varying.encode(self._run_vision, pixel_values)
        return self.backend.run(VISION, {"pixel_values": pixel_values})["image_features"]

    def _run_vision(self, feeds: dict[str, Any]) -> dict[str, Any]:
        out = self.backend.run(VISION, feeds)
        # A copy: the backend's memory may be gone with its tensor.
        return {name: np.array(self.backend.numpy(value)) for name, value in out.items()}

    def embed(self, input_ids: Ints, features: Any = None) -> Any:
        """input_ids [B, S] -> inputs_embeds [B, S, D]; features only where the ids hold an image."""
        return self._embedded(input_ids, features)["inputs_embeds"]

    def _embedded(self, input_ids: Ints, features: Any) -> dict[str, Any]:
        """The same, and what goes to the decoder's first layers beside, where the model has that."""
        if features is None:
            model = self.manifest.model
            width = model.hidden_size * (1 + model.deepstack)
            # No picture, but of the size that an engine's profile has.
            features = np.zeros((0, self.manifest.layout.total, width), np.float32)
        if isinstance(features, LaidPictures):
            features = features.features
        return self.backend.run(EMBED, {"input_ids": input_ids, "image_features": features})

    def prefill(self, prompts: Ints | PromptBatch, features: Any) -> dict[str, Any]:
        """The outputs of decoder_prefill for prompts [B, S] without padding, or a batch."""
        return self.prefill_cache(prompts, features)[0]

    def prefill_cache(self, prompts: Ints | PromptBatch, features: Any) -> tuple[dict[str, Any], Flags]:
        """The same, and [B, K], which of the positions that stay count."""
        if isinstance(prompts, np.ndarray):
            prompts = PromptBatch(prompts, np.zeros(len(prompts), np.int64))
        feeds, kept = self.prefill_feeds(prompts, features)
        return self.backend.run(PREFILL, feeds), kept

    def prefill_feeds(self, prompts: PromptBatch, features: Any) -> tuple[dict[str, Any], Flags]:
        """Inputs of a prefill without a cache before it, and [B, K], which of the kept positions count."""
        layouts: Layouts = self.layout
        positions = prompts.positions
        if self.varying is not None:
            rows = self.varying.by_row(prompts, self.image_token, features)
            layouts = [[picture.layout for picture in row] for row in rows]
            positions, _ = positions_of(prompts, self.image_token, rows)
        indices = prefill_indices(prompts, self.image_token, layouts, self.layout.used_tiers())
        embedded = self._embedded(prompts.input_ids, features)
        feeds = {
            **{name: value for name, value in embedded.items() if name in self._inputs},
            "attention_mask": prompts.mask.astype(np.int64),
            "position_ids": positions,
            **{ffn_index_name(tier): index for tier, index in indices.ffn_rows.items()},
            KV_KEEP_INDEX: indices.kv_keep,
        }
        if IMAGE_INDEX in self._inputs:
            feeds[IMAGE_INDEX] = image_index(prompts, self.image_token, layouts)
        return feeds, indices.kv_mask

    def decode(self, token: int | Ints, position: int | Ints, cache: KVCache) -> Any:
        """One step of every row of a cache -> logits.

        token, position: [B], or of a single row; positions count each row's whole original sequence.
        """
        return cache.step(
            {
                "inputs_embeds": self.embed(np.reshape(np.asarray(token, np.int64), (-1, 1))),
                "attention_mask": cache.mask(),
                "position_ids": self.position_ids(position),
            }
        )

    def position_ids(self, position: int | Ints) -> Ints:
        """What decode takes of the position of each row's token, [B]: [B, 1], or [3, B, 1]."""
        positions = np.reshape(np.asarray(position, np.int64), (-1, 1))
        # Text has the same on all axes.
        return positions if self.varying is None else np.stack([positions] * 3)

    def next_positions(self, batch: PromptBatch, features: Any) -> Ints:
        """[B], the position behind each prompt; features: of their pictures, laid out."""
        if self.varying is None:
            return batch.lengths
        rows = self.varying.by_row(batch, self.image_token, features)
        return positions_of(batch, self.image_token, rows)[1]

    def generate(
        self,
        input_ids: Ints,
        pixel_values: Pixels | None,
        *,
        features: Any = None,
        **options: Any,
    ) -> Transcript:
        """One prompt [1, S]; give pixel_values or features; options: those of Limits."""
        pixels = [] if pixel_values is None else [pixel_values]
        return self.generate_batch([input_ids], pixels, features=features, **options)[0]

    def generate_batch(
        self,
        prompts: Sequence[Ints],
        pixel_values: Sequence[Pixels],
        *,
        features: Any = None,
        **options: Any,
    ) -> list[Transcript]:
        """Generate for prompts [1, S] in one prefill, and one decode step for the next token of all.

        pixel_values: of each prompt, [0, ...] where it has no picture; or give features, those of all.
        options: those of Limits. Times are those of the batch. Raises InputError for more positions than
        the model has.
        """
        return self._run(prompts, pixel_values, features, None, Limits(**options))[0]

    def turn(
        self,
        input_ids: Ints,
        pixel_values: Pixels,
        before: Before | None = None,
        **options: Any,
    ) -> tuple[Transcript, KVCache]:
        """Generate for tokens [1, S], with pictures or without, that come first or behind others.

        before: what they come behind; options: those of Limits. Returns the cache too, which holds all but
        the last generated token. Raises InputError for more positions than the model has.
        """
        (done,), cache = self._run([input_ids], [pixel_values], None, before, Limits(**options))
        return done, cache()

    def _run(
        self,
        prompts: Sequence[Ints],
        pixel_values: Sequence[Pixels],
        features: Any,
        before: Before | None,
        limits: Limits,
    ) -> tuple[list[Transcript], Callable[[], KVCache]]:
        """Prefill and decode; the cache is made where decode, or the caller, wants it."""
        batch = PromptBatch.join(prompts, self.image_token)
        first = before.next_position if before else 0
        positions = batch.lengths + first
        self._check_room(int(positions.max()), limits.max_new_tokens)
        done = [self._begun(ids) for ids in prompts]
        start = time.perf_counter()
        if features is None:
            features = self._encode_all(pixel_values)
        encoded = time.perf_counter()
        if self.varying is not None:
            positions = self._count(done, batch, features) + first
            self._check_room(int(positions.max()), limits.max_new_tokens)
        for own, position in zip(done, positions, strict=True):
            own.next_position = int(position)
        out, kept = self.append(batch, features, before) if before else self.prefill_cache(batch, features)
        cache = self._go_on(done, out, kept, positions, limits, start, encoded)
        return done, lambda: cache or self.backend.cache(out, kept)

    def append(self, prompt: PromptBatch, features: Any, before: Before) -> tuple[dict[str, Any], Flags]:
        """The outputs of prefill for one more part of a prompt, and [1, K], which of its positions count."""
        feeds, counts = self.prefill_feeds(prompt, features)
        cached = before.cached
        feeds["attention_mask"] = np.ones((1, cached + prompt.input_ids.shape[1]), np.int64)
        feeds["position_ids"] = feeds["position_ids"] + before.next_position
        first = np.arange(cached, dtype=np.int64)[None]
        feeds[KV_KEEP_INDEX] = np.concatenate([first, feeds[KV_KEEP_INDEX] + cached], 1)
        out = self.backend.run(APPEND, feeds | before.cache.past(cached))
        return out, np.pad(counts, ((0, 0), (cached, 0)), constant_values=True)

    def _begun(self, input_ids: Ints) -> Transcript:
        pictures = int((input_ids == self.image_token).sum()) // self.layout.total
        done = Transcript(prompt_tokens=input_ids.shape[1], pictures=pictures)
        done.retained_tokens, done.skipped_tokens = (
            pictures * n for n in (self.layout.retained, self.layout.skipped)
        )
        return done

    def _count(self, done: list[Transcript], batch: PromptBatch, features: LaidPictures | None) -> Ints:
        """Fill in what is told of pictures of any shape; returns the next position of each prompt [B]."""
        assert self.varying is not None
        rows = self.varying.by_row(batch, self.image_token, features)
        for own, row in zip(done, rows, strict=True):
            own.pictures = len(row)
            own.retained_tokens = sum(picture.layout.retained for picture in row)
            own.skipped_tokens = sum(picture.layout.skipped for picture in row)
        return positions_of(batch, self.image_token, rows)[1]

    def _go_on(
        self,
        done: list[Transcript],
        out: dict[str, Any],
        kept: Flags,
        positions: Ints,
        limits: Limits,
        start: float,
        encoded: float,
    ) -> KVCache | None:
        """Decode behind what prefill gave for each row; returns the cache, None where no step was needed.

        kept: [B, K], which of its positions count; positions: [B], of the next token; start, encoded: when
        the pictures were taken up, and were done.
        """
        logits = self._logits(out["logits"])
        prefilled = time.perf_counter()
        for row, own in enumerate(done):
            own.vision_ms, own.prefill_ms = (encoded - start) * 1e3, (prefilled - encoded) * 1e3
            own.kv_tokens_after_prefill = int(kept[row].sum())
            if limits.keep_kv:
                own.kv = [self.backend.numpy(out[name])[row][:, kept[row]] for name in self._present]
        # Decode goes on from each prompt's length, not from the cache's.
        tokens = np.zeros(len(done), np.int64)
        running = list(range(len(done)))
        cache = None
        while True:
            for row in running:
                tokens[row] = limits.choose(logits[row])
                done[row].token_ids.append(int(tokens[row]))
                if limits.keep_logits:
                    done[row].logits.append(logits[row])
            # A row that has ended stays, and feeds its last token on.
            running = [
                row
                for row in running
                if tokens[row] not in limits.eos and len(done[row].token_ids) < limits.max_new_tokens
            ]
            if not running:
                return cache
            start = time.perf_counter()
            cache = cache or self.backend.cache(out, kept)
            logits = self._logits(self.decode(tokens, positions, cache))
            passed = (time.perf_counter() - start) * 1e3
            for row in running:
                done[row].decode_ms.append(passed)
            positions = positions + 1

    def _check_room(self, length: int, new: int) -> None:
        """Would a prompt of this length and its answer be longer than the model's positions?"""
        most = self.manifest.model.max_positions
        if most is not None and length + new > most:
            raise InputError(
                f"the prompt's {length} tokens and {new} new ones are over the model's {most}; "
                + (f"ask for at most {most - length} new tokens, or " if length < most else "")
                + "shorten the prompt"
            )

    def _encode_all(self, pictures: Sequence[Pixels]) -> Any:
        """Features of all prompts' pictures in their order, in one run where they have one size."""
        pictures = [pixels for pixels in pictures if len(pixels)]
        if not pictures:
            return None
        if self.varying is not None:
            return LaidPictures.join([self.encode(pixels) for pixels in pictures])
        pixel_values = [pixels for pixels in pictures if isinstance(pixels, np.ndarray)]
        if len({pixels.shape[1:] for pixels in pixel_values}) == 1:
            return self.encode(np.concatenate(pixel_values))
        return np.concatenate([self.backend.numpy(self.encode(pixels)) for pixels in pixel_values])

    def _logits(self, value: Any) -> npt.NDArray[np.float32]:
        """[B, vocab] of the last position, on the host; a backend that works ahead is waited for here."""
        # A copy: the backend's memory may be gone with its tensor.
        return np.array(self.backend.numpy(value)[:, -1], np.float32)
