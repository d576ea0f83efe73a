"""Train the tiny LLaVA, in two stages, and write checkpoint, log, results and test set.

Stage A trains the vision tower alone on per-patch labels. Stage B freezes it and trains projector
and decoder on cached features. Both can be stopped and go on from the last state in --output.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import transformers
from align_stage import align_projector
from common import Log, draw_pool
from decoder_stage import QuestionBank, train_decoder
from evaluate import evaluate, read_imagefolder, write_imagefolder
from modeling import build_model, build_processor, question_text, save_checkpoint
from scenes import all_questions, held_out, load_digit_banks, sample_scene
from transformers import LlavaForConditionalGeneration, LlavaProcessor
from vision_stage import cache_features, train_vision

# streams of random numbers: pictures of different splits must never share one
TRAIN, VALIDATION, TEST, TEXTS = 1, 2, 3, 4


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="Example: python train.py --output out --seed 0   (about an hour on two cores). "
        "A quick look: python train.py --output out --pictures 2000 --vision-steps 100 "
        "--decoder-steps 50",
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for all that is written")
    parser.add_argument("--seed", type=int, default=0, help="seed of data, weights and order")
    parser.add_argument("--threads", type=int, default=1, help="torch threads; 1 if cores are busy")
    parser.add_argument("--device", default="cpu", help="cpu, or cuda: minutes instead of an hour")
    parser.add_argument(
        "--minutes", type=float, help="stop the decoder's training after so many; the same command goes on"
    )
    parser.add_argument("--pictures", type=int, default=20000, help="training pictures to draw")
    parser.add_argument("--vision-steps", type=int, default=1400, help="steps of 64 pictures")
    parser.add_argument("--vision-rate", type=float, default=1.5e-3, help="peak learning rate")
    parser.add_argument("--decoder-steps", type=int, default=5600, help="steps")
    parser.add_argument("--decoder-batch", type=int, default=24, help="pictures per step")
    parser.add_argument("--decoder-rate", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument(
        "--skip-from",
        type=float,
        default=0.5,
        help="share of the decoder steps after which half of the batches skip visual tokens; "
        "1 trains without skipping",
    )
    parser.add_argument("--align-steps", type=int, default=1000, help="projector steps on patch codes")
    parser.add_argument(
        "--no-test", action="store_true", help="leave the test questions alone (while tuning)"
    )
    parser.add_argument(
        "--only-test", action="store_true", help="train nothing; test the checkpoint in --output"
    )
    return parser.parse_args()


def build(seed: int) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Processor with a tokenizer trained on drawn questions, and the initial model."""
    rng = np.random.default_rng([seed, TEXTS])
    texts = [
        f"USER: {question_text(question.question)} {question.answer}"
        for _ in range(3000)
        for found in all_questions(sample_scene(rng)).values()
        for question in found
    ]
    processor = build_processor(texts)
    torch.manual_seed(seed)
    return build_model(processor.tokenizer), processor


def measure(folder: Path, test: Path, seed: int) -> dict[str, object]:
    """Load the checkpoint afresh and answer the test questions, with right and shuffled images."""
    model = LlavaForConditionalGeneration.from_pretrained(folder)
    processor = LlavaProcessor.from_pretrained(folder)
    pixels, questions = read_imagefolder(test)
    return {
        "questions": sum(len(asked) for asked in questions),
        "exact_match": evaluate(model, processor, pixels, questions),
        "exact_match_shuffled_images": evaluate(model, processor, pixels, questions, shuffle_seed=seed),
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def versions() -> dict[str, str]:
    """Versions that a rerun should compare with."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def test_once(args: argparse.Namespace, log: Log) -> None:
    """Draw the test folder and write results.json; never used for any decision."""
    rng = np.random.default_rng([args.seed, TEST])
    bank = load_digit_banks(args.seed)["test"]
    write_imagefolder(args.output / "test", *held_out(rng, bank, 250))
    results = measure(args.output / "checkpoint", args.output / "test", args.seed)
    rows = [json.loads(line) for line in log.path.read_text(encoding="utf-8").splitlines()]
    # a run that was stopped and resumed starts its clock again, so add up its parts
    ends = [a["seconds"] for a, b in pairwise(rows) if b["stage"] == "start"]
    results |= {
        "seed": args.seed,
        "train_seconds": sum(ends) + rows[-1]["seconds"],
        "versions": versions(),
    }
    path = args.output / "results.json"
    path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    log.write(stage="test", exact_match=results["exact_match"])


def main() -> None:
    """Run both stages, then measure once on the test set."""
    args = parse_args()
    torch.set_num_threads(args.threads)
    output: Path = args.output
    output.mkdir(parents=True, exist_ok=True)
    log = Log(output / "train_log.jsonl")
    options = {name: value for name, value in vars(args).items() if name != "output"}
    if args.only_test:
        test_once(args, log)
        return
    log.write(stage="start", cpus=os.cpu_count(), **options, **versions())

    banks = load_digit_banks(args.seed)
    model, processor = build(args.seed)
    model.to(args.device)
    tower = model.model.vision_tower
    pool = draw_pool(args.seed, TRAIN, args.pictures, banks["train"])
    validation = draw_pool(args.seed, VALIDATION, 300, banks["validation"])
    log.write(stage="drawn", pictures=args.pictures)
    train_vision(
        tower,
        pool,
        validation,
        steps=args.vision_steps,
        batch=64,
        peak=args.vision_rate,
        seed=args.seed,
        state_path=output / "vision.pt",
        log=log,
    )

    features, attention = cache_features(tower, pool.pixels)
    if not (output / "decoder.pt").exists():
        projector = model.model.multi_modal_projector
        align_projector(projector, features, pool, steps=args.align_steps, seed=args.seed, log=log)
    train_bank = QuestionBank(pool.scenes, features, attention, processor)
    features, attention = cache_features(tower, validation.pixels)
    validation_bank = QuestionBank(validation.scenes, features, attention, processor)
    log.write(stage="cached")
    finished = train_decoder(
        model,
        train_bank,
        validation_bank,
        steps=args.decoder_steps,
        batch=args.decoder_batch,
        peak=args.decoder_rate,
        skip_from=args.skip_from,
        seed=args.seed,
        state_path=output / "decoder.pt",
        snapshot=lambda: save_checkpoint(output / "checkpoint", model, processor),
        log=log,
        seconds=None if args.minutes is None else 60 * args.minutes,
    )
    if not finished:
        log.write(stage="stopped", minutes=args.minutes)
        return
    save_checkpoint(output / "checkpoint", model, processor)
    if not args.no_test:
        test_once(args, log)


if __name__ == "__main__":
    main()
