"""Stage B: train projector and decoder on cached features of the frozen vision tower.

All questions about a picture share one sequence: `USER: ` and the visual tokens once, then each
question with its answer, which sees that prefix and itself only, at positions that restart after
the prefix. A 4D mask keeps them apart, so that the visual tokens are computed once for all.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from common import Log, build_optimizer, learning_rate, save_state, take_step
from modeling import (
    PREFIX,
    VISUAL_TOKENS,
    question_text,
)
from scenes import Question, Thing, all_questions, ask, pick_question
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration, LlavaProcessor

KEPT = (16, 32, 48)
# questions about places are by far the hardest to learn
TYPE_WEIGHTS = {"colour": 1.0, "count": 1.5, "where": 3.0, "what": 3.0, "digit": 1.5}


class QuestionBank:
    """Scenes with features, CLS attention and all their tokenized questions."""

    def __init__(
        self,
        scenes: list[list[Thing]],
        features: Tensor,
        attention: Tensor,
        processor: LlavaProcessor,
    ) -> None:
        """features: float16 [n, 64, width]; attention: float32 [n, 64], CLS to patches;"""
        self.scenes = scenes
        self.features = features
        self.attention = attention
        self.tokenizer = processor.tokenizer
        self.image_id = processor.image_token_id
        self.prefix: list[int] = self.tokenizer(PREFIX).input_ids
        self.found = [
            {name: questions for name, questions in all_questions(scene).items() if questions}
            for scene in scenes
        ]
        self._ids: dict[str, list[int]] = {}

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, remembered: there are only some thousand different texts."""
        if text not in self._ids:
            self._ids[text] = self.tokenizer(text).input_ids
        return self._ids[text]

    def pick(self, rng: np.random.Generator, scene: int, count: int) -> list[Question]:
        """Pick `count` questions about a scene, types at random."""
        found = self.found[scene]
        names = sorted(found)
        weights = np.array([TYPE_WEIGHTS[name] for name in names])
        types = rng.choice(names, size=count, p=weights / weights.sum())
        return [pick_question(rng, found[name]) for name in types]


@dataclass
class Packed:
    """One packed batch of n pictures, sequences of length s.

    ids, positions: int64 [n, s]; visible: bool [n, 1, s, s]; keep_ffn: bool [n, s];
    visual: float32 [n, 64, width], in the order in which the decoder gets them;
    rows, cols, targets: int64 [m], where each answer token is predicted and what it is;
    owner: int64 [m], the number of the question to which it belongs.
    """

    ids: Tensor
    positions: Tensor
    visible: Tensor
    keep_ffn: Tensor
    visual: Tensor
    rows: Tensor
    cols: Tensor
    targets: Tensor
    owner: Tensor

    def to(self, device: torch.device) -> Packed:
        """The same on a device."""
        return Packed(**{name: tensor.to(device) for name, tensor in vars(self).items()})


def retained_first(attention: np.ndarray, kept: int) -> np.ndarray:
    """Skip-Vision's order: the `kept` most attended patches, then the others, each in raster order.

    attention: float [64]; returns int64 [64].
    """
    ranked = np.argsort(-attention, kind="stable")
    return np.concatenate([np.sort(ranked[:kept]), np.sort(ranked[kept:])])


