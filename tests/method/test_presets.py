"""The reference under every kind of configuration, against a plain reading of the method."""

from dataclasses import replace

import pytest
import torch
from plain import IDS, generate, one_prompt, plain_logits
from tiny import tiny_model

from skipvision_export import SkipVisionConfig, apply_skip_vision
from skipvision_export.config import PRESETS
from skipvision_export.errors import ConfigError, InputError
from skipvision_export.method import SummaryTokens, attach_summary

MERGED = SkipVisionConfig.counts(12, 20, summaries=True)
CONFIGS = [
    MERGED,
    SkipVisionConfig.counts(12, 20),
    SkipVisionConfig.counts(24, 40, summaries=True),
    SkipVisionConfig.counts(0, 64),
    SkipVisionConfig.counts(0, 10, summaries=True),
    replace(MERGED, pass_through="last"),
    replace(MERGED, pass_through="first_last"),
    replace(MERGED, strict=True),
    replace(MERGED, skip_ffn=False),
    replace(MERGED, skip_kv=False),
    SkipVisionConfig.preset("quarter"),
]


def label(config):
    return "-".join(str(v) for v in config.to_json().values() if v not in (None, False, 0))


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def summary():
    torch.manual_seed(5)
    module = SummaryTokens(64)
    torch.nn.init.normal_(module.ada[0].weight)
    torch.nn.init.normal_(module.ada[1].weight)
    return module


@pytest.fixture
def inputs():
    return one_prompt()


def distance(out, expected):
    return max(float((s[0] - e).detach().abs().max()) for s, e in zip(out.logits, expected, strict=True))


@pytest.mark.parametrize("config", CONFIGS, ids=label)
def test_equals_a_plain_reading(model, summary, inputs, config):
    layout = config.layout(64)
    with apply_skip_vision(model, config, summary=summary) as state:
        out = generate(model, inputs)
    # sequences begin with the given prompt, whatever the layout's length
    assert torch.equal(out.sequences[:, : IDS.shape[1]], IDS)
    tokens = out.sequences[0, IDS.shape[1] :].tolist()
    assert state.prompt_length == IDS.shape[1] - 64 + layout.total
    assert out.past_key_values.get_seq_length() == IDS.shape[1] - 64 + layout.kept_kv + 5
    expected = plain_logits(model, inputs, tokens, config, layout, summary)
    assert distance(out, expected) < 1e-4
    # a twin that differs in one point is far away
    twin = SummaryTokens(64) if layout.summaries else None
    other = replace(config, strict=not config.strict and config.skip_kv, skip_ffn=not config.skip_ffn)
    broken = plain_logits(model, inputs, tokens, other, other.layout(64), twin or summary)
    assert distance(out, broken) > 1e-2


def test_every_paper_preset_has_its_layout():
    assert PRESETS["llava-100-156"].layout(576).runs == (
        ("retained", 100),
        ("summary", 1),
        ("skipped", 156),
        ("summary", 1),
    )
    hd = PRESETS["llava-hd-576-576"].layout(576, tiled=True)
    assert (hd.retained, hd.skipped, hd.total) == (576, 576, 1154)
    last = PRESETS["llava-64-156-pass-first-last"].layout(576)
    assert last.runs[2:5] == (("ffn_only", 1), ("skipped", 154), ("ffn_only", 1))
    assert sum(last.ffn_mask()) == 64 + 2 + 2
    assert last.kept_kv == 66


def test_policies_skip_by_layer(model, inputs):
    config = SkipVisionConfig(layer_shares=(0.0, 0.5, 1.0), selector="uniform", order="raster")
    counted = {}
    layers = model.model.language_model.layers
    hooks = [
        layer.mlp.register_forward_pre_hook(lambda m, a, i=i: counted.update({i: a[0].shape[1]}))
        for i, layer in enumerate(layers)
    ]
    with apply_skip_vision(model, config) as state:
        model(**inputs)
    for hook in hooks:
        hook.remove()
    text = IDS.shape[1] - 64
    assert counted == {0: text + 64, 1: text + 32, 2: text}
    assert not state.skipped.any()
    with (
        pytest.raises(ConfigError, match="2 layers"),
        apply_skip_vision(model, SkipVisionConfig(layer_shares=(0, 1))),
    ):
        pass


