"""Time to first token, time per token and answers of LLaVA shapes: dense, the method's parts, and pruning.

python benchmarks/gpu/inference.py                      # every shape and batch, on a GPU
python benchmarks/gpu/inference.py --small              # small twins on a CPU

First, in float32 and few layers, the runner of forward.py is compared with the Hugging Face model under
`apply_skip_vision`, pruning with masked attention, and bfloat16 with float32; twins that are broken on
purpose must be noticed. Then all contenders of a shape and batch take turns, each as CUDA graphs: the first
token (tower, layout, prefill), and 31 decode steps of growing length. Composed of these, and said so: 256
tokens (255 times the step in their middle), and concurrent requests (prefills one by one, decode together).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from common import (
    Bench,
    Ceilings,
    Results,
    arguments,
    begin,
    captured,
    free,
    graph_pool,
    interleave,
    peak_bytes,
    relative_error,
    require,
    share_of_saving,
    spread,
)
from forward import Cache, Runner, cache_lengths
from inference_check import check
from shapes import (
    SHAPES,
    Contender,
    Shape,
    contender_flops,
    contenders,
    layout_of,
    reference,
)

BATCHES = (1, 8, 32)
TOKENS, MANY = 32, 256
# The whole depth, twice in bfloat16: sums of merged tokens come in any order. A wrong graph is off by 1.
LIMIT_REPLAY = 0.2
DENSE, METHOD = "dense", "skip-ffn + skip-kv"
OURS = ("merge only", "skip-ffn", METHOD)
WANTED_SHARE = 0.85


def measure(model: Any, shape: Shape, batch: int, bench: Bench, ceilings: Ceilings) -> dict[str, Any]:
    """All contenders at one batch size."""
    tokens, many = (TOKENS, MANY) if bench.cuda else (3, 8)
    found = contenders(shape)
    room = many
    needed = max(Cache.numbers(shape, batch, cache_lengths(shape, one), room) for one in found.values())
    memory = torch.zeros(needed, dtype=bench.dtype, device=bench.device)
    pool, first, vision, answer, middle = graph_pool(bench), {}, {}, {}, {}
    rows: dict[str, dict[str, Any]] = {}
    for name, contender in found.items():
        runner = Runner(model, shape, contender, batch, room, memory)
        free(bench)
        peak = peak_bytes(bench, runner.first_token)
        wanted = runner.logits.clone()
        first[name] = captured(bench, runner.first_token, pool)
        vision[name] = captured(bench, runner.features, pool)
        first[name]()
        error = relative_error(runner.logits, wanted)
        for step in (*range(0, tokens - 1, 8), many // 2 - 1):  # lengths may differ in their kernels
            runner.decode(step)
        steps = captured(bench, _steps(runner, range(tokens - 1)), pool, warmed=True)
        answer[name] = _in_turn([first[name], steps])
        middle[name] = captured(bench, _steps(runner, [many // 2 - 1]), pool, warmed=True)
        numbers = Cache.numbers(shape, batch, runner.lengths, tokens)
        rows[name] = {
            "tokens_in": runner.length,
            "rows_in_ffn": len(runner.rows) // batch if runner.rows is not None else runner.length,
            "flops": {"vision": shape.vision_flops(), "prefill": contender_flops(shape, contender)},
            "cached": sum(runner.lengths) / len(runner.lengths),
            "replay_error": require(f"{name}: CUDA graph", error, LIMIT_REPLAY),
            "peak_bytes": _whole_peak(model, peak, numbers * memory.element_size()),
            "floor_ms": floors(
                shape, contender, batch, sum(runner.lengths), ceilings, memory.element_size(), tokens
            ),
        }
    times = {
        "ttft_ms": interleave(bench, first),
        "vision_ms": interleave(bench, vision),
        "answer_ms": interleave(bench, answer),
        "middle_step_ms": interleave(bench, middle),
    }
    for name, row in rows.items():
        row |= {what: spread(by_name[name]) for what, by_name in times.items()}
        ttft, whole = row["ttft_ms"]["median"], row["answer_ms"]["median"]
        row["prefill_ms"] = ttft - row["vision_ms"]["median"]
        row["step_ms"] = (whole - ttft) / (tokens - 1)
        row["answer_many_ms"] = ttft + (many - 1) * row["middle_step_ms"]["median"]
    for row in rows.values():
        row["against_dense"] = against_dense(rows[DENSE], row)
    return {"batch": batch, "tokens": tokens, "many": many, "contenders": rows}


def _steps(runner: Runner, steps: Iterable[int]) -> Callable[[], None]:
    def run() -> None:
        for step in steps:
            runner.decode(step)

    return run


def _in_turn(runs: list[Callable[[], Any]]) -> Callable[[], None]:
    def run() -> None:
        for one in runs:
            one()

    return run


def _whole_peak(model: Any, beyond: int | None, cache: int) -> int | None:
    """Weights, K/V, and what a prefill takes beyond them."""
    if beyond is None:
        return None
    return sum(p.numel() * p.element_size() for p in model.parameters()) + cache + beyond


def floors(
    shape: Shape, contender: Contender, batch: int, lengths: int, ceilings: Ceilings, width: int, tokens: int
) -> dict[str, float]:
    """Least times: of each phase its operations, or the weights and K/V that it reads, at the ceilings."""
    dims = shape.vision_dims
    tower = dims.num_layers * dims.hidden_size * (4 * dims.hidden_size + 2 * dims.intermediate_size)
    vision = ceilings.ms(batch * shape.vision_flops(), width * tower)
    prefill = ceilings.ms(batch * contender_flops(shape, contender), width * shape.decoder_weights)
    cached = lengths + shape.layers * tokens / 2
    step = ceilings.ms(
        batch * 2 * shape.decoder_weights + 4 * batch * shape.hidden * cached,
        shape.step_bytes(cached, batch, width),
    )
    ttft = vision + prefill
    return {
        "vision": vision,
        "prefill": prefill,
        "ttft": ttft,
        "step": step,
        "answer": ttft + (tokens - 1) * step,
    }


def against_dense(dense: dict[str, Any], row: dict[str, Any]) -> dict[str, Any]:
    """Time saved, what the floors promise, and the share of it."""
    found = {}
    for what in ("ttft", "answer"):
        a, b = dense[f"{what}_ms"]["median"], row[f"{what}_ms"]["median"]
        c, d = dense["floor_ms"][what], row["floor_ms"][what]
        found[what] = {"saved": 1 - b / a, "promised": 1 - d / c, "share": share_of_saving(a, b, c, d)}
    found["over_floor"] = {
        what: row[f"{what}_ms"]["median"] / row["floor_ms"][what] for what in ("ttft", "answer")
    }
    return found


def hooks(model: Any, shape: Shape, bench: Bench) -> dict[str, Any]:
    """The first token of one prompt by transformers' own forward, dense and under `apply_skip_vision`."""
    runs = {}
    for name in (DENSE, METHOD):
        contender = contenders(shape)[name]
        inputs = shape.inputs(1, model.device, model.dtype, layout_of(shape, contender).total)
        runs[name] = _hugging_face(model, shape, contender, inputs)
    return {name: spread(times) for name, times in interleave(bench, runs).items()}


