"""Masks that learn nothing, filters that are not the pruned ones and better networks are noticed; all ways get what they are said to."""

from __future__ import annotations

import copy
import json
from functools import cache, partial

import pytest
import torch
from tests.properties.sabotage import PAYS, record_of

import assay.methods.compression.bip as method
from assay.evidence.types import Verdict
from assay.evidence.verdict import judge
from assay.experiments import experiments_of, rates
from assay.experiments.compression import bip as room
from assay.experiments.compression import bip_arms as arms
from assay.methods.core.sparsity.masks import masks_of
from assay.methods.core.sparsity.projections import emptied, kept_count
from assay.workloads.images import digits_split

POINT = {"density": 0.2097, "budget": 20, "seeds": 3}
FILTERS = {"density": arms.FILTER_DENSITY, "images": 100, "budget": 20, "seeds": 3, "compiled": False}
RATES = dict.fromkeys(("random", "gradual", "halving", "imp", "hydra"), 0.3)  # 0.1 for the others
MASK_RATES = {"hydra": 100.0, "filters": 10.0, "channels": 10.0}  # 1 for the others
KNOWN: dict[object, object] = {}
DENSE, SPLIT = cache(arms.dense.__wrapped__), cache(arms.split.__wrapped__)  # of the small task below


@pytest.fixture
def short(monkeypatch):
    """A narrow network, small batches, iterative pruning in two rounds; what a test before has trained already is not trained again.

    The rates are those of such a network, not the searched ones. Networks that are trained for a moment are held to no floor.
    """
    monkeypatch.setattr(arms, "WIDTHS", (8, 16, 16, 32))
    monkeypatch.setattr(arms, "BATCH", 32)
    monkeypatch.setattr(arms, "TEST", 500)
    monkeypatch.setattr(arms, "SERIES", (0.5,))

    def rate_of(search, arm):
        known = {arms.MASK_RATES: MASK_RATES.get(arm, 1.0), arms.BUDGETS: 1.0 if arm == "gradual" else 2.0}
        return rates.Rate(known.get(search, RATES.get(arm, 0.1)), (0.1, 0.3))

    for module in (arms, room):
        monkeypatch.setattr(module, "rate_of", rate_of)
        monkeypatch.setattr(module, "dense", DENSE)
        monkeypatch.setattr(module, "split", SPLIT)

    def remembered(real, *given):
        key = (real.__name__, method.BilevelPruner.upper, repr(given))
        if key not in KNOWN:
            KNOWN[key] = real(*given)
        return KNOWN[key]

    monkeypatch.setattr(room, "judged", partial(remembered, room.judged))
    monkeypatch.setattr(room, "imp_along", partial(remembered, room.imp_along))

    def pruned(way, *given, real=room.pruned):
        again = way in ("filters", "channels")
        return copy.deepcopy(remembered(real, way, *given)) if again else real(way, *given)

    monkeypatch.setattr(room, "pruned", pruned)
    monkeypatch.setattr(room, "nearest_mean", lambda split: -1.0)


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
        decides = found[claim].decides["small"]
        assert (decides["density"], decides["budget"], decides["seeds"]) == (arms.DENSITY, arms.BUDGET, 3)
    assert found["bip/accuracy-over-imp"].decides["small"]["beside"] == [0.2097, 0.1074, 0.0225]
    assert found["bip/filter-speedup"].decides["small"]["density"] == arms.FILTER_DENSITY
    assert found["bip/pruning-speedup"].guard.margin == found["bip/filter-speedup"].guard.margin == arms.MARGIN


def test_time_saved_by_random_masks_is_refuted(monkeypatch, short):
    honest = record_of("bip/pruning-speedup", POINT)
    assert judge(honest).verdict is not Verdict.REFUTED
    monkeypatch.setattr(method.BilevelPruner, "upper", random_masks)
    broken = record_of("bip/pruning-speedup", POINT)
    assert broken.quality.controls["deleted"] == honest.quality.controls["deleted"]  # the rivals are as they were
    assert broken.quality.candidate < honest.quality.candidate - 0.05
    assert judge(broken).verdict is Verdict.REFUTED


