"""Is an answer right, and is a figure the one that was asked for? By values and by artists; and how alike two pictures are.

Answers come as plain data (`harness.plain`). Numbers may differ by rounding, everything else by nothing: a list is no dictionary, True is
no 1, and a missing key is a fault. A list and a tuple are the same to the tasks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

TOLERANCE = 1e-6
MARKS = ("lines", "points", "bars", "bands", "wedges", "images")
"""Kinds of marks: a figure has those that a task asks for, and none of the others."""
PLACES = (
    "row", "column", "title", "xlabel", "ylabel", "yside", "legend", "texts", "xticks", "yticks", "xtickat", "ytickat", "limits",
)  # fmt: skip
WINDOW = 7


def decoded(value: Any) -> Any:
    """Plain data with its dictionaries made of their pairs. Raises TypeError for a key that is none."""
    if isinstance(value, dict):
        return {_key(key): decoded(each) for key, each in value["__dict__"]}
    return [decoded(each) for each in value] if isinstance(value, list) else value


def _key(key: Any) -> Any:
    return tuple(key) if isinstance(key, list) else key


def same(expected: Any, got: Any, tolerance: float = TOLERANCE) -> bool:
    """Whether an answer is the expected one; numbers within `tolerance`, of themselves or absolutely where they are small.

    >>> same({"a": [1, 0.5]}, {"a": (1, 0.5 + 1e-9)}), same([1], [True]), same(2.0, "2")
    (True, False, False)
    """
    if isinstance(expected, Mapping):
        fits = isinstance(got, Mapping) and expected.keys() == got.keys()
        return fits and all(same(value, got[key], tolerance) for key, value in expected.items())
    if isinstance(expected, list | tuple):
        fits = isinstance(got, list | tuple) and len(expected) == len(got)
        return fits and all(same(a, b, tolerance) for a, b in zip(expected, got, strict=True))
    if isinstance(expected, bool) or isinstance(got, bool) or not isinstance(expected, int | float):
        return type(expected) is type(got) and bool(expected == got)
    if not isinstance(got, int | float):
        return False
    return math.isclose(expected, got, rel_tol=tolerance, abs_tol=tolerance)


def figure_fault(expected: Mapping[str, Any] | Sequence[Mapping[str, Any]], seen: Sequence[Mapping[str, Any]]) -> str:
    """What is wrong with a figure, "" for nothing: `expected` says of each pair of axes what counts, `seen` is from `harness.artists`.

    Marks of a kind may come in any order but for wedges; texts and ticks in that of a reader; a set of texts says what a legend must hold.
    Ticks that are named stand at their bars, or at 0, 1, 2, ... under an image. A line may run either way, and a straight one may have more
    points than its ends. Scales are linear unless it says otherwise. Colours, sizes and decoration do not count, nor what is not named,
    but for marks of other kinds, which must not be there.
    """
    wanted = [expected] if isinstance(expected, Mapping) else list(expected)
    if len(wanted) != len(seen):
        return f"{len(seen)} pairs of axes, not {len(wanted)}"
    faults = [_axes_fault(one, axes) for one, axes in zip(wanted, seen, strict=True)]
    return next((fault for fault in faults if fault), "")


def _axes_fault(wanted: Mapping[str, Any], seen: Mapping[str, Any]) -> str:
    for name in MARKS:
        marks, left = wanted.get(name, []), list(seen[name])
        if len(marks) != len(left):
            return f"{len(left)} {name}, not {len(marks)}"
        for mark in marks:
            allowed = left[:1] if name == "wedges" else left
            at = next((at for at, other in enumerate(allowed) if _fits(name, mark, other)), None)
            if at is None:
                return f"{name} with other data, places or labels"
            del left[at]
    for name in ("xscale", "yscale"):
        if seen[name] != wanted.get(name, "linear"):
            return f"{name} is {seen[name]}, not {wanted.get(name, 'linear')}"
    for name in PLACES:
        if name not in wanted:
            continue
        held, want = seen[name], wanted[name]
        if not (want <= set(held) if isinstance(want, set) else same(want, held)):
            return f"{name} is {held!r}, not {want!r}"
    for axis, flat in (("x", False), ("y", True)):
        if f"{axis}ticks" in wanted and f"{axis}tickat" not in wanted and not _ticks_fit(seen, axis, flat):
            return f"{axis}ticks stand elsewhere than what they name"
    return ""


def _ticks_fit(seen: Mapping[str, Any], axis: str, flat: bool) -> bool:
    """Whether ticks stand at their bars, or at the middles of an image's cells."""
    at = seen[f"{axis}tickat"]
    if seen["images"]:
        return same(list(range(len(at))), at)
    rows = [group for group in seen["bars"] if group["horizontal"] == flat]
    return all(
        len(at) == len(row["at"])
        and all(
            abs(tick - bar) <= width / 2 + TOLERANCE
            for tick, bar, width in zip(at, row["at"], row["width"], strict=True)
        )
        for row in rows
    )


