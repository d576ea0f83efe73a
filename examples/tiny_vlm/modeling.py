"""Build the tiny LLaVA: tokenizer, processor, model, and the vision features it trains on."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from scenes import GRID, IMAGE_SIZE, PATCH_SIZE
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

IMAGE_TOKEN, PAD_TOKEN, EOS_TOKEN = "<image>", "<|pad|>", "<|eos|>"
FEATURE_LAYER = -2
VISUAL_TOKENS = GRID * GRID
PREFIX = "USER: "
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}"
    "{{ 'USER: ' }}"
    "{%- if message['content'] is string -%}{{ message['content'] }}"
    "{%- else -%}"
    "{%- for part in message['content'] if part['type'] == 'image' -%}"
    "{{ '<image>\\n' }}"
    "{%- endfor -%}"
    "{%- for part in message['content'] if part['type'] == 'text' -%}"
    "{{ part['text'] }}"
    "{%- endfor -%}"
    "{%- endif -%}"
    "{%- else -%}"
    "{{ ' ASSISTANT: ' }}"
    "{%- if message['content'] is string -%}{{ message['content'] }}"
    "{%- else -%}"
    "{%- for part in message['content'] if part['type'] == 'text' -%}"
    "{{ part['text'] }}"
    "{%- endfor -%}"
    "{%- endif -%}"
    "{{ '<|eos|>' }}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ ' ASSISTANT:' }}{%- endif -%}"
)


def question_text(question: str) -> str:
    """The prompt after the image token, exactly as the chat template writes it."""
    return f"\n{question} ASSISTANT:"


def build_processor(texts: Iterable[str], vocab_size: int = 448) -> LlavaProcessor:
    """Train a byte-level BPE tokenizer on `texts` and wrap it with the image processor."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[PAD_TOKEN, EOS_TOKEN, IMAGE_TOKEN],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD_TOKEN,
        eos_token=EOS_TOKEN,
        extra_special_tokens={"image_token": IMAGE_TOKEN},
        padding_side="left",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )
    # without torchvision the default CLIP image processor cannot be built, so name the PIL one
    image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE_SIZE},
        crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlavaForConditionalGeneration:
    """A randomly initialised LLaVA of about 1.4 M parameters."""
    vision = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        projection_dim=128,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=288,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        # slow enough rotations that content can be matched across the picture
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        initializer_range=0.06,  # the usual 0.02 is for models 30 times as wide
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        vision_feature_layer=FEATURE_LAYER,
        vision_feature_select_strategy="default",
        image_seq_length=VISUAL_TOKENS,
        tie_word_embeddings=False,
    )
    model = LlavaForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=24,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    _widen_tower_init(model.model.vision_tower)
    _scale_decoder_init(model)
    return model


@torch.no_grad()
def _widen_tower_init(tower: torch.nn.Module) -> None:
    """Enlarge CLIP's initial weights, made for width 768 and more.

    At width 128 the stock scales leave the position signal at a few percent of the patch signal
    and attention almost uniform, and both then take most of the training to grow.
    """
    width = tower.config.hidden_size
    torch.nn.init.normal_(tower.embeddings.position_embedding.weight, std=0.5)
    torch.nn.init.normal_(tower.embeddings.patch_embedding.weight, std=1 / math.sqrt(3 * PATCH_SIZE**2))
    for layer in tower.encoder.layers:
        for name in ("q_proj", "k_proj"):
            weight = getattr(layer.self_attn, name).weight
            torch.nn.init.normal_(weight, std=1.2 / math.sqrt(width))
        torch.nn.init.normal_(layer.self_attn.v_proj.weight, std=1 / math.sqrt(width))
        torch.nn.init.normal_(layer.self_attn.out_proj.weight, std=0.5 / math.sqrt(width))


@torch.no_grad()
def _scale_decoder_init(model: LlavaForConditionalGeneration) -> None:
    """Give embeddings and layer outputs comparable sizes, so that four layers learn at once."""
    decoder = model.model.language_model
    torch.nn.init.normal_(decoder.embed_tokens.weight, std=0.5)
    torch.nn.init.normal_(model.lm_head.weight, std=0.02)
    shrink = 1 / math.sqrt(2 * len(decoder.layers))
    for layer in decoder.layers:
        layer.self_attn.o_proj.weight.mul_(shrink)
        layer.mlp.down_proj.weight.mul_(shrink)
    width = decoder.config.hidden_size
    for linear in (
        model.model.multi_modal_projector.linear_1,
        model.model.multi_modal_projector.linear_2,
    ):
        torch.nn.init.normal_(linear.weight, std=1 / math.sqrt(width))
        torch.nn.init.zeros_(linear.bias)


@torch.no_grad()
def fold_standardisation(projector: torch.nn.Module, mean: Tensor, std: Tensor) -> None:
    """Make the projector's first layer standardise its input: mean and std are [width]."""
    linear = projector.linear_1
    linear.weight.div_(std)
    linear.bias.sub_(linear.weight @ mean)


def to_pixel_values(pixels: np.ndarray) -> Tensor:
    """What the image processor gives: uint8 [n, 96, 96, 3] to float32 [n, 3, 96, 96] in -1..1."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


def tower_features(tower: torch.nn.Module, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
    """Features and CLS attention at FEATURE_LAYER, without running the layers after it.

    Returns patch features [n, 64, width] (CLS dropped), and log CLS attention [n, heads, 64]
    (CLS to CLS left out) of the layer that computes these features.
    """
    hidden = tower.pre_layrnorm(tower.embeddings(pixel_values))
    layers = tower.encoder.layers[: FEATURE_LAYER + 1]
    for layer in layers[:-1]:
        hidden = layer(hidden, None)
    last = layers[-1]
    attention, normed = last.self_attn, last.layer_norm1(hidden)
    n, length, _ = normed.shape
    heads = attention.num_heads
    query = attention.q_proj(normed[:, :1]).view(n, 1, heads, -1).transpose(1, 2)
    keys = attention.k_proj(normed).view(n, length, heads, -1).transpose(1, 2)
    scores = (query @ keys.transpose(2, 3) * attention.scale).squeeze(2)
    return last(hidden, None)[:, 1:], scores.log_softmax(-1)[..., 1:]


def save_checkpoint(folder: Path, model: LlavaForConditionalGeneration, processor: LlavaProcessor) -> None:
    """Write model and processor as `from_pretrained` reads them."""
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
