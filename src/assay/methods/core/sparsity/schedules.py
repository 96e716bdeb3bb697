"""How sparse at which step: constant, all at once, gradual, and rounds of training with rewinding.

A schedule says `sparsity(step)`, the share of weights that is zero from this step on, and `due(step)`, whether masks are made anew at
this step; steps count from 0. In a loop over steps the mask is made before the step's forward pass:

    for step, batch in enumerate(batches):
        if schedule.due(step):
            masks = global_(scores, density=1 - schedule.sparsity(step))

    >>> gradual = Gradual(final=0.8, begin=0, every=10, updates=10)
    >>> [round(gradual.sparsity(step), 3) for step in (0, 9, 10, 50, 100, 999)]
    [0.0, 0.0, 0.217, 0.7, 0.8, 0.8]
    >>> [step for step in range(1000) if gradual.due(step)][-2:]
    [90, 100]
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from assay import checks
from assay.methods.core.sparsity.masks import masks_of, matrix_of, put_masks, take_masks
from assay.methods.core.sparsity.projections import density as density_of

MOST_ROUNDS = 1000  # of iterative pruning


class Schedule(Protocol):
    """What every schedule offers."""

    def sparsity(self, step: int) -> float:
        """The share of weights that is zero at this step, 0 to 1."""
        ...

    def due(self, step: int) -> bool:
        """Whether masks are made anew at this step."""
        ...


@dataclass(frozen=True)
class Constant:
    """The same sparsity at every step, with new masks every `every` steps (SR-STE and BDWP: every one)."""

    final: float
    every: int = 1

    def __post_init__(self) -> None:
        checks.number("final", self.final, low=0, high=1)
        checks.whole("every", self.every, low=1)

    def sparsity(self, step: int) -> float:
        _step(step)
        return self.final

    def due(self, step: int) -> bool:
        return _step(step) % self.every == 0


@dataclass(frozen=True)
class OneShot:
    """Dense before step `at`; the final sparsity, and one mask for good, from there on."""

    final: float
    at: int = 0

    def __post_init__(self) -> None:
        checks.number("final", self.final, low=0, high=1)
        checks.whole("at", self.at, low=0)

    def sparsity(self, step: int) -> float:
        return self.final if _step(step) >= self.at else 0.0

    def due(self, step: int) -> bool:
        return _step(step) == self.at


@dataclass(frozen=True)
class Gradual:
    """The cubic schedule of Zhu and Gupta (arXiv 1710.01878): s = final + (initial - final) (1 - (t - begin) / (updates * every))^3.

    New masks at begin, begin + every, .. begin + updates * every, that is `updates` + 1 times; between two of them the sparsity stays,
    after the last for good. Half-way it has 7/8 of the range behind it. Before `begin` everything is dense.
    """

    final: float
    begin: int = 0
    every: int = 100
    updates: int = 100
    initial: float = 0.0

    def __post_init__(self) -> None:
        checks.number("final", self.final, low=0, high=1)
        checks.number("initial", self.initial, low=0, high=self.final)
        checks.whole("begin", self.begin, low=0)
        checks.whole("every", self.every, low=1)
        checks.whole("updates", self.updates, low=1)

    def sparsity(self, step: int) -> float:
        behind = (_step(step) - self.begin) // self.every
        if behind < 0:
            return 0.0
        left = 1 - min(behind, self.updates) / self.updates
        return self.final + (self.initial - self.final) * left**3

    def due(self, step: int) -> bool:
        behind = _step(step) - self.begin
        return behind >= 0 and behind % self.every == 0 and behind // self.every <= self.updates


# ---- rounds ------------------------------------------------------------------------------------------------------------------------


def ladder(target: float, rate: float = 0.2) -> list[float]:
    """The densities of iterative pruning: (1 - rate), (1 - rate)^2, .., and the target itself last.

    >>> [round(d, 3) for d in ladder(0.5)]
    [0.8, 0.64, 0.512, 0.5]
    """
    target = checks.number("target", target, above=0, below=1)
    rate = checks.number("rate", rate, above=0, below=1)
    steps: list[float] = []
    density = 1 - rate
    while density > target * (1 + 1e-9):
        steps.append(density)
        density *= 1 - rate
        if len(steps) > MOST_ROUNDS:
            raise ValueError(f"rate must reach the target within {MOST_ROUNDS} rounds, got {rate}")
    return [*steps, target]


@dataclass(frozen=True)
class Round:
    """One round of iterative pruning: the density reached, its masks, and what its training took, as `train` counted it."""

    density: float
    masks: dict[str, Tensor]
    passes: float


def iterative(
    model: nn.Module,
    names: Sequence[str],
    densities: Sequence[float],
    train: Callable[[nn.Module], float],
    *,
    project: Callable[[Mapping[str, Tensor], float], Mapping[str, Tensor]],
    rewind: Mapping[str, Tensor] | None = None,
) -> list[Round]:
    """Iterative magnitude pruning: for each density prune what is left, put the rest back where it was, train (arXiv 1803.03635).

    `model` comes trained and dense, and leaves with the last masks on it (`masks.put_masks`). `rewind` is the state dict of the dense
    model to go back to, of the start or of an early step (arXiv 1912.05671); None goes on from the weights as they are. `train(model)`
    trains the masked model in place, with an optimiser of its own, and returns what it took (passes over the data, or steps), which
    is kept in the `Round`: the sum is the price of the method beside its one-shot rivals. `project(|weights|, density)` makes
    masks; weights that are gone already come with -inf and stay gone.

    Raises ValueError, before anything is changed, unless densities fall strictly, and for a `rewind` that lacks a named weight.
    """
    steps = [checks.number(f"densities[{i}]", d, above=0, high=1) for i, d in enumerate(densities)]
    if not steps or any(later >= earlier for earlier, later in zip(steps, steps[1:], strict=False)):
        raise ValueError(f"densities must fall from one to the next, got {list(densities)}")
    if rewind is not None and (missing := [name for name in names if f"{name}.weight" not in rewind]):
        raise ValueError(f"rewind must be a state dict of the dense model, got none of {missing[0]}.weight")
    start = None if rewind is None else {name: tensor.detach().clone() for name, tensor in rewind.items()}
    if masks_of(model):
        raise ValueError("model must come without masks")
    rounds: list[Round] = []
    for step in steps:
        scores = {name: matrix_of(model, name).detach().abs() for name in names}
        if rounds:
            gone = rounds[-1].masks
            scores = {name: x.masked_fill(~gone[name].to(x.device), -torch.inf) for name, x in scores.items()}
            take_masks(model)
        found = dict(project(scores, step))
        if start is not None:
            model.load_state_dict(start)
        put_masks(model, found)
        rounds.append(Round(density_of(found), found, float(train(model))))
    return rounds


def _step(step: int) -> int:
    return checks.whole("step", step, low=0)
