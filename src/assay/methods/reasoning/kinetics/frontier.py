"""Which configuration to solve with: the best coverage within a cost, question by question, and what a wrong idea of
cost leads to.

A configuration (a model, a number of trials, a budget of keys) has for every question a cost and a coverage, the
probability that one of its trials is right (`core.reasoning.estimates.coverage`); a perfect verifier is taken for
granted, as the paper does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from assay import checks


@dataclass(frozen=True)
class Option:
    """A configuration: its name, and cost and coverage for each question, in the same order for all options.

    Raises ValueError for costs and coverages of different numbers or none, costs that are not above 0 and coverages
    outside 0 to 1.
    """

    name: str
    costs: tuple[float, ...]
    coverage: tuple[float, ...]

    def __post_init__(self) -> None:
        if not len(self.costs) or len(self.costs) != len(self.coverage):
            raise ValueError(
                f"costs and coverage must be of the same questions, got {len(self.costs)} and {len(self.coverage)}"
            )
        for name, values, limits in (
            ("costs", self.costs, {"above": 0}),
            ("coverage", self.coverage, {"low": 0, "high": 1}),
        ):
            for value in values:
                checks.number(name, value, **limits)


def _together(options: Sequence[Option]) -> tuple[np.ndarray, np.ndarray]:
    if not len(options):
        raise ValueError("options must hold at least one, got none")
    if len({len(option.costs) for option in options}) > 1:
        raise ValueError("options must be about the same questions, got different numbers of them")
    return np.array([option.costs for option in options]), np.array([option.coverage for option in options])


def frontier(options: Sequence[Option], limits: Sequence[float]) -> list[float]:
    """The mean over questions of the best coverage at a cost of at most each limit; a question that no option affords
    counts 0.

    Grows with the limit and with every option that is added. Raises ValueError without an option, or for other
    questions.

    >>> few, many = Option("few", (1.0, 1.0), (0.2, 0.4)), Option("many", (4.0, 9.0), (0.8, 1.0))
    >>> [round(value, 2) for value in frontier([few, many], [0.5, 1, 4, 9])]
    [0.0, 0.3, 0.6, 0.9]
    """
    costs, covered = _together(options)
    return [float(np.where(costs <= limit, covered, 0.0).max(0).mean()) for limit in limits]


def cheapest(
    options: Sequence[Option], target: float, *, by: Mapping[str, float] | None = None, tolerance: float = 0.0
) -> Option | None:
    """The cheapest option whose mean coverage is at least `target` less `tolerance`; None where none is.

    Costs are means over questions, or those in `by`, by name. Of equals the better, then the first.

    >>> few, many = Option("few", (1.0,), (0.3,)), Option("many", (4.0,), (0.8,))
    >>> cheapest([few, many], 0.3).name, cheapest([few, many], 0.5).name, cheapest([few, many], 0.9)
    ('few', 'many', None)
    """
    costs, covered = _together(options)
    good = covered.mean(1) >= target - checks.number("tolerance", tolerance, low=0) - 1e-12
    price = costs.mean(1) if by is None else np.array([by[option.name] for option in options])
    reached = [n for n in range(len(options)) if good[n]]
    if not reached:
        return None
    return options[min(reached, key=lambda n: (price[n], -covered[n].mean()))]


def extra_cost(
    options: Sequence[Option],
    target: float,
    *,
    by: Mapping[str, float],
    instead: Mapping[str, float],
    price: Mapping[str, float],
    tolerance: float = 0.0,
) -> float | None:
    """How many times dearer what looks cheapest `by` one cost is than what looks cheapest by the one `instead`, at
    equal coverage.

    Both are paid at `price` (costs by the options' names): 1 where the two agree about the option, below 1 where the
    first knows better. None where no option reaches the target.

    >>> small, large = Option("small", (1.0,), (0.5,)), Option("large", (1.0,), (0.6,))
    >>> flops, seconds = {"small": 1.0, "large": 2.0}, {"small": 9.0, "large": 3.0}
    >>> extra_cost([small, large], 0.5, by=flops, instead=seconds, price=seconds)
    3.0
    """
    first = cheapest(options, target, by=by, tolerance=tolerance)
    second = cheapest(options, target, by=instead, tolerance=tolerance)
    if first is None or second is None:
        return None
    return price[first.name] / price[second.name]
