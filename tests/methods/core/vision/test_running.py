"""The layers of a model in the order they run: every call once, with its shapes, its MACs and its own parameters."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from assay.measure.cost import count_cost
from assay.methods.core.vision.running import layers_run


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.late = nn.Linear(4, 3)
        self.first = nn.Conv2d(2, 4, (1, 3), stride=2, groups=2)
        self.twice = nn.Conv2d(4, 4, 1)
        self.idle = nn.Conv2d(4, 4, 3)

    def forward(self, x):
        x = self.twice(self.twice(self.first(x)))
        return self.late(x.mean((2, 3)))


def test_calls_come_in_the_order_they_run():
    ran = layers_run(Branches(), torch.zeros(2, 2, 6, 9))
    assert [call.name for call in ran] == ["first", "twice", "twice", "late"]
    assert ran[0].given == (2, 2, 6, 9)
    assert ran[0].gave == (2, 4, 3, 4)
    assert [call.kernel for call in ran] == [3, 1, 1, 1]
    assert [call.params for call in ran] == [4 * 3 + 4, 20, 20, 15]


def test_macs_are_those_that_are_counted():
    model, x = Branches(), torch.zeros(2, 2, 6, 9)
    assert sum(call.macs for call in layers_run(model, x)) == count_cost(model, x).macs


def test_nothing_is_left_behind_even_by_a_model_that_fails():
    model = Branches()
    with pytest.raises(RuntimeError):
        layers_run(model, torch.zeros(1, 3, 6, 9))
    assert not any(module._forward_hooks for module in model.modules())
    assert not layers_run(model, torch.zeros(1, 2, 6, 9))[-1].module.weight.grad
    assert layers_run(nn.ReLU(), torch.zeros(1)) == []


def test_it_runs_without_data():
    with torch.device("meta"):
        model, x = nn.Sequential(nn.Conv2d(3, 64, 3, padding=1)), torch.zeros(1, 3, 224, 224)
    assert layers_run(model, x)[0].macs == 224 * 224 * 64 * 27


def test_a_model_in_training_is_left_as_it_was():
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5)).train()
    model[1].eval()
    state, random = {key: value.clone() for key, value in model.state_dict().items()}, torch.get_rng_state()
    model[1].train()
    model[2].eval()
    layers_run(model, torch.ones(2, 2, 6, 6))
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert [module.training for module in model] == [True, True, False]
