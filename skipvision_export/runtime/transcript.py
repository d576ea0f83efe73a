"""What one generation did, on any backend."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt


@dataclass
class Transcript:
    """What one generation did.

    token_ids: generated ids, the end token included; logits: one [vocab] float32 row for each of
    them, where asked for; kv: [K or V of each layer in turn], [H, K, Dh] right after prefill, where
    asked for; next_position: of the first generated token, dropped ones counted; retained_tokens,
    skipped_tokens: of all pictures; raster, laid: the images' features [N*V, D] and [N*layout.total, D],
    before and after they are laid out, order: the tokens of each as they were chosen, [N, V], empty where
    nothing had to be chosen, and places: of pictures of any shape, where each one's laid-out tokens stand, as
    the backend has it; these four only where asked for.
    """

    token_ids: list[int] = field(default_factory=list)
    logits: list[npt.NDArray[np.float32]] = field(default_factory=list)
    kv: list[npt.NDArray[np.float32]] = field(default_factory=list)
    raster: npt.NDArray[np.float32] | None = None
    laid: npt.NDArray[np.float32] | None = None
    order: list[list[int]] = field(default_factory=list)
    places: list[npt.NDArray[np.int64]] = field(default_factory=list)
    pictures: int = 0
    retained_tokens: int = 0
    skipped_tokens: int = 0
    prompt_tokens: int = 0
    next_position: int = 0
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
