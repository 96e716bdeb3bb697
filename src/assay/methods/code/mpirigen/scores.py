"""How near predicted calls come to the true ones: by place, function and arguments, as the paper counts and one to one."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from assay import checks
from assay.methods.code.mpirigen.marks import Item
from assay.methods.code.mpirigen.tokens import Call

CORE = frozenset(
    ["MPI_Init", "MPI_Finalize", "MPI_Comm_rank", "MPI_Comm_size", "MPI_Send", "MPI_Recv", "MPI_Reduce", "MPI_Bcast"]
)
"""The common core: the eight functions that most programs have."""
TOLERANCES = (0, 1, 2)
Placed = tuple[int, Call]
"""A call and the line of the code that it stands after."""


@dataclass(frozen=True)
class Score:
    """How predicted calls of one program compare with its `calls` true ones.

    As the paper counts, where one prediction may serve several true calls: `location`, the share of true calls with one within the
    tolerance; `function`, the share of these for which one such prediction has the same function; `arguments`, the mean share of equal
    arguments over those, 1 where there are none. The two are None where nothing was hit.

    One to one, where each prediction serves one call: `matched` true calls have a prediction of their function within the tolerance, and
    `exact` have one with the same arguments too.
    """

    calls: int
    predicted: int
    location: float
    function: float | None
    arguments: float | None
    matched: int
    exact: int

    @property
    def recall(self) -> float:
        """The share of true calls that are matched."""
        return self.matched / self.calls

    @property
    def precision(self) -> float | None:
        """The share of predictions that are; None without any."""
        return self.matched / self.predicted if self.predicted else None

    @property
    def f1(self) -> float:
        """Both in one: twice the matches over all true and predicted calls."""
        return 2 * self.matched / (self.calls + self.predicted)

    @property
    def joint(self) -> float:
        """The share of true calls that are wholly there: place, function and every argument."""
        return self.exact / self.calls


def score(truth: Sequence[Placed], predicted: Sequence[Placed], *, tolerance: int = 2, core: bool = False) -> Score:
    """Compare the calls of one program. The order of either does not matter; a place is a line, not a position among the calls there.

    With `core` only the functions of `CORE` count, true or predicted. Raises ValueError where no true call is left, and for a tolerance
    below 0.

    >>> true = [(2, Call("MPI_Init", ("0", "0"))), (9, Call("MPI_Finalize", ()))]
    >>> found = score(true, [(3, Call("MPI_Init", ("&argc", "0")))])
    >>> found.location, found.function, found.arguments, found.precision
    (0.5, 1.0, 0.5, 1.0)
    """
    checks.whole("tolerance", tolerance, low=0)
    if core:
        truth = [placed for placed in truth if placed[1].function in CORE]
        predicted = [placed for placed in predicted if placed[1].function in CORE]
    if not truth:
        raise ValueError("truth must hold one call or more, got none")
    located, shares = 0, []
    for line, call in truth:
        near = [other for place, other in predicted if abs(place - line) <= tolerance]
        located += bool(near)
        same = [equal_share(call, other) for other in near if other.function == call.function]
        shares += [max(same)] if same else []
    return Score(
        len(truth),
        len(predicted),
        located / len(truth),
        len(shares) / located if located else None,
        float(np.mean(shares)) if shares else None,
        _matched(
            [(line, call.function) for line, call in truth],
            [(line, call.function) for line, call in predicted],
            tolerance,
        ),
        _matched(truth, predicted, tolerance),
    )


def equal_share(true: Call, other: Call) -> float:
    """The share of the true call's arguments that the other has in the same position; 1 for a call without any."""
    pairs = zip(true.arguments, other.arguments, strict=False)
    return sum(one == two for one, two in pairs) / len(true.arguments) if true.arguments else 1.0


