"""Schedules against their formula, and rounds of pruning against doing them by hand."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from assay.methods.core.sparsity.masks import masks_of
from assay.methods.core.sparsity.projections import global_
from assay.methods.core.sparsity.schedules import Constant, Gradual, OneShot, iterative, ladder


def test_the_cubic_schedule_is_its_formula_at_every_update_and_flat_between():
    schedule = Gradual(final=0.9, initial=0.1, begin=20, every=7, updates=10)
    assert schedule.sparsity(0) == schedule.sparsity(19) == 0.0
    assert schedule.sparsity(20) == pytest.approx(0.1)
    for step in range(20, 120):
        t = min((step - 20) // 7 * 7, 70)
        assert schedule.sparsity(step) == pytest.approx(0.9 - 0.8 * (1 - t / 70) ** 3)
    assert schedule.sparsity(90) == schedule.sparsity(10**9) == 0.9
    assert schedule.sparsity(55) == pytest.approx(0.1 + 7 / 8 * 0.8)  # half-way
    values = [schedule.sparsity(step) for step in range(20, 120)]
    assert values == sorted(values)
    assert [step for step in range(200) if schedule.due(step)] == [20 + 7 * i for i in range(11)]


def test_the_plain_schedules():
    assert [OneShot(0.8, at=3).sparsity(step) for step in (0, 2, 3, 9)] == [0, 0, 0.8, 0.8]
    assert [step for step in range(9) if OneShot(0.8, at=3).due(step)] == [3]
    assert [Constant(0.5, every=4).sparsity(step) for step in (0, 7)] == [0.5, 0.5]
    assert [step for step in range(9) if Constant(0.5, every=4).due(step)] == [0, 4, 8]


def test_the_ladder_ends_at_its_target():
    assert ladder(0.8) == [0.8]
    assert ladder(0.64) == pytest.approx([0.8, 0.64])
    rungs = ladder(0.05)
    assert rungs[-1] == 0.05
    assert len(rungs) == 14  # 0.8^13 is 0.055
    assert all(later >= 0.8 * earlier - 1e-12 for earlier, later in zip(rungs, rungs[1:], strict=False))


def project(scores, density):
    return global_(scores, density)


def test_iterative_pruning_is_pruning_rewinding_and_training_by_hand():
    torch.manual_seed(0)
    start = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    x, y = torch.randn(64, 8), torch.randn(64, 4)

    def train(model):
        optimiser = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for _ in range(5):
            optimiser.zero_grad()
            (model(x) - y).square().mean().backward()
            optimiser.step()
        return 5

    rewind = copy.deepcopy(start.state_dict())
    model = copy.deepcopy(start)
    train(model)
    hand = copy.deepcopy(model)
    rounds = iterative(model, ["0", "2"], [0.5, 0.25, 0.1], train, project=project, rewind=rewind)
    assert [r.passes for r in rounds] == [5, 5, 5]
    assert [sum(int(m.sum()) for m in r.masks.values()) for r in rounds] == [96, 48, 20]
    for earlier, later in zip(rounds, rounds[1:], strict=False):
        assert not any(bool((later.masks[name] & ~earlier.masks[name]).any()) for name in later.masks)
    assert all(torch.equal(masks_of(model)[name], mask) for name, mask in rounds[-1].masks.items())

    kept = None
    for share in (0.5, 0.25, 0.1):
        scores = {name: hand[int(name)].weight.detach().abs() for name in ("0", "2")}
        if kept is not None:
            scores = {name: torch.where(kept[name], s, -torch.inf) for name, s in scores.items()}
        kept = global_(scores, share)
        hand.load_state_dict(rewind)
        optimiser = torch.optim.SGD(hand.parameters(), lr=0.1, momentum=0.9)
        for _ in range(5):
            for name, mask in kept.items():
                hand[int(name)].weight.data *= mask
            optimiser.zero_grad()
            (hand(x) - y).square().mean().backward()
            for name, mask in kept.items():
                hand[int(name)].weight.grad *= mask
            optimiser.step()
        for name, mask in kept.items():
            hand[int(name)].weight.data *= mask
    assert torch.allclose(model(x), hand(x), atol=1e-6)


def test_without_rewinding_training_goes_on_from_where_it_is():
    model = nn.Sequential(nn.Linear(4, 4, bias=False))
    before = model[0].weight.detach().clone()
    rounds = iterative(model, ["0"], [0.5], lambda m: 0.0, project=project)
    assert torch.equal(model[0].weight, before * rounds[0].masks["0"])


def test_what_is_gone_stays_gone_whatever_ranks_the_rest():
    model = nn.Sequential(nn.Linear(4, 4, bias=False))
    seen = []

    def backwards(scores, density):
        seen.append(scores["0"].clone())
        ranks = torch.where(scores["0"] == -torch.inf, -torch.inf, -scores["0"])  # the smallest first
        return global_({"0": ranks}, density)

    first, second = iterative(model, ["0"], [0.5, 0.25], lambda m: 1.0, project=backwards)
    assert not bool((second.masks["0"] & ~first.masks["0"]).any())
    assert torch.equal(seen[1] == -torch.inf, ~first.masks["0"])


def test_bad_arguments_are_named_before_anything_changes():
    model = nn.Sequential(nn.Linear(4, 4))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"densities must fall from one to the next, got \[0.5, 0.5\]"):
        iterative(model, ["0"], [0.5, 0.5], lambda m: 0.0, project=project)
    with pytest.raises(ValueError, match="rewind must be a state dict of the dense model, got none of 0.weight"):
        iterative(model, ["0"], [0.5], lambda m: 0.0, project=project, rewind={})
    assert model.state_dict().keys() == before.keys()
    for make in (
        lambda: Gradual(final=1.5),
        lambda: Gradual(final=0.5, initial=0.6),
        lambda: Gradual(final=float("nan")),
        lambda: Gradual(final=0.5, every=0),
        lambda: OneShot(0.5, at=-1),
        lambda: Constant(0.5).due(-1),
        lambda: ladder(0.0),
        lambda: ladder(0.5, rate=1.0),
        lambda: ladder(0.001, rate=1e-6),
    ):
        with pytest.raises(ValueError, match="must"):
            make()
