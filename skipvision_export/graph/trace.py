"""Tracing the unpatched model to ONNX, opset 23, as four onnx_ir models."""

from __future__ import annotations

import contextlib
import itertools
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn

from skipvision_export.graph.clean import clean, name_dims
from skipvision_export.graph.experts import traced_by_rows
from skipvision_export.graph.fold import Weights, optimize_without_weights, settle_small
from skipvision_export.graph.passes.names import (
    DECODE,
    DEEPSTACK,
    EMBED,
    GRID,
    PREFILL,
    VISION,
    WINDOWS,
    present_names,
)
from skipvision_export.graph.prefill import prefill_from_decode
from skipvision_export.graph.repeat import TRACED, NotRepeatableError, repeat_layers
from skipvision_export.graph.wrappers import Decoder, EmbedTokens, PatchEncoder, VisionEncoder
from skipvision_export.models import ModelFamily
from skipvision_export.models.weights import WeightTensor

# Only 23 gives the compact graph: onnxscript gates its Attention, RMSNormalization and
# RotaryEmbedding fusions on it.
OPSET = 23

Progress = Callable[[str], None]


@dataclass
class Trace:
    """The graphs of one model, by name, before any pass."""

    graphs: dict[str, ir.Model]

    def clone(self) -> Trace:
        """A copy that passes may change; weights are shared."""
        return Trace({name: model.clone() for name, model in self.graphs.items()})


def trace(
    model: nn.Module,
    family: ModelFamily,
    progress: Progress = lambda _: None,
    weights: Mapping[str, WeightTensor] | None = None,
) -> Trace:
    """Trace vision encoder, embeddings and decoder; prefill is decode with an empty cache.

    Takes a model in evaluation mode on the CPU; its attention is traced through SDPA. With `weights`,
    by parameter name, the model is a skeleton: its numbers are not looked at, the graphs refer to the
    weights, and of many equal layers only a few are traced.
    """
    config: Any = model.config
    vision, dims = family.vision_dims(config), family.decoder_dims(config)
    by_place = Weights(model, weights) if weights is not None else None
    graphs: dict[str, ir.Model] = {}
    with _exporting(model):
        progress("vision encoder")
        layers = family.vision_layers(model)
        export = partial(_vision, model, family)
        if family.equal_vision_layers(config):
            graphs[VISION] = _stack(layers, vision.num_layers, by_place, export, VISION)
        else:
            graphs[VISION] = _finished(export(by_place)[1], VISION)
        progress("token embeddings")
        graphs[EMBED] = _finished(_embed(model, family, by_place), EMBED)
        progress("decoder")
        layers = family.decoder_layers(model)
        graphs[DECODE] = _stack(layers, dims.num_layers, by_place, partial(_decode, model, family), DECODE)
    if by_place is not None:
        for graph in graphs.values():
            settle_small(graph)
    graphs[PREFILL] = prefill_from_decode(graphs[DECODE])
    return Trace(graphs)


def _stack(
    layers: nn.ModuleList,
    used: int,
    weights: Weights | None,
    export: Callable[[Weights | None], tuple[nn.Module, ir.Model]],
    name: str,
) -> ir.Model:
    """Trace a graph with layers in it, of which `used` reach its outputs; where it can, not all of them."""
    if weights is None or used <= TRACED or not _alike(layers[:used]):
        return _finished(export(weights)[1], name)
    whole = list(layers)
    del layers[TRACED:used]
    try:
        module, model = export(weights)
        _finished(model, name)
        path = next(path for path, child in module.named_modules() if child is layers)
        repeat_layers(model, path, used, weights.of_layer(layers))
        return model
    except NotRepeatableError:
        del layers[:]
        layers.extend(whole)
        return _finished(export(weights)[1], name)


def _alike(layers: Iterable[nn.Module]) -> bool:
    """Are layers built of the same modules with the same settings, those that are not traced as well?"""

    def settings(module: nn.Module) -> tuple[Any, ...]:
        plain = {k: v for k, v in vars(module).items() if isinstance(v, (int, float, str, type(None)))}
        plain.pop("layer_idx", None)
        return type(module), sorted(plain.items(), key=str)

    return all(
        one == other
        for one, other in itertools.pairwise(
            [(name, settings(module)) for name, module in layer.named_modules()] for layer in layers
        )
    )


def _finished(model: ir.Model, name: str) -> ir.Model:
    clean(model)
    name_dims(model, name)
    return model


def _floats(model: nn.Module, *shape: int) -> Tensor:
    # Not zeros: constant folding of the example must have nothing to see.
    numbers = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    return numbers.to(next(model.parameters()).dtype)


def _ints(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.int64)


