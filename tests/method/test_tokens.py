"""Selection, merging and summary tokens, each against a plain reading of the method."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain import plain_merge, plain_summary

from skipvision_export.config import SkipVisionConfig
from skipvision_export.errors import ConfigError
from skipvision_export.method import SummaryTokens, layout_order, merge_tokens
from skipvision_export.tokens import TorchImage, selector, selector_names


def rows(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 24), st.data())
def test_merge_equals_a_plain_reading(n, data):
    keep = data.draw(st.integers(1, n))
    x = rows(2, n, 5, seed=data.draw(st.integers(0, 99)))
    merged = merge_tokens(x, keep)
    for got, one in zip(merged, x, strict=True):
        torch.testing.assert_close(got, plain_merge(one, keep), rtol=1e-5, atol=1e-6)


def test_a_merge_that_is_off_is_caught():
    x = rows(1, 20, 5)
    expected = plain_merge(x[0], 6)
    assert (merge_tokens(x, 6)[0].roll(1, 0) - expected).abs().max() > 1e-2
    assert (merge_tokens(x + 0.5, 6)[0] - expected).abs().max() > 1e-2


def test_merge_order_is_by_descending_redundancy():
    x = torch.eye(6)[None] + 0.2
    x[0, 4] = x[0, 5] = torch.ones(6)
    # 4 and 5 point where all others do: they are the sources
    merged = merge_tokens(x, 4)
    assert merged.shape == (1, 4, 6)
    assert merge_tokens(x, 6) is x


def test_zero_rows_are_guarded():
    x = rows(1, 12, 5)
    x[0, 3] = 0
    merged = merge_tokens(x, 4)
    assert merged.isfinite().all()
    torch.testing.assert_close(merged[0], plain_merge(x[0], 4), rtol=1e-5, atol=1e-6)
    assert merge_tokens(torch.zeros(2, 8, 4), 3).eq(0).all()


def test_duplicate_rows_leave_the_set():
    x = rows(1, 5, 4).repeat(1, 3, 1)
    merged = merge_tokens(x, 5)
    for row in merged[0]:
        assert row.isfinite().all()


def test_merge_keeps_the_mean_in_low_precision():
    x = rows(1, 64, 16).bfloat16()
    exact = merge_tokens(x.float(), 8)
    # same choices: similarities are float32 whatever the type
    assert (merge_tokens(x, 8).float() - exact).abs().max() < 2e-2


def test_values_carry_gradients_and_choices_do_not():
    x = rows(2, 10, 4).requires_grad_()
    merge_tokens(x, 3).sum().backward()
    grad = x.grad
    assert grad is not None
    # every row counts in exactly one mean, by 1 over its size
    assert torch.allclose(grad.sum((1, 2)), torch.tensor([12.0, 12.0]))
    assert (grad > 0).all()


@pytest.mark.parametrize("keep", [0, 11, -1])
def test_merge_refuses(keep):
    with pytest.raises(ConfigError, match="1 to 10"):
        merge_tokens(rows(1, 10, 4), keep)


def test_summary_equals_a_plain_reading():
    summary = SummaryTokens(6)
    torch.nn.init.normal_(summary.ada[0].weight)
    torch.nn.init.normal_(summary.ada[1].weight)
    x = rows(3, 7, 6)
    out = summary(x)
    assert out.shape == (3, 6)
    for got, one in zip(out, x, strict=True):
        torch.testing.assert_close(got, plain_summary(one, summary.ada), rtol=1e-5, atol=1e-6)
        assert (got - one.mean(0)).abs().max() > 1e-2


def test_summary_starts_as_the_mean_and_learns():
    summary, x = SummaryTokens(6), rows(1, 7, 6)
    torch.testing.assert_close(summary(x), x.mean(1))
    summary(x).square().sum().backward()
    assert summary.ada[1].weight.grad.abs().max() > 0


@given(st.lists(st.integers(0, 5), min_size=1, max_size=30), st.data())
def test_layout_order(values, data):
    n = len(values)
    first = data.draw(st.integers(0, n))
    second = data.draw(st.integers(0, n - first))
    order = layout_order(torch.tensor([values], dtype=torch.float32), [first, second])[0].tolist()
    groups = [order[:first], order[first : first + second], order[first + second :]]
    assert sorted(order) == list(range(n))
    assert all(group == sorted(group) for group in groups)
    ranked = sorted(range(n), key=lambda i: (-values[i], i))
    assert set(groups[0]) == set(ranked[:first])
    assert set(groups[1]) == set(ranked[first : first + second])


@pytest.mark.parametrize("name", selector_names())
def test_selectors(name):
    features = rows(2, 64, 8)
    image = TorchImage(features, lambda: rows(2, 64, seed=1), seed=3)
    scores = selector(name).scores(image)
    assert scores.shape == (2, 64)
    assert not scores.requires_grad
    assert torch.equal(scores, selector(name).scores(image))
    static = selector(name).static
    other = selector(name).scores(TorchImage(features.flip(1), lambda: rows(2, 64, seed=2), seed=3))
    assert torch.equal(scores, other) == static


def test_uniform_covers_the_grid():
    order = torch.from_numpy(selector("uniform").static_scores(64, 0).copy()).argsort(descending=True)
    places = torch.stack([order[:16] // 8, order[:16] % 8], 1).float()
    everywhere = torch.cartesian_prod(torch.arange(8.0), torch.arange(8.0))
    assert torch.cdist(everywhere, places).min(1).values.max() < 2.3
    assert selector("uniform").static_scores(7, 0).shape == (7,)


def test_random_follows_its_seed():
    image = [TorchImage(rows(1, 64, 8), lambda: rows(1, 64), seed=s) for s in (0, 0, 1)]
    a, b, c = (selector("random").scores(i) for i in image)
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_dart_prefers_what_is_different():
    x = torch.ones(1, 30, 8) + 0.01 * rows(1, 30, 8)
    x[0, 17] = torch.tensor([-0.5, 0.5] * 4)
    scores = selector("dart").scores(TorchImage(x, lambda: rows(1, 30)))
    assert 17 in scores[0].topk(5).indices.tolist()


def test_unknown_names():
    with pytest.raises(ConfigError, match="one of"):
        SkipVisionConfig.counts(1, 2, selector="nope")
    with pytest.raises(ConfigError, match="one of"):
        SkipVisionConfig.counts(1, 2, merge="nope")
