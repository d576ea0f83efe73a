"""A tiny random checkpoint of each vision tower and text model that a LLaVA may consist of."""

from __future__ import annotations

from pathlib import Path

import torch
from tiny import tiny_config, tiny_model, tiny_processor
from transformers import (
    GemmaConfig,
    LlamaConfig,
    LlavaConfig,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
)

TEXT = {
    "llama": LlamaConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "mistral": MistralConfig,
    "gemma": GemmaConfig,
    "phi3": Phi3Config,
}


def text_config(kind: str):
    """Three layers, two query heads for each key and value head."""
    values = tiny_config().text_config.to_dict()
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    names += (
        "num_key_value_heads",
        "max_position_embeddings",
        "pad_token_id",
        "bos_token_id",
        "eos_token_id",
    )
    more = {"head_dim": 24} if kind in ("qwen3", "gemma") else {}
    if kind == "mistral":
        more["sliding_window"] = None
    if kind == "phi3":
        more["original_max_position_embeddings"] = values["max_position_embeddings"]
    return TEXT[kind](**{name: values[name] for name in names}, **more)


def siglip(config: LlavaConfig) -> LlavaConfig:
    """The same with a tower that has no CLS row."""
    clip = config.vision_config
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    sizes = {name: getattr(clip, name) for name in (*names, "image_size", "patch_size")}
    values = config.to_dict() | {
        "vision_config": SiglipVisionConfig(**sizes, vision_use_head=False).to_dict()
    }
    values["vision_feature_select_strategy"] = "full"
    del values["model_type"]
    return LlavaConfig(**values)


def write_family(folder: Path, text: str = "llama", tower: str = "clip") -> Path:
    """Save model and processor as a Hugging Face folder."""
    config = tiny_config()
    config.text_config = text_config(text)
    processor = tiny_processor()
    if tower == "siglip":
        config = siglip(config)
        size = config.vision_config.image_size
        processor.image_processor = SiglipImageProcessorPil(size={"height": size, "width": size})
        processor.vision_feature_select_strategy, processor.num_additional_image_tokens = "full", 0
    model = tiny_model(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
