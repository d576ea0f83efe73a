"""Draw a training or validation imagefolder for `skipvision finetune` and `skipvision calibrate`.

Pictures and digits are none of the test's: each split has digits and random numbers of its own.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from evaluate import write_imagefolder
from scenes import all_questions, ask, draw_batch, load_digit_banks, pick_question, sample_scene

# streams of random numbers; train.py uses 1 to 4
STREAMS = {"train": 5, "validation": 6}
# places are the hardest to learn; the validation split asks all types alike, as the test does
WEIGHTS = {"colour": 1.0, "count": 1.5, "where": 2.0, "what": 2.0, "digit": 1.5}


def draw(folder: Path, split: str, pictures: int, per_picture: int, seed: int = 0) -> int:
    """Write DIR with `pictures` and up to `per_picture` questions on each; returns their number."""
    rng = np.random.default_rng([seed, STREAMS[split]])
    scenes = [sample_scene(rng) for _ in range(pictures)]
    questions = []
    for scene in scenes:
        if split == "validation":
            questions.append(ask(rng, scene, per_picture))
            continue
        found = {name: asked for name, asked in all_questions(scene).items() if asked}
        weights = np.array([WEIGHTS[name] for name in found])
        types = rng.choice(list(found), size=per_picture, p=weights / weights.sum())
        questions.append([pick_question(rng, found[name]) for name in types])
    pixels = draw_batch(rng, scenes, load_digit_banks(0)[split]).pixels
    write_imagefolder(folder, pixels, questions)
    return sum(map(len, questions))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="Example: python make_data.py --output data --split train --pictures 8000",
    )
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--split", choices=sorted(STREAMS), default="train")
    parser.add_argument("--pictures", type=int, default=8000)
    parser.add_argument("--per-picture", type=int, default=4, help="questions on each picture")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    count = draw(args.output, args.split, args.pictures, args.per_picture, args.seed)
    print(f"wrote {count} questions on {args.pictures} pictures to {args.output}")


if __name__ == "__main__":
    main()
