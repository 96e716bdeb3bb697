"""Memory and latency of a cell that nobody ran: what cannot be beaten, and a line through two cells that somebody ran.

The lower bounds are the roofline's: a prompt takes its operations at the device's peak or the reading of the weights, whichever is
longer; a token the reading of weights and cache, or its operations; memory is weights and cache. They are below any measurement, unless
the device's peaks are too low. What an engine makes of a bound, something fixed and a factor, is found from two measured cells and
judged on others: `Judged` holds the errors, which belong beside every prediction, and beside them those of `trivial` predictors, which it
must beat to be worth its two cells.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from assay import checks
from assay.methods.core.fleet.hardware import Device
from assay.methods.serving.mobile_llm_measurement.sizes import Sizes

ALIKE = 0.05
"""Two bounds that differ by less say nothing about what is fixed; our choice."""


@dataclass(frozen=True)
class Figures:
    """Seconds to the first token, seconds a further token, and bytes of memory: bounds, predictions or measurements."""

    prefill: float
    token: float
    memory: float

    def __post_init__(self) -> None:
        for name in ("prefill", "token", "memory"):
            checks.number(name, getattr(self, name), low=0)

    def seconds(self, new_tokens: int) -> float:
        """Of a whole answer of so many tokens, without network and waiting."""
        return self.prefill + (new_tokens - 1) * self.token


NAMES = ("prefill", "token", "memory")


def lower_bounds(sizes: Sizes, device: Device, prompt_tokens: int, new_tokens: int) -> Figures:
    """What a device needs at least, one answer at a time: `device` has the peaks of what runs there (its threads, its dtype).

    A token's bound is that of the first one after the prompt, whose cache is the shortest.
    """
    prompt = checks.whole("prompt_tokens", prompt_tokens, low=1)
    new = checks.whole("new_tokens", new_tokens, low=1)
    shape = sizes.shape
    prefill = device.seconds(sizes.prefill_flops(prompt), sizes.step_bytes)
    seen = min(prompt + 1, shape.window or prompt + 1)
    token = device.seconds(shape.step_flops([seen]), shape.step_bytes([seen]))
    return Figures(prefill, token, sizes.resident + shape.cache_bytes(prompt + new - 1))


@dataclass(frozen=True)
class Line:
    """What is measured where the bound is `x`: `fixed` + `factor` * x, and never less than x."""

    fixed: float
    factor: float

    def __call__(self, bound: float) -> float:
        return max(bound, self.fixed + self.factor * bound)


def through(first: tuple[float, float], second: tuple[float, float], *, added: bool = False) -> Line:
    """The line through two points (bound, measured).

    Where the bounds are alike within 5 %, or the line would not rise, noise made it so. It is then the proportional one of the mean ratio
    (geometric) instead, or with `added` the bound and the mean of what was measured beside it. What is fixed may be below 0: an engine that
    loads a model in float32 to pack it takes more for each byte of its layers than for one of its embedding. Raises ValueError for bounds
    or measurements that are not above 0.

    >>> through((1.0, 5.0), (3.0, 9.0))
    Line(fixed=3.0, factor=2.0)
    """
    points = [first, second]
    for bound, seen in points:
        checks.number("a bound", bound, above=0)
        checks.number("a measurement", seen, above=0)
    (x, y), (u, v) = sorted(points)
    if u > x * (1 + ALIKE):
        factor = (v - y) / (u - x)
        if factor > 0:
            return Line(y - factor * x, factor)
    return Line((y - x + v - u) / 2, 1.0) if added else Line(0.0, math.sqrt(y / x * v / u))


@dataclass(frozen=True)
class Predictor:
    """What an engine makes of the bounds."""

    prefill: Line
    token: Line
    memory: Line

    def predict(self, bounds: Figures) -> Figures:
        """What is to be expected where these are the bounds."""
        return Figures(*(getattr(self, name)(getattr(bounds, name)) for name in NAMES))


@dataclass(frozen=True)
class Seen:
    """A measured cell and its bounds."""

    name: str
    bounds: Figures
    measured: Figures

    @property
    def beaten(self) -> list[str]:
        """Bounds that lie above the measurement: the device's peaks are then too low."""
        return [name for name in NAMES if getattr(self.bounds, name) > getattr(self.measured, name)]


def calibrated(points: Sequence[Seen]) -> Predictor:
    """The predictor through two measured cells of one engine. Raises ValueError for any other number of them.

    Where two cells cannot tell, times are taken to be in proportion to their bounds, and memory to be the bound and what the libraries
    take, whatever the model.
    """
    if len(points) != 2:
        raise ValueError(f"points must be two measured cells, got {len(points)}")
    first, second = points
    lines = (
        through(
            *((getattr(one.bounds, name), getattr(one.measured, name)) for one in (first, second)),
            added=name == "memory",
        )
        for name in NAMES
    )
    return Predictor(*lines)


def trivial(points: Sequence[Seen]) -> dict[str, Predictor]:
    """What a predictor of two cells must beat: the bound itself (bytes over bandwidth, operations over peak), the mean of the two, and the
    bound times the mean of their ratios to it (geometric). None of them foretells less than the bound. Raises ValueError without points.
    """
    if not points:
        raise ValueError("points must hold at least one measured cell, got none")

    def lines(of: Callable[[list[tuple[float, float]]], Line]) -> Predictor:
        return Predictor(*(of([(getattr(p.bounds, n), getattr(p.measured, n)) for p in points]) for n in NAMES))

    return {
        "the bound": lines(lambda seen: Line(0.0, 1.0)),
        "their mean": lines(lambda seen: Line(statistics.fmean(y for _, y in seen), 0.0)),
        "the bound times their mean ratio": lines(
            lambda seen: Line(0.0, statistics.geometric_mean(y / x for x, y in seen))
        ),
    }


@dataclass(frozen=True)
class Judged:
    """Predicted over measured minus one, by figure, for each cell that the predictor has not seen; 0.1 is ten per cent too much."""

    errors: dict[str, dict[str, float]]

    def mean(self, name: str) -> float:
        """The mean size of the errors of a figure; NaN where there is none."""
        sizes = [abs(one[name]) for one in self.errors.values()]
        return sum(sizes) / len(sizes) if sizes else math.nan

    def off(self, name: str) -> tuple[float, float]:
        """By what factors the measurements lay below and above the predictions at most: (1, 1) where they agree, or there are none."""
        factors = [1 / (1 + one[name]) for one in self.errors.values()]
        return min([1.0, *factors]), max([1.0, *factors])


def judged(predictor: Predictor, held_out: Sequence[Seen]) -> Judged:
    """How far off the predictions are. Raises ValueError where two cells have one name."""
    if len({one.name for one in held_out}) < len(held_out):
        raise ValueError("held_out must have names of their own")
    errors = {}
    for one in held_out:
        predicted = predictor.predict(one.bounds)
        errors[one.name] = {name: getattr(predicted, name) / getattr(one.measured, name) - 1 for name in NAMES}
    return Judged(errors)
