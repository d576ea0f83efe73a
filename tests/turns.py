"""Turns of a conversation on a bundle's cache, as its tests ask them."""

import numpy as np

from skipvision_export.runtime.conversation import CachedPrompt


def ort_turns(bundle, parts, steps, **options):
    """Logits [turns * steps, vocab] of turns on one cache, and its length.

    parts: ids and pictures of each turn, whose ids begin with the last generated token of the one before;
    options: of the generator.
    """
    prompt, found, ids = CachedPrompt(bundle.generator), [], np.zeros(0, np.int64)
    for own, pictures in parts:
        ids = np.concatenate([ids, own])
        known = prompt.shared(ids)
        assert known == len(prompt.ids)
        done = prompt.extend(ids, pictures, known, max_new_tokens=steps, keep_logits=True, **options)
        ids = np.concatenate([ids, done.token_ids])
        found += done.logits
    return np.array(found), prompt._cache.length
