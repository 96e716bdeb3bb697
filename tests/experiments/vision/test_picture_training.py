"""The trainer that the vision rooms share: the same crops for every arm, judged by photographs that nothing was chosen on."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from assay.experiments.rates import Rate
from assay.experiments.vision import training
from assay.experiments.vision.training import (
    Judged,
    batches,
    difference,
    judged,
    level,
    rate_share,
    right_by_photograph,
    train,
)

RATE = Rate(0.01, (0.003, 0.01, 0.03))


def small() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 8, 5, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 12))


@pytest.fixture(autouse=True)
def few(monkeypatch):
    monkeypatch.setattr(training, "CROPS", 20)
    monkeypatch.setattr(training, "JUDGED", 10)
    training.crops.cache_clear()
    yield
    training.crops.cache_clear()


def test_every_arm_sees_the_same_crops_in_the_same_order():
    first, second, other = batches(1, 24), batches(1, 24), batches(2, 24)
    for _ in range(7):  # more than a pass over the 240 crops
        (a, x), (b, y), (c, _) = next(first), next(second), next(other)
        assert torch.equal(a, b)
        assert torch.equal(x, y)
    assert not torch.equal(a, c)


def test_training_learns_is_repeatable_and_ends_in_evaluation_mode():
    model = train(small, 0.01, 60, 1, size=24)
    assert not model.training
    again = train(small, 0.01, 60, 1, size=24)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    right = right_by_photograph(model, size=24, n=10)
    assert len(right) == 12
    assert np.mean(right) > 2 / 12  # chance is a twelfth


def test_a_model_that_knows_one_photograph_is_right_on_that_alone():
    class Always(nn.Module):
        def forward(self, x):
            return nn.functional.one_hot(torch.full((len(x),), 3), 12).float()

    assert right_by_photograph(Always(), size=24, n=10) == [float(place == 3) for place in range(12)]


def test_an_arm_is_trained_under_each_seed():
    found = judged(small, RATE, 2, size=24)
    assert found.right.shape == (3, 12)
    assert found.trained.floor == pytest.approx(1 / 12)
    assert found.trained.scores == found.right.mean(1).tolist()
    assert found.trained.rates == RATE.rates


def test_the_rate_warms_up_and_ends_at_nothing():
    shares = [rate_share(step, 100) for step in range(101)]
    assert shares[0] == pytest.approx(0.1, rel=0.01)
    assert max(shares) == pytest.approx(shares[9], rel=0.05)
    assert shares[100] == 0
    assert all(a >= b for a, b in zip(shares[10:], shares[11:], strict=False))


def test_intervals_are_over_photographs_and_seeds():
    generator = np.random.default_rng(0)
    base = generator.uniform(0.2, 0.8, (3, 12))
    same, better = Judged(base, RATE), Judged(base + 0.1, RATE)
    assert difference(better, same) == pytest.approx((10, 10, 10))
    assert difference(same, same) == (0, 0, 0)
    one = base.copy()
    one[:, 0] += 0.12  # one photograph is no proof of a gain
    gain, low, high = difference(Judged(one, RATE), same)
    assert gain == pytest.approx(1.0)
    assert low == pytest.approx(0, abs=1e-9)
    assert high > 2
    value, low, high = level(same)
    assert low < value < high
    misses = 0
    for seed in range(200):  # two equal arms: called different in about one of twenty
        draw = np.random.default_rng(seed)
        places, noise = draw.normal(0, 0.05, (1, 12)), draw.normal(0, 0.02, (3, 12))
        _, low, high = training._interval(places + noise)
        misses += not low <= 0 <= high
    assert misses <= 26
