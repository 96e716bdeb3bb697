"""HumanEval/90 next_smallest: the second smallest of the distinct numbers."""

# %% task
SIZES = (8, 1_000, 8_000, 50_000)  # numbers
COMPARE = "same"


def generate(size, rng):
    """Numbers in no order; the smallest stands in every fiftieth place or so, 200 at most. At small sizes there may be no second one."""
    if size < 100 and rng.random() < 0.25:
        return ([rng.randint(-3, 3)] * rng.randint(0, size),)
    often = rng.randint(1, 3) if size < 100 else min(size // 50, 200)
    lowest = -rng.randrange(1, 4 * size)
    rest = [lowest + 1 + rng.randrange(4 * size) for _ in range(max(1, size - often))]
    numbers = rest + [lowest] * often
    rng.shuffle(numbers)
    return (numbers,)


def contract(lst):
    assert isinstance(lst, list)
    assert all(type(number) is int for number in lst)


# %% expert: one pass that asks for the second smallest first, O(n)
def next_smallest(lst):
    first = second = float("inf")
    for number in lst:
        if number < second:
            if number < first:
                first, second = number, first
            elif number > first:
                second = number
    return None if second == float("inf") else second


# %% one pass, two variables, O(n)
def next_smallest(lst):
    first = second = None
    for number in lst:
        if first is None or number < first:
            first, second = number, first
        elif number > first and (second is None or number < second):
            second = number
    return second


# %% sorted, first one that differs, O(n log n)
def next_smallest(lst):
    ordered = sorted(lst)
    for number in ordered:
        if number > ordered[0]:
            return number
    return None


# %% two minima, the second of those that differ, O(n)
def next_smallest(lst):
    if not lst:
        return None
    smallest = min(lst)
    return min(filter(smallest.__ne__, lst), default=None)


# %% the two smallest of a heap of distinct numbers, O(n)
import heapq


def next_smallest(lst):
    smallest = heapq.nsmallest(2, set(lst))
    return smallest[1] if len(smallest) == 2 else None


# %% the smallest removed until it is gone, O(n * how often it occurs)
def next_smallest(lst):
    left = list(lst)
    if not left:
        return None
    smallest = min(left)
    while smallest in left:
        left.remove(smallest)
    return min(left) if left else None


# %% tournament of halves, O(n)
def next_smallest(lst):
    def two(low, high):
        if high - low == 1:
            return [lst[low]]
        middle = (low + high) // 2
        return sorted(set(two(low, middle) + two(middle, high)))[:2]

    if not lst:
        return None
    found = two(0, len(lst))
    return found[1] if len(found) > 1 else None


# %% how often each occurs, keys sorted, O(n log n)
from collections import Counter


def next_smallest(lst):
    keys = sorted(Counter(lst))
    return None if len(keys) < 2 else keys[1]


# %% distinct numbers kept in a list, inserted in order, quadratic in moves
from bisect import bisect_left


def next_smallest(lst):
    ordered = []
    for number in lst:
        place = bisect_left(ordered, number)
        if place == len(ordered) or ordered[place] != number:
            ordered.insert(place, number)
    if len(ordered) >= 2:
        return ordered[1]
    return None


# %% wrong: the second of the sorted numbers, distinct or not
def next_smallest(lst):
    return sorted(lst)[1] if len(lst) > 1 else None


# %% wrong: a new smallest does not hand the old one on
def next_smallest(lst):
    first = second = float("inf")
    for number in lst:
        if number < first:
            first = number
        elif first < number < second:
            second = number
    return None if second == float("inf") else second
