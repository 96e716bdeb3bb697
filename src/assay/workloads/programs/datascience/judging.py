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

    Marks of a kind may come in any order; texts and ticks in theirs. Scales are linear unless it says otherwise. Colours, sizes and
    decoration do not count, nor what is not named, but for marks of other kinds, which must not be there.
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
            at = next((at for at, other in enumerate(left) if _fits(name, mark, other)), None)
            if at is None:
                return f"{name} with other data, places or labels"
            del left[at]
    for name in ("xscale", "yscale"):
        if seen[name] != wanted.get(name, "linear"):
            return f"{name} is {seen[name]}, not {wanted.get(name, 'linear')}"
    for name in ("title", "xlabel", "ylabel", "legend", "texts", "xticks", "yticks", "limits"):
        shown = [text for text in seen[name] if text] if name in ("xticks", "yticks", "texts") else seen[name]
        if name in wanted and not same(wanted[name], shown):
            return f"{name} is {shown!r}, not {wanted[name]!r}"
    return ""


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
    return all(same(value, other[key]) for key, value in mark.items())


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
