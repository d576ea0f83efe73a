"""Model families: facts about where things stand in a Hugging Face model, no logic.

A new family is one file in this folder with one decorated class.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from skipvision_export.config import SkipVisionConfig
from skipvision_export.errors import ModelError
from skipvision_export.layout import TokenLayout

if TYPE_CHECKING:
    from torch import nn


# The paper's selector, and what stands in for it where a vision tower has no CLS row (SigLIP).
CLS_SELECTOR, SELECTOR_WITHOUT_CLS = "cls_attention", "dart"


@dataclass(frozen=True)
class DecoderDims:
    """Sizes of the text decoder that FLOPs and K/V bytes follow from."""

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int


@dataclass(frozen=True)
class VisionDims:
    """Sizes of the vision tower and projector; only layers whose output is used are counted."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    image_size: int
    patch_size: int
    projector_hidden: int
    feature_layer: int
    has_cls: bool


class ModelFamily:
    """What the exporter and the reference have to know about one architecture."""

    name: ClassVar[str]
    architectures: ClassVar[tuple[str, ...]]
    tiled: ClassVar[bool] = False  # an image is a thumbnail and tiles, each with `visual_tokens`

    def check(self, config: Any) -> None:
        """Raise ModelError where a configuration of this family is not supported, with why."""

    def image_token_id(self, config: Any) -> int:
        """Id of the placeholder token in `input_ids`."""
        raise NotImplementedError

    def visual_tokens(self, config: Any) -> int:
        """Visual tokens for each image (each crop, where `tiled`), before any is merged."""
        raise NotImplementedError

    def most_visual_tokens(self, config: Any) -> int:
        """Visual tokens of an image where nothing is skipped; the most there can be, where it varies."""
        return self.visual_tokens(config)

    def fitted(self, hf_config: Any, config: SkipVisionConfig) -> SkipVisionConfig:
        """A configuration for a model: without a CLS row to choose by, tokens are chosen by redundancy."""
        if config.selector == CLS_SELECTOR and not self.vision_dims(hf_config).has_cls:
            return replace(config, selector=SELECTOR_WITHOUT_CLS)
        return config

    def layout(self, hf_config: Any, config: SkipVisionConfig) -> TokenLayout:
        """Resolve a configuration for a model; raises ConfigError where it does not fit."""
        return self.fitted(hf_config, config).layout(
            self.visual_tokens(hf_config),
            num_layers=self.decoder_dims(hf_config).num_layers,
            tiled=self.tiled,
        )

    def max_positions(self, config: Any) -> int | None:
        """The longest sequence of the text decoder, where its configuration names one."""
        return getattr(config.get_text_config(), "max_position_embeddings", None)

    def decoder_dims(self, config: Any) -> DecoderDims:
        """Sizes of the text decoder."""
        raise NotImplementedError

    def vision_dims(self, config: Any) -> VisionDims:
        """Sizes of the vision tower."""
        raise NotImplementedError

    def vision_tower(self, model: nn.Module) -> nn.Module:
        """The module that turns pixels into hidden states."""
        raise NotImplementedError

    def projector(self, model: nn.Module) -> nn.Module:
        """The module that turns vision features into the decoder's width."""
        raise NotImplementedError

    def vision_layers(self, model: nn.Module) -> nn.ModuleList:
        """The vision tower's layers, each with `self_attn.{q_proj,k_proj}`."""
        raise NotImplementedError

    def language_model(self, model: nn.Module) -> nn.Module:
        """The decoder without its head, called with inputs_embeds."""
        raise NotImplementedError

    def decoder_layers(self, model: nn.Module) -> nn.ModuleList:
        """The decoder's layers."""
        raise NotImplementedError

    def ffn(self, layer: nn.Module) -> tuple[nn.Module, nn.Module]:
        """(norm, MLP) of one decoder layer: the region that skipped tokens pass by."""
        raise NotImplementedError


# Text models whose layers stand as Llama's do: RMS norm, attention, RMS norm, gated MLP.
_TEXT_MODELS = ("llama", "qwen2", "qwen3", "mistral", "gemma", "phi3")


def check_text(text: Any) -> None:
    """Raise ModelError for a text model that is not known to be of Llama's build, with why."""
    if text.model_type not in _TEXT_MODELS:
        raise ModelError(f"the text model is {text.model_type!r}; supported: {', '.join(_TEXT_MODELS)}")
    kinds = set(getattr(text, "layer_types", None) or ()) - {"full_attention"}
    window = getattr(text, "sliding_window", None)
    if kinds or (window is not None and window < text.max_position_embeddings):
        raise ModelError(
            f"the text model has sliding windows (sliding_window={window}), which count cached positions: a "
            "pruned cache would move them; supported: full attention in every layer"
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
    found = ", ".join(architectures or []) or "no architecture at all"
    raise ModelError(
        f"{where} names {found}, which is not supported; supported: {', '.join(supported_architectures())}"
    )
