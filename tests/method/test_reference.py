"""The reference patch: against a plain, slow reading of the method, and its manners."""

import pytest
import torch
from plain import IDS, generate, one_prompt, plain_logits
from tiny import tiny_model
from transformers import DynamicCache

from skipvision_export import SkipVisionConfig, apply_skip_vision
from skipvision_export.errors import ConfigError, ModelError
from skipvision_export.method import layout_order, select_by_cls_attention

CONFIG = SkipVisionConfig.preset("skip-75")


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def inputs():
    return one_prompt()


def gap(a, b):
    return max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True))


def test_equals_a_plain_reading_of_the_method(model, inputs):
    with apply_skip_vision(model, CONFIG) as state:
        out = generate(model, inputs)
    assert state.keep_index.shape == (1, IDS.shape[1] - 48)
    assert out.past_key_values.get_seq_length() == IDS.shape[1] - 48 + 5
    tokens = out.sequences[0, IDS.shape[1] :].tolist()
    expected = plain_logits(model, inputs, tokens, CONFIG, CONFIG.layout(64))
    assert gap([step[0] for step in out.logits], expected) < 1e-4
    # and the method does change something: dense is far from it
    assert gap([step[0] for step in generate(model, inputs).logits], expected) > 1e-2


def test_leaves_the_model_untouched(model, inputs):
    before = generate(model, inputs)
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    with apply_skip_vision(model, CONFIG):
        generate(model, inputs)
    with pytest.raises(RuntimeError), apply_skip_vision(model, CONFIG):
        raise RuntimeError
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    assert gap(before.logits, generate(model, inputs).logits) == 0


def test_dense_configuration_changes_nothing(model, inputs):
    before = generate(model, inputs)
    with apply_skip_vision(model, SkipVisionConfig.dense()):
        after = generate(model, inputs)
    assert gap(before.logits, after.logits) < 1e-5


def test_sampling_follows_its_seed(model, inputs):
    with apply_skip_vision(model, CONFIG):
        runs = []
        for seed in (0, 0, 1):
            torch.manual_seed(seed)
            runs.append(generate(model, inputs, do_sample=True, temperature=1.5, max_new_tokens=12))
    assert runs[0].sequences.tolist() == runs[1].sequences.tolist()
    assert runs[0].sequences.tolist() != runs[2].sequences.tolist()


def test_beams(model, inputs):
    with apply_skip_vision(model, CONFIG):
        one, three = (generate(model, inputs, num_beams=n).sequences for n in (1, 3))
    assert three.shape == one.shape


@torch.no_grad()
def test_step_by_step_without_positions(model, inputs):
    with apply_skip_vision(model, CONFIG):
        expected = generate(model, inputs)
        out = model(**inputs, use_cache=True)
        logits = [out.logits[:, -1]]
        for _ in range(5):
            token = logits[-1].argmax(-1, keepdim=True)
            out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
            logits.append(out.logits[:, -1])
    assert gap(logits, expected.logits) < 1e-5


@torch.no_grad()
def test_positions_restarted_would_show(model, inputs):
    with apply_skip_vision(model, CONFIG):
        out = model(**inputs, use_cache=True)
        cache = out.past_key_values
        token = out.logits[:, -1:].argmax(-1)
        steps = []
        for position in (IDS.shape[1], cache.get_seq_length()):
            copy = DynamicCache()
            for i, layer in enumerate(cache.layers):
                copy.update(layer.keys.clone(), layer.values.clone(), i)
            steps.append(
                model(input_ids=token, past_key_values=copy, position_ids=torch.tensor([[position]])).logits
            )
    assert (steps[0] - steps[1]).abs().max() > 1e-2


def test_a_batch_with_padding_equals_its_rows(model, inputs):
    longer = torch.tensor([[1, 5, 6, 11, 12, 13, *[3] * 64, 7, 8, 9, 10]])
    pixels = torch.randn(1, 3, 96, 96, generator=torch.Generator().manual_seed(2))
    rows = [
        (IDS, inputs["pixel_values"]),
        (longer, pixels),
    ]
    batch = {
        "input_ids": torch.cat([torch.nn.functional.pad(IDS, (3, 0)), longer]),
        "attention_mask": torch.cat([torch.nn.functional.pad(torch.ones_like(IDS), (3, 0)), longer * 0 + 1]),
        "pixel_values": torch.cat([inputs["pixel_values"], pixels]),
    }
    with apply_skip_vision(model, CONFIG):
        together = generate(model, batch)
        for i, (ids, picture) in enumerate(rows):
            alone = generate(
                model,
                {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": picture},
            )
            assert gap([s[i] for s in together.logits], [s[0] for s in alone.logits]) < 1e-4


def test_a_row_without_a_picture_keeps_everything(model, inputs):
    text = torch.full((1, 20), 9)
    batch = {
        "input_ids": torch.cat([IDS, torch.nn.functional.pad(text, (IDS.shape[1] - 20, 0))]),
        "attention_mask": torch.cat(
            [torch.ones_like(IDS), torch.nn.functional.pad(torch.ones_like(text), (IDS.shape[1] - 20, 0))]
        ),
        "pixel_values": inputs["pixel_values"],
    }
    text_alone = generate(model, {"input_ids": text, "attention_mask": torch.ones_like(text)})
    with apply_skip_vision(model, CONFIG):
        together = generate(model, batch)
        alone = generate(model, inputs)
    assert gap([s[0] for s in together.logits], [s[0] for s in alone.logits]) < 1e-4
    assert gap([s[1] for s in together.logits], [s[0] for s in text_alone.logits]) < 1e-4


def test_two_pictures_in_a_prompt(model, inputs):
    ids = torch.tensor([[1, 5, *[3] * 64, 6, 7, *[3] * 64, 8]])
    pixels = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(3))
    with apply_skip_vision(model, CONFIG) as state:
        generate(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels})
    kept = state.keep_index[0].tolist()
    assert kept == [*range(2 + 16), 66, 67, *range(68, 68 + 16), 132]


def test_selection_keeps_raster_order():
    scores = torch.tensor([[0.1, 0.9, 0.2, 0.8, 0.3]])
    assert layout_order(scores, [2]).tolist() == [[1, 3, 0, 2, 4]]
    attention = torch.zeros(1, 2, 6, 6)
    attention[0, :, 0, 1:] = scores / 2
    features = torch.arange(6.0).reshape(1, 6, 1)
    retained, rest, index = select_by_cls_attention(attention, features, 2)
    assert index.tolist() == [[1, 3]]
    assert retained.flatten().tolist() == [2, 4]
    assert rest.flatten().tolist() == [1, 3, 5]


def test_refusals(model, inputs):
    with (
        pytest.raises(ConfigError, match="576"),
        apply_skip_vision(model, SkipVisionConfig.preset("llava-256-320")),
    ):
        pass
    with pytest.raises(ModelError, match="supported"), apply_skip_vision(torch.nn.Linear(1, 1), CONFIG):
        pass
