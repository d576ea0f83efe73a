"""A tiny random checkpoint of each family, and of each vision tower and text model that a LLaVA may have."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from tiny import (
    TEMPLATE,
    amplified,
    tiny_config,
    tiny_model,
    tiny_next_config,
    tiny_processor,
    write_tiny_next,
)
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3ImageProcessorPil,
    Gemma3Processor,
    Gemma3TextConfig,
    GemmaConfig,
    GotOcr2ImageProcessorPil,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLProcessor,
    InternVLVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessorPil,
    LlavaOnevisionProcessor,
    MistralConfig,
    MixtralConfig,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
    Phi3Config,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLImageProcessorPil,
    Qwen2VLProcessor,
    Qwen3Config,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)

from skipvision_export.models.pictures import without_videos

TEXT = {
    "llama": LlamaConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "mistral": MistralConfig,
    "gemma": GemmaConfig,
    "phi3": Phi3Config,
    "mixtral": MixtralConfig,
}
# Text models that come in one family only.
OWN_TEXT = {"gemma3_text": Gemma3TextConfig}


def text_config(kind: str, layers: int = 2):
    """Two query heads for each key and value head; two layers, as each costs seconds to trace."""
    values = tiny_config().text_config.to_dict()
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
    names += (
        "num_key_value_heads",
        "max_position_embeddings",
        "pad_token_id",
        "bos_token_id",
        "eos_token_id",
    )
    more = {"head_dim": 24} if kind in ("qwen3", "gemma", "gemma3_text") else {}
    if kind == "mixtral":
        more |= {"num_local_experts": 4, "num_experts_per_tok": 2}
    if kind in ("mistral", "mixtral"):
        more["sliding_window"] = None
    if kind == "phi3":
        more["original_max_position_embeddings"] = values["max_position_embeddings"]
    if kind == "gemma3_text":
        more |= {"sliding_window": 96, "query_pre_attn_scalar": 24}
        more["layer_types"] = ["sliding_attention", "full_attention"]
    return (TEXT | OWN_TEXT)[kind](**{name: values[name] for name in names}, num_hidden_layers=layers, **more)


def siglip(config: LlavaConfig) -> LlavaConfig:
    """The same with a tower that has no CLS row."""
    tower = SiglipVisionConfig(**tower_sizes(3), vision_use_head=False)
    values = config.to_dict() | {"vision_config": tower.to_dict()}
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
    return save(folder, tiny_model(config), processor)


def save(folder: Path, model, processor) -> Path:
    """Save both, biases drawn at random, the decoder's attention sharpened: else it hardly sees positions."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.add_(0.2 * torch.randn_like(parameter))
            elif re.search(r"(language|text)_model.*q_(proj|norm)\.weight$", name):
                parameter.mul_(3.0)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def tokenizer(**special: str) -> PreTrainedTokenizerFast:
    """tiny_processor's, with more special tokens, by the names under which processors know them."""
    return PreTrainedTokenizerFast(
        tokenizer_object=tiny_processor().tokenizer.backend_tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens=special,
    )


def tower_sizes(layers: int = 2) -> dict[str, int]:
    """What towers have in common."""
    clip = tiny_config().vision_config
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "image_size", "patch_size")
    return {name: getattr(clip, name) for name in names} | {"num_hidden_layers": layers}


def write_internvl(folder: Path, text: str = "qwen3") -> Path:
    """16 visual tokens of 64 patches for each tile, up to four tiles and a thumbnail."""
    config = InternVLConfig(
        vision_config=InternVLVisionConfig(**tower_sizes()),
        text_config=text_config(text),
        image_token_id=3,
        image_seq_length=16,
    )
    processor = without_videos(InternVLProcessor)(
        GotOcr2ImageProcessorPil(
            size={"height": 96, "width": 96}, min_patches=1, max_patches=4, crop_to_patches=True
        ),
        tokenizer(
            context_image_token="<image>",
            start_image_token="<img>",
            end_image_token="</img>",
            video_token="<video>",
        ),
        image_seq_length=16,
        chat_template=TEMPLATE,
    )
    return save(folder, amplified(InternVLForConditionalGeneration, config), processor)


def write_idefics3(folder: Path, smol: bool = False) -> Path:
    """16 visual tokens of 64 patches for each crop: up to two by two of them, and the whole picture."""
    config = (SmolVLMConfig if smol else Idefics3Config)(
        vision_config=tower_sizes(), text_config=text_config("llama"), image_token_id=3, scale_factor=2
    )
    kind = SmolVLMForConditionalGeneration if smol else Idefics3ForConditionalGeneration
    processor = Idefics3Processor(
        Idefics3ImageProcessorPil(size={"longest_edge": 192}, max_image_size={"longest_edge": 96}),
        tokenizer(image_token="<image>"),
        image_seq_len=16,
        chat_template=TEMPLATE,
    )
    save(folder, amplified(kind, config), processor)
    if smol:  # its own processor cannot be made without torchvision
        file = folder / "processor_config.json"
        file.write_text(re.sub(r"Idefics3(Image)?Processor", r"SmolVLM\1Processor", file.read_text()))
    return folder


