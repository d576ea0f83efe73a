"""Tracing the unpatched model to ONNX, opset 23, as four onnx_ir models."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn

from skipvision_export.graph.clean import clean, name_dims
from skipvision_export.graph.passes.names import DECODE, EMBED, PREFILL, VISION, present_names
from skipvision_export.graph.prefill import prefill_from_decode
from skipvision_export.graph.wrappers import Decoder, EmbedTokens, VisionEncoder
from skipvision_export.models import ModelFamily

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


def trace(model: nn.Module, family: ModelFamily, progress: Progress = lambda _: None) -> Trace:
    """Trace vision encoder, embeddings and decoder; prefill is decode with an empty cache.

    Takes a model in evaluation mode on the CPU; its attention is traced through SDPA.
    """
    config: Any = model.config
    dims = family.decoder_dims(config)
    vision = family.vision_dims(config)
    visual = family.visual_tokens(config)
    dtype = next(model.parameters()).dtype
    dim = torch.export.Dim
    batch, length, images = dim("batch"), dim("length"), dim("images")

    def floats(*shape: int) -> Tensor:
        # Not zeros: constant folding of the example must have nothing to see.
        return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)

    def ints(*shape: int) -> Tensor:
        return torch.ones(shape, dtype=torch.int64)

    graphs: dict[str, ir.Model] = {}
    with _exporting(model):
        progress("vision encoder")
        graphs[VISION] = _export(
            VisionEncoder(model, family),
            (floats(2, *([3] if family.tiled else []), 3, vision.image_size, vision.image_size),),
            ({0: images, 1: dim("crops")} if family.tiled else {0: images},),
            ["pixel_values"],
            ["image_features"],
        )
        progress("token embeddings")
        graphs[EMBED] = _export(
            EmbedTokens(model, family.image_token_id(config)),
            (ints(2, 5), floats(3, visual, dims.hidden_size)),
            # A layout may have any number of tokens, and comparisons feed those before it.
            ({0: batch, 1: length}, {0: images, 1: dim("tokens")}),
            ["input_ids", "image_features"],
            ["inputs_embeds"],
        )
        progress("decoder")
        past_length = dim("past_length")
        # S = 1 cannot be traced (is_causal becomes symbolic), so decode takes any S.
        past = [floats(2, dims.num_kv_heads, 4, dims.head_dim) for _ in range(2 * dims.num_layers)]
        graphs[DECODE] = _export(
            Decoder(model, family),
            (
                floats(2, 3, dims.hidden_size),
                ints(2, 7),
                torch.arange(4, 7).expand(2, 3).clone(),
                past,
            ),
            (
                {0: batch, 1: length},
                {0: batch, 1: torch.export.Dim.DYNAMIC},
                {0: batch, 1: length},
                [{0: batch, 2: past_length} for _ in past],
            ),
            [
                "inputs_embeds",
                "attention_mask",
                "position_ids",
                *present_names("past_key_values", dims.num_layers),
            ],
            ["logits", *present_names("present", dims.num_layers)],
        )
    for name, graph in graphs.items():
        clean(graph)
        name_dims(graph, name)
    graphs[PREFILL] = prefill_from_decode(graphs[DECODE])
    return Trace(graphs)


@contextlib.contextmanager
def _exporting(model: nn.Module) -> Iterator[None]:
    """Silence the exporter and trace through SDPA, whatever the model was loaded with."""
    config: Any = model.config
    before = config._attn_implementation
    quiet = logging.getLogger("torch.onnx")
    level = quiet.level
    try:
        model.set_attn_implementation("sdpa")  # type: ignore[operator]
        quiet.setLevel(logging.ERROR)
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            yield
    finally:
        quiet.setLevel(level)
        model.set_attn_implementation(before)  # type: ignore[operator]


def _export(
    module: nn.Module,
    args: tuple[Any, ...],
    dynamic_shapes: tuple[Any, ...],
    inputs: list[str],
    outputs: list[str],
) -> ir.Model:
    program = torch.onnx.export(
        module.eval(),
        args,
        dynamo=True,
        opset_version=OPSET,
        dynamic_shapes=dynamic_shapes,
        input_names=inputs,
        output_names=outputs,
        optimize=True,
        verbose=False,
    )
    if program is None:
        raise RuntimeError("torch.onnx.export returned nothing")
    return program.model
