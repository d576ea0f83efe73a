"""One training step: what is computed, and that its gradients are the method's."""

import pytest
import torch
from tiny import tiny_model, tiny_processor

from skipvision_export import SkipVisionConfig, apply_skip_vision
from skipvision_export.method import attach_summary
from skipvision_export.models import family_of
from skipvision_export.training.answers import answers_only
from skipvision_export.training.collate import IGNORED, Collator
from skipvision_export.training.trainable import choose_trainable, merge_lora, trainable_state

CONFIG = SkipVisionConfig.preset("skip-75")
QUARTER = SkipVisionConfig.preset("quarter").layout(64).total
FAMILY = family_of(["LlavaForConditionalGeneration"], "")


def new_model(config=CONFIG, **options):
    model = tiny_model()
    if config.summaries:
        attach_summary(model)
    choose_trainable(model, FAMILY, **options)
    return model.train()


@pytest.fixture(scope="module")
def encoded(planned):
    return planned("skip-75").data.samples


def batch_of(samples, per_image=64):
    return Collator(tiny_processor(), 3, 0, per_image)(samples)


def step(model, batch, config=CONFIG, answers=True, **options):
    """Loss and gradients by name; options: of the model's call."""
    model.zero_grad()
    with apply_skip_vision(model, config):
        if answers:
            with answers_only(model):
                loss = model(**batch, use_cache=False, **options).loss
                loss.backward()
        else:
            loss = model(**batch, use_cache=False, **options).loss
            loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def gap(a, b):
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max() / b[name].abs().max().clamp(min=1e-6)) for name in b)


def test_skipped_rows_are_not_computed(encoded):
    model, batch = new_model(), batch_of(encoded[:3])
    rows: dict[str, list[int]] = {"forward": [], "backward": []}
    for layer in model.model.language_model.layers:
        for linear in (layer.mlp.gate_proj, layer.mlp.down_proj):
            linear.register_forward_hook(lambda m, a, out: rows["forward"].append(out[..., 0].numel()))
            linear.register_full_backward_hook(
                lambda m, i, grads: rows["backward"].append(grads[0][..., 0].numel())
            )
    step(model, batch)
    expected = batch["input_ids"].numel() - 3 * 48
    assert rows["forward"] == rows["backward"] == [expected] * 6
    rows["forward"].clear()
    step(model, batch, SkipVisionConfig.dense())
    assert rows["forward"] == [batch["input_ids"].numel()] * 6


def slow_step(model, batch, leak=False):
    """The same by masks: every row goes through the MLP, whose output is multiplied by 0 or 1.

    leak: broken on purpose, one skipped token of each picture passes.
    """
    keep = (batch["input_ids"] != 3).float()
    keep[(batch["input_ids"] == 3) & ((batch["input_ids"] == 3).cumsum(1) <= 16 + leak)] = 1
    hooks = [
        layer.mlp.register_forward_hook(lambda m, a, out: out * keep[..., None])
        for layer in model.model.language_model.layers
    ]
    model.zero_grad()
    # Only the choice of tokens is the patch's: with skip_ffn=False nothing passes by.
    only_order = SkipVisionConfig(skip_share=0.75, skip_ffn=False)
    with apply_skip_vision(model, only_order):
        loss = model(**batch, use_cache=False).loss
        loss.backward()
    for hook in hooks:
        hook.remove()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_gradients_equal_a_slow_reading(encoded):
    model, batch = new_model(), batch_of(encoded[:3])
    loss, grads = step(model, batch)
    slow_loss, slow = slow_step(model, batch)
    assert abs(loss - slow_loss) < 1e-5
    assert gap(grads, slow) < 1e-4
    leaked_loss, leaked = slow_step(model, batch, leak=True)
    assert abs(loss - leaked_loss) > 1e-4
    assert gap(grads, leaked) > 1e-2


def test_what_trains(encoded):
    _, grads = step(new_model(), batch_of(encoded[:2]))
    assert not any("vision_tower" in name for name in grads)
    assert any("multi_modal_projector" in name for name in grads)
    assert any("lm_head" in name for name in grads) and any("layers.2.mlp" in name for name in grads)
    _, grads = step(new_model(train_vision=True), batch_of(encoded[:2]))
    trained = {name.split("layers.")[1][0] for name in grads if "vision_tower" in name and "layers." in name}
    assert trained == {"0", "1"}  # the third layer is behind the features


def test_answers_only_changes_nothing(encoded):
    model, batch = new_model(), batch_of(encoded[:4])
    loss, grads = step(model, batch)
    whole_loss, whole = step(model, batch, answers=False)
    assert abs(loss - whole_loss) < 1e-5
    assert gap(grads, whole) < 1e-4
    seen = []
    model.lm_head.register_forward_pre_hook(lambda m, args: seen.append(args[0].shape[:2]))
    with apply_skip_vision(model, CONFIG), answers_only(model):
        seen.clear()
        handle = model.lm_head.register_forward_pre_hook(lambda m, args: seen.append(args[0].shape[:2]))
        model(**batch)
        handle.remove()
    assert tuple(seen[-1]) == (1, int((batch["labels"] != IGNORED).sum()))