def _matched(truth: Sequence[tuple[int, Any]], predicted: Sequence[tuple[int, Any]], tolerance: int) -> int:
    """The most pairs of equal things within the tolerance, each used once: in order of lines the first that fits is never worse."""
    count = 0
    for thing in {thing for _, thing in truth}:
        left = sorted(line for line, other in predicted if other == thing)
        for line in sorted(line for line, other in truth if other == thing):
            while left and left[0] < line - tolerance:
                left.pop(0)
            if left and left[0] <= line + tolerance:
                left.pop(0)
                count += 1
    return count


def placed(items: Iterable[Item]) -> list[Placed]:
    """The calls of items with their lines."""
    return [(item.line, call) for item in items for call in item.calls]


def over_programs(scores: Sequence[Score]) -> dict[str, float | None]:
    """Means over programs; those without a hit are left out of `function` and `arguments`, as in the paper, and counted in `without a hit`.

    `precision` leaves out programs without predictions. Raises ValueError for no scores.
    """
    if not scores:
        raise ValueError("scores must be one or more, got none")

    def mean(name: str) -> float | None:
        values = [value for one in scores if (value := getattr(one, name)) is not None]
        return float(np.mean(values)) if values else None

    names = ("location", "function", "arguments", "recall", "precision", "f1", "joint")
    return {name: mean(name) for name in names} | {"without a hit": float(sum(one.function is None for one in scores))}


def curve(scores: Sequence[Score], most: Iterable[int]) -> dict[int, dict[str, float | None]]:
    """`over_programs` of the programs with at most so many calls, for each number that leaves a program: the paper's curves."""
    found = {}
    for number in most:
        if kept := [one for one in scores if one.calls <= number]:
            found[number] = over_programs(kept)
    return found


# ------------------------------------------------------------------------------------------------------------- the released scorer

_CUT = re.compile(r"\((.*?);")
_HEAD = re.compile(r"(\d+) (\d+),\s*(MPI_\w*)\(")


def score_as_released(label: str, predicted: str, *, tolerance: int = 2) -> tuple[float, float | None, float | None]:
    """Location, function and arguments as the released scorer has them, from texts as a model writes them.

    It differs from `score`: a place is line.index read as a number, so that index 10 is index 1; near is the same index some lines away, or
    another index of the same line; of several calls at one place the last counts; an item ends at its first semicolon and arguments are
    cut at every comma; the first prediction of the same function counts, not the best. For comparing with published tables only.
    Raises ValueError for a label without calls, or a tolerance below 0.

    >>> score_as_released("(2 1, MPI_Init(0, 0);)", "(3 1, MPI_Init(0, x);)")
    (1.0, 1.0, 0.5)
    """
    checks.whole("tolerance", tolerance, low=0)
    truth, found = _released(label), _released(predicted)
    if not truth:
        raise ValueError(f"label must hold one call or more, got {checks.shown(label)}")
    located, same, shares = 0, 0, []
    for place, (function, arguments) in truth.items():
        near = [other for at, other in found.items() if _near(place, at, tolerance)]
        located += bool(near)
        fitting = next((other for other in near if other[0] == function), None)
        if fitting is not None:
            same += 1
            equal = sum(one == two for one, two in zip(arguments, fitting[1], strict=False))
            shares.append(equal / len(arguments))
    if not located:
        return 0.0, None, None
    return located / len(truth), same / located, float(np.mean(shares)) if shares else None


def calls_as_released(label: str) -> int:
    """How many calls the released scorer sees in a text: by this the authors' tables choose programs of at most so many."""
    return len(_released(label))


def _released(label: str) -> dict[int, tuple[str, list[str]]]:
    """Calls by place, in hundredths of a line."""
    found = {}
    for part in _CUT.findall(label):
        if head := _HEAD.search(part):
            place = round(100 * float(f"{head[1]}.{head[2]}"))
            found[place] = (head[3], part[head.end() : -1].split(","))
    return found


def _near(true: int, other: int, tolerance: int) -> bool:
    apart = abs(true - other)
    return apart % 100 == 0 and apart <= 100 * tolerance or apart % 10 == 0 and apart <= 10 * tolerance
