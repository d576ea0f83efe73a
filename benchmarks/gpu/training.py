"""Training steps of LLaVA shapes: dense against the presets, bfloat16, gradient checkpointing, frozen tower.

python benchmarks/gpu/training.py               # on a GPU
python benchmarks/gpu/training.py --small       # small twins on a CPU

The steps are the project's own (`apply_skip_vision`, `answers_only`, `choose_trainable`), tower included. All
weights of decoder and projector train, with AdamW whose moments are bfloat16 as the weights are; where that
does not fit, LoRA of rank 128. First, in float32 and few layers, loss and gradients are compared with a step
in which every row goes through each FFN and is multiplied by 0 or 1. Variants take turns at equal batch; then
the largest batch of each is searched for.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import torch
from common import (
    Bench,
    Ceilings,
    Results,
    arguments,
    as_found,
    begin,
    elapsed,
    fits,
    free,
    interleave,
    peak_bytes,
    relative_error,
    require,
    require_noticed,
    share_of_saving,
    spread,
)
from shapes import SHAPES, TEXT, TEXT_BEFORE, Shape, reference

from skipvision_export.config import SkipVisionConfig
from skipvision_export.method import attach_summary
from skipvision_export.training.answers import answers_only
from skipvision_export.training.trainable import choose_trainable

ANSWER = 32  # labels of a sample, its last tokens
BATCHES = {"llava-hd": 4, "cos": 8, "llava-1.5-7b": 16, "llava-llama3-8b": 16}
LORA_RANK = 128
MOST_SECONDS = 40
LIMIT = 1e-4  # relative, of loss and gradients in float32
WANTED = {"llava-hd": 0.60, "cos": 0.60}
WANTED_SHARE = 0.85


def variants(shape: Shape) -> dict[str, SkipVisionConfig | None]:
    """Dense, the merge alone, and the preset."""
    merged = replace(shape.preset, name="merge only", skip_ffn=False, skip_kv=False)
    return {"dense": None, "merge only": merged, shape.preset.name: shape.preset}


class Steps:
    """A model with its optimizer, and steps of any variant and batch."""

    def __init__(self, shape: Shape, bench: Bench, dtype: torch.dtype, lora: int) -> None:
        """lora: the rank, 0 trains all."""
        self.shape, self.bench = shape, bench
        self.model = shape.build(bench.device, dtype).train()
        attach_summary(self.model)
        choose_trainable(self.model, shape.family, lora_rank=lora)
        self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-5, weight_decay=0.0, fused=True)

    def batch(self, config: SkipVisionConfig | None, samples: int) -> dict[str, Any]:
        """Samples of one picture and TEXT tokens, the last of them labels."""
        total = self.shape.layout(config or SkipVisionConfig.dense()).total
        inputs = self.shape.inputs(samples, self.model.device, self.model.dtype, total)
        labels = torch.full_like(inputs["input_ids"], -100)
        labels[:, -ANSWER:] = inputs["input_ids"][:, -ANSWER:]
        return inputs | {"labels": labels}

    def loss(self, config: SkipVisionConfig | None, batch: dict[str, Any]) -> torch.Tensor:
        """Forward and backward; gradients are left."""
        with reference(self.model, self.shape, config), answers_only(self.model):
            loss = self.model(**batch, use_cache=False).loss
            loss.backward()
        return loss.detach()  # type: ignore[no-any-return]

    def step(self, config: SkipVisionConfig | None, batch: dict[str, Any]) -> None:
        """A whole step."""
        self.loss(config, batch)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def run(self, config: SkipVisionConfig | None, samples: int) -> Callable[[], None]:
        """A step on a batch of its own."""
        batch = self.batch(config, samples)
        return lambda: self.step(config, batch)

    def fits(self, config: SkipVisionConfig | None, samples: int) -> bool:
        """Is there memory for a step?"""
        found = fits(lambda: self.run(config, samples)())
        self.optimizer.zero_grad(set_to_none=True)
        free(self.bench)
        return found


# -- correctness ----------------------------------------------------------------------------------------


def check(shape: Shape, bench: Bench) -> dict[str, Any]:
    """Loss and gradients of a preset's step against the same step by masks; a leaking mask is noticed."""
    steps = Steps(shape.shallow(), bench, torch.float32, 0)
    preset = shape.preset
    merged = replace(preset, name="merge only", skip_ffn=False, skip_kv=False)
    batch = steps.batch(preset, 2)
    found, loss = _gradients(steps, preset, batch)
    wanted, slow = _masked(steps, merged, batch, leak=0)
    leaking, _ = _masked(steps, merged, batch, leak=4)
    if found.keys() != wanted.keys():
        raise ValueError(f"other weights have gradients: {sorted(found.keys() ^ wanted.keys())[:3]}")
    # A gradient that is zero but for rounding says nothing: a bias under a softmax over the tokens.
    whole = max(float(gradient.norm()) for gradient in wanted.values())
    large = [name for name, gradient in wanted.items() if float(gradient.norm()) > 1e-6 * whole]
    worst = max(relative_error(found[name], wanted[name]) for name in large)
    twin = max(relative_error(leaking[name], wanted[name]) for name in large)
    return {
        "limit": LIMIT,
        "loss": require("loss", relative_error(loss, slow), LIMIT),
        "gradients": require("gradients", worst, LIMIT),
        "weights_compared": f"{len(large)} of {len(wanted)}",
        "twin": require_noticed("four skipped tokens let through", twin, LIMIT),
    }


