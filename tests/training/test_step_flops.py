"""The formula of a step's operations against those that PyTorch counts."""

import pytest
from tiny import tiny_model, tiny_processor
from torch.utils.flop_counter import FlopCounterMode

from skipvision_export import SkipVisionConfig, apply_skip_vision
from skipvision_export.benchmark.training_flops import training_cost
from skipvision_export.models import family_of
from skipvision_export.training.answers import answers_only
from skipvision_export.training.collate import IGNORED, Collator
from skipvision_export.training.trainable import choose_trainable


@pytest.mark.parametrize("preset", ["dense", "skip-75"])
def test_formula_equals_a_count(planned, preset):
    model, family = tiny_model().train(), family_of(["LlavaForConditionalGeneration"], "")
    # Its matrix products are what is counted; the fused kernel on a CPU is not.
    model.set_attn_implementation("eager")
    choose_trainable(model, family)
    config = SkipVisionConfig.dense() if preset == "dense" else SkipVisionConfig.preset(preset)
    sample = planned("skip-75").data.samples[:1]
    batch = Collator(tiny_processor(), 3, 0, 64)(sample)
    counter = FlopCounterMode(display=False)
    with apply_skip_vision(model, config), answers_only(model), counter:
        model(**batch, use_cache=False).loss.backward()
    dims, vision = family.decoder_dims(model.config), family.vision_dims(model.config)
    labels = int((batch["labels"] != IGNORED).sum())
    text = batch["input_ids"].shape[1] - 64

    def cost(layout):
        return training_cost(dims, vision, layout, text, labels).total

    # The count has the tower's unused last layer and the CLS row's scores, the formula does not.
    unused = 2 * 65 * 48 * (4 * 48 + 2 * 96) + 4 * 65 * 65 * 48
    counted = counter.get_total_flops() - unused
    assert counted == pytest.approx(cost(family.layout(model.config, config)), rel=0.005)
    other = SkipVisionConfig.preset("skip-50")
    assert counted != pytest.approx(cost(family.layout(model.config, other)), rel=0.005)
