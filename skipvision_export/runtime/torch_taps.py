"""What the modules of a Hugging Face model compute while it answers, for comparisons layer by layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from skipvision_export.graph.module_paths import ModulePaths
from skipvision_export.models import ModelFamily

Array = npt.NDArray[Any]


@dataclass
class Call:
    """One run through the vision tower or the decoder.

    entered: what a layer, an FFN or the last norm was given, by module path; left: what a layer returned;
    checkpoints: (module path, `input` or `output`, array) of the modules without children, as they ran.
    """

    entered: dict[str, Array] = field(default_factory=dict)
    left: dict[str, Array] = field(default_factory=dict)
    checkpoints: list[tuple[str, str, Array]] = field(default_factory=list)


class TorchTaps:
    """Records vision tower and decoder; a context manager, entered before the model is patched.

    paths: of its modules; vision: of the last picture; steps: prefill and the decode steps in turn.
    """

    def __init__(self, model: Any, family: ModelFamily) -> None:
        """Nothing is hooked yet."""
        self._model, self._family = model, family
        self.vision, self.steps = Call(), list[Call]()
        self.cache: Any = None
        self._handles: list[Any] = []
        self._current = self.vision
        decoder: Any = family.language_model(model)
        self.paths = ModulePaths(model, family)
        self._paths = self.paths.of
        named = {path: module for module, path in self._paths.items()}
        self._tower = list(family.vision_layers(model))[: len(self.paths.vision_layers)]
        self._decoder, self._layers = decoder, [named[path] for path in self.paths.decoder_layers]
        self._norms = [named[path] for path in (*self.paths.ffns, self.paths.last_norm)]

    def __enter__(self) -> Self:
        """Hook every module of both parts."""
        tower, projector = self._family.vision_tower(self._model), self._family.projector(self._model)
        self._before(tower, self._seeing)
        self._before(self._decoder, self._stepping)
        for layer in self._tower:
            self._handles.append(layer.register_forward_hook(self._leaving(layer)))
        for module in (*self._layers, *self._norms):
            self._before(module, self._entering(module))
        for part in (tower, projector, self._decoder, self._model.get_output_embeddings()):
            for module in part.modules():
                if not list(module.children()) and module in self._paths:
                    self._before(module, self._checkpoint_input(module))
                    self._handles.append(module.register_forward_hook(self._checkpoint(module)))
        return self

    def __exit__(self, *error: object) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()

    def _before(self, module: nn.Module, hook: Callable[..., None]) -> None:
        self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def _seeing(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.vision = self._current = Call()

    def _stepping(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._current = Call()
        self.steps.append(self._current)
        self.cache = kwargs["past_key_values"]
        self._current.entered["inputs_embeds"] = _array(kwargs["inputs_embeds"])

    def _entering(self, module: nn.Module) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, kwargs: Any) -> None:
            self._current.entered[self._paths[module]] = _array(_first(args, kwargs))

        return hook

    def _leaving(self, module: nn.Module) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, out: Any) -> None:
            self._current.left[self._paths[module]] = _array(out[0] if isinstance(out, tuple) else out)

        return hook

    def _checkpoint_input(self, module: nn.Module) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, kwargs: Any) -> None:
            value = _first(args, kwargs)
            if isinstance(module, nn.Linear) and value is not None:
                self._current.checkpoints.append((self._paths[module], "input", _array(value)))

        return hook

    def _checkpoint(self, module: nn.Module) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, out: Any) -> None:
            for value in out if isinstance(out, tuple) else (out,):
                if isinstance(value, torch.Tensor) and value.is_floating_point():
                    self._current.checkpoints.append((self._paths[module], "output", _array(value)))

        return hook


def _first(args: Any, kwargs: Any) -> Any:
    if args:
        return args[0]
    return next((kwargs[name] for name in ("hidden_states", "input") if name in kwargs), None)


def _array(value: torch.Tensor) -> Array:
    return np.array(value.detach().float().numpy())