def _gradients(steps: Steps, config: SkipVisionConfig, batch: dict[str, Any]) -> Any:
    steps.optimizer.zero_grad(set_to_none=True)
    loss = steps.loss(config, batch)
    named = steps.model.named_parameters()
    return {name: p.grad.clone() for name, p in named if p.grad is not None}, loss


def _masked(steps: Steps, config: SkipVisionConfig, batch: dict[str, Any], leak: int) -> Any:
    """Every row goes through the FFNs, whose output is multiplied by 0 where the preset skips."""
    flags = steps.shape.layout(steps.shape.preset).ffn_mask()
    for i in [i for i, through in enumerate(flags) if not through][:leak]:
        flags[i] = True
    row = [True] * TEXT_BEFORE + flags + [True] * (TEXT - TEXT_BEFORE)
    keep = torch.tensor(row, device=steps.model.device).float()[None, :, None]
    layers = steps.shape.family.decoder_layers(steps.model)
    hooks = [layer.mlp.register_forward_hook(lambda m, a, out: out * keep) for layer in layers]
    try:
        return _gradients(steps, config, batch)
    finally:
        for hook in hooks:
            hook.remove()


# -- time -----------------------------------------------------------------------------------------------


def floor_ms(steps: Steps, config: SkipVisionConfig | None, samples: int, lora: int, c: Ceilings) -> float:
    """Forward, recomputed forward and backward at the matrix rate, and the optimizer's pass over memory.

    Backward has as many operations as the forward for gradients of inputs, and for those of weights where
    these train.
    """
    shape = steps.shape
    layout = shape.layout(config or SkipVisionConfig.dense())
    head = 2 * shape.hidden * shape.vocab
    first, *others = (2 * shape.visual_tokens * i * o for i, o in shape.vision_dims.projector)
    decoder = (3 if lora else 4) * (shape.prefill_flops(layout) - head)
    flops = shape.vision_flops() + first + 2 * sum(others) + decoder + 3 * head * ANSWER
    numbers = sum(p.numel() * p.element_size() for p in steps.trained)
    # Weight, gradient and two moments are read; weight and moments are written.
    return c.ms(samples * flops) + c.ms(nbytes=7 * numbers)


def measure(steps: Steps, lora: int, samples: int, bench: Bench, ceilings: Ceilings) -> dict[str, Any]:
    """All variants at one batch size, halved until the dense one fits."""
    configs = variants(steps.shape)
    while samples > 1 and not steps.fits(None, samples):
        samples //= 2
    runs = {name: steps.run(config, samples) for name, config in configs.items()}
    times = interleave(bench, runs)
    rows: dict[str, Any] = {}
    for name, config in configs.items():
        rows[name] = {
            "step_ms": spread(times[name]),
            "floor_ms": floor_ms(steps, config, samples, lora, ceilings),
            "peak_bytes_beyond_weights": peak_bytes(bench, runs[name]),
        }
    dense = rows["dense"]
    for row in rows.values():
        a, b = dense["step_ms"]["median"], row["step_ms"]["median"]
        row["saved"], row["promised"] = 1 - b / a, 1 - row["floor_ms"] / dense["floor_ms"]
        row["share"] = share_of_saving(a, b, dense["floor_ms"], row["floor_ms"])
    return {"batch": samples, "lora_rank": lora, "variants": rows}


