"""Training on scenes: the same scenes for every arm, parts apart, an interval over scenes and seeds in pairs."""

import numpy as np
import pytest
import torch
from torch import nn

from assay.experiments.rates import Rate
from assay.experiments.vision import scenes
from assay.experiments.vision.scenes import (
    Scored,
    batches,
    error_for_choice,
    gap,
    guarded,
    level,
    outcomes,
    pixels,
    scored,
    train,
)

RATE = Rate(1e-2, (1e-3, 1e-2, 1e-1))


class Counter(nn.Module):
    """Tells how many digits a scene has, from its mean colour."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 1)

    def forward(self, some):
        return self.linear(pixels(some).mean((2, 3)))[:, 0]


def loss(model, some):
    return (model(some) - torch.tensor([float(len(scene.labels)) for scene in some])).square().mean()


def outcome(model, some):
    return [float(abs(guess - len(scene.labels)) < 2) for guess, scene in zip(model(some).tolist(), some, strict=True)]


@pytest.fixture(autouse=True)
def few(monkeypatch):
    monkeypatch.setattr(scenes, "SCENES", {"train": 24, "choose": 6, "heldout": 10})
    scenes.scenes.cache_clear()
    yield
    scenes.scenes.cache_clear()


def test_a_pass_has_every_scene_once_and_a_seed_is_an_order():
    stream = batches(1, 64)
    once = [id(scene) for _ in range(3) for scene in next(stream)]
    assert sorted(once) == sorted(id(scene) for scene in scenes.scenes("train", 64))
    assert [id(scene) for _ in range(3) for scene in next(stream)] != once
    again = batches(1, 64)
    assert [id(scene) for _ in range(3) for scene in next(again)] == once


def test_a_model_is_trained_and_judged_on_other_scenes():
    shown = scored(Counter, loss, outcome, np.mean, RATE, 30, size=64, seeds=(1, 2))
    assert [len(each) for each in shown.found] == [10, 10]
    untrained = scored(
        Counter, lambda model, some: 0 * loss(model, some), outcome, np.mean, RATE, 1, size=64, seeds=(1, 2)
    )
    assert shown.value != untrained.value
    assert shown.trained(0.1, "chance").scores == shown.by_seed()
    model = train(Counter, loss, 1e-2, 30, 0, size=64)
    assert not model.training
    assert error_for_choice(Counter, loss, outcome, np.mean, 1e-2, 30, size=64) == pytest.approx(
        1 - np.mean(outcomes(model, outcome, "choose", size=64))
    )


def test_a_loss_that_is_no_number_is_named():
    with pytest.raises(ValueError, match=r"loss of step 0 is nan at a rate of 0\.5"):
        train(Counter, lambda model, some: loss(model, some) * torch.nan, 0.5, 2, 0, size=64)


def arm(values):
    return Scored(tuple(map(tuple, values)), np.mean, RATE)


def test_intervals_are_over_scenes_and_seeds_in_pairs():
    generator = np.random.default_rng(0)
    base = (generator.random((3, 60)) < 0.5).astype(float)
    better = arm(np.where(generator.random(base.shape) < 0.3, 1.0, base))
    value, low, high = gap(better, arm(base))
    assert value == pytest.approx(100 * (np.mean(better.found) - base.mean()))
    assert 0 < low < value < high
    assert gap(arm(base), arm(base)) == (0, 0, 0)
    _, low, high = level(arm(base))
    assert (
        2 * 1.96 * 100 * np.sqrt(0.25 / 180) < high - low < 3 * 2 * 1.96 * 100 * np.sqrt(0.25 / 60)
    )  # more than if all were independent
    gain, low, high = gap(better, arm(base))
    quality = guarded(better, arm(base), {"deleted": arm(base)})
    assert quality.baseline == pytest.approx(arm(base).value)
    assert quality.low == pytest.approx(quality.baseline + low)
    assert quality.controls["deleted"] == quality.baseline
