"""What the experiments of BiP train: a small network on moved digits, and the ways to prune it, each with its rates searched.

All ways begin with the same dense network of a seed and see the same images in the same order. What they take is counted in evaluations: a
forward and backward pass over one batch. A step of BiP is two of them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay.experiments.rates import Rate, chosen, searched
from assay.methods.compression.bip import BilevelPruner
from assay.methods.core.sparsity.masks import matrix_of, prunable, put_masks
from assay.methods.core.sparsity.projections import global_, kept_count, structured
from assay.methods.core.sparsity.schedules import Gradual, iterative, ladder
from assay.methods.core.sparsity.units import groups
from assay.workloads.images import digits_split

Split = tuple[Tensor, Tensor, Tensor, Tensor]
"""Images and labels to train on, images and labels to judge on."""
Batch = tuple[Tensor, Tensor]

CANVAS, DIGIT = 12, 8  # pixels a side: of the image, and of the digit at a random place in it
TRAIN, TEST, BATCH = 2000, 2000, 64  # images
WIDTHS = (16, 32, 32, 96)
MOMENTUM, DECAY = 0.9, 1e-4
SERIES = (
    0.8,
    0.64,
    0.512,
    0.41,
    0.328,
    0.262,
    0.2097,
    0.1678,
    0.1342,
    0.1074,
    0.0859,
    0.0687,
    0.055,
    0.044,
    0.035,
    0.028,
    0.0225,
)
"""The densities of the release, a fifth less each time: the rounds of iterative pruning."""
DENSITY, BUDGET = 0.055, 120  # at which rates are searched, and which decide at small; evaluations
PRETRAIN = 2  # times the budget: the dense training, as in the paper
EARLY = 0.05  # of the dense training: where rewinding goes back to, our choice
UPDATES = 10  # of gradual pruning's masks, over the first half of its evaluations
MARGIN = 0.01  # of accuracy: "as accurate"
FREE = ("one-shot", "gradual", "halving")
"""What needs nothing but torch.nn.utils.prune."""


# ------------------------------------------------------------------------------------------------------------------ the task


def placed(images: Tensor, labels: Tensor, n: int, seed: int) -> Batch:
    """`n` of the digits (m, 1, 8, 8), each at a random place of an empty square: (n, 1, 12, 12) in [-1, 1], and their labels."""
    generator = torch.Generator().manual_seed(seed)
    picks = torch.randint(len(images), (n,), generator=generator)
    places = torch.randint(CANVAS - DIGIT + 1, (n, 2), generator=generator)
    rows, columns = (corner[:, None] + torch.arange(DIGIT) for corner in places.T)
    canvas = torch.zeros(n, 1, CANVAS, CANVAS)
    canvas[torch.arange(n)[:, None, None], 0, rows[:, :, None], columns[:, None]] = images[picks, 0]
    return (canvas - 0.5) / 0.5, labels[picks]


@cache
def split(seed: int, choosing: bool) -> Split:
    """The task of a seed: other draws of the digits for training, the same images to be judged on.

    For choices (rates, budgets) those judged on come from a part of the digits for training, which is then not trained on.
    """
    images, labels, test_images, test_labels = digits_split(seed=0)
    if choosing:
        test_images, test_labels = images[1000:], labels[1000:]
        images, labels = images[:1000], labels[:1000]
    return (*placed(images, labels, TRAIN, 10 + seed), *placed(test_images, test_labels, TEST, 2))


def nearest_mean(data: Split) -> float:
    """The accuracy of the trivial rule: the class whose average image is the nearest."""
    images, labels, test, wanted = data
    means = torch.stack([images[labels == label].flatten(1).mean(0) for label in range(10)])
    return float((torch.cdist(test.flatten(1), means).argmin(1) == wanted).double().mean())


@torch.no_grad()
def accuracy(model: nn.Module, data: Split) -> float:
    """The share of the images to judge on that are told right, the model in evaluation mode."""
    return float((model.eval()(data[2]).argmax(1) == data[3]).double().mean())


def network(seed: int, density: float = 1.0) -> nn.Sequential:
    """Three convolutions with norms, two linear layers: 27,216 weights that can be masked. No padding, so that filters can be removed.

    With a `density` below 1, narrow from the beginning: the widths that pruning this share of filters leaves.
    """
    torch.manual_seed(seed)
    a, b, c, d = (kept_count(width, density) for width in WIDTHS)
    return nn.Sequential(
        *(nn.Conv2d(1, a, 3, bias=False), nn.BatchNorm2d(a), nn.ReLU()),
        *(nn.Conv2d(a, b, 3, stride=2, bias=False), nn.BatchNorm2d(b), nn.ReLU()),
        *(nn.Conv2d(b, c, 3, bias=False), nn.BatchNorm2d(c), nn.ReLU(), nn.Flatten()),
        *(nn.Linear(4 * c, d), nn.ReLU(), nn.Linear(d, 10)),
    )


def stream(data: Split, seed: int) -> Iterator[Batch]:
    """Batches for ever, the images in a new order in every pass."""
    images, labels = data[:2]
    generator = torch.Generator().manual_seed(seed)
    while True:
        for picks in torch.randperm(len(images), generator=generator).split(BATCH):
            yield images[picks], labels[picks]


def loss(model: nn.Module, batch: Batch) -> Tensor:
    """The cross-entropy of a batch."""
    return F.cross_entropy(model(batch[0]), batch[1])


def descend(
    model: nn.Module,
    batches: Iterator[Batch],
    evaluations: int,
    rate: float,
    before: Callable[[int], None] = lambda step: None,
) -> float:
    """SGD with momentum, weight decay and a cosine down to 0; `before(step)` comes first in each step. Returns the evaluations.

    Raises ValueError for a loss that is not finite.
    """
    optimizer = torch.optim.SGD(model.parameters(), rate, momentum=MOMENTUM, weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, evaluations)
    model.train()
    for step in range(evaluations):
        before(step)
        value = loss(model, next(batches))
        if not bool(torch.isfinite(value)):
            raise ValueError(f"loss must be finite, got {float(value.detach())}")
        optimizer.zero_grad()
        torch.autograd.backward([value])
        optimizer.step()
        schedule.step()
    return float(evaluations)


# ---------------------------------------------------------------------------------------------------------- the ways to prune


@dataclass(frozen=True)
class Task:
    """One pruning: the data, how much stays, how many evaluations (a round, for iterative pruning), the rates, where rewinding goes."""

    data: Split
    density: float
    budget: int
    rate: float
    mask_rate: float
    seed: int
    early: Mapping[str, Tensor]

    def batches(self) -> Iterator[Batch]:
        """The same batches in the same order for every way to prune."""
        return stream(self.data, 1000 + self.seed)


def magnitudes(model: nn.Module) -> dict[str, Tensor]:
    """|w| of all layers, masked where they are."""
    return {name: matrix_of(model, name).detach().abs() for name in prunable(model)}


def dense_on(model: nn.Module, task: Task) -> float:
    """Nothing is pruned: the dense network, trained with as many evaluations more as pruning takes."""
    return descend(model, task.batches(), task.budget, task.rate)


def one_shot(model: nn.Module, task: Task) -> float:
    """The largest weights of all layers stay; then training."""
    put_masks(model, global_(magnitudes(model), task.density))
    return descend(model, task.batches(), task.budget, task.rate)


def at_random(model: nn.Module, task: Task) -> float:
    """As many weights of each layer as one-shot pruning keeps, but random ones; then training."""
    put_masks(model, shuffled(global_(magnitudes(model), task.density), task.seed))
    return descend(model, task.batches(), task.budget, task.rate)


def shuffled(masks: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """The same masks, the places of each layer in a random order."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: mask.flatten()[torch.randperm(mask.numel(), generator=generator)].view_as(mask)
        for name, mask in masks.items()
    }