def largest(steps: Steps, config: SkipVisionConfig | None, bench: Bench, start: int) -> dict[str, Any]:
    """The largest batch that fits, to within a sixteenth.

    Two steps show what memory a sample takes; from what that promises the search goes up or down. A batch
    whose step would take more than MOST_SECONDS is not tried.
    """
    peaks = [peak_bytes(bench, steps.run(config, n)) or 0 for n in (start, 2 * start)]
    each = max(1.0, (peaks[1] - peaks[0]) / start)
    seconds = elapsed(bench, steps.run(config, 2 * start)) / 2e3 / start
    free(bench)
    room = torch.cuda.mem_get_info()[0] if bench.cuda else peaks[1]
    low, high, most = 2 * start, 0, int(MOST_SECONDS / seconds)
    trial = max(low + 1, int((room - peaks[0]) / each) + start)
    while bench.left() > 2 * MOST_SECONDS and low < trial <= most and (not high or trial < high):
        by = max(1, trial // 16)
        if steps.fits(config, trial):
            low, trial = trial, trial + by
        else:
            high, trial = trial, trial - by
    return {"batch": low, "does_not_fit": high or None, "bytes_of_a_sample": int(each)}


def started(shape: Shape, bench: Bench, lora: int) -> Steps | None:
    """A model that trains, after a first step of one sample; None where that does not fit."""
    found: list[Steps] = []

    def start() -> None:
        found.append(Steps(shape, bench, bench.dtype, lora))
        found[0].run(None, 1)()

    if fits(start):
        return found[0]
    found.clear()
    free(bench)
    return None


def whole_cell(shape: Shape, samples: int, bench: Bench, ceilings: Ceilings, lora: bool) -> dict[str, Any]:
    """A model with all weights training, or with LoRA where that does not fit, and its times."""
    for rank in (LORA_RANK,) if lora else (0, LORA_RANK):
        steps = started(shape, bench, rank)
        if steps is not None:
            return measure(steps, rank, samples, bench, ceilings)
    return {"out_of_memory": "a batch of one, with LoRA"}


def searched(
    shape: Shape, config: SkipVisionConfig | None, step: dict[str, Any], bench: Bench
) -> dict[str, Any]:
    """The largest batch of one variant, in a model of its own."""
    steps = started(shape, bench, step["lora_rank"])
    if steps is None:
        return {"out_of_memory": "a batch of one"}
    return largest(steps, config, bench, max(1, step["batch"] // 2))


def goals(cells: dict[str, Any]) -> list[dict[str, Any]]:
    """Time saved at equal batch, and the share of what is promised."""
    found = []
    for name, cell in cells.items():
        shape = name.removesuffix(" step")
        row = cell.get("variants", {}).get(SHAPES[shape].preset.name) if shape in SHAPES else None
        for what, wanted, measured in (
            ("time of a training step saved", WANTED.get(shape), row and row["saved"]),
            ("share of the analytic saving", WANTED_SHARE, row and row["share"]),
        ):
            if row and wanted:
                found.append(
                    {
                        "goal": f"{shape}, training: {what}",
                        "wanted": wanted,
                        "measured": measured,
                        "reached": measured >= wanted,
                    }
                )
    return found


def table(whole: dict[str, Any]) -> list[str]:
    """For people."""
    lines = []
    for name, cell in whole["cells"].items():
        if "variants" not in cell:
            lines.append(as_found(name, cell))
        for variant, row in cell.get("variants", {}).items():
            lines.append(
                f"{name}, batch {cell['batch']}, {variant:<18} {row['step_ms']['median']:9.1f} ms (floor "
                f"{row['floor_ms']:8.1f}) saved {row['saved']:6.1%} of {row['promised']:6.1%}"
            )
    return lines


def main() -> int:
    """Command line."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--lora", action="store_true", help="do not try to train all weights")
    args = parser.parse_args()
    bench = begin("training", args)
    results = Results(bench)
    ceilings = results.ceilings()
    shapes = {name: SHAPES[name].small() if bench.small else SHAPES[name] for name in args.shapes}
    for name, shape in shapes.items():
        results.cell(f"{name} check", lambda s=shape: check(s, bench), needs=20)
        if "limit" in results.cells.get(f"{name} check", {}):
            samples = 1 if bench.small else BATCHES[name]
            results.cell(
                f"{name} step",
                lambda s=shape, n=samples: whole_cell(s, n, bench, ceilings, args.lora),
                needs=60,
            )
    for name, shape in shapes.items() if bench.cuda else ():
        step = results.cells.get(f"{name} step", {})
        configs = variants(shape)
        for variant in ("dense", shape.preset.name) if "variants" in step else ():
            results.cell(
                f"{name} largest batch, {variant}",
                lambda s=shape, c=configs[variant], r=step: searched(s, c, r, bench),
                needs=3 * MOST_SECONDS,
            )
    results.whole["goals"] = [] if bench.small else goals(results.cells)
    return results.end(table)


if __name__ == "__main__":
    sys.exit(main())
