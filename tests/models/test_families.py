"""Every family, vision tower and text model: exported graphs against PyTorch, and broken twins."""

import re
from functools import partial

import pytest
import torch
from families import FAMILIES, text_config, write_gemma3, write_idefics3
from family_check import LIMIT, PARITY, SIZES, Subject, picture
from full import FULL
from tiny import tiny_config, tiny_model, write_tiny
from transformers import (
    Idefics3Config,
    LlavaForConditionalGeneration,
    MixtralConfig,
    PaliGemmaConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
    SmolVLMImageProcessorPil,
)
from transformers.models.idefics3.modeling_idefics3 import Idefics3VisionConfig, Idefics3VisionEmbeddings

from skipvision_export import SkipVisionConfig
from skipvision_export.cli import run
from skipvision_export.errors import ConfigError, ModelError
from skipvision_export.models import family_of
from skipvision_export.models.loading import load_processor, resolve_model
from skipvision_export.runtime.pipeline import Bundle
from skipvision_export.runtime.prompt import prepare
from skipvision_export.tensorrt.build import plan
from skipvision_export.tensorrt.recipe import ProfileSettings, Recipe

# By default those that differ most, for a few steps; all of them, for twelve, take ten minutes.
STEPS = 13 if FULL else 4  # one of prefill, the others of decode
NAMES = FAMILIES if FULL else ("llava_onevision", "internvl", "idefics3", "paligemma", "gemma3")


@pytest.fixture(scope="module", params=NAMES)
def subject(request, tmp_path_factory):
    return Subject.make(FAMILIES[request.param], tmp_path_factory.mktemp("family"))


def test_parity(subject, tmp_path):
    dense = subject.dense(tmp_path / "dense")
    for bundle in filter(None, (dense, subject.skip)):
        report = subject.measure(bundle, (*PARITY, "method"), STEPS)
        assert report.passed
        for name in PARITY:
            assert report.gaps[name].overall.max_abs <= LIMIT
        assert max(len(t.token_ids) for t in report.transcripts["ort"]) == STEPS
    assert report.gaps["method"].outputs["logits"].max_abs > 0.1


def test_the_reference_is_the_model_s_own_pipeline(subject):
    assert subject.own_pipeline(STEPS) <= 1e-5


def test_broken_graphs_are_caught(subject, tmp_path):
    for name, gap in subject.twins(tmp_path, STEPS).items():
        assert gap > 100 * LIMIT, name


def test_without_a_cls_row_tokens_are_chosen_by_redundancy(subject):
    family, config = subject.traced.source.family, subject.traced.source.config
    if not family.tiled:
        chooses = family.vision_dims(config).cls_chooses
        assert subject.skip.config.selector == ("cls_attention" if chooses else "dart")


def test_a_batch_answers_as_each_prompt_alone(subject):
    requests = [(picture(size), text) for size, text in zip(SIZES, ("What?", "Is it red?"), strict=True)]
    together = [answer.token_ids for answer in subject.skip.generate_batch(requests, 3)]
    assert together == [subject.skip.generate(*request, 3).token_ids for request in requests]


TURNS = (
    "{% for m in messages %}{{ m['role'] }}:{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>"
    "{% else %}{{ c['text'] }}{% endif %}{% endfor %}{% endfor %}assistant:"
)


def test_a_later_turn_feeds_its_own_crops(subject):
    if not subject.traced.source.family.cropped:
        pytest.skip("a picture is one crop, or the model has one picture for each prompt")
    bundle = Bundle.load(subject.skip.folder)
    bundle.processor.chat_template = TURNS
    seen, encode = [], bundle.generator.encode
    bundle.generator.encode = lambda pixels: seen.append(len(pixels)) or encode(pixels)
    talk = bundle.conversation()
    for size in (SIZES[1], SIZES[0], SIZES[1]):
        talk.ask("What?", picture(size), 1)
    several, one = (len(bundle.prepare(picture(size), "<image>What?").pixel_values) for size in SIZES[::-1])
    assert talk.fed_again == 0
    assert seen == [several, one, several]


def test_a_prompt_that_the_processor_refuses(subject, capsys):
    if subject.traced.source.family.sees == "prompt":
        asked = ["generate", str(subject.skip.folder), "--prompt", "What?"]
        assert run(asked) == 2
        assert "does not take the prompt" in capsys.readouterr().err


def test_engines_want_the_number_of_crops(subject):
    if subject.traced.source.family.cropped:
        with pytest.raises(ConfigError, match="does not say how many"):
            plan(subject.skip.folder, Recipe())
        profile = ProfileSettings(images=(1, 2, 5))
        sizes = plan(subject.skip.folder, Recipe(profiles=(profile,))).profiles("vision_encoder")
        assert [shape[0] for shape in sizes[0]["pixel_values"]] == [1, 2, 5]


def test_the_command_line(subject, capsys, tmp_path):
    folder, image = str(subject.traced.source.folder), tmp_path / "wide.png"
    picture(SIZES[1]).save(image)
    assert run(["inspect", folder]) == 0
    family, config = subject.traced.source.family, subject.traced.source.config
    layers = family.decoder_dims(config).num_layers
    assert f"family {family.name}, {layers} decoder layers" in capsys.readouterr().out
    asked = ["generate", str(subject.skip.folder), "--image", str(image), "--prompt", "What?"]
    assert run([*asked, "--max-new-tokens", "2"]) == 0


