"""Draw 2 x 2 scenes of coloured shapes and handwritten digits, and ask questions about them.

A picture is 96 x 96 pixels: four cells of 48 x 48, each holding at most one object at a jittered
place, so that every 12 x 12 patch belongs to exactly one cell. Digits are scikit-learn's real
handwritten ones; they are split by image, so no test digit was ever seen in training.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

IMAGE_SIZE = 96
PATCH_SIZE = 12
GRID = IMAGE_SIZE // PATCH_SIZE
CELL = IMAGE_SIZE // 2

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (215, 35, 35),
    "green": (30, 150, 60),
    "blue": (40, 80, 220),
    "orange": (245, 150, 20),
    "purple": (150, 50, 190),
    "black": (35, 35, 35),
}
COLOUR_NAMES = list(COLOURS)
SHAPES = ["circle", "square", "triangle", "diamond", "cross", "star"]
PLURALS = {shape: shape + ("es" if shape == "cross" else "s") for shape in SHAPES}
DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
KINDS = SHAPES + [f"digit {name}" for name in DIGITS]
CELLS = ["top left", "top right", "bottom left", "bottom right"]
COUNTS = ["no", "one", "two", "three", "four"]
TYPES = ["colour", "count", "where", "what", "digit"]


@dataclass(frozen=True)
class Thing:
    """One drawn object: indices into CELLS, KINDS and COLOUR_NAMES."""

    cell: int
    kind: int
    colour: int

    @property
    def is_digit(self) -> bool:
        """Whether it is a handwritten digit rather than a shape."""
        return self.kind >= len(SHAPES)


@dataclass(frozen=True)
class Question:
    """A question, its only accepted answer and its type (one of TYPES)."""

    question: str
    answer: str
    type: str


@dataclass
class Batch:
    """Pictures with per-patch labels.

    pixels: uint8 [n, 96, 96, 3]; kind and colour: int64 [n, 64], -1 where there is no object;
    coverage: float32 [n, 64], the share of the patch that an object covers.
    """

    pixels: np.ndarray
    kind: np.ndarray
    colour: np.ndarray
    coverage: np.ndarray
    scenes: list[list[Thing]]


@dataclass
class DigitBank:
    """Handwritten digits of one split: for each of the ten classes, float32 [n, 8, 8] in 0..1."""

    by_class: list[np.ndarray]
    augment: bool


def load_digit_banks(seed: int = 0) -> dict[str, DigitBank]:
    """Split scikit-learn's 1,797 digits by image into disjoint train, validation and test banks."""
    from sklearn.datasets import load_digits

    data = load_digits()
    order = np.random.default_rng(seed).permutation(len(data.target))
    cuts = {"train": order[:1437], "validation": order[1437:1617], "test": order[1617:]}
    return {
        name: DigitBank(
            [(data.images[ids[data.target[ids] == digit]] / 16.0).astype(np.float32) for digit in range(10)],
            augment=name == "train",
        )
        for name, ids in cuts.items()
    }


def _polygon(shape: str) -> list[tuple[float, float]]:
    """Corners of a shape in the unit square."""
    if shape == "square":
        return [(0.08, 0.08), (0.92, 0.08), (0.92, 0.92), (0.08, 0.92)]
    if shape == "triangle":
        return [(0.5, 0.04), (0.98, 0.94), (0.02, 0.94)]
    if shape == "diamond":
        return [(0.5, 0.0), (1.0, 0.5), (0.5, 1.0), (0.0, 0.5)]
    if shape == "cross":
        a, b = 0.33, 0.67
        return [
            (a, 0), (b, 0), (b, a), (1, a), (1, b), (b, b),
            (b, 1), (a, 1), (a, b), (0, b), (0, a), (a, a),
        ]  # fmt: skip
    corners = []
    for i in range(10):  # star
        radius, angle = (0.53, 0.21)[i % 2], math.pi * (i / 5 - 0.5)
        corners.append((0.5 + radius * math.cos(angle), 0.53 + radius * math.sin(angle)))
    return corners


@functools.cache
def _shape_mask(shape: str, size: int) -> np.ndarray:
    """Antialiased mask of a shape: float32 [size, size]."""
    big = size * 4
    image = Image.new("L", (big, big))
    pen = ImageDraw.Draw(image)
    if shape == "circle":
        pen.ellipse((2, 2, big - 3, big - 3), fill=255)
    else:
        pen.polygon([(x * (big - 1), y * (big - 1)) for x, y in _polygon(shape)], fill=255)
    return np.asarray(image.resize((size, size), Image.Resampling.BOX), np.float32) / 255


