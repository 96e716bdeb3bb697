"""Masks that learn nothing and filters that are not the pruned ones are noticed; all ways to prune get what they are said to."""

from __future__ import annotations

import json
from functools import cache

import pytest
import torch
from tests.properties.sabotage import record_of

import assay.methods.compression.bip as method
from assay.evidence.types import Verdict
from assay.evidence.verdict import judge
from assay.experiments import experiments_of, rates
from assay.experiments.compression import bip as room
from assay.experiments.compression import bip_arms as arms
from assay.methods.core.sparsity.masks import masks_of
from assay.methods.core.sparsity.projections import emptied

POINT = {"density": 0.2, "budget": 30, "seeds": 3}
FILTERS = {"density": 0.75, "images": 100, "budget": 60, "seeds": 3}
LEARNED = ("bip", "hydra", "filters")
FREE_ARMS = ("gradual magnitude pruning", "magnitude pruning that halves")
KNOWN: dict[tuple[object, ...], room.Judged] = {}
DENSE, SPLIT = (
    cache(arms.dense.__wrapped__),
    cache(arms.split.__wrapped__),
)  # with small batches, few images to judge on


@pytest.fixture
def short(monkeypatch):
    """Small batches, iterative pruning in two rounds, nothing compiled, and what breaking BiP does not touch trained once for all tests.

    Networks that are trained for a moment are held to no floor.
    """
    monkeypatch.setattr(arms, "BATCH", 32)
    monkeypatch.setattr(arms, "TEST", 500)
    for module in (arms, room):
        monkeypatch.setattr(module, "dense", DENSE)
        monkeypatch.setattr(module, "split", SPLIT)

    def remembered(way, *given, real=room.judged):
        if way in LEARNED or way.startswith("bip"):
            return real(way, *given)
        if (way, *given) not in KNOWN:
            KNOWN[way, *given] = real(way, *given)
        return KNOWN[way, *given]

    monkeypatch.setattr(room, "judged", remembered)
    monkeypatch.setattr(room, "nearest_mean", lambda split: -1.0)
    monkeypatch.setattr(arms, "ladder", lambda target, rate=0.2: [0.5, target])
    monkeypatch.setattr(torch, "compile", lambda model: model)


def random_masks(pruner, batch):
    """In the place of `BilevelPruner.upper`, at its cost: as many weights stay, drawn anew in each step."""
    value = pruner._loss(batch)
    torch.autograd.grad(value, pruner._scores)
    with torch.no_grad():
        for scores in pruner._scores:
            scores.normal_()
    method.reproject(pruner.model, pruner.scored, pruner._project)
    return float(value.detach())


def test_every_experiment_declares_what_decides():
    found = {each.claim: each for each in experiments_of("bip")}
    assert set(found) == {"bip/pruning-speedup", "bip/accuracy-over-imp", "bip/filter-speedup"}
    for claim in ("bip/pruning-speedup", "bip/accuracy-over-imp"):
        assert found[claim].decides["small"] == {"density": arms.DENSITY, "budget": arms.BUDGET, "seeds": 3}
    assert [point["density"] for point in found["bip/accuracy-over-imp"].points["small"]] == [0.2, 0.1, 0.05, 0.02]
    assert found["bip/filter-speedup"].decides["small"]["density"] == arms.FILTER_DENSITY
    assert found["bip/pruning-speedup"].guard.margin == found["bip/filter-speedup"].guard.margin == arms.MARGIN


def test_time_saved_by_random_masks_is_refuted(monkeypatch, short):
    honest = record_of("bip/pruning-speedup", POINT)
    assert judge(honest).verdict is not Verdict.REFUTED
    monkeypatch.setattr(method.BilevelPruner, "upper", random_masks)
    broken = record_of("bip/pruning-speedup", POINT)
    assert broken.quality.candidate < honest.quality.candidate - 0.1
    assert judge(broken).verdict is Verdict.REFUTED


def test_the_accuracy_of_random_masks_is_refuted(monkeypatch, short):
    honest = record_of("bip/accuracy-over-imp", POINT)
    assert judge(honest).verdict is not Verdict.REFUTED
    assert honest.measured.median > honest.controls["random"]
    assert honest.free == max(honest.controls["deleted"], *(honest.arms[name] for name in FREE_ARMS))
    monkeypatch.setattr(method.BilevelPruner, "upper", random_masks)
    broken = record_of("bip/accuracy-over-imp", POINT)
    assert broken.controls["deleted"] == honest.controls["deleted"]  # the rivals are as they were
    assert judge(broken).verdict is Verdict.REFUTED


