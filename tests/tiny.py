"""A LLaVA small enough to trace in seconds, with weights scaled up so that mistakes show.

At stock initialisation a wrong position moves logits by 6e-5 only.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaNextProcessor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

SPECIAL = ["<pad>", "<s>", "</s>", "<image>"]
TEMPLATE = (
    "USER: {% for m in messages %}{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>\n"
    "{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endfor %} ASSISTANT:"
)


def tiny_config(**text: Any) -> LlavaConfig:
    """64 visual tokens, 3 decoder layers, 4 query and 2 key/value heads."""
    return LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=48,
            intermediate_size=96,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=96,
            patch_size=12,
            projection_dim=48,
        ),
        text_config=LlamaConfig(
            **{
                "hidden_size": 64,
                "intermediate_size": 128,
                "num_hidden_layers": 3,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "vocab_size": 280,
                "max_position_embeddings": 512,
                "pad_token_id": 0,
                "bos_token_id": 1,
                "eos_token_id": 2,
            }
            | text
        ),
        image_token_id=3,
        image_token_index=3,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )


def tiny_next_config(image_size: int = 96, patch_size: int = 12) -> LlavaNextConfig:
    """The same, as LLaVA-NeXT: a thumbnail and two to four tiles."""
    values = tiny_config().to_dict()
    values["vision_config"] |= {"image_size": image_size, "patch_size": patch_size}
    del values["model_type"], values["image_seq_length"]
    side = image_size
    grids = [[side, 2 * side], [2 * side, side], [2 * side, 2 * side], [3 * side, side]]
    return LlavaNextConfig(**values, image_grid_pinpoints=grids)


def tiny_model(config: LlavaConfig | None = None, seed: int = 0) -> LlavaForConditionalGeneration:
    """Random weights, matrices three times the stock scale."""
    config = config or tiny_config()
    tiled = isinstance(config, LlavaNextConfig)
    return amplified(
        LlavaNextForConditionalGeneration if tiled else LlavaForConditionalGeneration, config, seed
    )


def amplified(kind, config, seed: int = 0):
    """A model of a class, weights scaled up, and those random that start as constants."""
    torch.manual_seed(seed)
    model = kind(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.mul_(3.0)
                if not parameter.any():
                    parameter.normal_(0, 0.1)
            elif "norm" in name:
                # Distinct, so that a norm taken for another one shows.
                parameter.add_(0.2 * torch.randn_like(parameter))
            elif "lambda" in name:  # scales of InternVL's branches
                parameter.uniform_(0.5, 1.5)
    model.generation_config.eos_token_id = 2
    model.generation_config.pad_token_id = 0
    return model


def tiny_processor(image_size: int = 96, patch_size: int = 12) -> LlavaProcessor:
    """Byte-level BPE tokenizer with no merges worth speaking of, and the PIL image processor."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=280,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["what is in the picture"] * 4, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens={"image_token": "<image>"},
    )
    images = CLIPImageProcessorPil(
        size={"shortest_edge": image_size}, crop_size={"height": image_size, "width": image_size}
    )
    return LlavaProcessor(
        images,
        fast,
        patch_size=patch_size,
        vision_feature_select_strategy="default",
        chat_template=TEMPLATE,
        image_token="<image>",
        num_additional_image_tokens=1,
    )


def tiny_next_processor(image_size: int = 96, patch_size: int = 12) -> LlavaNextProcessor:
    """PIL image processor that cuts tiles."""
    images = LlavaNextImageProcessorPil(
        size={"shortest_edge": image_size},
        crop_size={"height": image_size, "width": image_size},
        image_grid_pinpoints=tiny_next_config(image_size, patch_size).image_grid_pinpoints,
    )
    return LlavaNextProcessor(
        images,
        tiny_processor().tokenizer,
        patch_size=patch_size,
        vision_feature_select_strategy="default",
        chat_template=TEMPLATE,
        image_token="<image>",
        num_additional_image_tokens=1,
    )


def write_tiny_next(folder: Path) -> Path:
    """The same as LLaVA-NeXT."""
    tiny_model(tiny_next_config()).save_pretrained(folder)
    tiny_next_processor().save_pretrained(folder)
    return folder


def write_tiny(folder: Path, **text: Any) -> Path:
    """Save model and processor as a Hugging Face folder."""
    tiny_model(tiny_config(**text)).save_pretrained(folder)
    tiny_processor().save_pretrained(folder)
    return folder