def _hugging_face(
    model: Any, shape: Shape, contender: Contender, inputs: dict[str, Any]
) -> Callable[[], Any]:
    @torch.no_grad()
    def run() -> Any:
        with reference(model, shape, contender.config):
            return model(**inputs, use_cache=True, logits_to_keep=1).logits.argmax(-1)

    return run


# -- goals ----------------------------------------------------------------------------------------------


def goals(cells: dict[str, Any]) -> list[dict[str, Any]]:
    """What the project wants to reach, where it was measured."""
    found = []

    def goal(what: str, wanted: float, measured: float) -> None:
        found.append({"goal": what, "wanted": wanted, "measured": measured, "reached": measured >= wanted})

    def saved(cell: str, what: str) -> float | None:
        rows = cells.get(cell, {}).get("contenders")
        return None if rows is None else rows[METHOD]["against_dense"][what]["saved"]

    first, answer = saved("llava-hd batch 1", "ttft"), saved("llava-hd batch 32", "answer")
    if first is not None:
        goal("LLaVA-HD, batch 1: time to first token saved", 0.65, first)
    if answer is not None:
        goal("LLaVA-HD, batch 32: time of 32 tokens saved", 0.60, answer)
    for name, cell in cells.items():
        for contender in OURS if "contenders" in cell else ():
            for what, row in cell["contenders"][contender]["against_dense"].items():
                if row.get("share") is not None:
                    goal(
                        f"{name}, {contender}, {what}: share of the analytic saving",
                        WANTED_SHARE,
                        row["share"],
                    )
    return found


