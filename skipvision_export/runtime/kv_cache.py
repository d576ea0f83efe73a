"""Keys and values between decode steps: handed from run to run, or in one buffer that steps append to."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from skipvision_export.graph.passes.names import DECODE, past_name

if TYPE_CHECKING:
    import onnxruntime as ort

    from skipvision_export.runtime.batch import Flags, Ints
    from skipvision_export.runtime.generation import Backend

# Positions by which a buffer grows: a copy of the whole cache each time, so not few.
ROOM = 256


class KVCache(Protocol):
    """The cache of B sequences; `length` is the number of cached positions of the longest one."""

    length: int

    def mask(self) -> Ints:
        """attention_mask [B, length + 1] of the next step."""

    def step(self, feeds: dict[str, Any]) -> Any:
        """Run decode on inputs_embeds, attention_mask and position_ids; returns the logits."""

    def past(self, length: int) -> dict[str, Any]:
        """The first `length` positions, [B, H, length, Dh], by the names of a graph's inputs."""


class JoinedCache:
    """Decode joins past and new K/V into new tensors each step, in whatever holds the backend's tensors."""

    def __init__(self, backend: Backend, present: dict[str, Any], kept: Flags | None = None) -> None:
        """present: outputs of a run, among them `present.i.key` and `.value`.

        kept: [B, K], which of their positions count; None for all.
        """
        self._backend = backend
        self._keep(present)
        rows = backend.shape(next(iter(self._feeds.values())))[0]
        self._kept = np.ones((rows, self.length), np.bool_) if kept is None else kept

    def mask(self) -> Ints:
        """attention_mask [B, length + 1] of the next step."""
        new = self.length + 1 - self._kept.shape[1]
        return np.pad(self._kept.astype(np.int64), ((0, 0), (0, new)), constant_values=1)

    def past(self, length: int) -> dict[str, Any]:
        """The first `length` positions, [B, H, length, Dh], by the names of a graph's inputs."""
        if length == self.length:
            return self._feeds
        return {name: self._backend.numpy(value)[:, :, :length] for name, value in self._feeds.items()}

    def _keep(self, out: dict[str, Any]) -> None:
        self._feeds = {past: out[name] for past, name in _names(out)}
        self.length = self._backend.shape(next(iter(self._feeds.values())))[2]

    def step(self, feeds: dict[str, Any]) -> Any:
        """Run decode on inputs_embeds, attention_mask and position_ids; returns the logits."""
        out = self._backend.run(DECODE, feeds | self._feeds)
        self._keep(out)
        return out["logits"]


class SharedCache:
    """One buffer for each layer's K and V, past and present at once, for the graph of SharedKVPass.

    Bound once, so that a step costs the same in Python whatever the number of layers, and copies one
    position of each layer. On the CPU; the buffers grow by `ROOM` positions. Each row's positions are at
    the front of its buffer: its padding is left out when the buffers are made.
    """

    def __init__(
        self, session: ort.InferenceSession, present: dict[str, ort.OrtValue], kept: Flags | None = None
    ) -> None:
        """present: outputs of a prefill, [B, H, K, Dh] each; they are copied.

        kept: [B, K], which of their positions count; None for all.
        """
        self._session = session
        self._names = _names(present)
        self._arrays = {name: np.asarray(present[name].numpy()) for _, name in self._names}
        first = next(iter(self._arrays.values()))
        self._dtype = first.dtype
        self.length = self._capacity = first.shape[2]
        vocabulary = next(out.shape[-1] for out in session.get_outputs() if out.name == "logits")
        self._logits = (first.shape[0], 1, vocabulary)
        # Positions that a row has less than the longest one.
        self._lacking = np.zeros(first.shape[0], np.int64) if kept is None else (~kept).sum(1)
        if kept is not None and self._lacking.any():
            # Stable: a row's own positions first, in their order.
            front = np.argsort(~kept, axis=1, kind="stable")[:, None, :, None]
            self._arrays = {name: np.take_along_axis(a, front, 2) for name, a in self._arrays.items()}
        self._grow()

    def mask(self) -> Ints:
        """attention_mask [B, length + 1] of the next step, of which the graph takes the sums."""
        places = np.arange(self.length + 1) >= self._lacking[:, None]
        return places.astype(np.int64)

    def past(self, length: int) -> dict[str, Any]:
        """The first `length` positions, [B, H, length, Dh], by the names of a graph's inputs."""
        return {past: self._arrays[name][:, :, :length] for past, name in self._names}

    def _grow(self) -> None:
        import onnxruntime as ort

        self._capacity += ROOM
        self._binding = self._session.io_binding()
        for past, name in self._names:
            old = self._arrays[name]
            batch, heads, _, size = old.shape
            new = np.zeros((batch, heads, self._capacity, size), old.dtype)
            new[:, :, : self.length] = old[:, :, : self.length]
            self._arrays[name] = new
            # OrtValues of numpy arrays on the CPU share their memory.
            value = ort.OrtValue.ortvalue_from_numpy(new)
            self._binding.bind_ortvalue_input(past, value)
            self._binding.bind_ortvalue_output(name, value)

    def step(self, feeds: dict[str, npt.NDArray[Any] | ort.OrtValue]) -> ort.OrtValue:
        """Run decode on inputs_embeds, attention_mask and position_ids; returns the logits."""
        import onnxruntime as ort

        if self.length == self._capacity:
            self._grow()
        for name, value in feeds.items():
            bound = value if isinstance(value, ort.OrtValue) else ort.OrtValue.ortvalue_from_numpy(value)
            self._binding.bind_ortvalue_input(name, bound)
        # Bound to memory, not asked for afterwards: that would list every layer's outputs too.
        logits = ort.OrtValue.ortvalue_from_numpy(np.empty(self._logits, self._dtype))
        self._binding.bind_ortvalue_output("logits", logits)
        self._session.run_with_iobinding(self._binding)
        self.length += 1
        return logits


def _names(present: dict[str, Any]) -> list[tuple[str, str]]:
    """(past, present) of each layer's K and V among a run's outputs."""
    return [(past_name(name), name) for name in present if name.startswith("present.")]