def _fits(name: str, mark: Any, other: Any) -> bool:
    if name == "images":
        return same(mark, other)
    if name == "bands":
        edges = [(x, y) for side in ("low", "high") for x, y in zip(mark["x"], mark[side], strict=True)]
        corners = list(zip(other["x"], other["y"], strict=True))
        return _among(edges, corners) and _among(corners, edges)
    if name == "points":
        one, two = (sorted(zip(each["x"], each["y"], strict=True)) for each in (mark, other))
        return same(one, two) and same(mark.get("label", other["label"]), other["label"])
    if name == "lines":
        mark = {"drawstyle": "default", **mark}
        other = other if mark["drawstyle"] != "default" else _like(mark, other)
    return all(same(value, other[key]) for key, value in mark.items())


def _like(mark: Mapping[str, Any], line: Mapping[str, Any]) -> Mapping[str, Any]:
    """A line the other way round where it then begins as `mark` does; of one that `mark` draws by its two ends, the ends."""
    x, y = mark.get("x", []), mark.get("y", [])
    if len(x) == len(y) == 2 < len(line["x"]) and _straight(x, y, line):
        ends = sorted(zip(line["x"], line["y"], strict=True))
        line = {**line, "x": [ends[0][0], ends[-1][0]], "y": [ends[0][1], ends[-1][1]]}
    if x and y and line["x"] and not same([x[0], y[0]], [line["x"][0], line["y"][0]]):
        line = {**line, "x": line["x"][::-1], "y": line["y"][::-1]}
    return line


def _straight(x: Sequence[float], y: Sequence[float], line: Mapping[str, Any]) -> bool:
    """Whether all points of a line lie on the one through two ends."""
    if x[0] == x[1] or any(isinstance(value, str) for value in (*line["x"], *line["y"])):
        return False
    slope = (y[1] - y[0]) / (x[1] - x[0])
    return all(same(y[0] + slope * (a - x[0]), b) for a, b in zip(line["x"], line["y"], strict=True))


def _among(some: Sequence[Any], others: Sequence[Any]) -> bool:
    return all(any(same(one, other) for other in others) for one in some)


def similarity(first: Any, second: Any) -> float:
    """The structural similarity (SSIM; Wang and others, 2004) of two grey pictures of equal size, by rows, 0 to 255: 1 for the same.

    The mean over windows of 7 by 7 pixels that weigh the same, with the usual constants. When NOT to use it: alone. Most of a plot is
    white, so that a wrong one is often more like the right one than 0.9. Raises ValueError for other sizes.

    >>> picture = [[0, 255] * 8] * 16
    >>> similarity(picture, picture)
    1.0
    """
    a, b = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if a.shape != b.shape or a.ndim != 2 or min(a.shape) < WINDOW:
        raise ValueError(f"pictures must be of one size, at least {WINDOW} by {WINDOW}, got {a.shape} and {b.shape}")
    n = WINDOW * WINDOW
    means = [_windows(each) / n for each in (a, b, a * a, b * b, a * b)]
    spread = [n / (n - 1) * (means[at] - means[x] * means[y]) for at, x, y in ((2, 0, 0), (3, 1, 1), (4, 0, 1))]
    one, two = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    above = (2 * means[0] * means[1] + one) * (2 * spread[2] + two)
    return float((above / ((means[0] ** 2 + means[1] ** 2 + one) * (spread[0] + spread[1] + two))).mean())


def _windows(values: np.ndarray) -> np.ndarray:
    """The sums over all windows."""
    total = np.pad(values.cumsum(axis=0).cumsum(axis=1), ((1, 0), (1, 0)))
    return total[WINDOW:, WINDOW:] - total[:-WINDOW, WINDOW:] - total[WINDOW:, :-WINDOW] + total[:-WINDOW, :-WINDOW]
