"""Plain, slow readings of the method, to which the reference is held: loops and masks, no gathers."""

import torch

# A prompt of the tiny model with one picture, whose 64 placeholders are 3.
IDS = torch.tensor([[1, 5, 6, *[3] * 64, 7, 8, 9, 10]])


def one_prompt():
    """Arguments of the tiny model for that prompt and a random picture."""
    pixels = torch.randn(1, 3, 96, 96, generator=torch.Generator().manual_seed(1))
    return {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "pixel_values": pixels}


def generate(model, inputs, **options):
    options = {"max_new_tokens": 6, "do_sample": False, "min_new_tokens": 6} | options
    return model.generate(**inputs, **options, return_dict_in_generate=True, output_logits=True)


def plain_merge(x, keep):
    """[N, D] -> [keep, D], one similarity at a time (method, section 2)."""
    n = x.shape[0]
    if keep == n:
        return x
    wide = x.double()

    def cosine(a, b):
        length = wide[a].norm() * wide[b].norm()
        return float(wide[a] @ wide[b] / length) if length > 0 else 0.0

    table = [[cosine(a, b) for b in range(n)] for a in range(n)]
    redundancy = [sum(row) - row[i] for i, row in enumerate(table)]
    order = sorted(range(n), key=lambda i: -redundancy[i])
    sources, targets = order[: n - keep], order[n - keep :]
    members = {target: [target] for target in targets}
    for source in sources:
        members[max(targets, key=lambda target: table[source][target])].append(source)
    return torch.stack([wide[members[target]].mean(0) for target in targets]).to(x.dtype)


def plain_summary(x, ada):
    """[N, D] -> [D]."""
    norm, linear = ada
    weights = []
    for row in x:
        centred = row - row.mean()
        unit = centred / (centred.square().mean() + 1e-5).sqrt()
        weights.append(linear.weight[0] @ (unit * norm.weight + norm.bias) + linear.bias[0])
    weights = torch.stack(weights).exp()
    return (weights[:, None] * x).sum(0) / weights.sum()


def plain_layout(features, scores, config, layout, summary):
    """[V, D], [V] -> [total, D]: [retained][q1][skipped][q2], from the counts alone."""
    ranked = sorted(range(len(scores)), key=lambda i: -scores[i])
    retained = sorted(ranked[: layout.retained])
    rest = sorted(ranked[layout.retained :])
    blocks = []
    for picked, size in ((retained, layout.retained), (rest, layout.skipped)):
        if size:
            block = plain_merge(features[picked], size)
            blocks.append(block)
            if layout.summaries:
                blocks.append(plain_summary(block, summary.ada)[None])
    return torch.cat(blocks)


@torch.no_grad()
def plain_logits(model, inputs, tokens, config, layout, summary=None, train=False):
    """Logits of each generated token with no pruned cache and no gathered rows: masks only.

    One prompt with one picture, CLS attention. The whole sequence runs at once; rows that skip have
    their MLP output zeroed, and generated tokens do not see what is no longer cached.
    """
    tower, decoder = model.model.vision_tower, model.model.language_model
    model.set_attn_implementation("eager")
    try:
        out = tower(inputs["pixel_values"], output_hidden_states=True, output_attentions=True)
        features = model.model.multi_modal_projector(out.hidden_states[-2][:, 1:])[0]
        scores = out.attentions[-2][0, :, 0, 1:].sum(0).tolist()
        visual = plain_layout(features, scores, config, layout, summary)
        ids = inputs["input_ids"][0].tolist()
        first = ids.index(3)
        table = model.get_input_embeddings()
        before = table(torch.tensor(ids[:first]))
        after = table(torch.tensor([*ids[first + features.shape[0] :], *tokens[:-1]]))
        embeds = torch.cat([before, visual, after])[None]
        length, prompt = embeds.shape[1], embeds.shape[1] - len(tokens) + 1
        end = first + layout.total
        through = torch.ones(layout.total, dtype=torch.bool)
        cached = torch.ones(layout.total, dtype=torch.bool)
        at = 0
        for role, n in layout.runs:
            through[at : at + n] = role in ("retained", "summary", "ffn_only")
            cached[at : at + n] = role in ("retained", "summary", "kv_only")
            at += n
        seen = torch.ones(length, length).tril().bool()
        if not train:
            seen[prompt:, first:end] &= cached
        if config.strict:
            seen[end:, first:end] &= cached
        mask = torch.zeros(1, 1, length, length).masked_fill(~seen, torch.finfo(torch.float32).min)
        bypass = torch.zeros(length, dtype=torch.bool)
        bypass[first:end] = ~through
        hooks = [
            layer.mlp.register_forward_hook(lambda m, a, o: o.masked_fill(bypass[None, :, None], 0))
            for layer in decoder.layers
        ]
        hidden = decoder(inputs_embeds=embeds, attention_mask=mask).last_hidden_state
        for hook in hooks:
            hook.remove()
        return model.lm_head(hidden)[0, prompt - 1 :]
    finally:
        model.set_attn_implementation("sdpa")