def pack(
    bank: QuestionBank,
    chosen: list[int],
    questions: list[list[Question]],
    orders: list[np.ndarray],
    kept: int | None,
    pictures: list[int] | None = None,
) -> Packed:
    """Pack questions about scenes `chosen`; `kept` None means that no visual token is skipped.

    `pictures` are the scenes whose features are shown: the same, unless images are shuffled.
    """
    head = len(bank.prefix) + VISUAL_TOKENS
    sequences, segments, positions, answers = [], [], [], []
    rows, cols, targets, owner = [], [], [], []
    number = 0
    for row, asked in enumerate(questions):
        ids = bank.prefix + [bank.image_id] * VISUAL_TOKENS
        segment, position, answering = [0] * head, list(range(head)), [False] * head
        for i, question in enumerate(asked, start=1):
            prompt = bank.encode(question_text(question.question))
            answer = bank.encode(f" {question.answer}")
            start = len(ids) + len(prompt) - 1
            wanted = [*answer, bank.tokenizer.eos_token_id]
            rows += [row] * len(wanted)
            cols += range(start, start + len(wanted))
            targets += wanted
            owner += [number] * len(wanted)
            number += 1
            length = len(prompt) + len(answer)
            ids = ids + prompt + answer
            segment += [i] * length
            position += range(head, head + length)
            answering += [False] * len(prompt) + [True] * len(answer)
        sequences.append(ids)
        segments.append(segment)
        positions.append(position)
        answers.append(answering)

    size = max(map(len, sequences))

    def padded(lists: list[list[int]], value: int) -> Tensor:
        return torch.tensor([part + [value] * (size - len(part)) for part in lists])

    segment = padded(segments, -1)
    shared = (segment == 0)[:, None, :]
    visible = (shared | (segment[:, :, None] == segment[:, None, :])).tril()
    keep_ffn = torch.ones(len(chosen), size, dtype=torch.bool)
    if kept is not None:
        first = len(bank.prefix) + kept
        keep_ffn[:, first:head] = False
        # answer tokens are fed after the prefill, when the skipped tokens' K/V are gone
        answering = padded(answers, False).bool()
        visible[:, :, first:head] &= ~answering[:, :, None]
    shown = torch.tensor(chosen if pictures is None else pictures)
    device = bank.features.device
    order = torch.from_numpy(np.stack(orders)).to(device)
    visual = bank.features[shown.to(device)].float()
    return Packed(
        ids=padded(sequences, bank.tokenizer.pad_token_id),
        positions=padded(positions, 0),
        visible=visible[:, None],
        keep_ffn=keep_ffn,
        visual=visual.gather(1, order[..., None].expand(-1, -1, visual.shape[-1])),
        rows=torch.tensor(rows),
        cols=torch.tensor(cols),
        targets=torch.tensor(targets),
        owner=torch.tensor(owner),
    ).to(device)


