"""Trial, Figure, Quality and the `@experiment` decorator."""

from __future__ import annotations

import importlib
import pkgutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Scale = Literal["smoke", "small", "full"]
SCALES: tuple[Scale, ...] = ("smoke", "small", "full")


@dataclass(frozen=True)
class Quality:
    """A candidate's quality, apart from its speed. `low`/`high` bound `candidate` (95 %), None if nothing was sampled."""

    metric: str
    candidate: float
    baseline: float | None = None
    low: float | None = None
    high: float | None = None
    higher_is_better: bool = True


@dataclass
class Trial:
    """One paired measurement. Each callable takes no arguments and does one whole run of the work.

    `baseline` is the paper's own baseline, `free` the strongest thing a user gets without losing quality (None if that is the
    baseline itself). `quality` is called once, after the timing. `details` are further figures worth keeping (density, bytes,
    estimation time ...), JSON-able; it may be a callable, then it is called once after the timing.

    >>> trial = Trial(baseline=lambda: sorted(range(100)), candidate=lambda: list(range(100)))
    >>> trial.candidate() == trial.baseline()
    True
    """

    baseline: Callable[[], Any]
    candidate: Callable[[], Any]
    free: Callable[[], Any] | None = None
    free_label: str = ""
    quality: Callable[[], Quality] | None = None
    details: Mapping[str, Any] | Callable[[], Mapping[str, Any]] = field(default_factory=dict)
    pairs: int = 10
    warmup: int = 1


@dataclass(frozen=True)
class Figure:
    """A measured value that is not a time ratio: decibels, bytes, evaluations saved, a coefficient of determination.

    `low`/`high` bound `value` (95 %) and equal it when the quantity is exact. `baseline` is the paper's baseline in the same unit.
    """

    value: float
    unit: str
    low: float | None = None
    high: float | None = None
    baseline: float | None = None
    free: float | None = None
    free_label: str = ""
    quality: Quality | None = None
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Experiment:
    """A claim's experiment: `run(**point)` for the points of a scale."""

    claim: str
    run: Callable[..., Trial | Figure]
    points: Mapping[str, Sequence[Mapping[str, Any]]]
    needs: tuple[str, ...] = ()  # e.g. ("cuda",); what this machine lacks makes the verdict `needs other hardware`
    minutes: float = 10.0  # time limit of one point
    memory_gib: float = 16.0  # memory limit of one point

    @property
    def slug(self) -> str:
        return self.claim.split("/", 1)[0]


_REGISTRY: dict[str, Experiment] = {}


def experiment(
    claim: str,
    *,
    points: Mapping[str, Sequence[Mapping[str, Any]]],
    needs: tuple[str, ...] = (),
    minutes: float = 10.0,
    memory_gib: float = 16.0,
) -> Callable[[Callable[..., Trial | Figure]], Callable[..., Trial | Figure]]:
    """Register a function as the experiment of `claim` ("slug/what", a claim id of the catalogue).

    `points` maps a scale ("smoke" | "small" | "full") to the keyword arguments of each run.
    Raises ValueError for an unknown scale, an empty grid, a claim without a slash, or a claim registered twice.
    """
    if "/" not in claim:
        raise ValueError(f"claim must look like 'slug/what', got {claim!r}")
    if unknown := set(points) - set(SCALES):
        raise ValueError(f"points has unknown scale {sorted(unknown)}; allowed: {', '.join(SCALES)}")
    if not points or not all(points.values()):
        raise ValueError(f"points of {claim!r} must have at least one point in each scale it names")

    def register(function: Callable[..., Trial | Figure]) -> Callable[..., Trial | Figure]:
        known = _REGISTRY.get(claim)
        if known is not None and known.run.__module__ != function.__module__:
            raise ValueError(f"claim {claim!r} already has an experiment in {known.run.__module__}")
        _REGISTRY[claim] = Experiment(claim, function, points, needs, minutes, memory_gib)
        function.__dict__["experiment"] = _REGISTRY[claim]
        return function

    return register


def experiments_of(slug: str) -> list[Experiment]:
    """The experiments of one paper, in the order they stand in its module; empty when it has none yet."""
    for family in pkgutil.iter_modules(sys.modules[__package__].__path__):
        if not family.ispkg:
            continue
        name = f"{__package__}.{family.name}"
        modules = {module.name for module in pkgutil.iter_modules(importlib.import_module(name).__path__)}
        if slug in modules:
            room = importlib.import_module(f"{name}.{slug}")
            for found in [getattr(value, "experiment", None) for value in vars(room).values()]:
                if isinstance(found, Experiment):  # also when the module was imported before this registry was made
                    _REGISTRY.setdefault(found.claim, found)
    return [found for found in _REGISTRY.values() if found.slug == slug]
