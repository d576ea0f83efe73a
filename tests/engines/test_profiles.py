"""Profiles that follow from a recipe and a bundle, and those that a model cannot have."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skipvision_export.bundle import Manifest
from skipvision_export.config import SkipVisionConfig
from skipvision_export.errors import ConfigError
from skipvision_export.runtime.batch import PromptBatch, prefill_indices
from skipvision_export.tensorrt.profiles import shapes, sizes
from skipvision_export.tensorrt.recipe import ProfileSettings


@pytest.fixture(scope="module")
def manifest(bundle_folder):
    return Manifest.load(bundle_folder)


def test_sizes_are_those_of_the_generation_loop(manifest):
    """What the optimum is made for is what a picture with as much text really feeds."""
    found = sizes(ProfileSettings(text=(1, 20, 40)), manifest, 512)
    image = manifest.model.image_token_id
    ids = np.array([[image] * manifest.layout.total + [9] * 20])
    fed = prefill_indices(PromptBatch.join([ids], image), image, manifest.layout)
    assert found.prompt[1] == ids.shape[1]
    assert found.kept[1] == fed.kv_keep.shape[1]
    assert {tier: size[1] for tier, size in found.ffn.items()} == {t: len(r) for t, r in fed.ffn_rows.items()}


def test_policies_have_a_size_for_each_tier(finetuned, tmp_path):
    config = SkipVisionConfig(layer_shares=(0, 0.25, 0.5, 0.5), kv_share=0.5)
    manifest = finetuned.write(tmp_path / "b", config).manifest
    found = sizes(ProfileSettings(), manifest, 512)
    assert len(found.ffn) == len(manifest.layout.used_tiers()) == 2
    first = shapes("decoder_prefill", manifest.graphs["decoder_prefill"], found, manifest.layout)
    assert first["ffn_index"] != first["ffn_index.2"]


def test_every_input_of_every_graph_has_shapes(manifest):
    found = sizes(ProfileSettings(batch=(1, 2, 4), text=(1, 20, 40)), manifest, 512)
    total = manifest.layout.total
    for graph, info in manifest.graphs.items():
        made = shapes(graph, info, found, manifest.layout)
        assert set(made) == {tensor.name for tensor in info.inputs}
        for low, opt, high in made.values():
            assert all(a <= b <= c for a, b, c in zip(low, opt, high, strict=True))
    prefill = shapes("decoder_prefill", manifest.graphs["decoder_prefill"], found, manifest.layout)
    assert prefill["inputs_embeds"][1][:2] == (2, 20 + total)
    assert prefill["ffn_index"][2] == (4 * (40 + total),)
    decode = shapes("decoder_decode", manifest.graphs["decoder_decode"], found, manifest.layout)
    assert decode["inputs_embeds"][2][1] == 1
    cached = decode["past_key_values.0.key"]
    assert [m[1] for m in decode["attention_mask"]] == [c[2] + 1 for c in cached]


@settings(max_examples=100, deadline=None)
@given(
    text=st.lists(st.integers(1, 600), min_size=3, max_size=3).map(sorted),
    new=st.integers(1, 600),
    limit=st.integers(100, 700),
)
def test_derived_sizes_always_fit_the_model(manifest, text, new, limit):
    found = sizes(ProfileSettings(text=tuple(text), new_tokens=new), manifest, limit)
    assert found.prompt[2] <= limit and found.cache[2] < limit
    assert found.kept[2] <= found.prompt[2]
    for low, opt, high in (found.prompt, found.kept, found.cache, *found.ffn.values()):
        assert 1 <= low <= opt <= high


@pytest.mark.parametrize(
    ("profile", "said"),
    [
        ({"prompt": (1, 100, 600)}, r"prompt: \[1, 100, 600\] is outside \[1, 512\]: the model has 512"),
        ({"prompt": (1, 10, 60)}, "cannot hold a picture of 64 visual tokens"),
        ({"kept": (1, 50, 2000)}, "no more tokens are kept than the prompt's"),
        ({"cache": (1, 50, 600)}, "cache: .* the model has 512 positions"),
        ({"cache": (1, 5, 6)}, "cache: at most 6 tokens, but prefill keeps up to"),
        ({"text": (0, 1, 1)}, "text: .* a prompt has text"),
        ({"batch": (0, 1, 1)}, "batch: .* at least one prompt"),
    ],
)
def test_what_a_model_cannot_have(manifest, profile, said):
    with pytest.raises(ConfigError, match=said):
        sizes(ProfileSettings(**profile), manifest, 512)
