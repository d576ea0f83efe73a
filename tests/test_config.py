import pytest
from hypothesis import given
from hypothesis import strategies as st

from skipvision_export.config import PRESETS, SkipVisionConfig
from skipvision_export.errors import ConfigError
from skipvision_export.layout import TokenLayout


@given(st.integers(1, 3000), st.floats(0, 0.999))
def test_shares_fit_every_model(visual, share):
    layout = SkipVisionConfig(skip_share=share).layout(visual)
    assert layout.total == visual
    assert layout.kept_kv + layout.skipped == visual
    assert abs(layout.count("skipped") - visual * share) <= 0.5


@given(st.integers(1, 3000), st.floats(0.01, 0.99), st.floats(0, 0.99))
def test_shares_that_merge_fit_every_model(visual, skip, part):
    config = SkipVisionConfig(skip_share=skip, retained_share=(1 - skip) * part)
    if round(visual * skip):
        assert config.layout(visual).total <= visual


def test_two_shares_rounded_up_are_not_one_too_many():
    assert SkipVisionConfig(skip_share=0.5, retained_share=0.5).layout(3).total == 3


def test_a_share_that_rounds_to_nothing_to_merge_to_is_refused():
    with pytest.raises(ConfigError, match="nothing to be merged to"):
        SkipVisionConfig(skip_share=0.01, retained_share=0.5).layout(8)


@pytest.mark.parametrize("how", ["last", "first_last"])
def test_the_skipped_block_is_one_whatever_it_skips(how):
    for ffn in (True, False):
        for kv in (True, False):
            config = SkipVisionConfig.counts(3, 4, skip_ffn=ffn, skip_kv=kv, pass_through=how)
            assert config.layout(10).selection_sizes() == (3, 4)


def test_no_truncation_in_shares():
    # int(100 * (1 - 0.9)) is 9
    assert SkipVisionConfig.preset("skip-90").layout(100).kept_kv == 10


@given(st.integers(0, 600), st.integers(0, 600))
def test_json_round_trip(retained, skipped):
    if retained + skipped == 0:
        return
    config = SkipVisionConfig.counts(retained, skipped)
    assert SkipVisionConfig.from_json(config.to_json()) == config


def test_layout_order_is_retained_then_skipped():
    layout = SkipVisionConfig.counts(2, 3).layout(5)
    assert layout.runs == (("retained", 2), ("skipped", 3))
    assert layout.ffn_mask() == layout.kv_mask() == [True, True, False, False, False]


def test_dense_has_one_run():
    assert SkipVisionConfig.dense().layout(64) == TokenLayout((("retained", 64),))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SkipVisionConfig.preset("nope"), "choose one of"),
        (lambda: SkipVisionConfig(retained=3), "both"),
        (lambda: SkipVisionConfig(skip_share=1.0), "outside"),
        (lambda: SkipVisionConfig(retained=1, skipped=1, skip_share=0.5), "not both"),
        (lambda: SkipVisionConfig.counts(-1, 2), "at least 0"),
        (lambda: SkipVisionConfig.counts(50, 50).layout(64), "more than"),
        (lambda: SkipVisionConfig.counts(5, 0).layout(64), "nothing to be merged to"),
        (lambda: SkipVisionConfig.preset("llava-100-156").layout(64), "576"),
        (lambda: SkipVisionConfig.preset("llava-hd-576-576").layout(576), "tiles"),
        (lambda: SkipVisionConfig.from_json({"colour": 1}), "colour"),
    ],
)
def test_refusals_say_why(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_presets_are_known_by_their_own_name():
    assert all(preset.name == name for name, preset in PRESETS.items())
