"""The models whose shapes are timed, with random weights, and what competes on each.

No weights are downloaded: times depend on shapes. CoS's resampler is not in transformers; its 16 + 256 +
1024 tokens come out of a tower of 36 x 36 patches instead, the first 272 of them retained, as its coarse
scales are, so that decoder and sequence are CoS's and the tower is a little dearer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from skipvision_export.benchmark.flops import layers_flops
from skipvision_export.benchmark.training_flops import vision_forward
from skipvision_export.config import SkipVisionConfig
from skipvision_export.layout import TokenLayout
from skipvision_export.method import apply_skip_vision
from skipvision_export.models import DecoderDims, ModelFamily, VisionDims, family_of

TEXT_BEFORE, TEXT = 16, 64  # text tokens before a picture, and in all
IMAGE_TOKEN = 3


@dataclass(frozen=True)
class Shape:
    """A LLaVA's sizes; crops: pictures of the tower for each picture; preset: what skips on it."""

    name: str
    preset: SkipVisionConfig
    hidden: int = 4096
    intermediate: int = 14336
    layers: int = 32
    heads: int = 32
    kv_heads: int = 8
    vocab: int = 128320
    image_size: int = 336
    crops: int = 1
    vision_hidden: int = 1024
    vision_layers: int = 24
    vision_heads: int = 16

    @property
    def tiled(self) -> bool:
        """A thumbnail and tiles?"""
        return self.crops > 1

    @property
    def visual_tokens(self) -> int:
        """In the dense decoder's sequence."""
        return int(self.crops * (self.image_size // 14) ** 2)

    @property
    def family(self) -> ModelFamily:
        """The project's facts of it."""
        name = "LlavaNextForConditionalGeneration" if self.tiled else "LlavaForConditionalGeneration"
        return family_of([name], self.name)

    def small(self) -> Shape:
        """The same tokens, in a model for a CPU."""
        return replace(
            self,
            hidden=64,
            intermediate=192,
            layers=3,
            heads=4,
            kv_heads=4 if self.kv_heads == self.heads else 2,
            vocab=512,
            vision_hidden=32,
            vision_layers=3,
            vision_heads=2,
        )

    def shallow(self) -> Shape:
        """The same widths in few layers, for checks in float32."""
        return replace(self, layers=3, vision_layers=3)

    @property
    def config(self) -> Any:
        """Of transformers."""
        from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaNextConfig

        vision: Any = CLIPVisionConfig(
            hidden_size=self.vision_hidden,
            intermediate_size=4 * self.vision_hidden,
            num_hidden_layers=self.vision_layers,
            num_attention_heads=self.vision_heads,
            image_size=self.image_size,
            patch_size=14,
            projection_dim=self.vision_hidden,
        )
        text: Any = LlamaConfig(
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            vocab_size=self.vocab,
            max_position_embeddings=8192,
            rope_theta=500000.0,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
        kind: Any = LlavaNextConfig if self.tiled else LlavaConfig
        side = self.image_size
        more = {"image_grid_pinpoints": [[2 * side, 2 * side]]} if self.tiled else {}
        return kind(
            vision_config=vision,
            text_config=text,
            image_token_id=IMAGE_TOKEN,
            image_token_index=IMAGE_TOKEN,
            vision_feature_layer=-2,
            vision_feature_select_strategy="default",
            **more,
        )

    def build(self, device: torch.device, dtype: torch.dtype, seed: int = 0) -> Any:
        """The model on the device, in sdpa; weights never pass through the host."""
        from transformers import LlavaForConditionalGeneration, LlavaNextForConditionalGeneration

        kind: Any = LlavaNextForConditionalGeneration if self.tiled else LlavaForConditionalGeneration
        torch.manual_seed(seed)
        with torch.device(device):
            model = kind._from_config(self.config, dtype=dtype, attn_implementation="sdpa")
        return model.eval()

    def pixels(self, batch: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
        """[B, 3, h, w], or [B, crops, 3, h, w] where tiled; random."""
        crops = (self.crops,) if self.tiled else ()
        size = (batch, *crops, 3, self.image_size, self.image_size)
        generator = torch.Generator(device).manual_seed(1)
        return torch.randn(size, generator=generator, device=device, dtype=dtype)

    def inputs(self, batch: int, device: torch.device, dtype: torch.dtype, total: int) -> dict[str, Any]:
        """What the whole model takes, with `total` placeholders for each picture."""
        ids = self.ids(batch, device, total)
        more: dict[str, Any] = {}
        if self.tiled:
            more["image_sizes"] = torch.full((batch, 2), 2 * self.image_size, device=device)
        pixels = self.pixels(batch, device, dtype)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels, **more}

    def ids(self, batch: int, device: torch.device, total: int) -> torch.Tensor:
        """[B, TEXT + total] int64: a picture's placeholders between two pieces of text."""
        generator = torch.Generator().manual_seed(2)
        text = torch.randint(4, self.vocab - 1, (batch, TEXT), generator=generator)
        visual = torch.full((batch, total), IMAGE_TOKEN)
        return torch.cat([text[:, :TEXT_BEFORE], visual, text[:, TEXT_BEFORE:]], 1).to(device)

    @property
    def dims(self) -> DecoderDims:
        """Of the decoder."""
        return self.family.decoder_dims(self.config)

    @property
    def vision_dims(self) -> VisionDims:
        """Of the tower."""
        return self.family.vision_dims(self.config)

    def layout(self, config: SkipVisionConfig) -> TokenLayout:
        """Of a picture."""
        if self.tiled and not config.tiled:  # dense
            return config.layout(self.visual_tokens, num_layers=self.layers)
        return config.layout(self.visual_tokens // self.crops, num_layers=self.layers, tiled=self.tiled)

    # -- operations and bytes of one sample --

    def vision_flops(self) -> float:
        """Tower and projector; not the tower's last layer, which transformers computes and nobody reads."""
        dims = self.vision_dims
        projector = sum(2 * dims.visual_tokens * i * o for i, o in dims.projector)
        return float(self.crops * (vision_forward(dims) + projector))

    def prefill_flops(self, layout: TokenLayout, layers: int | None = None) -> float:
        """The decoder's layers, half of the square of attention, as it is causal, and one row of the head."""
        dims = self.dims if layers is None else replace(self.dims, num_layers=layers)
        length = TEXT + layout.total
        unseen = dims.num_layers * 2 * length * length * dims.num_heads * dims.head_dim
        head = 2 * dims.hidden_size * dims.vocab_size
        return float(layers_flops(dims, layout, TEXT, last_only=False) - unseen + head)

    @property
    def decoder_weights(self) -> float:
        """Numbers that a decode step reads: layers and head."""
        d, q, kv = self.hidden, self.heads, self.kv_heads
        size = d // self.heads
        layer = 2 * d * q * size + 2 * d * kv * size + 3 * d * self.intermediate
        return float(self.layers * layer + d * self.vocab)

    def step_bytes(self, cached: float, batch: int, width: int) -> float:
        """Of a decode step: all weights once, and the cached K/V (over all layers) of each sequence."""
        kv = 2 * self.kv_heads * (self.hidden // self.heads) * cached
        return width * (self.decoder_weights + batch * kv)


def _all_tokens(image_features: Any, image_sizes: Any, *args: Any, **kwargs: Any) -> Any:
    """In place of LLaVA-NeXT's pack_image_features: crops [1+T, V, D] of each image, one after the other."""
    packed = [crops.flatten(0, 1) for crops in image_features]
    return packed, torch.tensor([len(p) for p in packed], device=packed[0].device)


def _shapes() -> dict[str, Shape]:
    """In the order in which they are timed: the paper's largest savings first."""
    preset = SkipVisionConfig.preset
    cos = SkipVisionConfig("cos-272-256", 272, 256, summaries=True, selector="thumbnail")
    vicuna = {"intermediate": 11008, "kv_heads": 32, "vocab": 32064}
    shapes = [
        Shape("llava-hd", preset("llava-hd-576-576"), crops=5),
        Shape("cos", cos, image_size=504),
        Shape("llava-1.5-7b", preset("llava-100-156"), **vicuna),
        Shape("llava-llama3-8b", preset("llava-100-156")),
    ]
    return {shape.name: shape for shape in shapes}


SHAPES = _shapes()


@dataclass(frozen=True)
class Contender:
    """A way to run a prompt.

    config: of the project's, None for a model as it is. prune: "fastv" or "dart": visual tokens leave the
    sequence in front of layer PRUNE_AT, all but `kept` of them.
    """

    name: str
    config: SkipVisionConfig | None = None
    prune: str | None = None
    kept: int = 0


PRUNE_AT = 2  # FastV's and DART's layer


def contenders(shape: Shape) -> dict[str, Contender]:
    """Dense, the method's parts, and pruning at the operations of the whole method."""
    preset = shape.preset
    merge_only = replace(preset, name="merge only", skip_ffn=False, skip_kv=False)
    kept = pruned_tokens(shape, shape.prefill_flops(shape.layout(preset)))
    found = [
        Contender("dense"),
        Contender("merge only", merge_only),
        Contender("skip-ffn", replace(preset, name="skip-ffn", skip_kv=False)),
        Contender("skip-ffn + skip-kv", preset),
        Contender("fastv-style", prune="fastv", kept=kept),
        Contender("dart-style", prune="dart", kept=kept),
    ]
    return {one.name: one for one in found}


@contextmanager
def reference(model: Any, shape: Shape, config: SkipVisionConfig | None) -> Iterator[Any]:
    """The Hugging Face model itself: as it is (None), or under `apply_skip_vision`, whose state it yields."""
    if config is not None:
        with apply_skip_vision(model, config) as state:
            yield state
        return
    if shape.tiled:
        # As the paper counts: all crops' tokens, neither unpadded nor with a newline token a row.
        model.model.__dict__["pack_image_features"] = _all_tokens
    try:
        yield None
    finally:
        model.model.__dict__.pop("pack_image_features", None)


def layout_of(shape: Shape, contender: Contender) -> TokenLayout:
    """Of what enters the decoder."""
    return shape.layout(contender.config or SkipVisionConfig.dense())


def contender_flops(shape: Shape, contender: Contender) -> float:
    """Of a prefill."""
    if not contender.prune:
        return shape.prefill_flops(layout_of(shape, contender))
    return pruned_flops(shape, contender.kept)


def pruned_flops(shape: Shape, kept: int) -> float:
    """Of a prefill whose layers from PRUNE_AT on see `kept` visual tokens."""
    head = 2 * shape.hidden * shape.vocab
    few = TokenLayout((("retained", kept),))
    front = shape.prefill_flops(layout_of(shape, Contender("dense")), PRUNE_AT)
    return front + shape.prefill_flops(few, shape.layers - PRUNE_AT) - head


def pruned_tokens(shape: Shape, flops: float) -> int:
    """The most visual tokens that may be kept within these operations; 1 where even that is more."""
    low, high = 1, shape.visual_tokens
    while low < high:
        middle = (low + high + 1) // 2
        if pruned_flops(shape, middle) <= flops:
            low = middle
        else:
            high = middle - 1
    return low