def _digit_mask(rng: np.random.Generator, bank: DigitBank, digit: int, size: int) -> np.ndarray:
    """A handwritten digit of the bank, enlarged (and slightly deformed in training): [size, size].

    There are only about 140 training images of a class, so they are rotated, sheared and stretched.
    """
    images = bank.by_class[digit]
    image = Image.fromarray(np.pad(images[rng.integers(len(images))], 1))
    angle, shear, stretch = (
        (rng.uniform(-0.22, 0.22), rng.uniform(-0.15, 0.15), rng.uniform(0.88, 1.12))
        if bank.augment
        else (0.0, 0.0, 1.0)
    )
    scale = 8.6 / size
    cos, sin = math.cos(angle) * scale, math.sin(angle) * scale
    a, b = cos * stretch, (shear * math.cos(angle) - math.sin(angle)) * scale
    d, e = sin * stretch, cos
    half = (size - 1) / 2
    image = image.transform(
        (size, size),
        Image.Transform.AFFINE,
        (a, b, 5 - a * half - b * half, d, e, 5 - d * half - e * half),
        Image.Resampling.BICUBIC,
    )
    return np.clip(np.asarray(image, np.float32) * 1.25, 0, 1)


def sample_scene(rng: np.random.Generator) -> list[Thing]:
    """One to four objects; kinds and colours repeat often enough that counting is not trivial."""
    count = rng.choice([1, 2, 3, 4], p=[0.08, 0.22, 0.3, 0.4])
    things: list[Thing] = []
    for cell in rng.permutation(4)[:count]:
        kind = int(rng.integers(len(SHAPES)))
        if rng.random() < 0.5:
            kind = len(SHAPES) + int(rng.integers(10))
        colour = int(rng.integers(len(COLOURS)))
        if things and rng.random() < 0.3:
            kind = things[rng.integers(len(things))].kind
        if things and rng.random() < 0.3:
            colour = things[rng.integers(len(things))].colour
        things.append(Thing(int(cell), kind, colour))
    return sorted(things, key=lambda thing: thing.cell)


def _background(rng: np.random.Generator) -> np.ndarray:
    """A light, faintly tinted colour with a slight gradient: float32 [96, 96, 3]."""
    base = rng.uniform(222, 250) + rng.uniform(-6, 6, size=3)
    ramp = np.linspace(-1, 1, IMAGE_SIZE) * rng.uniform(-8, 8)
    ramp = ramp[:, None, None] if rng.random() < 0.5 else ramp[None, :, None]
    return np.broadcast_to(base + ramp, (IMAGE_SIZE, IMAGE_SIZE, 3)).astype(np.float32)


