"""Small image models trained on PhotoCrops: every arm sees the same crops in the same order, for as many steps, at a rate of its own.

@searched("swin/accuracy", arms=ARMS, grid=(1e-3, 3e-3, 1e-2))
def score(arm, rate):
    return error_for_choice(lambda: make(arm), rate, STEPS)

shown = {arm: judged(lambda: make(arm), chosen("swin/accuracy", arm), STEPS) for arm in ARMS}
gain = difference(shown["shift"], shown["no shift"])          # points, resampled over photographs and seeds
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from assay.experiments.core import Quality, Trained
from assay.experiments.rates import Rate
from assay.workloads.pictures import CHANCE, PICTURES, Part, photo_crops

Make = Callable[[], nn.Module]
"""Makes an untrained model for crops (B, 1, size, size) and twelve classes. The seed is set before it is called."""

SIZE, BATCH, CROPS, JUDGED = (
    48,
    48,
    150,
    60,
)  # pixels a side; crops: of a batch, for training and for judging of each photograph
SEEDS = (1, 2, 3)
CHOICE_SEED = 0  # of the models that rates are chosen by: none of those that are judged
DECAY, CLIP, WARM_UP = 0.05, 1.0, 0.1
DRAWS = 2000  # of the bootstrap


@dataclass(frozen=True)
class Judged:
    """An arm that was trained: the share of crops told right, (seeds, photographs), and the rate it was trained at."""

    right: np.ndarray
    rate: Rate

    @property
    def accuracy(self) -> float:
        """Over all seeds and photographs, in per cent."""
        return 100 * float(self.right.mean())

    @property
    def trained(self) -> Trained:
        """For the record: accuracies of the seeds beside chance."""
        return Trained(
            self.right.mean(1).tolist(),
            CHANCE,
            "chance",
            self.rate.rate,
            self.rate.rates,
            higher_is_better=True,
            best=1.0,
        )


@cache
def crops(part: Part, n: int, size: int, seed: int) -> tuple[Tensor, Tensor]:
    """The crops of a part, drawn once a process."""
    return photo_crops(part, n, size=size, seed=seed)


def batches(seed: int, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches for ever, the crops for training in a new order in every pass, mirrored at random."""
    images, labels = crops("train", CROPS, size, 10)
    generator = torch.Generator().manual_seed(seed)
    while True:
        for picks in torch.randperm(len(images), generator=generator).split(BATCH):
            mirrored = torch.rand(len(picks), 1, 1, 1, generator=generator) < 0.5
            yield torch.where(mirrored, images[picks].flip(3), images[picks]), labels[picks]


def train(make: Make, rate: float, steps: int, seed: int, *, size: int = SIZE) -> nn.Module:
    """AdamW, a tenth of the steps of warm-up, then a cosine down to 0, gradients clipped at 1; in evaluation mode when it comes back."""
    torch.manual_seed(seed)
    model = make().train()
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=DECAY, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_share(step, steps))
    stream = batches(seed, size)
    for _ in range(steps):
        images, labels = next(stream)
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        schedule.step()
    return model.eval()


def rate_share(step: int, steps: int) -> float:
    """The share of the rate at a step."""
    warm = WARM_UP * steps
    return min(1.0, (step + 1) / warm) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps)))


@torch.no_grad()
def right_by_photograph(model: nn.Module, part: Part = "heldout", *, size: int = SIZE, n: int = JUDGED) -> list[float]:
    """The share of a part's crops that are told right, for each photograph."""
    images, labels = crops(part, n, size, 20)
    guesses = torch.cat([model(some).argmax(1) for some in images.split(4 * BATCH)])
    return (guesses == labels).float().view(len(PICTURES), n).mean(1).tolist()


def error_for_choice(make: Make, rate: float, steps: int, *, size: int = SIZE) -> float:
    """For `@searched`: the share of wrong crops of the part for choices, by a model of a seed that is not judged."""
    model = train(make, rate, steps, CHOICE_SEED, size=size)
    return 1 - float(np.mean(right_by_photograph(model, "choose", size=size)))


def judged(make: Make, rate: Rate, steps: int, *, size: int = SIZE, seeds: tuple[int, ...] = SEEDS) -> Judged:
    """Trained under each seed and judged on the part held out."""
    return Judged(
        np.array([right_by_photograph(train(make, rate.rate, steps, seed, size=size), size=size) for seed in seeds]),
        rate,
    )


def difference(arm: Judged, other: Judged) -> tuple[float, float, float]:
    """Points of accuracy that `arm` is better than `other` by, with a 95 % interval: photographs and seeds resampled, in pairs."""
    gap = 100 * (arm.right - other.right)
    return _interval(gap)


def guarded(arm: Judged, base: Judged, controls: Mapping[str, Judged], rival: str = "") -> Quality:
    """The accuracy of `arm` in per cent beside `base`'s, with the interval of their difference, for a `Guard` in points."""
    gain, low, high = difference(arm, base)
    start = base.accuracy
    return Quality(
        start + gain,
        start,
        start + low,
        start + high,
        controls={name: control.accuracy for name, control in controls.items()},
        rival=rival,
    )


def level(arm: Judged) -> tuple[float, float, float]:
    """Accuracy in per cent with a 95 % interval: photographs and seeds resampled."""
    return _interval(100 * arm.right)


def _interval(values: np.ndarray) -> tuple[float, float, float]:
    generator = np.random.default_rng(0)
    seeds, photographs = values.shape
    rows = generator.integers(seeds, size=(DRAWS, seeds, 1))
    columns = generator.integers(photographs, size=(DRAWS, 1, photographs))
    low, high = np.quantile(values[rows, columns].mean((1, 2)), (0.025, 0.975))
    return float(values.mean()), float(low), float(high)
