"""What an experiment declares, and what it returns: `@experiment`, Operator, Guard, Trial, Figure, Quality, Trained.

The declarations are what a sceptic asks for before looking at a figure: which configuration of the paper decides, what would
refute the claim, what the strongest rivals are, and which quality may not be lost. They are fixed in the code before the
measurement, and an experiment without them is refused.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Scale = Literal["smoke", "small", "full"]
SCALES: tuple[Scale, ...] = ("smoke", "small", "full")
CONTROLS = ("deleted", "random", "rival")
FLOOR_MARGIN = 0.1
"""A trained arm must cover this share of the way from its trivial floor to perfection; our choice, above any spread over seeds seen."""
LEAST_SEEDS = 3


@dataclass(frozen=True)
class Operator:
    """What is made cheaper, and the two baselines that every claim about it is held against.

    `free` is what an expert gets in ten lines without assay; `exact` is our own best code that loses nothing, "" where there is
    none better than `free`. Declared once a paper (or shared by papers about the same thing), so that one kernel cannot pay in
    one claim and lose in another.
    """

    name: str
    free: str
    exact: str = ""


@dataclass(frozen=True)
class Guard:
    """The quality that must not be lost, fixed before the measurement.

    `margin` is the most that may be lost, as a share of the baseline's value (`relative`) or in the metric's own unit. `without`
    says of a control that cannot exist why not: {"random": "packing makes no choice"}. A result that is equal bit for bit, or up to
    rounding, has a guard too: its error, against that of the method deleted.
    """

    metric: str
    margin: float
    higher_is_better: bool = False
    relative: bool = True
    without: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Quality:
    """A candidate's quality in the guard's metric, with the controls at equal budget beside it.

    `low`/`high` bound `candidate` (95 %, paired with the baseline, documents or seeds resampled); None if nothing was sampled.
    `controls` has "deleted" (the method's work left out), "random" (its choice replaced by a random one of equal shape and cost) and
    "rival" (the cheapest other way to spend the same budget), unless the guard says why not; other names are further arms, ablations say.
    """

    candidate: float
    baseline: float
    low: float | None = None
    high: float | None = None
    controls: Mapping[str, float] = field(default_factory=dict)
    rival: str = ""  # what the cheapest rival is


@dataclass(frozen=True)
class Trained:
    """An arm that was trained for the experiment: its score under each seed, the trivial floor it has to beat, and its learning rate.

    `floor` is the score of something trivial in the same metric (bigram table, majority class, chance), `best` the perfect score.
    `rates` are the learning rates among which `rate` was chosen (see `assay.experiments.rates`): fewer than two is no search.
    """

    scores: Sequence[float]
    floor: float
    floor_name: str
    rate: float
    rates: Sequence[float]
    higher_is_better: bool = False
    best: float | None = None  # 0 for a loss, 1 for a share, unless given


@dataclass
class Trial:
    """One paired measurement of times. Each callable takes no arguments and does one whole run of the work.

    `candidate` is the paper's mechanism at its whole cost (selecting, packing, calibrating included, or their break-even in `details`).
    `baseline` is the paper's own baseline. `free` and `exact` are the operator's two baselines: None where `free` is the paper's
    baseline itself, or where the operator declares no `exact`. `arms` are further things timed beside them: ablations, rivals.
    `quality` is called once, after the timing; so is `details`, if it is callable (JSON-able figures: density, bytes, seconds).
    Every trial is taken in three fresh processes, with the candidate against itself beside the rest.

    >>> trial = Trial(baseline=lambda: sorted(range(100)), candidate=lambda: list(range(100)))
    >>> trial.candidate() == trial.baseline()
    True
    """

    baseline: Callable[[], Any]
    candidate: Callable[[], Any]
    free: Callable[[], Any] | None = None
    exact: Callable[[], Any] | None = None
    arms: Mapping[str, Callable[[], Any]] = field(default_factory=dict)
    quality: Callable[[], Quality] | None = None
    trained: Mapping[str, Trained] | Callable[[], Mapping[str, Trained]] = field(default_factory=dict)
    details: Mapping[str, Any] | Callable[[], Mapping[str, Any]] = field(default_factory=dict)
    pairs: int = 12


@dataclass(frozen=True)
class Figure:
    """A measured value other than a time: decibels, bytes, evaluations saved, a share.

    `low`/`high` bound `value` (95 %) and equal it when the quantity is exact. `baseline` is the paper's baseline, `free` and `exact`
    the operator's, `controls` as in `Quality`, `arms` further arms (ablations, rivals), all in `unit`. Where the figure is itself a
    quality, `controls` are needed.
    """

    value: float
    unit: str
    low: float | None = None
    high: float | None = None
    baseline: float | None = None
    free: float | None = None
    exact: float | None = None
    controls: Mapping[str, float] = field(default_factory=dict)
    arms: Mapping[str, float] = field(default_factory=dict)
    quality: Quality | None = None
    trained: Mapping[str, Trained] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Experiment:
    """A claim's experiment: `run(**point)` for the points of a scale, and what it declares (see `experiment`)."""

    claim: str
    run: Callable[..., Trial | Figure]
    points: Mapping[str, Sequence[Mapping[str, Any]]]
    operator: Operator
    refuted_if: str
    paper: Mapping[str, Any]
    departures: Mapping[str, str]
    decides: Mapping[str, Mapping[str, Any]]
    guard: Guard | None = None
    refutes: Callable[[Mapping[str, Any]], bool] | None = None
    tolerance: float | None = None
    measured_here: str = ""
    computed: str = ""
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
    operator: Operator,
    paper: Mapping[str, Any],
    refuted_if: str,
    departures: Mapping[str, str] | None = None,
    decides: Mapping[str, Mapping[str, Any]] | None = None,
    guard: Guard | None = None,
    refutes: Callable[[Mapping[str, Any]], bool] | None = None,
    tolerance: float | None = None,
    measured_here: str = "",
    computed: str = "",
    needs: tuple[str, ...] = (),
    minutes: float = 10.0,
    memory_gib: float = 16.0,
) -> Callable[[Callable[..., Trial | Figure]], Callable[..., Trial | Figure]]:
    """Register a function as the experiment of `claim` ("slug/what", a claim id of the catalogue).

    - `points` maps a scale ("smoke" | "small" | "full") to the keyword arguments of each run.
    - `paper` is the paper's own configuration. The point that decides is named by `decides[scale]` (not needed where a scale has one
      point) and agrees with `paper` in every field, or `departures` says in one sentence what stands there instead and why.
    - `operator` names the thing made cheaper and its two baselines, `guard` the quality that must hold (see `Guard`).
    - `refuted_if` is the sentence that says which outcome would refute the claim; `refutes`, where the general rule (the whole interval on
      the wrong side of no gain) does not say the same, is that sentence as a predicate on the fields of the record.
    - `tolerance`, in the claim's unit, is how far "about" and "comparable" reach; such claims need it.
    - `measured_here` names what was measured where it is a stand-in for the claim's metric ("accuracy on tiles of 12 photographs").
    - `computed` says why a figure is arithmetic, where it only follows from sizes chosen beforehand.

    Raises ValueError for an unknown scale, an empty grid, a claim without a slash, a claim registered twice, and any declaration
    that is missing or contradicts another.
    """
    if "/" not in claim:
        raise ValueError(f"claim must look like 'slug/what', got {claim!r}")
    if unknown := set(points) - set(SCALES):
        raise ValueError(f"points has unknown scale {sorted(unknown)}; allowed: {', '.join(SCALES)}")
    if not points or not all(points.values()):
        raise ValueError(f"points of {claim!r} must have at least one point in each scale it names")
    if not refuted_if.strip():
        raise ValueError(f"refuted_if of {claim!r} must say which outcome would refute the claim")
    named = _deciding(claim, points, decides or {}, paper, departures or {})
    _check_guard(claim, guard)

    def register(function: Callable[..., Trial | Figure]) -> Callable[..., Trial | Figure]:
        known = _REGISTRY.get(claim)
        if known is not None and known.run.__module__ != function.__module__:
            raise ValueError(f"claim {claim!r} already has an experiment in {known.run.__module__}")
        _REGISTRY[claim] = Experiment(
            claim, function, points, operator, refuted_if, paper, departures or {}, named, guard, refutes, tolerance,
            measured_here, computed, needs, minutes, memory_gib,
        )  # fmt: skip
        function.__dict__["experiment"] = _REGISTRY[claim]
        return function

    return register


