"""A larger LLaVA with random weights: what times are taken on, where accuracy means nothing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

TEXT_TOKENS = 64


@dataclass(frozen=True)
class SiblingSizes:
    """About 33 M parameters by default; the decoder is wide against its tower as real ones are."""

    hidden: int = 512
    intermediate: int = 1792
    layers: int = 8
    heads: int = 8
    vision_hidden: int = 192
    vision_layers: int = 4
    vocab: int = 2048


def sibling_model(sizes: SiblingSizes, seed: int = 0) -> Any:
    """A LLaVA of random weights with 576 visual tokens for each picture; placeholder 3."""
    import torch
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    config_class: Any = LlavaConfig
    config = config_class(
        vision_config=CLIPVisionConfig(
            hidden_size=sizes.vision_hidden,
            intermediate_size=4 * sizes.vision_hidden,
            num_hidden_layers=sizes.vision_layers,
            num_attention_heads=4,
            image_size=336,
            patch_size=14,
            projection_dim=sizes.vision_hidden,
        ),
        text_config=LlamaConfig(
            hidden_size=sizes.hidden,
            intermediate_size=sizes.intermediate,
            num_hidden_layers=sizes.layers,
            num_attention_heads=sizes.heads,
            num_key_value_heads=sizes.heads // 2,
            vocab_size=sizes.vocab,
            max_position_embeddings=2048,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        ),
        image_token_id=3,
        image_token_index=3,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    torch.manual_seed(seed)
    return LlavaForConditionalGeneration(config)


def write_sibling(folder: Path, seed: int = 0) -> int:
    """Save the default one; returns its parameters."""
    model = sibling_model(SiblingSizes(), seed)
    model.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())