def concurrent(cells: dict[str, Any], shape: str) -> list[dict[str, Any]]:
    """Requests that come together: prefills one by one, decode in one batch; composed of measured parts."""
    alone = cells.get(f"{shape} batch 1", {}).get("contenders")
    found = []
    for batch in BATCHES:
        cell = cells.get(f"{shape} batch {batch}", {})
        for name, row in cell.get("contenders", {}).items() if alone else ():
            first = alone[name]["ttft_ms"]["median"]
            steps = (cell["tokens"] - 1) * row["step_ms"]
            found.append(
                {
                    "requests": batch,
                    "contender": name,
                    "mean_ttft_ms": first * (batch + 1) / 2,
                    "answer_ms": batch * first + steps,
                }
            )
    return found


def table(whole: dict[str, Any]) -> list[str]:
    """For people."""
    lines = []
    for name, cell in whole["cells"].items():
        lines.append(
            f"{name}  {'' if 'contenders' in cell else cell.get('error') or cell.get('out_of_memory') or ''}"
        )
        for contender, row in cell.get("contenders", {}).items():
            gain, floor = row["against_dense"], row["floor_ms"]
            share = gain["ttft"]["share"]
            lines.append(
                f"  {contender:<20} ttft {row['ttft_ms']['median']:8.2f} ms (floor {floor['ttft']:7.2f}) "
                f"step {row['step_ms']:7.3f} ({floor['step']:6.3f}) answer {row['answer_ms']['median']:9.2f} "
                f"saved {gain['ttft']['saved']:6.1%} / {gain['answer']['saved']:6.1%} "
                f"share {'' if share is None else f'{share:.2f}'}"
            )
    for goal in whole.get("goals", []):
        met = "reached" if goal["reached"] else "NOT reached"
        lines.append(f"{met}: {goal['goal']}: {goal['measured']:.3f}, wanted {goal['wanted']}")
    return lines


def main() -> int:
    """Command line."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--batches", nargs="+", type=int)
    args = parser.parse_args()
    bench = begin("inference", args)
    results = Results(bench)
    ceilings = results.ceilings()
    for name in args.shapes:
        shape = SHAPES[name].small() if bench.small else SHAPES[name]
        results.cell(f"{name} check", lambda shape=shape: check(shape, bench), needs=20)
        if "limit" not in results.cells.get(f"{name} check", {}):
            continue  # nothing is timed that is not known to be right
        batches = args.batches or ([1] if bench.small else BATCHES)
        built: list[Any] = []

        def model(shape: Shape = shape, built: list[Any] = built) -> Any:
            built.extend([shape.build(bench.device, bench.dtype)] if not built else [])
            return built[0]

        for batch in batches:
            results.cell(
                f"{name} batch {batch}",
                lambda m=model, s=shape, b=batch: measure(m(), s, b, bench, ceilings),
                needs=30,
            )
        results.cell(f"{name} hooks", lambda m=model, s=shape: hooks(m(), s, bench), needs=15)
        built.clear()
        free(bench)
    results.whole["goals"] = [] if bench.small else goals(results.cells)
    results.whole["concurrent"] = {name: concurrent(results.cells, name) for name in args.shapes}
    return results.end(table)


if __name__ == "__main__":
    sys.exit(main())