def test_a_batch_of_different_pictures_and_lengths(model, inputs):
    """Placeholders are replaced row by row; padding moves with them."""
    ids = [
        IDS[0].tolist(),
        [1, *[3] * 128, 11, 12, *[3] * 64, 7],
        [1, 9, 8, 7],
    ]
    length = max(map(len, ids))
    pixels = torch.randn(4, 3, 96, 96, generator=torch.Generator().manual_seed(2))
    padded = torch.tensor([[0] * (length - len(row)) + row for row in ids])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in ids])
    batch = {"input_ids": padded, "attention_mask": mask, "pixel_values": pixels}
    with apply_skip_vision(model, MERGED):
        together = generate(model, batch)
        for i, (row, used) in enumerate(zip(ids, (slice(0, 1), slice(1, 4), slice(0)), strict=True)):
            one = {
                "input_ids": torch.tensor([row]),
                "attention_mask": torch.ones(1, len(row), dtype=torch.long),
            }
            if pixels[used].shape[0]:
                one["pixel_values"] = pixels[used]
            alone = generate(model, one)
            gaps = [(a[i] - b[0]).abs().max() for a, b in zip(together.logits, alone.logits, strict=True)]
            assert max(gaps) < 1e-4


def test_labels_of_visual_tokens_are_ignored(model, inputs):
    labels = IDS.clone()
    wrong = labels.masked_fill(IDS == 3, 77)
    with apply_skip_vision(model, MERGED):
        losses = [model(**inputs, labels=each).loss for each in (labels, wrong)]
        text_only = model(**inputs, labels=labels.masked_fill(IDS == 3, -100)).loss
        other = model(**inputs, labels=labels.masked_fill(IDS != 3, 77)).loss
    assert losses[0] == losses[1] == text_only
    assert other != text_only


def test_gradients_reach_projector_and_summary(inputs):
    model = tiny_model()
    summary = attach_summary(model)
    labels = IDS.masked_fill(IDS == 3, -100)
    with apply_skip_vision(model, MERGED):
        model(**inputs, labels=labels).loss.backward()
    assert summary.ada[1].weight.grad.abs().max() > 0
    assert model.model.multi_modal_projector.linear_1.weight.grad.abs().max() > 0
    assert "skip_vision_summary.ada.1.weight" in dict(model.named_parameters())


def test_answers_can_be_trained_as_decode_sees_them(model, summary, inputs):
    """One pass with train_skip_kv gives the logits of prefill and decode with the cache pruned."""
    with apply_skip_vision(model, MERGED, summary=summary):
        out = generate(model, inputs)
    tokens = out.sequences[0, IDS.shape[1] :]
    ids = torch.cat([IDS, tokens[None, :-1]], 1)
    labels = ids.clone()
    labels[:, : IDS.shape[1]] = -100
    batch = inputs | {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
    first = IDS.shape[1] - 64 + MERGED.layout(64).total - 1
    seen = []
    for train_skip_kv in (True, False):
        with apply_skip_vision(model, MERGED, summary=summary, train_skip_kv=train_skip_kv):
            seen.append(distance(out, model(**batch).logits[0, first:]))
    assert seen[0] < 1e-4
    assert seen[1] > 1e-2


def test_placeholders_that_do_not_fit(model, inputs):
    with apply_skip_vision(model, MERGED):
        with pytest.raises(InputError, match="multiple of the model's 64"):
            model(**inputs | {"input_ids": IDS[:, :40], "attention_mask": None})
        with pytest.raises(InputError, match="2 pictures"):
            model(**inputs | {"pixel_values": inputs["pixel_values"].repeat(2, 1, 1, 1)})
        with pytest.raises(ConfigError, match="patched already"), apply_skip_vision(model, MERGED):
            pass
    assert "generate" not in vars(model)