def _vision(model: nn.Module, family: ModelFamily, weights: Weights | None) -> tuple[nn.Module, ir.Model]:
    if family.dynamic:
        return _patches(model, family, weights)
    size = family.vision_dims(model.config).image_size
    images, crops = torch.export.Dim("images"), torch.export.Dim("crops")
    module = VisionEncoder(model, family)
    return module, _export(
        module,
        (_floats(model, 2, *([3] if family.tiled else []), 3, size, size),),
        ({0: images, 1: crops} if family.tiled else {0: images},),
        ["pixel_values"],
        ["image_features"],
        weights,
    )


def _patches(model: nn.Module, family: ModelFamily, weights: Weights | None) -> tuple[nn.Module, ir.Model]:
    side = family.merge_size(model.config)
    assert side is not None
    module = PatchEncoder(model, family)
    grid = torch.tensor([[1, 2 * side, 3 * side]])
    args: tuple[Any, ...] = (_floats(model, 6 * side**2, family.patch_width(model.config)), grid)
    names = ["pixel_values", GRID]
    # The number of tokens is the one that may have any value.
    dims: tuple[Any, ...] = ({0: side**2 * torch.export.Dim("tokens")}, {})
    window = family.window_side(model.config)
    if window is not None:
        args, names = (*args, _ints(3, window**2)), [*names, WINDOWS]
        dims = (*dims, {0: torch.export.Dim("windows")})
    return module, _export(
        module,
        args,
        dims,
        names,
        ["image_features"],
        weights,
    )


def _embed(model: nn.Module, family: ModelFamily, weights: Weights | None) -> ir.Model:
    config, dim = model.config, torch.export.Dim
    levels = family.deepstack_layers(config)
    width = (1 + levels) * family.decoder_dims(config).hidden_size
    features = _floats(model, 3, family.visual_tokens(config), width)
    return _export(
        EmbedTokens(model, family.image_token_id(config)),
        (_ints(2, 5), features),
        # A layout may have any number of tokens, and comparisons feed those before it.
        ({0: dim("batch"), 1: dim("length")}, {0: dim("images"), 1: dim("tokens")}),
        ["input_ids", "image_features"],
        ["inputs_embeds", *([DEEPSTACK] if levels else [])],
        weights,
    )


def _decode(model: nn.Module, family: ModelFamily, weights: Weights | None) -> tuple[nn.Module, ir.Model]:
    dims, layers = family.decoder_dims(model.config), len(family.decoder_layers(model))
    batch, length, past_length = (torch.export.Dim(n) for n in ("batch", "length", "past_length"))
    # S = 1 cannot be traced (is_causal becomes symbolic), so decode takes any S.
    past = [_floats(model, 2, dims.num_kv_heads, 4, dims.head_dim) for _ in range(2 * layers)]
    module = Decoder(model, family)
    positions = torch.arange(4, 7).expand(2, 3).clone()
    axes = {0: batch, 1: length}
    if family.dynamic:
        # Of each axis other ones, else the three would be traced as one.
        positions = torch.stack([positions, positions + 1, positions + 2])
        axes = {1: batch, 2: length}
    return module, _export(
        module,
        (
            _floats(model, 2, 3, dims.hidden_size),
            _ints(2, 7),
            positions,
            past,
        ),
        (
            {0: batch, 1: length},
            {0: batch, 1: torch.export.Dim.DYNAMIC},
            axes,
            [{0: batch, 2: past_length} for _ in past],
        ),
        ["inputs_embeds", "attention_mask", "position_ids", *present_names("past_key_values", layers)],
        ["logits", *present_names("present", layers)],
        weights,
    )


@contextlib.contextmanager
def _exporting(model: nn.Module) -> Iterator[None]:
    """Silence the exporter and trace through SDPA, whatever the model was loaded with."""
    config: Any = model.config
    before = config._attn_implementation
    # The second one warns of every weight that is hidden from it.
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnx_ir.passes.common")]
    levels = [logger.level for logger in loggers]
    try:
        model.set_attn_implementation("sdpa")  # type: ignore[operator]
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings(), torch.no_grad(), traced_by_rows(model):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        model.set_attn_implementation(before)  # type: ignore[operator]


def _export(
    module: nn.Module,
    args: tuple[Any, ...],
    dynamic_shapes: tuple[Any, ...],
    inputs: list[str],
    outputs: list[str],
    weights: Weights | None,
) -> ir.Model:
    program = torch.onnx.export(
        module.eval(),
        args,
        dynamo=True,
        opset_version=OPSET,
        dynamic_shapes=dynamic_shapes,
        input_names=inputs,
        output_names=outputs,
        optimize=weights is None,
        verbose=False,
    )
    if program is None:
        raise RuntimeError("torch.onnx.export returned nothing")
    if weights is not None:
        optimize_without_weights(program.model, weights.of, program.optimize)
    return program.model
