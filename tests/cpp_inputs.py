"""Pictures, tokenizers and texts of many kinds, on which the C++ runtime is compared with Hugging Face."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

TEXTS = [
    "",
    " ",
    "what is in the picture?",
    "  it's  we'll\n\n two \t tabs 12345 ",
    "<s>a <image> b</s>",
    "naïve cafe\u0301 — “quoted” 日本語 한국어 русский עברית",
    "emoji 👩‍👩‍👧 👍🏽 \u0000 \u00a0 \u2028 end",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa bababababa the the then there",
]
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def trained_tokenizer(kind: str) -> Tokenizer:
    """Tokenizers of the kinds that language models have, trained on a few words."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    llama = kind in ("llama", "metaspace")
    tokenizer = Tokenizer(
        models.BPE(byte_fallback=llama, unk_token="<unk>" if llama else None, fuse_unk=llama)
    )
    special = ["<unk>", "<s>", "</s>", "<image>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if kind == "gpt2":
        tokenizer.pre_tokenizer = byte_level
    elif kind == "qwen":
        tokenizer.normalizer = normalizers.NFC()
        split = pre_tokenizers.Split(Regex(LLAMA3), "isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                split,
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(False, use_regex=False),
            ]
        )
    elif kind == "llama":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    if llama:
        special += [f"<0x{byte:02X}>" for byte in range(256)]
        alphabet = list("▁abcdefghijklmnopqrstuvwxyz")
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        )
    else:
        tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS[2:4] + TEXTS[7:] + ["in the beginning was the word"] * 3, trainer)
    if llama:  # the byte tokens are no special ones
        data = json.loads(tokenizer.to_str())
        data["added_tokens"] = data["added_tokens"][:4]
        tokenizer = Tokenizer.from_str(json.dumps(data))
    return tokenizer


def random_texts() -> list[str]:
    """Texts of what tokenizers treat apart."""
    rng = np.random.default_rng(1)
    pool = [*"aab th e.,'\n\t 0129éß日👍\u0301<>", "the ", "<image>", "'ll", "\u00a0"]
    return ["".join(rng.choice(pool, rng.integers(1, 60))) for _ in range(200)]


def random_pictures(folder: Path) -> list[Path]:
    """Pictures of many sizes and modes, smooth and rough."""
    rng = np.random.default_rng(0)
    files = []
    # The one of 400 x 100 is resized in height first.
    sizes = [(96, 96), (97, 200), (300, 61), (17, 23), (512, 384), (1, 9), (400, 100)]
    for i, (height, width) in enumerate(sizes):
        blocks = Image.fromarray(rng.integers(0, 256, (height, width, 4), dtype=np.uint8), "RGBA")
        smooth = blocks.resize((max(width // 7, 1), max(height // 7, 1))).resize((width, height))
        for mode, picture in {"RGB": blocks, "RGBA": blocks, "P": smooth, "L": smooth, "LA": blocks}.items():
            files.append(folder / f"{i}{mode}.png")
            (picture.convert("RGB").convert("P") if mode == "P" else picture.convert(mode)).save(files[-1])
    return files
