"""Model families: facts about where things stand in a Hugging Face model, no logic.

A new family is one file in this folder with one decorated class.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from skipvision_export.config import SkipVisionConfig
from skipvision_export.errors import ConfigError, ModelError
from skipvision_export.layout import TokenLayout

if TYPE_CHECKING:
    from torch import Tensor, nn


Sees = Literal["before", "image", "prompt"]

# Visual tokens a side of the picture that families with pictures of any shape are counted by.
SIDE = 16
# The paper's selector, and what stands in for it where a vision tower has no CLS row (SigLIP).
CLS_SELECTOR, SELECTOR_WITHOUT_CLS = "cls_attention", "dart"
THUMBNAIL_SELECTOR = "thumbnail"


@dataclass(frozen=True)
class DecoderDims:
    """Sizes of the text decoder that FLOPs and K/V bytes follow from.

    experts: in each layer, each with an FFN of `intermediate_size`; a token goes through
    `experts_per_token` of them. 0 of an FFN that all tokens go through.
    """

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    experts: int = 0
    experts_per_token: int = 0

    @property
    def ffn_products(self) -> int:
        """Multiplications of one token in a layer's FFN, the choice of experts included."""
        return self._ffn(self.experts_per_token)

    @property
    def ffn_weights(self) -> int:
        """Numbers in a layer's FFN."""
        return self._ffn(self.experts)

    def _ffn(self, experts: int) -> int:
        gate_up_down = 3 * self.hidden_size * self.intermediate_size
        return gate_up_down * (experts or 1) + self.hidden_size * self.experts


