"""What predictions are worth: scores by component and language, both means by name, and what a prediction costs against a run."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from assay import checks
from assay.methods.code.surge.items import Item
from assay.methods.code.surge.scores import Score, score


@dataclass(frozen=True)
class Report:
    """`macro` is the mean over components of their means, `micro` the mean over items: they differ where components differ in size.

    `unparsable` is the share of answers that could not be read, `right` of those that score 1.
    """

    macro: float
    micro: float
    by_component: Mapping[str, float]
    by_language: Mapping[str, float]
    unparsable: float
    right: float
    items: int

    def as_dict(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)


def scored(items: Sequence[Item], replies: Sequence[str], *, variant: str = "paper") -> list[Score]:
    """The score of each reply. Raises ValueError for replies that are not one for each item."""
    if len(replies) != len(items):
        raise ValueError(f"replies must be one for each of {len(items)} items, got {len(replies)}")
    return [score(item, reply, variant=variant) for item, reply in zip(items, replies, strict=True)]


def report(items: Sequence[Item], scores: Sequence[Score]) -> Report:
    """The means of scores. Raises ValueError for no items, and for scores that are not one for each.

    >>> a = Item("a", "ML", "c", "a", "c", {"main.c": "x"}, "gcc main.c", "1")
    >>> b = Item("b", "BG", "name", "b", "python", {"main.py": "x"}, "python main.py", "e")
    >>> found = report([a, a, b], [Score(1.0, "right"), Score(0.0, "unparsable"), Score(1.0, "right")])
    >>> found.macro, round(found.micro, 3), found.by_component
    (0.75, 0.667, {'ML': 0.5, 'BG': 1.0})
    """
    if not items or len(items) != len(scores):
        raise ValueError(f"items and scores must be one or more and as many, got {len(items)} and {len(scores)}")
    by_component = _means(items, scores, lambda item: item.component)
    return Report(
        statistics.fmean(by_component.values()),
        statistics.fmean(one.value for one in scores),
        by_component,
        _means(items, scores, lambda item: item.language),
        statistics.fmean(one.state == "unparsable" for one in scores),
        statistics.fmean(one.state == "right" for one in scores),
        len(items),
    )


def _means(items: Sequence[Item], scores: Sequence[Score], key: Callable[[Item], str]) -> dict[str, float]:
    held: dict[str, list[float]] = {}
    for item, one in zip(items, scores, strict=True):
        held.setdefault(key(item), []).append(one.value)
    return {name: statistics.fmean(values) for name, values in held.items()}


# ----------------------------------------------------------------------------------------------------------------------- cost


@dataclass(frozen=True)
class Cost:
    """Medians over items: seconds and tokens of a prediction, seconds of a run; and `break_even`, with the accuracy it was taken at.

    `longer` is the share of items whose program runs longer than that.
    """

    predict_seconds: float
    tokens: float
    run_seconds: float
    accuracy: float
    break_even: float
    longer: float

    def as_dict(self) -> dict[str, Any]:
        """As plain data; a break-even that there is not is None."""
        return {**asdict(self), "break_even": self.break_even if math.isfinite(self.break_even) else None}


def break_even(seconds: float, accuracy: float) -> float:
    """The run time in seconds above which predicting first pays: `seconds` of a prediction over its accuracy; infinite at 0. Ours.

    Predict, and run the program where the prediction is wrong: seconds + (1 - accuracy) * t < t. That is the kindest case, in which
    somebody knows for free whether a prediction is right; where nobody does, a wrong one costs more than any run.

    >>> break_even(0.5, 0.25), break_even(0.5, 0.0)
    (2.0, inf)
    """
    seconds = checks.number("seconds", seconds, above=0)
    accuracy = checks.number("accuracy", accuracy, low=0, high=1)
    return seconds / accuracy if accuracy else math.inf


def cost(items: Sequence[Item], scores: Sequence[Score], seconds: Sequence[float], tokens: Sequence[int]) -> Cost:
    """What predictions cost against runs. Accuracy is the share of items that score 1: half an answer replaces no run.

    Raises ValueError for no items, and for figures that are not one for each.
    """
    if not items or not len(items) == len(scores) == len(seconds) == len(tokens):
        sizes = [len(items), len(scores), len(seconds), len(tokens)]
        raise ValueError(f"items, scores, seconds and tokens must be one or more and as many, got {sizes}")
    accuracy = statistics.fmean(one.state == "right" for one in scores)
    spent = statistics.median(seconds)
    pays = break_even(spent, accuracy)
    runs = [item.seconds for item in items]
    longer = statistics.fmean(run > pays for run in runs)
    return Cost(spent, statistics.median(tokens), statistics.median(runs), accuracy, pays, longer)
