"""Exact match of greedily generated answers, through the real processor and `generate`."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from scenes import Question
from transformers import LlavaForConditionalGeneration, LlavaProcessor


def write_imagefolder(folder: Path, pixels: np.ndarray, questions: list[list[Question]]) -> None:
    """Write pictures uint8 [n, 96, 96, 3] and their questions as a Hugging Face imagefolder."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for i, asked in enumerate(questions):
        name = f"{i:03d}.png"
        Image.fromarray(pixels[i]).save(folder / name, optimize=True)
        for question in asked:
            row = {"file_name": name, "question": question.question}
            lines.append(json.dumps(row | {"answer": question.answer, "type": question.type}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def read_imagefolder(folder: Path) -> tuple[np.ndarray, list[list[Question]]]:
    """Read back what `write_imagefolder` wrote."""
    asked: dict[str, list[Question]] = defaultdict(list)
    for line in (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        asked[row["file_name"]].append(Question(row["question"], row["answer"], row["type"]))
    names = sorted(asked)
    pixels = np.stack([np.asarray(Image.open(folder / name).convert("RGB")) for name in names])
    return pixels, [asked[name] for name in names]


def derangement(rng: np.random.Generator, n: int) -> np.ndarray:
    """A random order of `n` items in which none keeps its place (a single random cycle)."""
    cycle = rng.permutation(n)
    order = np.empty(n, np.int64)
    order[cycle] = np.roll(cycle, 1)
    return order


@torch.inference_mode()
def generate_answers(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    pixels: np.ndarray,
    questions: list[list[Question]],
    batch_size: int = 50,
) -> list[tuple[Question, str]]:
    """Answer every question greedily; prompts of equal length share a batch, so none is padded."""
    groups: dict[int, list[tuple[str, Image.Image, Question]]] = defaultdict(list)
    for picture, asked in zip(pixels, questions, strict=True):
        for question in asked:
            content = [{"type": "image"}, {"type": "text", "text": question.question}]
            prompt = processor.apply_chat_template(
                [{"role": "user", "content": content}], add_generation_prompt=True
            )
            item = (prompt, Image.fromarray(picture), question)
            groups[len(processor.tokenizer(prompt).input_ids)].append(item)
    model.eval()
    pairs = []
    for items in groups.values():
        for start in range(0, len(items), batch_size):
            part = items[start : start + batch_size]
            inputs = processor(
                text=[prompt for prompt, _, _ in part],
                images=[image for _, image, _ in part],
                return_tensors="pt",
            )
            output = model.generate(**inputs, do_sample=False, max_new_tokens=24)
            new = output[:, inputs["input_ids"].shape[1] :]
            texts = processor.tokenizer.batch_decode(new, skip_special_tokens=True)
            pairs += [(item[2], text.strip()) for item, text in zip(part, texts, strict=True)]
    return pairs


def exact_match(pairs: list[tuple[Question, str]]) -> dict[str, float]:
    """Share of answers equal to the accepted one, over all questions and by type."""
    hits: dict[str, list[bool]] = defaultdict(list)
    for question, text in pairs:
        for name in ("all", question.type):
            hits[name].append(text == question.answer)
    return {name: round(float(np.mean(values)), 4) for name, values in sorted(hits.items())}


def evaluate(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    pixels: np.ndarray,
    questions: list[list[Question]],
    shuffle_seed: int | None = None,
) -> dict[str, float]:
    """Exact match, with the images shuffled among the questions if a seed is given."""
    if shuffle_seed is not None:
        pixels = pixels[derangement(np.random.default_rng(shuffle_seed), len(pixels))]
    return exact_match(generate_answers(model, processor, pixels, questions))