def test_the_accuracy_of_random_masks_is_refuted(monkeypatch, short):
    point = {**POINT, "beside": [0.5]}
    honest = record_of("bip/accuracy-over-imp", point)
    assert judge(honest).verdict is not Verdict.REFUTED
    assert honest.measured.median > honest.controls["random"]
    free = ("gradual magnitude pruning", "magnitude pruning that halves")
    assert honest.free == max(honest.controls["deleted"], *(honest.arms[name] for name in free))
    assert set(honest.details["at other densities"]["0.5"]["accuracy"]) == {"imp", "one-shot", "hydra", "bip"}
    assert honest.details["passes"]["imp"] == 2 * honest.details["passes"]["bip"]  # two rounds
    assert honest.details["passes"]["bip"] == honest.details["passes"]["one-shot"]
    monkeypatch.setattr(method.BilevelPruner, "upper", random_masks)
    broken = record_of("bip/accuracy-over-imp", point)
    assert broken.controls["deleted"] == honest.controls["deleted"]
    assert judge(broken).verdict is Verdict.REFUTED


def test_the_verdict_on_filters_follows_from_the_network_without_them(monkeypatch, short):
    """At the density that decides: worse filters are refuted, and a network as accurate as the dense one pays."""
    honest = record_of("bip/filter-speedup", FILTERS)
    macs = honest.details["macs of an image"]
    assert macs["pruned"] < 0.4 * macs["dense"]
    real = room.compact

    def others(model, probe, *, granularity):
        saved = real(model, probe, granularity=granularity)
        with torch.no_grad():
            model[3].weight.copy_(model[3].weight.roll(1, 0))  # each filter has its neighbour's weights
        return saved

    def better(model, probe, *, granularity):
        saved = real(model, probe, granularity=granularity)
        if granularity == "filters":
            arms.descend(model, arms.stream(arms.split(0, False), 0), 120, 0.1)
        return saved

    monkeypatch.setattr(room, "compact", others)
    broken = record_of("bip/filter-speedup", FILTERS)
    assert broken.quality.candidate < honest.quality.candidate - 0.05
    assert judge(broken).verdict is Verdict.REFUTED
    monkeypatch.setattr(room, "compact", better)
    assert judge(record_of("bip/filter-speedup", FILTERS)).verdict in PAYS


def test_iterative_pruning_judged_on_the_way_is_that_to_each_density(short):
    along = room.imp_along([0.2097, 0.5], 2, 6)
    for density in (0.2097, 0.5):
        assert along[density] == room.judged("imp", 2, density, 6)


@pytest.mark.parametrize("way", ["filters", "channels"])
def test_the_small_network_from_nothing_has_the_widths_of_the_pruned_one(way, short):
    little, saved = room.without_units(way, 0, 0.5, 30)
    small = arms.scratch(0, False, 2, 0.01, 0.5)
    for i in (0, 3, 6, 10, 12):
        assert little[i].weight.shape == small[i].weight.shape
    assert saved.after.macs < 0.4 * saved.before.macs


@pytest.mark.parametrize("way", arms.WAYS)
def test_every_way_takes_the_evaluations_it_counts_and_keeps_as_many_weights(way, monkeypatch, short):
    budget, density, calls = 12, 0.3, []
    arms.dense(0, False, budget, arms.rate_of(arms.DENSE_RATES, "dense").rate)

    def counted(model, batch, real=arms.loss):
        calls.append(len(batch[0]))
        return real(model, batch)

    monkeypatch.setattr(arms, "loss", counted)
    model, evaluations = arms.prune(way, 0, False, density, budget, 0.03, 1.0, budget)
    assert evaluations == len(calls)
    assert set(calls) == {arms.BATCH}
    assert evaluations == (2 * budget if way == "imp" else budget)
    masks = masks_of(model)
    if way == "dense, going on":
        assert not masks
    elif way in arms.BY_UNITS:
        axis, a_unit = (
            (1, [1, 1, 4, 1]) if way == "channels" else (0, [1, 1, 1, 1])
        )  # a channel is four inputs once it is flat
        kept = [int(mask.transpose(0, axis).flatten(1).any(1).sum()) for mask in masks.values()]
        assert kept == [n * kept_count(width, density) for n, width in zip(a_unit, arms.WIDTHS, strict=True)]
    else:
        total = sum(mask.numel() for mask in masks.values())
        assert total == sum(model[i].weight.numel() for i in (0, 3, 6, 10, 12))
        assert sum(mask.numel() - int(mask.sum()) for mask in masks.values()) == total - kept_count(total, density)
        assert not emptied(masks)