def gradual(model: nn.Module, task: Task) -> float:
    """Zhu and Gupta's cubic schedule over the first half of the training; what is gone stays gone."""
    every = max(1, task.budget // (2 * UPDATES))
    schedule = Gradual(final=1 - task.density, every=every, updates=min(UPDATES, max(1, task.budget // 2)))

    def thin(step: int) -> None:
        if schedule.due(step):
            sparsity = schedule.sparsity(step)
            share = task.density if sparsity == schedule.final else 1 - sparsity
            put_masks(model, global_(magnitudes(model), share))

    return descend(model, task.batches(), task.budget, task.rate, thin)


def halving(model: nn.Module, task: Task) -> float:
    """Half of what is left goes in each round, the budget is shared out among the rounds, and nothing is rewound."""
    densities, batches = ladder(task.density, 0.5), task.batches()
    each = max(1, task.budget // len(densities))
    rounds = iterative(
        model,
        list(prunable(model)),
        densities,
        lambda masked: descend(masked, batches, each, task.rate),
        project=global_,
    )
    return sum(step.passes for step in rounds)


def rounds_to(density: float) -> list[float]:
    """The densities of iterative pruning: those of `SERIES` above this one, and this one last."""
    return [*(d for d in SERIES if d > density), density]


def imp(model: nn.Module, task: Task, after: Callable[[float], None] = lambda density: None) -> float:
    """Iterative magnitude pruning, a fifth of what is left a round; each round goes back to the early weights and has the whole budget.

    `after(density)` comes at the end of each round.
    """
    densities, batches = rounds_to(task.density), task.batches()
    left = iter(densities)

    def train(masked: nn.Module) -> float:
        spent = descend(masked, batches, task.budget, task.rate)
        after(next(left))
        return spent

    rounds = iterative(model, list(prunable(model)), densities, train, project=global_, rewind=task.early)
    return sum(step.passes for step in rounds)


def _pruner(model: nn.Module, task: Task, **settings: Any) -> BilevelPruner:
    return BilevelPruner(
        model,
        loss,
        density=task.density,
        rate=task.rate,
        mask_rate=task.mask_rate,
        momentum=MOMENTUM,
        weight_decay=DECAY,
        **settings,
    )


def hydra(model: nn.Module, task: Task) -> float:
    """Scores learned on frozen weights for half of the budget, then the weights under the last mask."""
    half, batches = task.budget // 2, task.batches()
    pruner = _pruner(model, task, inverse_gamma=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(pruner.upper_optimizer, half)
    model.train()
    for _ in range(half):
        pruner.upper(next(batches))
        schedule.step()
    pruner.finish()
    return half + descend(model, batches, task.budget - half, task.rate)


def bip(model: nn.Module, task: Task, **settings: Any) -> float:
    """BiP: two evaluations a step, both rates down to 0 along a cosine, no training afterwards."""
    steps, batches = task.budget // 2, task.batches()
    pruner = _pruner(model, task, **settings)
    optimizers = (pruner.lower_optimizer, pruner.upper_optimizer)
    schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps) for optimizer in optimizers]
    model.train()
    for _ in range(steps):
        upper, lower = next(batches), next(batches)
        pruner.step(upper, lower)
        for schedule in schedules:
            schedule.step()
    pruner.finish()
    return 2.0 * steps


def filters_by_norm(model: nn.Module, task: Task, *, random: bool = False) -> float:
    """The filters of each layer with the largest norms stay, or random ones, as many; then training."""
    masks = {}
    generator = torch.Generator().manual_seed(task.seed)
    for name in groups(model):
        weight = matrix_of(model, name).detach()
        scores = torch.rand(len(weight), generator=generator).view(-1, *[1] * (weight.dim() - 1)).expand_as(weight)
        masks[name] = structured(scores if random else weight, task.density)
    put_masks(model, masks)
    return descend(model, task.batches(), task.budget, task.rate)


Way = Callable[[nn.Module, Task], float]
WAYS: dict[str, Way] = {
    "dense, going on": dense_on,
    "one-shot": one_shot,
    "random": at_random,
    "gradual": gradual,
    "halving": halving,
    "imp": imp,
    "hydra": hydra,
    "bip": bip,
    "bip, gamma infinite": partial(bip, inverse_gamma=0.0),
    "bip, as released": partial(bip, variant="as_released"),
    "filters": partial(bip, granularity="filters"),
    "channels": partial(bip, granularity="channels"),
    "filters by norm": filters_by_norm,
    "filters at random": partial(filters_by_norm, random=True),
}
OWN_MASK_RATE = ("hydra", "bip", "bip, gamma infinite", "bip, as released", "filters", "channels")
BY_UNITS = ("filters", "channels", "filters by norm", "filters at random")
FILTER_DENSITY = 0.5


# ------------------------------------------------------------------------------------------------------------------ the rates

DENSE_RATES, WEIGHT_RATES, MASK_RATES, BUDGETS = "bip/dense", "bip/weights", "bip/masks", "bip/budgets"
GRID = (0.01, 0.03, 0.1, 0.3, 1.0)
NO_MASK_RATE = 1.0  # of ways that learn no scores: not used
RATE_SEEDS, BUDGET_SEEDS = (100,), (100, 101)


@dataclass(frozen=True)
class Start:
    """A trained dense network, and its state dict early in that training."""

    model: nn.Sequential
    early: Mapping[str, Tensor]


@cache
def dense(seed: int, choosing: bool, budget: int, rate: float) -> Start:
    """The dense network of a seed, trained with `PRETRAIN` times the budget that pruning has."""
    model = network(seed)
    early: dict[str, Tensor] = {}
    evaluations = PRETRAIN * budget

    def keep(step: int) -> None:
        if step == int(EARLY * evaluations):
            early.update({name: tensor.detach().clone() for name, tensor in model.state_dict().items()})

    descend(model, stream(split(seed, choosing), seed), evaluations, rate, keep)
    return Start(model.eval(), early)


def scratch(seed: int, choosing: bool, budget: int, rate: float, density: float = FILTER_DENSITY) -> nn.Sequential:
    """A dense network with the widths of a pruned one, from nothing, with as many evaluations as dense training and pruning together."""
    model = network(seed, density)
    descend(model, stream(split(seed, choosing), seed), (PRETRAIN + 1) * budget, rate)
    return model.eval()


@cache
def rate_of(search: str, arm: str) -> Rate:
    """The rate that a search found, read once: the file is not read while a clock runs."""
    return chosen(search, arm)


def rates_of(way: str) -> tuple[Rate, float]:
    """The rate of the weights with its grid, and the rate of the scores (which only `OWN_MASK_RATE` have)."""
    mask_rate = rate_of(MASK_RATES, way).rate if way in OWN_MASK_RATE else NO_MASK_RATE
    return rate_of(WEIGHT_RATES, way), mask_rate


def prepared(
    seed: int, choosing: bool, density: float, budget: int, rate: float, mask_rate: float, of_dense: int
) -> tuple[nn.Module, Task]:
    """A copy of the dense network of a seed, trained with a multiple of `of_dense`, and what is to be done with it."""
    start = dense(seed, choosing, of_dense, rate_of(DENSE_RATES, "dense").rate)
    return copy.deepcopy(start.model), Task(split(seed, choosing), density, budget, rate, mask_rate, seed, start.early)


def prune(
    way: str, seed: int, choosing: bool, density: float, budget: int, rate: float, mask_rate: float, of_dense: int
) -> tuple[nn.Module, float]:
    """The dense network of a seed (see `prepared`) pruned in one of `WAYS`, masks on it; and the evaluations that took."""
    model, task = prepared(seed, choosing, density, budget, rate, mask_rate, of_dense)
    evaluations = WAYS[way](model, task)
    return model.eval(), evaluations


@cache
def mean_error(way: str, budget: int, rate: float, mask_rate: float, seeds: tuple[int, ...] = BUDGET_SEEDS) -> float:
    """The mean error of the networks of some seeds on digits kept for choices, at the density that decides."""
    density = FILTER_DENSITY if way in BY_UNITS else DENSITY
    found = [prune(way, seed, True, density, budget, rate, mask_rate, BUDGET)[0] for seed in seeds]
    errors = [1 - accuracy(model, split(seed, True)) for model, seed in zip(found, seeds, strict=True)]
    return sum(errors) / len(errors)


@searched(DENSE_RATES, arms=("dense", "scratch"), grid=GRID)
def dense_rate(arm: str, rate: float) -> float:
    """The error of a dense network on digits kept for the choice."""

    def trained(seed: int) -> nn.Module:
        given = (seed, True, BUDGET, rate)
        return scratch(*given) if arm == "scratch" else dense(*given).model

    errors = [1 - accuracy(trained(seed), split(seed, True)) for seed in RATE_SEEDS]
    return sum(errors) / len(errors)


@searched(MASK_RATES, arms=OWN_MASK_RATE, grid=(0.01, 0.1, 1.0, 10.0, 100.0, 1000.0, 10000.0))
def masks_rate(arm: str, rate: float) -> float:
    """The error on digits kept for the choice, at the best of three rates of the weights: each pair is tried."""

    def error(of_weights: float) -> float:
        try:
            return mean_error(arm, BUDGET, of_weights, rate, RATE_SEEDS)
        except ValueError:  # the loss is not finite any more
            return float("inf")

    return min(map(error, GRID[1:-1]))


@searched(WEIGHT_RATES, arms=tuple(WAYS), grid=GRID)
def weights_rate(arm: str, rate: float) -> float:
    """The error on digits kept for the choice, where scores are learned at the rate chosen for them."""
    mask_rate = rate_of(MASK_RATES, arm).rate if arm in OWN_MASK_RATE else NO_MASK_RATE
    return mean_error(arm, BUDGET, rate, mask_rate, RATE_SEEDS)


@searched(BUDGETS, arms=FREE, grid=(0.25, 0.5, 1.0, 2.0))
def least_budget(arm: str, multiple: float) -> float:
    """No rate but a budget, as a multiple of BiP's: the least at which a free way is as accurate as BiP on digits kept for the choice.

    "As accurate" is within `MARGIN`. Budgets that do not reach it count as worse than all that do, the larger the better, so that
    the largest is chosen where none does.
    """
    rate, mask_rate = rates_of("bip")
    wanted = mean_error("bip", BUDGET, rate.rate, mask_rate) + MARGIN
    budget = round(multiple * BUDGET)
    return multiple if mean_error(arm, budget, rates_of(arm)[0].rate, NO_MASK_RATE) <= wanted else 1000 - multiple


def cheapest() -> tuple[str, float]:
    """The free way with the least budget that is as accurate as BiP, and that budget as a multiple of BiP's."""
    budgets = {way: rate_of(BUDGETS, way).rate for way in FREE}
    way = min(budgets, key=lambda name: budgets[name])
    return way, budgets[way]