# -- facts -------------------------------------------------------------------------------------------


def refused(tmp_path, config, message):
    tiny_model(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=re.escape(message)):
        resolve_model(tmp_path)


@pytest.mark.parametrize(
    ("where", "part"),
    [
        ("model", "language_model"),
        ("model", "multi_modal_projector"),
        ("model.language_model", "layers"),
        ("model.language_model.layers.1", "mlp"),
    ],
)
def test_a_changed_layout_is_refused_by_the_part_that_is_missing(where, part, monkeypatch, tmp_path, capsys):
    """As a class of a later transformers may have it: the part has another name."""

    class Moved(LlavaForConditionalGeneration):
        @classmethod
        def from_pretrained(cls, *args, **kwargs):
            model, info = LlavaForConditionalGeneration.from_pretrained(*args, **kwargs)
            owner = model.get_submodule(where)
            owner.moved = getattr(owner, part)
            delattr(owner, part)
            return model, info

    folder = write_tiny(tmp_path / "model")
    monkeypatch.setattr("transformers.LlavaForConditionalGeneration", Moved)
    assert run(["export", str(folder), "-o", str(tmp_path / "out"), "--dense"]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("skipvision: ")]
    assert len(lines) == 1
    assert f"no attribute {part!r}" in lines[0] and "not laid out as family 'llava' knows it" in lines[0]


def test_sliding_windows_are_refused(tmp_path):
    config = tiny_config()
    config.text_config = text_config("mistral")
    config.text_config.sliding_window = 64
    refused(tmp_path, config, "has sliding windows (sliding_window=64)")


@pytest.mark.parametrize(
    ("kind", "experts"),
    [(Qwen2MoeConfig, 60), (Qwen3MoeConfig, 128), (partial(MixtralConfig, num_local_experts=32), 32)],
)
def test_other_mixtures_of_experts_are_refused_with_the_reason(kind, experts, tmp_path, capsys):
    config = tiny_config()
    config.text_config = kind()
    config.architectures = ["LlavaForConditionalGeneration"]
    config.save_pretrained(tmp_path)
    for asked in (["inspect"], ["export", "--dense", "-o", str(tmp_path / "out")]):
        assert run([*asked, str(tmp_path)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"a mixture of {experts} experts; supported: mixtral, of up to 16, as each is traced" in line
    (tmp_path / "config.json").write_text('{"architectures": ["Qwen3VLMoeForConditionalGeneration"]}')
    assert run(["inspect", str(tmp_path)]) == 2
    assert "Qwen3VLMoeForConditionalGeneration, a mixture of experts; supp" in capsys.readouterr().err


def test_a_selection_that_does_not_fit_the_tower_is_refused(tmp_path):
    config = tiny_config()
    config.vision_feature_select_strategy = "full"
    refused(tmp_path, config, "supported with clip_vision_model: 'default'")


def test_sequences_of_gemma3_stay_within_a_window(tmp_path, capsys):
    assert run(["inspect", str(write_gemma3(tmp_path))]) == 0
    assert "16 visual tokens, counted with 64 text tokens, sequences of up to 96\n" in capsys.readouterr().out


def test_smolvlm_s_processor_takes_pictures_without_videos(tmp_path):
    processor = load_processor(write_idefics3(tmp_path, smol=True))
    assert isinstance(processor.image_processor, SmolVLMImageProcessorPil)
    found = prepare(processor, picture(SIZES[1]), "What?", 16)
    assert (found.input_ids == 3).sum() == 16 * len(found.pixel_values) > 16


def test_cross_attention_is_refused(tmp_path, capsys):
    (tmp_path / "config.json").write_text('{"architectures": ["MllamaForConditionalGeneration"]}')
    assert run(["inspect", str(tmp_path)]) == 2
    assert "cross-attention, so they are not in its sequence" in capsys.readouterr().err


def test_strict_masking_is_for_causal_prompts():
    family = family_of(["PaliGemmaForConditionalGeneration"], "")
    config = SkipVisionConfig.counts(16, 24, selector="dart", strict=True)
    with pytest.raises(ConfigError, match="see their whole prompt"):
        family.layout(PaliGemmaConfig(), config)


@pytest.mark.parametrize("side", [8, 26, 27, 32, 25])
def test_positions_of_idefics3_are_in_order_or_refused(side):
    tower = Idefics3VisionEmbeddings(Idefics3VisionConfig(image_size=2 * side, patch_size=2, hidden_size=1))
    with torch.no_grad():
        tower.position_embedding.weight.copy_(torch.arange(side**2)[:, None])
        tower.patch_embedding.weight.zero_()
        tower.patch_embedding.bias.zero_()
        places = tower(torch.zeros(1, 3, 2 * side, 2 * side), torch.ones(1, side, side, dtype=torch.bool))
    config = Idefics3Config(vision_config={"image_size": 2 * side, "patch_size": 2})
    family = family_of(["Idefics3ForConditionalGeneration"], "")
    if torch.equal(places.flatten(), torch.arange(side**2.0)):
        family.check(config)
    else:
        with pytest.raises(ModelError, match="25 patches in a row"):
            family.check(config)
