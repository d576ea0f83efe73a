"""Is forward.py right? Against Hugging Face under `apply_skip_vision`, and against masked attention."""

from __future__ import annotations

from typing import Any

import torch
from common import Bench, relative_error, require, require_noticed
from forward import Runner
from shapes import PRUNE_AT, TEXT_BEFORE, Contender, Shape, contenders, reference

LIMIT = 1e-4  # float32, relative
LIMIT_BF16 = 3e-2  # three layers in bfloat16 against float32, relative


def check(shape: Shape, bench: Bench) -> dict[str, Any]:
    """Errors by contender; raises CheckError over a limit."""
    shape = shape.shallow()
    model = shape.build(bench.device, torch.float32)
    found: dict[str, Any] = {"limit": LIMIT, "limit_bfloat16": LIMIT_BF16}
    for name, contender in contenders(shape).items():
        compare = _against_masks if contender.prune else _against_reference
        found[name] = compare(model, shape, contender)
    half = shape.build(bench.device, torch.bfloat16)  # not model.to(): angles stay float32
    half.load_state_dict(model.state_dict())
    wide = {name: found[name].pop("run") for name in found if isinstance(found[name], dict)}
    for name, (features, logits) in wide.items():
        runner = Runner(half, shape, contenders(shape)[name], 2, 4)
        if runner.contender.prune:
            continue  # bfloat16 chooses other tokens where scores are nearly equal
        error = relative_error(runner.prefill(features), logits)
        found[name]["bfloat16"] = require(f"{name} in bfloat16", error, LIMIT_BF16)
    return found


def _against_reference(model: Any, shape: Shape, contender: Contender) -> dict[str, Any]:
    """Prefill, cache and two decode steps against the (patched) Hugging Face model."""
    runner = Runner(model, shape, contender, 2, 4)
    features = runner.features()
    logits = [runner.prefill(features).clone()]
    tokens = []
    for step in range(2):
        tokens.append(runner.token.clone())
        logits.append(runner.decode(step).clone())
    inputs = shape.inputs(2, model.device, torch.float32, runner.layout.total)
    mask, wanted = inputs["attention_mask"], []
    with reference(model, shape, contender.config), torch.no_grad():
        out = model(**inputs, use_cache=True, logits_to_keep=1)
        wanted.append(out.logits[:, -1])
        for token in tokens:
            mask = torch.cat([mask, mask.new_ones(2, 1)], 1)
            cache = out.past_key_values
            out = model(input_ids=token, attention_mask=mask, past_key_values=cache, use_cache=True)
            wanted.append(out.logits[:, -1])
    name = contender.name
    errors = [require(name, relative_error(a, b), LIMIT) for a, b in zip(logits, wanted, strict=True)]
    keys = out.past_key_values.layers[-1].keys
    kept = runner.cache.keys[-1][:, :, : keys.shape[2]]
    found = {
        "prefill": errors[0],
        "decode": max(errors[1:]),
        "keys": require(f"{name}: cached keys", relative_error(kept, keys), LIMIT),
        "run": (features, wanted[0]),
    }
    if runner.rows is not None:
        through = torch.zeros(2 * runner.length, dtype=torch.bool, device=features.device)
        through[runner.rows] = True
        runner.rows[TEXT_BEFORE] = (~through).nonzero()[0, 0]  # a skipped row in place of a retained one
        error = relative_error(runner.prefill(features), wanted[0])
        found["twin"] = require_noticed(f"{name} with one wrong row", error, LIMIT)
    return found


def _against_masks(model: Any, shape: Shape, contender: Contender) -> dict[str, Any]:
    """Pruned tokens leave the sequence; hidden as keys from layer PRUNE_AT on, they change as little."""
    runner = Runner(model, shape, contender, 2, 4)
    features = runner.features()
    logits = runner.prefill(features).clone()
    wanted = _masked(runner, features, runner.index)
    shifted = (runner.index + 1).clamp(max=runner.length - 1)
    return {
        "prefill": require(contender.name, relative_error(logits, wanted), LIMIT),
        "twin": require_noticed(
            f"{contender.name} with other tokens",
            relative_error(_masked(runner, features, shifted), wanted),
            LIMIT,
        ),
        "run": (features, wanted),
    }


@torch.no_grad()
def _masked(runner: Runner, features: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Logits [B, vocab] where layers from PRUNE_AT on see the positions `index` [B, K] only."""
    h = runner.decoder.embed_tokens(runner.ids)
    h[:, runner.place] = features
    size = runner.length
    causal = torch.ones(size, size, dtype=torch.bool, device=h.device).tril()
    seen = torch.zeros(runner.batch, size, dtype=torch.bool, device=h.device).scatter_(1, index, True)
    few = causal & (seen[:, None] | torch.eye(size, dtype=torch.bool, device=h.device))
    for i, layer in enumerate(runner.decoder.layers):
        mask = (few if i >= PRUNE_AT else causal.expand_as(few))[:, None]
        h = layer(
            h,
            attention_mask=torch.zeros(mask.shape, device=h.device).masked_fill(
                ~mask, torch.finfo(h.dtype).min
            ),
            position_embeddings=(runner.cos[:, :size], runner.sin[:, :size]),
        )
        h = h[0] if isinstance(h, tuple) else h
    logits: torch.Tensor = runner.head(runner.decoder.norm(h[:, -1]))
    return logits