@contextmanager
def skipped_ffn(decoder: nn.Module, keep: Tensor) -> Iterator[None]:
    """Leave the FFN out of the residual stream where `keep` [n, s] is false, in every layer."""
    if bool(keep.all()):
        yield
        return
    factor = keep[..., None].float()
    hooks = [
        layer.mlp.register_forward_hook(lambda _module, _args, output: output * factor)
        for layer in decoder.layers
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def answer_logits(model: LlavaForConditionalGeneration, packed: Packed) -> Tensor:
    """Logits [m, vocabulary] of the answer tokens."""
    decoder = model.model.language_model
    embeds = decoder.embed_tokens(packed.ids)
    visual = model.model.multi_modal_projector(packed.visual)
    is_image = packed.ids == model.config.image_token_id
    embeds = embeds.masked_scatter(is_image[..., None], visual)
    with skipped_ffn(decoder, packed.keep_ffn):
        hidden = decoder(
            inputs_embeds=embeds,
            attention_mask=packed.visible,
            position_ids=packed.positions,
            use_cache=False,
        ).last_hidden_state
    return model.lm_head(hidden[packed.rows, packed.cols])


def random_batch(bank: QuestionBank, rng: np.random.Generator, pictures: int, skip: bool) -> Packed:
    """`pictures` with ten questions each, half of the dense batches in raster order."""
    chosen = rng.integers(len(bank.scenes), size=pictures).tolist()
    questions = [bank.pick(rng, scene, 10) for scene in chosen]
    kept = int(rng.choice(KEPT))
    if skip or rng.random() < 0.25:
        orders = [retained_first(bank.attention[scene].numpy(), kept) for scene in chosen]
    elif rng.random() < 0.33:
        orders = [rng.permutation(VISUAL_TOKENS) for _ in chosen]
    else:
        orders = [np.arange(VISUAL_TOKENS) for _ in chosen]
    return pack(bank, chosen, questions, orders, kept if skip else None)


@torch.no_grad()
def validate(model: LlavaForConditionalGeneration, bank: QuestionBank) -> dict[str, float]:
    """Share of questions with every answer token right: dense, by type, shuffled, and skipped.

    With the right answer as input this equals exact match of the greedy answer.
    """
    rng = np.random.default_rng(7)
    asked = [ask(rng, scene, 4) for scene in bank.scenes]
    measured: dict[str, float] = {}
    for name, kept in (("dense", None), ("shuffled", None), ("kept_32", 32), ("kept_16", 16)):
        right: list[bool] = []
        types: list[str] = []
        for start in range(0, len(asked), 50):
            chosen = list(range(start, min(start + 50, len(asked))))
            shown = [(i + 1) % len(asked) for i in chosen] if name == "shuffled" else chosen
            orders = [
                np.arange(VISUAL_TOKENS)
                if kept is None
                else retained_first(bank.attention[scene].numpy(), kept)
                for scene in shown
            ]
            questions = asked[start : start + 50]
            packed = pack(bank, chosen, questions, orders, kept, pictures=shown)
            hit = (answer_logits(model, packed).argmax(-1) == packed.targets).cpu()
            total = sum(map(len, questions))
            good = torch.ones(total, dtype=torch.bool)
            good[packed.owner.cpu()[~hit]] = False
            right += good.tolist()
            types += [question.type for part in questions for question in part]
        measured[name] = round(float(np.mean(right)), 4)
        if name == "dense":
            for kind in sorted(set(types)):
                hits = [ok for ok, got in zip(right, types, strict=True) if got == kind]
                measured[kind] = round(float(np.mean(hits)), 4)
    return measured


def train_decoder(
    model: LlavaForConditionalGeneration,
    bank: QuestionBank,
    validation: QuestionBank,
    *,
    steps: int,
    batch: int,
    peak: float,
    skip_from: float,
    seed: int,
    state_path: Path,
    snapshot: Callable[[], None],
    log: Log,
    seconds: float | None = None,
) -> bool:
    """Train projector and decoder, or go on from `state_path`; `snapshot` saves the model.

    seconds: stop at the first saved state after so many. Returns whether all steps were taken.
    """
    start = time.monotonic()
    model.train()
    model.model.vision_tower.requires_grad_(False)
    parts = [model.model.multi_modal_projector, model.model.language_model, model.lm_head]
    optimizer = build_optimizer(parts)
    first = 0
    if state_path.exists():
        state = torch.load(state_path, weights_only=True, map_location="cpu")
        for part, weights in zip(parts, state["parts"], strict=True):
            part.load_state_dict(weights)
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    running = 0.0
    for step in range(first, steps):
        # The decoder first learns to read the codes; then both may move.
        parts[0].requires_grad_(step >= steps // 2)
        rng = np.random.default_rng([seed, 20, step])
        skip = step >= skip_from * steps and step % 2 == 1
        packed = random_batch(bank, rng, batch, skip)
        loss = F.cross_entropy(answer_logits(model, packed), packed.targets)
        take_step(loss, optimizer, learning_rate(step, steps, peak))
        running = loss.item() if running == 0.0 else 0.95 * running + 0.05 * loss.item()
        if (step + 1) % 50 == 0:
            log.write(stage="decoder", step=step + 1, loss=round(running, 4))
        if (step + 1) % 200 == 0 or step + 1 == steps:
            log.write(stage="decoder-validation", step=step + 1, **validate(model, validation))
            state = {
                "parts": [part.state_dict() for part in parts],
                "optimizer": optimizer.state_dict(),
                "step": step + 1,
            }
            save_state(state_path, state)
            snapshot()
            if seconds is not None and time.monotonic() - start > seconds:
                return step + 1 == steps
    return True