def write_onevision(folder: Path) -> Path:
    """64 visual tokens for each of a thumbnail and up to four tiles."""
    grids = tiny_next_config().image_grid_pinpoints
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**tower_sizes(), vision_use_head=False),
        text_config=text_config("qwen2"),
        image_token_index=3,
        image_grid_pinpoints=grids,
        vision_aspect_ratio="anyres_max_2",
    )
    processor = without_videos(LlavaOnevisionProcessor)(
        LlavaOnevisionImageProcessorPil(size={"height": 96, "width": 96}, image_grid_pinpoints=grids),
        tokenizer(image_token="<image>", video_token="<video>"),
        num_image_tokens=64,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_2",
        chat_template=TEMPLATE,
    )
    return save(folder, amplified(LlavaOnevisionForConditionalGeneration, config), processor)


def write_paligemma(folder: Path) -> Path:
    """64 visual tokens."""
    config = PaliGemmaConfig(
        vision_config=SiglipVisionConfig(**tower_sizes(), vision_use_head=False),
        text_config=text_config("gemma"),
        image_token_index=3,
        projection_dim=64,
        hidden_size=64,
        vocab_size=280,
    )
    images = SiglipImageProcessorPil(size={"height": 96, "width": 96})
    images.image_seq_length = 64
    processor = PaliGemmaProcessor(images, tokenizer(image_token="<image>"), chat_template=TEMPLATE)
    return save(folder, amplified(PaliGemmaForConditionalGeneration, config), processor)


def write_gemma3(folder: Path) -> Path:
    """16 visual tokens, each the mean of four patches."""
    special = tokenizer(boi_token="<boi>", eoi_token="<eoi>", image_token="<soft>")
    text = text_config("gemma3_text")
    text.vocab_size = special.image_token_id  # the placeholder lies behind the embedding table
    config = Gemma3Config(
        vision_config=SiglipVisionConfig(**tower_sizes(), vision_use_head=False),
        text_config=text,
        mm_tokens_per_image=16,
        image_token_index=special.image_token_id,
        boi_token_index=special.boi_token_id,
        eoi_token_index=special.eoi_token_id,
    )
    processor = Gemma3Processor(
        Gemma3ImageProcessorPil(size={"height": 96, "width": 96}),
        special,
        chat_template=TEMPLATE.replace("<image>", "<boi>"),
        image_seq_length=16,
    )
    return save(folder, amplified(Gemma3ForConditionalGeneration, config), processor)


# Vision towers of Qwen's models: patches of 8 pixels, four of them for a token.
QWEN_TOWERS = {
    "qwen2_vl": {"embed_dim": 48, "hidden_size": 64, "mlp_ratio": 2},
    "qwen2_5_vl": {
        "hidden_size": 48,
        "intermediate_size": 96,
        "out_hidden_size": 64,
        "window_size": 32,  # two by two tokens
        "fullatt_block_indexes": [1],
    },
    "qwen3_vl": {
        "hidden_size": 48,
        "intermediate_size": 96,
        "out_hidden_size": 64,
        "num_position_embeddings": 36,
        "deepstack_visual_indexes": [0, 1],
        "depth": 3,
    },
}
QWEN = {
    "qwen2_vl": (Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen2VLProcessor),
    "qwen2_5_vl": (Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor),
    "qwen3_vl": (Qwen3VLConfig, Qwen3VLForConditionalGeneration, Qwen3VLProcessor),
}


def write_qwen(folder: Path, kind: str, text: dict | None = None, vision: dict | None = None) -> Path:
    """Pictures of their own shape: 36 visual tokens for 96 by 96 pixels.

    text, vision: what is otherwise in the two configurations.
    """
    sizes, (config_kind, model_kind, processor_kind) = text_config("qwen2").to_dict(), QWEN[kind]
    special = tokenizer(
        image_token="<image>",
        video_token="<video>",
        vision_start_token="<|vision_start|>",
        vision_end_token="<|vision_end|>",
    )
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "vocab_size")
    names += ("max_position_embeddings", "pad_token_id", "bos_token_id", "eos_token_id")
    text = {name: sizes[name] for name in names} | {"head_dim": 16, "num_hidden_layers": 3} | (text or {})
    # A small base: else the slower axes of positions hardly turn.
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [2, 3, 3]}
    if kind != "qwen3_vl":
        del text["head_dim"]
    config = config_kind(
        vision_config={"depth": 2, "num_heads": 4, "patch_size": 8} | QWEN_TOWERS[kind] | (vision or {}),
        text_config=text,
        image_token_id=3,
        video_token_id=special.video_token_id,
        vision_start_token_id=special.vision_start_token_id,
        vision_end_token_id=special.vision_end_token_id,
    )
    config.text_config.vocab_size = len(special)
    images = Qwen2VLImageProcessorPil(
        size={"shortest_edge": 32 * 32, "longest_edge": 160 * 160}, patch_size=8, merge_size=2
    )
    start, end = special.vision_start_token, special.vision_end_token
    template = TEMPLATE.replace("<image>", f"{start}<image>{end}")
    processor = without_videos(processor_kind)(images, special, chat_template=template)
    return save(folder, amplified(model_kind, config), processor)


# Every row of the test table.
FAMILIES: dict[str, Callable[[Path], Path]] = {
    **{f"llava: clip, {text}": partial(write_family, text=text) for text in TEXT},
    "llava: siglip, llama": partial(write_family, tower="siglip"),
    "llava_next": write_tiny_next,
    "llava_onevision": write_onevision,
    "internvl": write_internvl,
    "idefics3": write_idefics3,
    "smolvlm": partial(write_idefics3, smol=True),
    "paligemma": write_paligemma,
    "gemma3": write_gemma3,
    **{kind: partial(write_qwen, kind=kind) for kind in QWEN},
}
