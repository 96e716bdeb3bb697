"""BiP: how much less time it takes than iterative pruning, whether its networks are better, and what pruned filters save.

The task, the ways to prune and their rates are in `bip_arms`. How long a way takes follows mostly from the budget that it is given, which
is why the free baseline has a budget of its own: the least at which magnitude pruning of some kind is as accurate as BiP.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from assay.experiments.compression.bip_arms import (
    BATCH,
    BUDGET,
    DENSE_RATES,
    DENSITY,
    FREE,
    MARGIN,
    PRETRAIN,
    TRAIN,
    accuracy,
    cheapest,
    dense,
    imp,
    nearest_mean,
    prepared,
    prune,
    rate_of,
    rates_of,
    scratch,
    split,
)
from assay.experiments.core import Figure, Guard, Operator, Quality, Trained, Trial, experiment
from assay.experiments.seeds import paired
from assay.measure.cost import count_cost
from assay.methods.compression.bip import compact
from assay.methods.core.sparsity.masks import masks_of
from assay.methods.core.sparsity.removal import Removed

PRUNING = Operator(
    "a sparse network out of a trained dense one",
    free=(
        "the best of one-shot, gradual and halving magnitude pruning: the cheapest as accurate, the most accurate at equal cost"
    ),
)
PAPER: dict[str, Any] = {
    "data": "CIFAR-10, CIFAR-100, Tiny-ImageNet, ImageNet",
    "net": "residual and VGG networks",
    "density": "0.8, 0.64, 0.512, ...",
    "budget": "100 passes over the data in batches of 128",
    "seeds": 3,
    "schedules": "a cosine for the weights' rate, steps for the scores'",
}
DEPARTURES = {
    "data": "scikit-learn's 8 x 8 digits at random places of 12 x 12: the paper's sets come with no package",
    "net": "three convolutions and two linear layers, 27,216 weights, which train in a second",
    "density": "of the paper's series 0.055 decides, where ways differ; the accuracy is also measured at 0.2097, 0.1074 and 0.0225",
    "budget": "120 batches of 64 (1,200 at full), what such a network needs; a step of BiP takes two of them",
    "seeds": "3 at small, 5 at full",
    "schedules": "a cosine for both, so that the last masks are those that the weights were trained under",
    "rates": (
        "searched for every way at density 0.055 (filters and channels: 0.5) and 120 batches with one network a rate, and used at the "
        "other densities and budgets too; where scores are learned, their rate is searched together with that of the weights"
    ),
    "iterative pruning": "rewinds to the weights that the dense training had after a twentieth of its steps",
}


@dataclass(frozen=True)
class Judged:
    """What a way to prune gave: the accuracy on held-out digits under each seed; of the first seed evaluations and densities by layer."""

    scores: list[float]
    evaluations: float
    kept: dict[str, float]


def pruned(way: str, seed: int, density: float, budget: int, share: float = 1.0) -> tuple[nn.Module, float]:
    """The dense network of a seed pruned with `share` of the budget; and the evaluations that took."""
    rate, mask_rate = rates_of(way)
    return prune(way, seed, False, density, round(share * budget), rate.rate, mask_rate, budget)


def judged(way: str, seeds: int, density: float, budget: int, share: float = 1.0) -> Judged:
    """One of the ways under each seed, the dense network before pruning ("dense"), or a small one from nothing ("scratch")."""
    made = [_made(way, seed, density, budget, share) for seed in range(seeds)]
    scores = [accuracy(model, split(seed, False)) for seed, (model, _) in enumerate(made)]
    return Judged(scores, made[0][1], _kept(made[0][0]))


def _made(way: str, seed: int, density: float, budget: int, share: float) -> tuple[nn.Module, float]:
    if way == "dense":
        return _dense(seed, budget), float(PRETRAIN * budget)
    if way == "scratch":
        small = scratch(seed, False, budget, rate_of(DENSE_RATES, way).rate, density)
        return small, float((PRETRAIN + 1) * budget)
    return pruned(way, seed, density, budget, share)


def imp_along(densities: Sequence[float], seeds: int, budget: int) -> dict[float, Judged]:
    """Iterative pruning to the least of the densities under each seed, judged at each of them on the way as "imp" to it would be."""
    made = [_along(seed, densities, budget) for seed in range(seeds)]
    return {
        density: Judged([each[density].scores[0] for each in made], first.evaluations, first.kept)
        for density, first in made[0].items()
    }


def _along(seed: int, densities: Sequence[float], budget: int) -> dict[float, Judged]:
    rate, mask_rate = rates_of("imp")
    model, task = prepared(seed, False, min(densities), budget, rate.rate, mask_rate, budget)
    rounds: list[float] = []
    found: dict[float, Judged] = {}

    def look(density: float) -> None:
        rounds.append(density)
        if density in densities:
            found[density] = Judged([accuracy(model, task.data)], float(len(rounds) * budget), _kept(model))

    imp(model, task, after=look)
    return found


def _kept(model: nn.Module) -> dict[str, float]:
    return {name: float(mask.double().mean()) for name, mask in masks_of(model).items()}


def _dense(seed: int, budget: int) -> nn.Sequential:
    return dense(seed, False, budget, rate_of(DENSE_RATES, "dense").rate).model


def trained(scores: Sequence[float], way: str, unit: float = 1.0) -> Trained:
    """The declaration of a trained way, with the rate of its weights. Its floor is that of the first seed's training images."""
    rate = rate_of(DENSE_RATES, way) if way in ("dense", "scratch") else rates_of(way)[0]
    floor = unit * nearest_mean(split(0, False))
    return Trained(scores, floor, "the nearest class mean", rate.rate, rate.rates, higher_is_better=True, best=unit)


