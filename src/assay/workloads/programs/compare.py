"""Is an answer the expected one? Comparators for values, each `compare(expected, got) -> bool`; a bank names them.

All of them tell True from 1 and refuse what is of another kind, for a program that returns "3" where 3 is asked is wrong.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

Compare = Callable[[Any, Any], bool]


def same(expected: Any, got: Any) -> bool:
    """Equal in kind and value; floats as `close` has it, 2 and 2.0 are the same number, a list is no tuple.

    >>> same([1, 2.0], [1, 2.0000000001]), same((1,), [1]), same(1, True)
    (True, False, False)
    """
    return _equal(expected, got, rtol=1e-9, atol=1e-12, sequences=False)


def close(rtol: float = 1e-6, atol: float = 1e-6) -> Compare:
    """Numbers within `atol + rtol * |expected|`, also nested; NaN equals NaN.

    >>> close(atol=0.01)([1.0], [1.005])
    True
    """

    def compare(expected: Any, got: Any) -> bool:
        return _equal(expected, got, rtol=rtol, atol=atol, sequences=False)

    return compare


def sequence(expected: Any, got: Any) -> bool:
    """As `same`, but a list and a tuple of the same items are the same.

    >>> sequence([(1, 2)], ([1, 2],))
    True
    """
    return _equal(expected, got, rtol=1e-9, atol=1e-12, sequences=True)


def unordered(expected: Any, got: Any) -> bool:
    """The same items, each as often, in any order; a set counts as its items.

    >>> unordered([1, 2, 2], (2, 1, 2)), unordered([1, 2], [1, 2, 2])
    (True, False)
    """
    if not all(isinstance(x, (list, tuple, set, frozenset)) for x in (expected, got)) or len(expected) != len(got):
        return False
    try:
        return Counter(map(_keyed, expected)) == Counter(map(_keyed, got))
    except TypeError:  # items that cannot be hashed: each is looked for among those not yet found
        rest = list(got)
        for item in expected:
            at = next((n for n, other in enumerate(rest) if same(item, other)), None)
            if at is None:
                return False
            del rest[at]
        return True


def figure(atol: float = 1e-9, *, turned: bool = True) -> Compare:
    """Polygons and lines, sequences of points: the same closed ring may begin anywhere, and (`turned`) run the other way.

    >>> figure()([(0, 0), (1, 0), (1, 1)], [(1, 0), (1, 1), (0, 0)])
    True
    """

    def compare(expected: Any, got: Any) -> bool:
        rings = []
        for points in (expected, got):
            if not isinstance(points, (list, tuple)) or not all(_is_point(point) for point in points):
                return False
            ring = [tuple(map(float, point)) for point in points]
            rings.append(ring[:-1] if len(ring) > 1 and _near(ring[0], ring[-1], atol) else ring)
        one, other = rings
        if len(one) != len(other):
            return False
        ways = [other, other[::-1]] if turned else [other]
        return not one or any(
            all(_near(point, way[(n + start) % len(way)], atol) for n, point in enumerate(one))
            for way in ways
            for start in range(len(way))
        )

    return compare


def any_of(compare: Compare) -> Compare:
    """The expected value is a list of answers that are all right.

    >>> any_of(same)([1, 2], 2)
    True
    """
    return lambda expected, got: any(compare(one, got) for one in expected)


COMPARATORS: dict[str, Compare] = {
    "same": same,
    "close": close(),
    "sequence": sequence,
    "unordered": unordered,
    "figure": figure(),
}
"""By the names that banks and files of cases use."""


def named(name: str) -> Compare:
    """The comparator of a name. Raises ValueError for another, with the names there are."""
    if name not in COMPARATORS:
        raise ValueError(f"compare must be one of {', '.join(COMPARATORS)}, got {name!r}")
    return COMPARATORS[name]


def _equal(expected: Any, got: Any, *, rtol: float, atol: float, sequences: bool) -> bool:
    if isinstance(expected, bool) or isinstance(got, bool) or expected is None or got is None:
        return type(expected) is type(got) and expected == got
    if isinstance(expected, (int, float, complex)) and isinstance(got, (int, float, complex)):
        return _numbers(expected, got, rtol, atol)
    if isinstance(expected, (list, tuple)) and isinstance(got, (list, tuple)):
        if not sequences and isinstance(expected, list) != isinstance(got, list):
            return False
        return len(expected) == len(got) and all(
            _equal(one, other, rtol=rtol, atol=atol, sequences=sequences)
            for one, other in zip(expected, got, strict=True)
        )
    if isinstance(expected, dict) and isinstance(got, dict):
        return (
            len(expected) == len(got)
            and expected.keys() == got.keys()
            and all(
                _equal(value, got[key], rtol=rtol, atol=atol, sequences=sequences) for key, value in expected.items()
            )
        )
    if isinstance(expected, (set, frozenset)) and isinstance(got, (set, frozenset)):
        return Counter(map(_keyed, expected)) == Counter(map(_keyed, got))
    return type(expected) is type(got) and bool(expected == got)


def _numbers(expected: complex, got: complex, rtol: float, atol: float) -> bool:
    if isinstance(expected, int) and isinstance(got, int):
        return expected == got
    parts = []
    for one, other in ((expected.real, got.real), (expected.imag, got.imag)):
        try:
            one, other = float(one), float(other)
        except OverflowError:  # an int beyond every float equals nothing but itself
            return expected == got
        if math.isnan(one) or math.isnan(other) or math.isinf(one) or math.isinf(other):
            parts.append((math.isnan(one) and math.isnan(other)) or one == other)
        else:
            parts.append(abs(one - other) <= atol + rtol * abs(one))
    return all(parts)


def _keyed(item: Any) -> Any:
    """Something to hash in which True is not 1, also inside of tuples."""
    if isinstance(item, tuple):
        return ("tuple", *map(_keyed, item))
    return ("bool", item) if isinstance(item, bool) else item


def _is_point(point: Any) -> bool:
    return isinstance(point, (list, tuple)) and all(
        isinstance(x, (int, float)) and not isinstance(x, bool) for x in point
    )


def _near(one: tuple[float, ...], other: tuple[float, ...], atol: float) -> bool:
    return len(one) == len(other) and all(abs(a - b) <= atol for a, b in zip(one, other, strict=True))
