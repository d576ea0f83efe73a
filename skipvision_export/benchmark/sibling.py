"""A larger LLaVA with random weights: what times are taken on, where accuracy means nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

TEXT_TOKENS = 64


def write_sibling(folder: Path, seed: int = 0) -> int:
    """Save a LLaVA of about 32 M parameters and 576 visual tokens; returns its parameters.

    The decoder is wide against its vision tower as real ones are: there the FLOPs are.
    """
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
            hidden_size=192,
            intermediate_size=768,
            num_hidden_layers=4,
            num_attention_heads=4,
            image_size=336,
            patch_size=14,
            projection_dim=192,
        ),
        text_config=LlamaConfig(
            hidden_size=512,
            intermediate_size=1792,
            num_hidden_layers=8,
            num_attention_heads=8,
            num_key_value_heads=4,
            vocab_size=2048,
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
    model = LlavaForConditionalGeneration(config)
    model.save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())
