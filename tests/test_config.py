import pytest
from hypothesis import given
from hypothesis import strategies as st

from skipvision_export.config import PRESETS, SkipVisionConfig, TokenLayout
from skipvision_export.errors import ConfigError


@given(st.integers(1, 3000), st.floats(0, 0.999))
def test_shares_fit_every_model(visual, share):
    layout = SkipVisionConfig(skip_share=share).layout(visual)
    assert layout.total == visual
    assert layout.kept + layout.count("skipped") == visual
    assert abs(layout.count("skipped") - visual * share) <= 0.5


def test_no_truncation_in_shares():
    # int(100 * (1 - 0.9)) is 9
    assert SkipVisionConfig.preset("skip-90").layout(100).kept == 10


@given(st.integers(0, 600), st.integers(0, 600))
def test_json_round_trip(retained, skipped):
    if retained + skipped == 0:
        return
    config = SkipVisionConfig.counts(retained, skipped)
    assert SkipVisionConfig.from_json(config.to_json()) == config


def test_layout_order_is_retained_then_skipped():
    layout = SkipVisionConfig.counts(2, 3).layout(5)
    assert layout.runs == (("retained", 2), ("skipped", 3))
    assert layout.skipped_mask() == [False, False, True, True, True]


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
        (lambda: SkipVisionConfig.counts(5, 5).layout(64), "merged away"),
        (lambda: SkipVisionConfig.preset("llava-100-156").layout(64), "576"),
        (lambda: SkipVisionConfig.preset("llava-256-320").layout(576), "summary"),
        (lambda: SkipVisionConfig.from_json({"colour": 1}), "colour"),
    ],
)
def test_refusals_say_why(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_presets_are_known_by_their_own_name():
    assert all(preset.name == name for name, preset in PRESETS.items())