def test_filters_that_are_not_the_pruned_ones_are_refuted(monkeypatch, short):
    honest = record_of("bip/filter-speedup", FILTERS)
    assert judge(honest).verdict is not Verdict.REFUTED
    assert honest.details["macs of an image"]["pruned"] < 0.7 * honest.details["macs of an image"]["dense"]

    def others(model, probe, *, granularity, real=room.compact):
        saved = real(model, probe, granularity=granularity)
        with torch.no_grad():
            model[3].weight.copy_(model[3].weight.roll(1, 0))  # each filter has its neighbour's weights
        return saved

    monkeypatch.setattr(room, "compact", others)
    broken = record_of("bip/filter-speedup", FILTERS)
    assert broken.quality.candidate < honest.quality.candidate - 0.05
    assert judge(broken).verdict is Verdict.REFUTED


def test_the_small_network_from_nothing_has_the_widths_of_the_pruned_one(short):
    little, saved = room.without_filters(0, 0.5, 30)
    small = arms.scratch(0, False, 2, 0.01, 0.5)
    for i in (0, 3, 6, 10, 12):
        assert little[i].weight.shape == small[i].weight.shape
    assert saved.after.macs < 0.4 * saved.before.macs


@pytest.mark.parametrize("way", arms.WAYS)
def test_every_way_takes_the_evaluations_it_counts_and_keeps_as_many_weights(way, monkeypatch):
    budget, density, calls = 12, 0.3, []
    arms.dense(0, False, budget, arms.rate_of(arms.DENSE_RATES, "dense").rate)

    def counted(model, batch, real=arms.loss):
        calls.append(len(batch[0]))
        return real(model, batch)

    monkeypatch.setattr(arms, "loss", counted)
    model, evaluations = arms.prune(way, 0, False, density, budget, 0.03, 1.0, budget)
    assert evaluations == len(calls)
    assert set(calls) == {arms.BATCH}
    rounds = len(arms.ladder(density)) if way.startswith("imp") else 1
    assert evaluations == rounds * budget
    masks = masks_of(model)
    if way == "dense, going on":
        assert not masks
    elif "filters" in way:
        assert list(masks) == ["0", "3", "6", "10"]
        assert [int(mask.flatten(1).any(1).sum()) for mask in masks.values()] == [5, 10, 10, 29]
    else:
        assert sum(mask.numel() for mask in masks.values()) == 27216
        assert sum(int((~mask).sum()) for mask in masks.values()) == 19051
        assert not emptied(masks)


def test_all_ways_see_the_same_batches_and_choices_see_other_digits():
    task = arms.Task(arms.split(0, False), 0.1, 4, 0.1, 1.0, 0, {})
    first, second = task.batches(), task.batches()
    for _ in range(3):
        a, b = next(first), next(second)
        assert torch.equal(a[0], b[0])
        assert torch.equal(a[1], b[1])
    real, choosing = arms.split(0, False), arms.split(0, True)
    assert not torch.equal(real[2], choosing[2])
    assert torch.equal(arms.split(1, False)[2], real[2])  # held-out images are the same for all seeds
    assert not torch.equal(arms.split(1, False)[0], real[0])


def test_the_cheapest_free_way_is_the_one_that_reaches_bip_first(monkeypatch):
    errors = {("bip", 1.0): 0.10, ("gradual", 0.5): 0.115, ("gradual", 1.0): 0.108, ("gradual", 2.0): 0.10}

    def error(way, budget, rate, mask_rate):
        return errors.get((way, budget / arms.BUDGET), 0.5)

    monkeypatch.setattr(arms, "rates_of", lambda way: (rates.Rate(0.1, (0.1, 0.2)), 1.0))
    monkeypatch.setattr(arms, "mean_error", error)
    grid = (0.25, 0.5, 1.0, 2.0, 4.0)
    scores = {way: {multiple: arms.least_budget(way, multiple) for multiple in grid} for way in ("gradual", "halving")}
    assert min(grid, key=scores["gradual"].__getitem__) == 1.0
    assert min(grid, key=scores["halving"].__getitem__) == 4.0  # none is enough
    monkeypatch.setattr(
        arms, "rate_of", lambda search, way: rates.Rate({"gradual": 1.0, "one-shot": 4.0, "halving": 4.0}[way], grid)
    )
    assert arms.cheapest() == ("gradual", 1.0)


def test_in_the_searches_random_masks_lose_by_more_than_the_margin():
    known = json.loads(rates.FILE.read_text(encoding="utf-8"))
    best = {
        arm: min(value for value in found["losses"].values() if value is not None)
        for search in (arms.WEIGHT_RATES, arms.MASK_RATES)
        for arm, found in known[search]["arms"].items()
    }
    assert best["random"] > best["bip"] + arms.MARGIN
    assert set(known[arms.WEIGHT_RATES]["arms"]) == set(arms.WAYS)
    assert set(known[arms.BUDGETS]["arms"]) == set(arms.FREE)