def test_labels(encoded):
    batch = batch_of(encoded[:4])
    visual = batch["input_ids"] == 3
    assert (batch["labels"][visual] == IGNORED).all()
    assert (batch["labels"][batch["attention_mask"] == 0] == IGNORED).all()
    for row, sample in zip(batch["labels"], encoded[:4], strict=True):
        assert row[row != IGNORED].tolist() == sample.ids[sample.answer_from :]
    # and labels of visual tokens that are there all the same count for nothing
    model = new_model()
    marked = batch | {"labels": batch["labels"].masked_fill(visual, 7)}
    assert step(model, batch)[0] == step(model, marked)[0]
    other = batch | {"labels": batch["labels"].where(batch["labels"] == IGNORED, 7)}
    assert step(model, batch)[0] != step(model, other)[0]


def test_gradient_checkpointing_changes_nothing(encoded):
    model, batch = new_model(), batch_of(encoded[:3])
    loss, grads = step(model, batch)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    again, recomputed = step(model, batch)
    assert loss == again
    assert gap(recomputed, grads) < 1e-6


def test_accumulation_and_rows_apart_change_nothing(encoded):
    """Samples with one, two and no pictures, together and one at a time."""
    model = new_model()
    samples = encoded[2:5]
    assert [len(sample.images) for sample in samples] == [1, 2, 0]
    batch = batch_of(samples)
    count = (batch["labels"] != IGNORED).sum()
    loss, grads = step(model, batch, num_items_in_batch=count)
    total, parts = 0.0, None
    for sample in samples:
        part, own = step(model, batch_of([sample]), num_items_in_batch=count)
        total += part
        parts = own if parts is None else {name: parts[name] + own[name] for name in own}
    assert abs(loss - total) < 1e-5
    assert gap(parts, grads) < 1e-4
    # a mean of each batch's mean is another loss
    means = [step(model, batch_of([sample]))[0] for sample in samples]
    assert abs(loss - sum(means) / 3) > 1e-4


def test_a_batch_without_pictures_gives_every_weight_a_gradient(encoded):
    config = SkipVisionConfig.preset("quarter")
    model = new_model(config)
    text = [encoded[4]]
    batch = batch_of(text, QUARTER)
    assert batch["pixel_values"].shape[0] == 1 and batch["labels"].shape[0] == 2
    loss, grads = step(model, batch, config)
    assert grads.keys() == trainable_state(model).keys()
    assert not grads["skip_vision_summary.ada.1.weight"].any()
    alone = {name: tensor[:1] for name, tensor in batch.items() if name != "pixel_values"}
    assert step(model, alone, config)[0] == pytest.approx(float(loss), rel=1e-5)


@pytest.mark.parametrize("strict", [False, True])
def test_train_skip_kv_and_bfloat16(encoded, strict):
    config = SkipVisionConfig(skip_share=0.75, strict=strict)
    model, batch = new_model(), batch_of(encoded[:2])
    losses = []
    for skip_kv in (False, True):
        with (
            apply_skip_vision(model, config, train_skip_kv=skip_kv),
            answers_only(model),
            torch.autocast("cpu", torch.bfloat16),
        ):
            loss = model(**batch, use_cache=False).loss
            loss.backward()
        losses.append(float(loss.detach()))
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    assert losses[0] == pytest.approx(float(step(model, batch, config)[0]), rel=0.05)
    if not strict:  # a strict mask hides from answers already
        assert losses[0] != losses[1]


def test_lora_trains_adapters_and_merges(encoded):
    config = SkipVisionConfig.preset("quarter")
    torch.manual_seed(0)
    model, batch = new_model(config, lora_rank=2), batch_of(encoded[:2], QUARTER)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    names = trainable_state(model)
    assert {name.split(".")[-3] for name in names if "lora" in name} == {"lora_A", "lora_B"}
    assert sum("lora_A" in name for name in names) == 3 * 7
    others = [n for n in names if "lora" not in n]
    assert all("projector" in n or "summary" in n for n in others)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(2):
        step(model, batch, config)
        optimizer.step()
    trained = model.state_dict()
    moved = {name for name in before if not torch.equal(before[name], trained[name])}
    assert moved <= names.keys() and any("lora_A" in name for name in moved)
    loss, _ = step(model, batch, config)
    plain = new_model(config)
    plain.load_state_dict(merge_lora(trained))
    assert step(plain, batch, config)[0] == pytest.approx(float(loss), rel=1e-5)
    forgotten = {name: tensor for name, tensor in trained.items() if "lora_B" not in name}
    plain.load_state_dict(merge_lora(forgotten))
    assert step(plain, batch, config)[0] != pytest.approx(float(loss), rel=1e-5)
