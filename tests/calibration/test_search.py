"""The search alone, on effects that are known."""

import random

import pytest

from skipvision_export.calibration import Budget, lazy_greedy
from skipvision_export.errors import ConfigError

SHARES = (0.5, 1.0)
HARM = (0.03, 0.0, 4.0, 0.2)  # of each layer at share 1.0


def flops(shares):
    return 1000 - round(sum(100 * share for share in shares))


def harm(shares):
    return sum(h * s for h, s in zip(HARM, shares, strict=True))


def order(measure):
    """Layers in the order in which they were brought to the highest share."""
    path = lazy_greedy(4, SHARES, measure, flops, Budget(flops=0.6)).path
    done = [[i for i, share in enumerate(point.shares) if share == 1] for point in path]
    return sorted(set(done[-1]), key=lambda i: next(n for n, d in enumerate(done) if i in d))


def test_harmless_first_harmful_last():
    assert order(harm) == [1, 0, 3, 2]
    # the broken twin: scores that belong to other layers
    assert order(lambda shares: harm(shares[::-1])) == [2, 3, 0, 1]


def test_moves_are_measured_jointly():
    # Layers 0 and 1 do not hurt alone, only together: taking the scores at face value would take both.
    def pair(shares):
        return 10 * shares[0] * shares[1] + 0.1 * (shares[2] + shares[3])

    found = lazy_greedy(4, (1.0,), pair, flops, Budget(flops=0.8))
    assert found.path[-1].divergence == pytest.approx(0.1)
    alone = sorted(range(4), key=lambda i: pair(tuple(float(j == i) for j in range(4))))
    assert set(alone[:2]) == {0, 1}


def test_budgets():
    found = lazy_greedy(4, SHARES, harm, flops, Budget(divergence=0.25))
    assert found.path[-1].divergence <= 0.25
    assert found.path[-1].shares == (1.0, 1.0, 0.0, 1.0)
    found = lazy_greedy(4, SHARES, harm, flops, Budget(flops=0.9))
    assert flops(found.path[-1].shares) <= 900 < flops(found.path[-2].shares)


def test_lazy_is_affordable():
    rng = random.Random(0)
    cost = [rng.random() for _ in range(32)]

    def measure(shares):
        return sum(c * s * s for c, s in zip(cost, shares, strict=True))

    def count(shares):
        return 10_000 - round(sum(100 * share for share in shares))

    found = lazy_greedy(32, (0.5, 0.75, 0.9, 1.0), measure, count, Budget(flops=0.85))
    moves = len(found.path) - 1
    assert len(found.tried) < 32 + 4 * moves < 32 * moves


@pytest.mark.parametrize("bad", [{}, {"flops": 0.5, "divergence": 1.0}, {"flops": 1.0}, {"divergence": 0.0}])
def test_a_budget_is_one_number_in_range(bad):
    with pytest.raises(ConfigError):
        Budget(**bad)
