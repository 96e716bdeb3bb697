"""Detectors and segmenters trained on DigitScenes: every arm sees the same scenes in the same order, for as many steps, at its own rate.

Whoever trains says what the loss of a batch is, and what came of a scene (`assay.measure.detection`: a match, a panoptic table, a
confusion table); the figure over scenes follows from those, so that scenes and seeds can be resampled:

    shown = scored(make, loss, outcome, average_precision, chosen("leyolo/ap", arm), STEPS)
    gap(shown, other)                  # points of AP with a 95 % interval: scenes and seeds in pairs
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from assay.experiments.core import Quality, Trained
from assay.experiments.rates import Rate
from assay.experiments.vision.training import CHOICE_SEED, CLIP, DECAY, SEEDS, rate_share
from assay.workloads.digit_scenes import Scene, digit_scenes
from assay.workloads.pictures import Part

SIZE, BATCH = 128, 8  # pixels a side of a scene, scenes of a batch
SCENES: dict[str, int] = {"train": 400, "choose": 40, "heldout": 60}
SEED_OF: dict[str, int] = {"train": 10, "choose": 20, "heldout": 30}
DRAWS = 300  # of the bootstrap: every draw counts the figure anew
MEAN, STD = 0.5, 0.25

Make = Callable[[], nn.Module]
Loss = Callable[[nn.Module, Sequence[Scene]], Tensor]
Outcome = Callable[[nn.Module, Sequence[Scene]], Sequence[Any]]
"""What came of each of some scenes, by a model in evaluation mode."""
Tally = Callable[[Sequence[Any]], float]
"""The figure over any outcomes, from 0 to 1: `average_precision`, `panoptic_quality`, `mean_iou`, ..."""


@cache
def scenes(part: Part, size: int = SIZE) -> tuple[Scene, ...]:
    """The scenes of a part, drawn once a process."""
    return tuple(digit_scenes(part, SCENES[part], size=size, seed=SEED_OF[part]))


def pixels(some: Sequence[Scene]) -> Tensor:
    """Their images as a model takes them, (n, 3, size, size), about -2 to 2."""
    return (torch.stack([scene.image for scene in some]) - MEAN) / STD


def batches(seed: int, size: int = SIZE, batch: int = BATCH) -> Iterator[list[Scene]]:
    """Batches for ever, the scenes for training in a new order in every pass. Nothing is mirrored: a mirrored digit is none."""
    every, generator = scenes("train", size), torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(every), generator=generator)
        for picks in order[: len(every) // batch * batch].split(batch):
            yield [every[i] for i in picks.tolist()]


def train(
    make: Make, loss: Loss, rate: float, steps: int, seed: int, *, size: int = SIZE, batch: int = BATCH
) -> nn.Module:
    """AdamW with warm-up and cosine as in `training.train`; in evaluation mode when it comes back.

    Raises ValueError where a loss is no number.
    """
    torch.manual_seed(seed)
    model = make().train()
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], rate, weight_decay=DECAY, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_share(step, steps))
    stream = batches(seed, size, batch)
    for step in range(steps):
        optimizer.zero_grad()
        value = loss(model, next(stream))
        if not value.isfinite():
            raise ValueError(f"the loss of step {step} is {value.item()} at a rate of {rate:g}")
        value.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def outcomes(model: nn.Module, outcome: Outcome, part: Part, *, size: int = SIZE) -> list[Any]:
    """What came of each scene of a part."""
    every = scenes(part, size)
    return [each for at in range(0, len(every), BATCH) for each in outcome(model, every[at : at + BATCH])]


def error_for_choice(
    make: Make,
    loss: Loss,
    outcome: Outcome,
    tally: Tally,
    rate: float,
    steps: int,
    *,
    size: int = SIZE,
    batch: int = BATCH,
) -> float:
    """For `@searched`: 1 less the figure on the scenes for choices, by a model of a seed that is not judged."""
    model = train(make, loss, rate, steps, CHOICE_SEED, size=size, batch=batch)
    return 1 - tally(outcomes(model, outcome, "choose", size=size))


@dataclass(frozen=True)
class Scored:
    """An arm that was trained: what came of every held-out scene, by seed, the figure over scenes, and the rate it was trained at."""

    found: tuple[tuple[Any, ...], ...]
    tally: Tally
    rate: Rate

    @property
    def value(self) -> float:
        """The mean over seeds, in per cent."""
        return 100 * float(np.mean(self.by_seed()))

    def by_seed(self, picks: Sequence[int] | None = None) -> list[float]:
        """The figure of each seed, over all scenes or those picked."""
        return [self.tally(each if picks is None else [each[i] for i in picks]) for each in self.found]

    def trained(self, floor: float, floor_name: str) -> Trained:
        """For the record, beside what something trivial reaches (a share)."""
        return Trained(
            self.by_seed(), floor, floor_name, self.rate.rate, self.rate.rates, higher_is_better=True, best=1.0
        )


def scored(
    make: Make, loss: Loss, outcome: Outcome, tally: Tally, rate: Rate, steps: int,
    *, size: int = SIZE, batch: int = BATCH, seeds: Sequence[int] = SEEDS,
) -> Scored:  # fmt: skip
    """Trained under each seed and judged on the scenes held out."""
    models = (train(make, loss, rate.rate, steps, seed, size=size, batch=batch) for seed in seeds)
    return Scored(tuple(tuple(outcomes(model, outcome, "heldout", size=size)) for model in models), tally, rate)


def level(arm: Scored) -> tuple[float, float, float]:
    """The figure in per cent with a 95 % interval: scenes and seeds resampled."""
    return _interval(arm.value, lambda picks: np.array(arm.by_seed(picks)), arm)


def gap(arm: Scored, other: Scored) -> tuple[float, float, float]:
    """Points that `arm` is better than `other` by, with a 95 % interval: scenes and seeds resampled, in pairs."""
    return _interval(arm.value - other.value, lambda picks: np.array(arm.by_seed(picks)) - other.by_seed(picks), arm)


def _interval(value: float, of: Callable[[Sequence[int]], np.ndarray], arm: Scored) -> tuple[float, float, float]:
    generator = np.random.default_rng(0)
    seeds, count = len(arm.found), len(arm.found[0])
    draws = []
    for _ in range(DRAWS):
        each = of(generator.integers(count, size=count).tolist())
        draws.append(100 * each[generator.integers(seeds, size=seeds)].mean())
    low, high = np.nanquantile(draws, (0.025, 0.975))
    return value, min(float(low), value), max(float(high), value)


def guarded(arm: Scored, base: Scored, controls: Mapping[str, Scored], rival: str = "") -> Quality:
    """The figure of `arm` in per cent beside `base`'s, with the interval of their difference, for a `Guard` in points."""
    gain, low, high = gap(arm, base)
    start = base.value
    levels = {name: control.value for name, control in controls.items()}
    return Quality(start + gain, start, start + low, start + high, controls=levels, rival=rival)
