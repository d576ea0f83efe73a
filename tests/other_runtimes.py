"""Prompts for dense bundles in runtimes of others, and what Hugging Face answers to them."""

import numpy as np
import torch

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
