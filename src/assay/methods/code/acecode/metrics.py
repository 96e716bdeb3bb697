"""What a trained model is told by: pass@1, general execution time, efficiency among right code, and the share that runs faster.

Samples come by task: the cost of a right one, None for a wrong one, which has none. Costs are in any unit, the same for all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from assay import checks

Samples = Mapping[str, Sequence[float | None]]


def pass_at_1(samples: Samples) -> float:
    """The share of right samples, the mean over tasks.

    >>> pass_at_1({"a": [1.0, None], "b": [2.0, 2.0]})
    0.75
    """
    _check("samples", samples)
    return math.fsum(sum(cost is not None for cost in costs) / len(costs) for costs in samples.values()) / len(samples)


def get(samples: Samples, original: Samples) -> float | None:
    """General execution time: mean cost of right samples over that of the original model's, the mean over the tasks that both solve at
    least once. Below 1 is faster. Our reading. None where they solve none together.

    >>> get({"a": [1.0, None], "b": [None]}, {"a": [2.0, 4.0], "b": [1.0]})
    0.3333333333333333
    """
    both = _together(samples, original)
    found = [_mean(mine) / _mean(theirs) for mine, theirs in both if mine and theirs]
    return _mean(found) if found else None


def ecc(samples: Samples, reference: Mapping[str, float]) -> float | None:
    """Efficiency among correct code: the share of right samples that cost less than the task's reference. Our reading. None without any.

    >>> ecc({"a": [1.0, None, 3.0]}, {"a": 2.0})
    0.5
    """
    _check("samples", samples)
    if missing := set(samples) - set(reference):
        raise ValueError(f"reference must have all tasks, lacks {', '.join(sorted(missing))}")
    found = [cost < reference[task] for task, costs in samples.items() for cost in costs if cost is not None]
    return sum(found) / len(found) if found else None


def faster_share(samples: Samples, original: Samples, *, dead_zone: float = 0.1) -> float | None:
    """The share of cases that run faster than the original model's: a sample against the original's of the same place, where that one is
    right; a wrong one is never faster. Faster is by more than `dead_zone`. None where the original is right nowhere.

    >>> faster_share({"a": [1.0, None, 2.0, 1.0]}, {"a": [2.0, 2.0, 2.0, None]})
    0.3333333333333333
    """
    checks.number("dead_zone", dead_zone, low=0, below=1)
    _together(samples, original)
    if any(len(samples[task]) != len(original[task]) for task in samples):
        raise ValueError("original must have as many samples of every task as samples")
    found = [
        mine is not None and mine < (1 - dead_zone) * theirs
        for task in samples
        for mine, theirs in zip(samples[task], original[task], strict=True)
        if theirs is not None
    ]
    return sum(found) / len(found) if found else None


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _together(samples: Samples, original: Samples) -> list[tuple[list[float], list[float]]]:
    _check("samples", samples)
    _check("original", original)
    if set(samples) != set(original):
        raise ValueError(f"original must have the tasks of samples, got {len(original)} and {len(samples)}")
    return [tuple([c for c in of[task] if c is not None] for of in (samples, original)) for task in samples]  # type: ignore[misc]


def _check(name: str, samples: Samples) -> None:
    if not samples or not all(samples.values()):
        raise ValueError(f"{name} must have at least one task, and each at least one sample")
    for costs in samples.values():
        for cost in costs:
            if cost is not None:
                checks.number(f"a cost in {name}", cost, above=0)