def draw_batch(rng: np.random.Generator, scenes: list[list[Thing]], bank: DigitBank) -> Batch:
    """Draw scenes, with the labels that vision pre-training uses."""
    n = len(scenes)
    pixels = np.empty((n, IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    kind = np.full((n, GRID, GRID), -1, np.int64)
    colour = np.full((n, GRID, GRID), -1, np.int64)
    coverage = np.zeros((n, GRID, GRID), np.float32)
    for i, scene in enumerate(scenes):
        canvas = _background(rng)
        for thing in scene:
            size = int(rng.integers(26, 40))
            if thing.is_digit:
                mask = _digit_mask(rng, bank, thing.kind - len(SHAPES), size)
            else:
                mask = _shape_mask(KINDS[thing.kind], size)
            row, col = divmod(thing.cell, 2)
            top, left = rng.integers(1, CELL - size, size=2) + np.array([row, col]) * CELL
            tint = np.array(COLOURS[COLOUR_NAMES[thing.colour]]) + rng.uniform(-14, 14, size=3)
            window = canvas[top : top + size, left : left + size]
            window += mask[..., None] * (tint.astype(np.float32) - window)
            full = np.zeros((CELL, CELL), np.float32)
            y, x = top - row * CELL, left - col * CELL
            full[y : y + size, x : x + size] = mask
            half = GRID // 2
            share = full.reshape(half, PATCH_SIZE, half, PATCH_SIZE).mean((1, 3))
            here = (i, slice(row * half, (row + 1) * half), slice(col * half, (col + 1) * half))
            coverage[here] = share
            kind[here] = np.where(share > 0.06, thing.kind, -1)
            colour[here] = np.where(share > 0.06, thing.colour, -1)
        pixels[i] = np.clip(np.rint(canvas), 0, 255)
    flat = (n, GRID * GRID)
    return Batch(pixels, kind.reshape(flat), colour.reshape(flat), coverage.reshape(flat), list(scenes))


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def _count_questions(scene: list[Thing]) -> list[Question]:
    asked = [
        (f"{name} objects", f"{name} object", sum(t.colour == i for t in scene))
        for i, name in enumerate(COLOUR_NAMES)
    ]
    asked += [(PLURALS[name], name, sum(t.kind == i for t in scene)) for i, name in enumerate(SHAPES)]
    asked.append(("digits", "digit", sum(t.is_digit for t in scene)))
    return [
        Question(
            f"how many {plural} are there?",
            f"there is one {single}" if n == 1 else f"there are {COUNTS[n]} {plural}",
            "count",
        )
        for plural, single, n in asked
    ]


def all_questions(scene: list[Thing]) -> dict[str, list[Question]]:
    """Every question with one clear answer, by type; types that do not apply are empty."""
    kinds = Counter(t.kind for t in scene)
    pairs = Counter((t.kind, t.colour) for t in scene)
    digit_colours = Counter(t.colour for t in scene if t.is_digit)
    found: dict[str, list[Question]] = {name: [] for name in TYPES}
    found["count"] = _count_questions(scene)
    for thing in scene:
        kind, colour, cell = KINDS[thing.kind], COLOUR_NAMES[thing.colour], CELLS[thing.cell]
        if kinds[thing.kind] == 1:
            found["colour"].append(
                Question(f"what colour is the {kind}?", f"the {kind} is {colour}", "colour")
            )
        if pairs[thing.kind, thing.colour] == 1:
            found["where"].append(Question(f"where is the {colour} {kind}?", f"it is in the {cell}", "where"))
        answer = f"there is {_article(colour)} {colour} {kind}"
        found["what"].append(Question(f"what is in the {cell}?", answer, "what"))
        if thing.is_digit:
            answer = f"it is the {kind}"
            found["digit"].append(Question(f"which digit is in the {cell}?", answer, "digit"))
            if digit_colours[thing.colour] == 1:
                found["digit"].append(Question(f"which digit is {colour}?", answer, "digit"))
    for cell in set(range(4)) - {t.cell for t in scene}:
        found["what"].append(Question(f"what is in the {CELLS[cell]}?", "there is nothing", "what"))
    return found


def pick_question(rng: np.random.Generator, questions: list[Question]) -> Question:
    """Pick one question so that priors help little: counts level, empty cells rare."""
    if questions[0].type == "count":
        groups: dict[str, list[Question]] = {}
        for question in questions:
            groups.setdefault(question.answer.split()[2], []).append(question)
        names = sorted(groups)
        # "no" is possible in nearly every picture, so a level choice would make it the best guess
        weights = np.array([0.5 if name == "no" else 1.0 for name in names])
        questions = groups[names[rng.choice(len(names), p=weights / weights.sum())]]
    elif questions[0].type == "what":
        weights = np.array([0.25 if q.answer == "there is nothing" else 1.0 for q in questions])
        return questions[rng.choice(len(questions), p=weights / weights.sum())]
    return questions[rng.integers(len(questions))]


def ask(rng: np.random.Generator, scene: list[Thing], count: int) -> list[Question]:
    """Ask `count` questions of different types (fewer if the scene does not offer as many)."""
    found = {name: questions for name, questions in all_questions(scene).items() if questions}
    types = rng.permutation(sorted(found))[:count]
    return [pick_question(rng, found[name]) for name in types]


def held_out(
    rng: np.random.Generator, bank: DigitBank, pictures: int, per_picture: int = 4
) -> tuple[np.ndarray, list[list[Question]]]:
    """Pictures uint8 [n, 96, 96, 3] that each allow `per_picture` types, and their questions."""
    scenes: list[list[Thing]] = []
    questions: list[list[Question]] = []
    while len(scenes) < pictures:
        scene = sample_scene(rng)
        asked = ask(rng, scene, per_picture)
        if len(asked) == per_picture:
            scenes.append(scene)
            questions.append(asked)
    return draw_batch(rng, scenes, bank).pixels, questions
