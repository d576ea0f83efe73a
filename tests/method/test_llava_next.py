"""LLaVA-NeXT: the thumbnail is retained, all tiles' tokens are merged."""

import pytest
import torch
from PIL import Image
from plain import plain_merge, plain_summary
from tiny import tiny_model, tiny_next_config, tiny_next_processor

from skipvision_export import SkipVisionConfig, apply_skip_vision
from skipvision_export.errors import ConfigError, InputError
from skipvision_export.method import SummaryTokens

CONFIG = SkipVisionConfig.counts(64, 40, summaries=True, selector="thumbnail", tiled=True)
LAYOUT = CONFIG.layout(64, tiled=True)


@pytest.fixture(scope="module")
def model():
    return tiny_model(tiny_next_config())


@pytest.fixture(scope="module")
def processor():
    return tiny_next_processor()


def picture(width, height, seed=0):
    values = torch.randint(0, 256, (6, 6, 3), generator=torch.Generator().manual_seed(seed))
    return Image.fromarray(values.numpy().astype("uint8")).resize((width, height))


def prompt(processor, *pictures, text="<image>\nWhat?"):
    return processor(images=list(pictures), text=[text], return_tensors="pt")


def generate(model, inputs):
    return model.generate(
        **inputs,
        max_new_tokens=5,
        min_new_tokens=5,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )


@torch.no_grad()
def plain_features(model, crops, summary):
    """[1+T, 3, h, w] -> [total, D]."""
    hidden = model.model.vision_tower(crops, output_hidden_states=True).hidden_states[-2][:, 1:]
    features = model.model.multi_modal_projector(hidden)
    merged = plain_merge(features[1:].flatten(0, 1), 40)
    q1, q2 = (plain_summary(block, summary.ada)[None] for block in (features[0], merged))
    return torch.cat([features[0], q1, merged, q2])


@pytest.mark.parametrize("size", [(200, 90), (90, 220), (180, 180), (300, 90)])
def test_tiles_are_merged(model, processor, size):
    summary = SummaryTokens(64)
    torch.nn.init.normal_(summary.ada[1].weight)
    inputs = prompt(processor, picture(*size))
    seen = []
    hook = model.model.language_model.register_forward_pre_hook(
        lambda m, a, k: seen.append(k["inputs_embeds"]), with_kwargs=True
    )
    with apply_skip_vision(model, CONFIG, summary=summary):
        out = generate(model, inputs)
    hook.remove()
    first = inputs["input_ids"][0].tolist().index(3)
    visual = seen[0][0, first : first + LAYOUT.total]
    expected = plain_features(model, inputs["pixel_values"][0], summary)
    torch.testing.assert_close(visual, expected, rtol=1e-4, atol=1e-4)
    text = int((inputs["input_ids"] != 3).sum())
    assert seen[0].shape[1] == text + LAYOUT.total
    assert out.past_key_values.get_seq_length() == text + 64 + 2 + 4
    assert torch.equal(out.sequences[:, : inputs["input_ids"].shape[1]], inputs["input_ids"])


def test_pictures_of_different_sizes_in_a_batch(model, processor):
    pictures = [picture(200, 90), picture(180, 180, seed=1)]
    together = processor(
        images=pictures,
        text=["<image>\nWhat?", "<image>\nWhat is it?"],
        return_tensors="pt",
        padding=True,
        padding_side="left",
    )
    with apply_skip_vision(model, CONFIG):
        both = generate(model, together)
        for i, (one, text) in enumerate(
            zip(pictures, ["<image>\nWhat?", "<image>\nWhat is it?"], strict=True)
        ):
            alone = generate(model, prompt(processor, one, text=text))
            gaps = [(a[i] - b[0]).abs().max() for a, b in zip(both.logits, alone.logits, strict=True)]
            assert max(gaps) < 1e-4


def test_the_paper_preset_fits_a_model_of_its_size():
    model = tiny_model(tiny_next_config(336, 14))
    processor = tiny_next_processor(336, 14)
    inputs = prompt(processor, picture(640, 300))
    with apply_skip_vision(model, SkipVisionConfig.preset("llava-hd-576-576")) as state:
        out = generate(model, inputs)
    text = int((inputs["input_ids"] != 3).sum())
    assert state.prompt_length == text + 576 + 1 + 576 + 1
    assert out.past_key_values.get_seq_length() == text + 576 + 2 + 4


def test_refusals(model, processor):
    for config, message in (
        (SkipVisionConfig.preset("skip-75"), "thumbnail and tiles"),
        (SkipVisionConfig.counts(32, 40, selector="thumbnail", tiled=True), "retains the thumbnail"),
    ):
        with pytest.raises(ConfigError, match=message), apply_skip_vision(model, config):
            pass
    inputs = prompt(processor, picture(200, 90), picture(90, 200), text="<image><image>\nWhat?")
    with apply_skip_vision(model, CONFIG), pytest.raises(InputError, match="1 pictures"):
        generate(model, inputs)