def test_the_rounds_are_those_of_the_release():
    assert arms.rounds_to(0.055) == list(arms.SERIES[:13])
    assert arms.rounds_to(0.5) == [0.8, 0.64, 0.512, 0.5]
    for earlier, later in zip(arms.SERIES, arms.SERIES[1:], strict=False):
        assert later == pytest.approx(0.8 * earlier, rel=0.01)


def test_each_digit_lies_whole_in_its_image():
    images, labels, _, _ = digits_split(seed=0)
    placed, wanted = arms.placed(images, labels, 40, 3)
    generator = torch.Generator().manual_seed(3)
    picks = torch.randint(len(images), (40,), generator=generator)
    places = torch.randint(5, (40, 2), generator=generator).tolist()
    assert torch.equal(wanted, labels[picks])
    for image, pick, (top, left) in zip(placed, picks, places, strict=True):
        digit = image[0, top : top + 8, left : left + 8]
        torch.testing.assert_close((digit + 1) / 2, images[pick, 0])
        assert float((image + 1).sum()) == pytest.approx(float((digit + 1).sum()))  # nothing beside it


def test_all_ways_see_the_same_batches_and_choices_see_other_digits(monkeypatch):
    task = arms.Task(arms.split(0, False), 0.1, 4, 0.1, 1.0, 0, {})
    first, second = task.batches(), task.batches()
    for _ in range(3):
        a, b = next(first), next(second)
        assert torch.equal(a[0], b[0])
        assert torch.equal(a[1], b[1])
    real = arms.split(0, False)
    assert torch.equal(arms.split(1, False)[2], real[2])  # held-out images are the same for all seeds
    assert not torch.equal(arms.split(1, False)[0], real[0])
    monkeypatch.setattr(arms, "placed", lambda images, labels, n, seed: (images, labels))
    train, held_out, choice_train, choice_test = (
        {tuple(image.flatten().tolist()) for image in images}
        for choosing in (False, True)
        for images in arms.split.__wrapped__(0, choosing)[::2]
    )
    assert not train & held_out
    assert not choice_train & choice_test
    assert choice_train | choice_test == train


def test_the_cheapest_free_way_is_the_one_that_reaches_bip_first(monkeypatch):
    errors = {("bip", 1.0): 0.10, ("gradual", 0.5): 0.115, ("gradual", 1.0): 0.108, ("gradual", 2.0): 0.10}

    def error(way, budget, rate, mask_rate):
        return errors.get((way, budget / arms.BUDGET), 0.5)

    monkeypatch.setattr(arms, "rates_of", lambda way: (rates.Rate(0.1, (0.1, 0.2)), 1.0))
    monkeypatch.setattr(arms, "mean_error", error)
    grid = (0.25, 0.5, 1.0, 2.0)
    scores = {way: {multiple: arms.least_budget(way, multiple) for multiple in grid} for way in ("gradual", "halving")}
    assert min(grid, key=scores["gradual"].__getitem__) == 1.0
    assert min(grid, key=scores["halving"].__getitem__) == 2.0  # none is enough
    monkeypatch.setattr(arms, "rate_of", lambda search, way: rates.Rate({"gradual": 1.0}.get(way, 2.0), grid))
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