def _deciding(
    claim: str,
    points: Mapping[str, Sequence[Mapping[str, Any]]],
    decides: Mapping[str, Mapping[str, Any]],
    paper: Mapping[str, Any],
    departures: Mapping[str, str],
) -> dict[str, Mapping[str, Any]]:
    """The point of each scale that decides, checked against the paper's configuration (but for `smoke`, which decides nothing)."""
    named = {}
    for scale, grid in points.items():
        if scale not in decides and len(grid) > 1 and scale != "smoke":
            raise ValueError(
                f"{claim!r} has {len(grid)} points at scale {scale}: decides must name the one that counts"
            )
        point = decides.get(scale, grid[0])
        if point not in grid:
            raise ValueError(f"decides[{scale!r}] of {claim!r} must be one of its points, got {dict(point)}")
        named[scale] = point
        if scale == "smoke":
            continue
        for name, value in paper.items():
            if name not in departures and point.get(name, value if name not in point else None) != value:
                raise ValueError(
                    f"the point of {claim!r} that decides at {scale} has {name}={point[name]!r}, the paper {value!r}: "
                    "departures must say why"
                )
    for name, why in departures.items():
        if not why.strip():
            raise ValueError(f"departures[{name!r}] of {claim!r} must be a sentence")
    return named


def _check_guard(claim: str, guard: Guard | None) -> None:
    if guard is None:
        return
    if not guard.margin > 0:
        raise ValueError(f"the guard's margin of {claim!r} must be above 0, got {guard.margin}")
    if strange := set(guard.without) - set(CONTROLS):
        raise ValueError(f"without of {claim!r} may name {', '.join(CONTROLS)}, got {sorted(strange)}")


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