def mean(values: Sequence[float]) -> float:
    """The mean."""
    return sum(values) / len(values)


def over_of(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """The mean gain of one way over another with its interval, paired by seeds."""
    gain = paired(ours, theirs)
    return {"median": gain.median, "low": gain.low, "high": gain.high}


# ---------------------------------------------------------------------------------------------------------------- time to prune


@experiment(
    "bip/pruning-speedup",
    points={
        "smoke": [{"density": 0.328, "budget": 12, "seeds": 3}],
        "small": [{"density": DENSITY, "budget": BUDGET, "seeds": 3}],
        "full": [{"density": DENSITY, "budget": 10 * BUDGET, "seeds": 5}],
    },
    operator=PRUNING,
    guard=Guard("accuracy on held-out digits", MARGIN, higher_is_better=True, relative=False),
    paper=PAPER,
    departures=DEPARTURES,
    refuted_if=(
        "the whole interval of IMP's time over BiP's lies below 1, or with as many evaluations as BiP in all one-shot pruning, or pruning "
        "by halves in rounds, is certainly more accurate"
    ),
    refutes=lambda record: (
        record["measured"]["high"] < 1
        or record["details"]["over one-shot"]["high"] < 0
        or record["details"]["over halving"]["high"] < 0
    ),
    measured_here="pruning a small trained network on moved digits to density 0.055, its dense training not counted",
    minutes=60,
)
def pruning_speedup(density: float, budget: int, seeds: int) -> Trial:
    """One whole pruning from the trained dense network: iterative magnitude pruning (IMP) against BiP.

    IMP drops a fifth of what is left a round, rewinds, and trains each round with the budget that BiP has as a whole. How long that takes
    follows mostly from the number of rounds; so what can refute and the free baseline are pruning with less training. The free baseline
    has as little as it needs to come within a point of BiP (searched once, at the density that decides and 120 evaluations; "free" in
    the details says which way that is, and with what budget; 2 means that perhaps nothing was enough). The guard's margin is a point of
    accuracy against IMP. Controls at BiP's budget: the scores' steps left out (one-shot pruning, then training), random masks of the
    same size in each layer, gradual pruning as the rival, HYDRA, and halving: iterative pruning with all rounds in BiP's budget.
    """
    way, share = cheapest()
    found: dict[str, Judged] = {}
    _dense(0, budget)  # trained before the clock runs

    def run(name: str, of_budget: float = 1.0) -> Callable[[], float]:
        return lambda: pruned(name, 0, density, budget, of_budget)[1]

    def quality() -> Quality:
        for name in ("imp", "bip", "one-shot", "random", "gradual", "hydra", "halving", "dense"):
            found[name] = judged(name, seeds, density, budget)
        found["free"] = judged(way, seeds, density, budget, share)
        gain, base = paired(found["bip"].scores, found["imp"].scores), mean(found["imp"].scores)
        controls = {"deleted": "one-shot", "random": "random", "rival": "gradual", "HYDRA": "hydra", "free": "free"}
        controls["halving"] = "halving"
        return Quality(
            base + gain.median,
            base,
            base + gain.low,
            base + gain.high,
            controls={control: mean(found[name].scores) for control, name in controls.items()},
            rival="gradual magnitude pruning with as many evaluations",
        )

    def arms_trained() -> dict[str, Trained]:
        named = {name: name for name in found if name != "random"} | {"free": way}
        return {name: trained(found[name].scores, searched_as) for name, searched_as in named.items()}

    def details() -> dict[str, Any]:
        over = {"one-shot": "one-shot", "random": "random", "halving": "halving"}
        return {
            **{f"over {name}": over_of(found["bip"].scores, found[other].scores) for name, other in over.items()},
            "free": {"way": way, "budget over BiP's": share},
            "evaluations": {name: each.evaluations for name, each in found.items()},
            "passes": {name: each.evaluations * BATCH / TRAIN for name, each in found.items()},
            "accuracy": {name: each.scores for name, each in found.items()},
            "scores' rate": rates_of("bip")[1],
        }

    return Trial(
        run("imp"),
        run("bip"),
        free=run(way, share),
        arms={"one-shot pruning, as many evaluations": run("one-shot"), "HYDRA, as many evaluations": run("hydra")},
        quality=quality,
        trained=arms_trained,
        details=details,
    )


# ------------------------------------------------------------------------------------------------------------- better networks


@experiment(
    "bip/accuracy-over-imp",
    points={
        "smoke": [{"density": 0.328, "beside": [0.64], "budget": 12, "seeds": 3}],
        "small": [{"density": DENSITY, "beside": [0.2097, 0.1074, 0.0225], "budget": BUDGET, "seeds": 3}],
        "full": [{"density": DENSITY, "beside": [0.2097, 0.1074, 0.0225], "budget": 10 * BUDGET, "seeds": 5}],
    },
    operator=PRUNING,
    paper=PAPER,
    departures=DEPARTURES,
    refuted_if="the whole interval of BiP's gain lies below 0 points over IMP, or over HYDRA with as many evaluations",
    refutes=lambda record: record["measured"]["high"] < 0 or record["details"]["over HYDRA"]["high"] < 0,
    measured_here="accuracy on moved held-out digits",
    minutes=120,
)
def accuracy_over_imp(density: float, beside: Sequence[float], budget: int, seeds: int) -> Figure:
    """Points of accuracy over iterative magnitude pruning, which has as many evaluations in each round as BiP has as a whole.

    All other ways have as many as BiP. The free baseline is the most accurate of one-shot, gradual and halving pruning on the held-out
    images, which favours it. Controls, as gains over IMP too: the scores' steps left out (one-shot
    pruning, then training), random masks, and HYDRA (global here, as in the release). Arms: the dense network, and trained as much longer;
    BiP without the implicit part of its gradient, and as released. At the densities `beside` the one that decides IMP, one-shot
    pruning, HYDRA and BiP are in the details. Intervals are Student's t over the seeds' paired differences, the held-out images staying
    the same.
    """
    iterative = imp_along([density, *beside], seeds, budget)
    ways = ["bip", "random", "hydra", "bip, gamma infinite", "bip, as released", *FREE, "dense", "dense, going on"]
    found = {"imp": iterative[density]} | {way: judged(way, seeds, density, budget) for way in ways}
    points = {way: _points(each) for way, each in found.items()}
    gain = {way: paired(points[way], points["imp"]) for way in ways}
    arms = {
        "the dense network": "dense",
        "the dense network, trained on": "dense, going on",
        "BiP without the implicit gradient": "bip, gamma infinite",
        "BiP as released": "bip, as released",
        "gradual magnitude pruning": "gradual",
        "magnitude pruning that halves": "halving",
    }
    elsewhere = {
        each: {"imp": iterative[each]} | {way: judged(way, seeds, each, budget) for way in ("one-shot", "hydra", "bip")}
        for each in beside
    }
    return Figure(
        gain["bip"].median,
        "points",
        gain["bip"].low,
        gain["bip"].high,
        baseline=0.0,
        free=max(gain[way].median for way in FREE),
        controls={
            "deleted": gain["one-shot"].median,
            "random": gain["random"].median,
            "rival": gain["hydra"].median,
        },
        arms={name: gain[way].median for name, way in arms.items()},
        trained={way: trained(points[way], way, 100.0) for way in found if way != "random"},
        details={
            "accuracy": points,
            "over HYDRA": over_of(points["bip"], points["hydra"]),
            "over one-shot": over_of(points["bip"], points["one-shot"]),
            "evaluations": {way: each.evaluations for way, each in found.items()},
            "passes": {way: each.evaluations * BATCH / TRAIN for way, each in found.items()},
            "densities by layer": {way: found[way].kept for way in ("bip", "imp", "one-shot")},
            "at other densities": {
                f"{each:g}": {
                    "accuracy": {way: _points(judged_there) for way, judged_there in there.items()},
                    "BiP over IMP": over_of(_points(there["bip"]), _points(there["imp"])),
                    "passes": {way: judged_there.evaluations * BATCH / TRAIN for way, judged_there in there.items()},
                }
                for each, there in elsewhere.items()
            },
        },
    )


def _points(each: Judged) -> list[float]:
    return [100 * score for score in each.scores]


# ------------------------------------------------------------------------------------------------------------- filters removed


@experiment(
    "bip/filter-speedup",
    points={
        "smoke": [{"density": 0.5, "images": 256, "budget": 12, "seeds": 3, "compiled": False}],
        "small": [{"density": 0.5, "images": 1000, "budget": BUDGET, "seeds": 3, "compiled": True}],
        "full": [{"density": 0.5, "images": 2000, "budget": 10 * BUDGET, "seeds": 5, "compiled": True}],
    },
    operator=Operator("a forward pass of the network", free="the dense network, compiled as the pruned one is"),
    guard=Guard("accuracy on held-out digits", MARGIN, higher_is_better=True, relative=False),
    paper=PAPER | {"density": "several shares of the filters, the same in every layer"},
    departures=DEPARTURES | {"density": "half of the filters and hidden neurons of each layer"},
    refuted_if=(
        "the whole interval of the dense network's time over the pruned one's lies below 1, or a network of its widths, trained "
        "from nothing with as many evaluations as dense training and pruning together, is certainly more accurate"
    ),
    refutes=lambda record: record["measured"]["high"] < 1 or record["details"]["over scratch"]["high"] < 0,
    measured_here="a forward pass over moved digits on this processor",
    minutes=60,
)
def filter_speedup(density: float, images: int, budget: int, seeds: int, compiled: bool) -> Trial:
    """The dense network against the same one without the filters that BiP prunes, which are really gone (`compact`); both `compiled`.

    The guard's margin is a point of accuracy against the dense network, trained as much longer as pruning takes. Controls, all trained
    with BiP's budget from the same dense network: filters chosen by norm (the scores' steps left out), at random, and BiP by input
    channels, which leaves the same widths. The rival has the pruned network's widths, and so its time, but was small from the beginning:
    its accuracy can refute.
    """
    big = _dense(0, budget)
    little, saved = without_units("filters", 0, density, budget)
    by_channels, _ = without_units("channels", 0, density, budget)
    x = split(0, False)[2][:images]
    found: dict[str, list[float]] = {}

    def run(model: Any) -> Callable[[], Any]:
        def forward(given: Tensor = x) -> Any:
            with torch.inference_mode():
                return model(given)

        return forward

    def quality() -> Quality:
        for way, first in (("filters", little), ("channels", by_channels)):
            small = [first, *(without_units(way, seed, density, budget)[0] for seed in range(1, seeds))]
            found[way] = [accuracy(model, split(seed, False)) for seed, model in enumerate(small)]
        for way in ("dense, going on", "filters by norm", "filters at random", "scratch"):
            found[way] = judged(way, seeds, density, budget).scores
        gain, base = paired(found["filters"], found["dense, going on"]), mean(found["dense, going on"])
        controls = {"deleted": "filters by norm", "random": "filters at random", "rival": "scratch"}
        controls["BiP by channels"] = "channels"
        return Quality(
            base + gain.median,
            base,
            base + gain.low,
            base + gain.high,
            controls={control: mean(found[way]) for control, way in controls.items()},
            rival="a network of these widths trained from nothing",
        )

    def details() -> dict[str, Any]:
        return {
            "accuracy": found,
            "over scratch": over_of(found["filters"], found["scratch"]),
            "macs of an image": {"dense": count_cost(big, x[:1]).macs, "pruned": count_cost(little, x[:1]).macs},
            "parameters": {"dense": saved.before.params, "pruned": saved.after.params},
        }

    ready = torch.compile if compiled else _as_it_is
    eager = {
        "the dense network, not compiled": run(big),
        "the pruned network, not compiled": run(little),
    }
    return Trial(
        run(ready(big)),
        run(ready(little)),
        arms={"the network pruned by channels": run(ready(by_channels)), **(eager if compiled else {})},
        quality=quality,
        trained=lambda: {way: trained(scores, way) for way, scores in found.items() if way != "filters at random"},
        details=details,
    )


def _as_it_is(model: nn.Module) -> nn.Module:
    return model


def without_units(way: str, seed: int, density: float, budget: int) -> tuple[nn.Module, Removed]:
    """The network of a seed that BiP pruned by "filters" or "channels", with these taken out, and what that saved."""
    model, _ = pruned(way, seed, density, budget)
    probe = split(seed, False)[2][:8]
    return model, compact(model, probe, granularity="filters" if way == "filters" else "channels")
