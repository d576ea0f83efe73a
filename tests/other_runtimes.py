"""Prompts for dense bundles in runtimes of others, and what Hugging Face answers to them."""

import numpy as np
import onnx_ir as ir
import torch
from damage import instead_of_input

from skipvision_export.runtime.rounded import load_in_int4

STEPS, IMAGE, VISUAL = 12, 3, 64


def prompt(pictures):
    """Ids with a run of placeholders for each picture, and pixels [N, 3, 96, 96] or None."""
    rng = np.random.default_rng(pictures)
    words = rng.integers(4, 280, 20)
    parts = [words[:5]]
    for at in range(pictures):
        parts += [np.full(VISUAL, IMAGE), words[5 + 4 * at : 9 + 4 * at]]
    ids = np.concatenate([*parts, words[-6:]])
    return ids, rng.standard_normal((pictures, 3, 96, 96)).astype(np.float32) if pictures else None


def in_pytorch(model, ids, pixels):
    """Logits [STEPS, vocab] and ids."""
    given = {} if pixels is None else {"pixel_values": torch.from_numpy(pixels)}
    out = model.generate(
        input_ids=torch.from_numpy(ids)[None],
        attention_mask=torch.ones((1, len(ids)), dtype=torch.int64),
        **given,
        max_new_tokens=STEPS,
        do_sample=False,
        eos_token_id=None,
        return_dict_in_generate=True,
        output_logits=True,
    )
    return np.array([step[0].numpy() for step in out.logits]), out.sequences[0, len(ids) :].tolist()


def check_int4(traced, ids, pixels, logits):
    """Logits of a bundle with int4 weights, which computes with activations in 8 bits."""
    expected = in_pytorch(load_in_int4(traced.source, "float32"), ids, pixels)[0]
    full = in_pytorch(traced.model, ids, pixels)[0]
    # Far from it are the full weights.
    assert np.abs(logits[0] - expected[0]).max() < 0.2 * np.abs(logits[0] - full[0]).max()


def strided_positions(graph):
    instead_of_input(graph, "position_ids", lambda positions: [ir.node("Add", [positions, positions])])