@dataclass(frozen=True)
class VisionDims:
    """Sizes of the vision tower and projector; only layers whose output is used are counted.

    projector: its linear layers, each with inputs and outputs; token_patches: patches that one visual
    token is made of; has_cls: a CLS row stands in front.
    """

    num_layers: int
    hidden_size: int
    intermediate_size: int
    image_size: int
    patch_size: int
    projector: tuple[tuple[int, int], ...]
    has_cls: bool = False
    token_patches: int = 1

    @property
    def feature_layer(self) -> int:
        """The last layer that is used."""
        return self.num_layers - 1

    @property
    def patches(self) -> int:
        """Of one crop."""
        return int((self.image_size // self.patch_size) ** 2)

    @property
    def visual_tokens(self) -> int:
        """Of one crop."""
        return self.patches // self.token_patches

    @property
    def cls_chooses(self) -> bool:
        """Can tokens be chosen by the CLS row's attention? It looks at patches, so these must be tokens."""
        return self.has_cls and self.token_patches == 1


@dataclass(frozen=True)
class PatchInput:
    """A picture of any shape: patches [P, C] in squares of `merge_size` a side, and its grid [1, 3].

    windows: where the family has a window_side, [N, window_side**2] int64, the patches of each window, P
    where it has less.
    """

    patches: Tensor
    grid: Tensor
    windows: Tensor | None = None


class ModelFamily:
    """What the exporter and the reference have to know about one architecture."""

    name: ClassVar[str]
    architectures: ClassVar[tuple[str, ...]]
    # An image is a thumbnail and tiles, which become the tokens of one image.
    tiled: ClassVar[bool] = False
    # An image may come as several crops, each of which is an image of its own to the decoder.
    cropped: ClassVar[bool] = False
    # What a prompt's tokens see beside those before them: nothing, their own image, or the whole prompt.
    sees: ClassVar[Sees] = "before"
    # The position of a sequence's first token; the graphs add it to positions from 0 on.
    first_position: ClassVar[int] = 0
    # A picture keeps its shape: its tokens, a grid of any height and width, vary in number, and positions
    # have three axes (time, row, column).
    dynamic: ClassVar[bool] = False

    @property
    def plain(self) -> bool:
        """One crop for each image, and tokens that see those before them: for training and calibration."""
        return not self.tiled and not self.cropped and not self.dynamic and self.sees == "before"

    def check(self, config: Any) -> None:
        """Raise ModelError where a configuration of this family is not supported, with why."""

    def image_token_id(self, config: Any) -> int:
        """Id of the placeholder token in `input_ids`: `image_token_index` in some files, one name in code."""
        return int(config.image_token_id)

    def visual_tokens(self, config: Any) -> int:
        """Visual tokens for each image (each crop, where there are several), before any is merged.

        Of a `dynamic` family, those of a square picture of SIDE tokens a side, by which it is counted.
        """
        return self.vision_dims(config).visual_tokens

    def most_visual_tokens(self, config: Any) -> int:
        """Visual tokens of an image (crop) where nothing is skipped; the most there can be, where `tiled`."""
        return self.visual_tokens(config)

    def inputs(self, config: Any, ids: Tensor, pixel_values: Tensor) -> dict[str, Tensor]:
        """What the model takes beside input_ids [1, S]; pixel_values: all crops [N, 3, h, w] of a prompt."""
        return {"pixel_values": pixel_values}

    def images(self, pixel_values: Tensor) -> int:
        """Images (crops, where each is one to the decoder) in what `inputs` makes of pixel_values."""
        return int(pixel_values.shape[0])

    def merge_size(self, config: Any) -> int | None:
        """Of a `dynamic` family: patches along each side of a visual token."""
        return None

    def patch_width(self, config: Any) -> int:
        """Of a `dynamic` family: numbers of a patch."""
        raise NotImplementedError

    def deepstack_layers(self, config: Any) -> int:
        """Decoder layers, the first ones, behind which further features of the visual tokens are added."""
        return 0

    def pack(self, model: Any, crops: Tensor, image_sizes: Tensor) -> Tensor:
        """Of a `tiled` image's crops [T, V, D]: what the decoder reads where nothing is skipped, [n, D]."""
        raise NotImplementedError

    def fitted(self, hf_config: Any, config: SkipVisionConfig) -> SkipVisionConfig:
        """A configuration for a model.

        Of tiles, counts retain the thumbnail and merge the rest. Without a CLS row to choose by, tokens are
        chosen by redundancy.
        """
        by_counts = config.retained is not None and config.visual_tokens is None
        if self.tiled and by_counts and config.selector == CLS_SELECTOR:
            return replace(config, selector=THUMBNAIL_SELECTOR, tiled=True)
        if config.selector == CLS_SELECTOR and not self.vision_dims(hf_config).cls_chooses:
            return replace(config, selector=SELECTOR_WITHOUT_CLS)
        return config

    def layout(self, hf_config: Any, config: SkipVisionConfig) -> TokenLayout:
        """Resolve a configuration for a model; raises ConfigError where it does not fit."""
        if config.strict and self.sees != "before":
            raise ConfigError(
                f"strict masking is for models whose tokens see those before them, {self.name} tokens see "
                f"their whole {self.sees}; use the preset without it"
            )
        return self.fitted(hf_config, config).layout(
            self.visual_tokens(hf_config),
            varies=self.dynamic,
            num_layers=self.decoder_dims(hf_config).num_layers,
            tiled=self.tiled,
        )

    def max_positions(self, config: Any) -> int | None:
        """The longest sequence of the text decoder, where its configuration names one."""
        return getattr(config.get_text_config(), "max_position_embeddings", None)

    def decoder_dims(self, config: Any) -> DecoderDims:
        """Sizes of the text decoder."""
        return text_dims(config.text_config)

    def vision_dims(self, config: Any) -> VisionDims:
        """Sizes of the vision tower."""
        raise NotImplementedError

    def vision_tower(self, model: nn.Module) -> nn.Module:
        """The module that turns pixels into hidden states."""
        return model.model.vision_tower  # type: ignore[union-attr,return-value]

    def projector(self, model: nn.Module) -> nn.Module:
        """The module whose output [N, V, D] is the visual tokens in the decoder's width."""
        return model.model.multi_modal_projector  # type: ignore[union-attr,return-value]

    def image_features(self, config: Any, tower: Any, projector: Any, pixel_values: Tensor) -> Tensor:
        """pixel_values [N, 3, h, w] -> [N, V, D]: what the model's code does, on the two modules alone."""
        return projector(tower(pixel_values, return_dict=True).last_hidden_state)  # type: ignore[no-any-return]

    def window_side(self, config: Any) -> int | None:
        """Of a `dynamic` family: patches along each side of the windows that its tower has, if it has any."""
        return None

    def patch_features(self, config: Any, tower: Any, projector: Any, picture: PatchInput) -> Tensor:
        """Of a `dynamic` family, one picture -> [1, V, W].

        W is D, or (1 + deepstack_layers) D where there are further features, which come behind.
        """
        raise NotImplementedError

    def vision_layers(self, model: nn.Module) -> nn.ModuleList:
        """The vision tower's layers, each with `self_attn.{q_proj,k_proj}` where the CLS row may choose."""
        # transformers 4 and 5 differ in the nesting.
        tower: Any = self.vision_tower(model)
        return getattr(tower, "vision_model", tower).encoder.layers  # type: ignore[no-any-return]

    def equal_vision_layers(self, config: Any) -> bool:
        """Does every layer of the tower do the same, so that a trace of some stands for all?"""
        return True

    def language_model(self, model: nn.Module) -> nn.Module:
        """The decoder without its head, called with inputs_embeds."""
        return model.model.language_model  # type: ignore[union-attr,return-value]

    def decoder_layers(self, model: nn.Module) -> nn.ModuleList:
        """The decoder's layers."""
        return self.language_model(model).layers  # type: ignore[return-value]

    def ffn(self, layer: nn.Module) -> tuple[nn.Module, nn.Module]:
        """First and last module of a layer's FFN, such as norm and MLP: skipped tokens pass by all of it."""
        return layer.post_attention_layernorm, layer.mlp  # type: ignore[return-value]


# Text models whose layers stand as Llama's do: RMS norm, attention, RMS norm, gated MLP or experts of it.
_TEXT_MODELS = ("llama", "qwen2", "qwen3", "mistral", "gemma", "phi3", "mixtral")
# How transformers' configurations name the number of a text model's experts.
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
# Each is 17 nodes of every layer in a graph.
_MOST_EXPERTS = 16
_NO_MIXTURE = (
    f"supported: mixtral, of up to {_MOST_EXPERTS}, as each is traced into every layer (`skipvision rewrite` "
    "takes graphs with ONNX Runtime's MoE operator, of any number)"
)


def check_text(text: Any, supported: Sequence[str] = _TEXT_MODELS, *, windows: bool = False) -> None:
    """Raise ModelError for a text model that is not known to be of Llama's build, with why.

    windows: whether layers may have sliding windows; then no sequence may be longer than those.
    """
    experts = next(filter(None, (getattr(text, name, None) for name in _EXPERTS)), 0)
    if experts and (text.model_type not in supported or experts > _MOST_EXPERTS):
        raise ModelError(
            f"the text model is {text.model_type!r}, a mixture of {experts} experts; {_NO_MIXTURE}"
        )
    if text.model_type not in supported:
        raise ModelError(f"the text model is {text.model_type!r}; supported: {', '.join(supported)}")
    kinds = set(getattr(text, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    window = getattr(text, "sliding_window", None)
    if kinds or (window is not None and window < text.max_position_embeddings and not windows):
        raise ModelError(
            f"the text model has sliding windows (sliding_window={window}), which count cached positions: a "
            "pruned cache would move them; supported: full attention in every layer"
        )


def siglip_dims(vision: Any, out: int) -> VisionDims:
    """Sizes of a SigLIP tower whose last layer is used, and of one linear layer to the decoder's width."""
    return VisionDims(
        num_layers=vision.num_hidden_layers,
        hidden_size=vision.hidden_size,
        intermediate_size=vision.intermediate_size,
        image_size=vision.image_size,
        patch_size=vision.patch_size,
        projector=((vision.hidden_size, out),),
    )


def text_dims(text: Any) -> DecoderDims:
    """Sizes of a text model of Llama's build."""
    heads = text.num_attention_heads
    return DecoderDims(
        num_layers=text.num_hidden_layers,
        hidden_size=text.hidden_size,
        num_heads=heads,
        num_kv_heads=text.num_key_value_heads or heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
        intermediate_size=text.intermediate_size,
        vocab_size=text.vocab_size,
        experts=getattr(text, "num_local_experts", 0),
        experts_per_token=getattr(text, "num_experts_per_tok", 0),
    )


def check_parts(family: ModelFamily, model: nn.Module) -> None:
    """Raise ModelError where a model lacks a part that its family knows, as after a change of its class."""
    parts = (family.vision_tower, family.vision_layers, family.projector, family.language_model)
    try:
        for part in parts:
            part(model)
        for layer in family.decoder_layers(model):
            family.ffn(layer)
    except AttributeError as error:
        raise ModelError(
            f"{type(model).__name__} is not laid out as family {family.name!r} knows it: {error}; use a "
            "version of transformers that this program was tested with"
        ) from None


_FAMILIES: dict[str, ModelFamily] = {}

# Architectures in which there is nothing to skip, and why.
_REFUSED = {
    "MllamaForConditionalGeneration": "its decoder reads visual tokens by cross-attention, so they are not "
    "in its sequence: no FFN sees them, and their keys and values are computed once",
}


def register(cls: type[ModelFamily]) -> type[ModelFamily]:
    """Class decorator: make a family known under each of its architectures."""
    family = cls()
    for architecture in cls.architectures:
        _FAMILIES[architecture] = family
    return cls


def supported_architectures() -> list[str]:
    """Names as they stand in `config.json`."""
    return sorted(_FAMILIES)


def family_of(architectures: list[str] | None, where: str) -> ModelFamily:
    """The family of a `config.json`'s `architectures`; raises ModelError with those supported."""
    for architecture in architectures or []:
        if architecture in _FAMILIES:
            return _FAMILIES[architecture]
        if architecture in _REFUSED:
            raise ModelError(
                f"{where} names {architecture}, in which nothing can be skipped: {_REFUSED[architecture]}"
            )
        if "moe" in architecture.lower():
            raise ModelError(f"{where} names {architecture}, a mixture of experts; {_NO_MIXTURE}")
    found = ", ".join(architectures or []) or "no architecture at all"
    raise ModelError(
        f"{where} names {found}, which is not supported; supported: {', '.join(supported_architectures())}"
    )
