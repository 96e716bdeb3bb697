"""HumanEval/0 has_close_elements: is any pair of numbers nearer than a threshold?"""

# %% task
SIZES = (8, 400, 1500, 4000)
COMPARE = "same"


def generate(size, rng):
    if size <= 8:  # quarters: distances equal to the threshold come up
        numbers = [rng.randrange(64) / 4 for _ in range(rng.randint(1, size))]
        return numbers, rng.choice((0.25, 0.5, 1.0, 1.5))
    numbers = [i + rng.uniform(0.0, 0.4) for i in range(size)]  # no gap below 0.6: nobody may stop early
    rng.shuffle(numbers)
    return numbers, 0.5


def contract(numbers, threshold):
    assert isinstance(numbers, list)
    assert all(isinstance(x, (int, float)) and x - x == 0 for x in numbers)
    assert isinstance(threshold, (int, float)) and threshold - threshold == 0


# %% expert: the smallest gap of neighbours in sorted order, O(n log n)
from math import inf
from operator import sub


def has_close_elements(numbers, threshold):
    ordered = sorted(numbers)
    return min(map(sub, ordered[1:], ordered), default=inf) < threshold


# %% sorted, a loop over neighbours, O(n log n)
def has_close_elements(numbers, threshold):
    ordered = sorted(numbers)
    for i in range(1, len(ordered)):
        if ordered[i] - ordered[i - 1] < threshold:
            return True
    return False


# %% buckets as wide as the threshold, O(n)
from math import floor


def has_close_elements(numbers, threshold):
    if threshold <= 0:
        return False
    buckets = {}
    for x in numbers:
        place = floor(x / threshold)
        for near in (place - 1, place, place + 1):
            if near in buckets and abs(buckets[near] - x) < threshold:
                return True
        buckets[place] = x
    return False


# %% each number against its neighbours among the earlier ones, by bisection
from bisect import bisect_left


def has_close_elements(numbers, threshold):
    kept = []
    for x in numbers:
        at = bisect_left(kept, x)
        if at < len(kept) and kept[at] - x < threshold:
            return True
        if at > 0 and x - kept[at - 1] < threshold:
            return True
        kept.insert(at, x)
    return False


# %% numbers taken from a heap one by one, O(n log n)
import heapq


def has_close_elements(numbers, threshold):
    heap = list(numbers)
    heapq.heapify(heap)
    last = None
    while heap:
        x = heapq.heappop(heap)
        if last is not None and x - last < threshold:
            return True
        last = x
    return False


# %% each pair once in two loops, O(n^2)
def has_close_elements(numbers, threshold):
    for i in range(len(numbers)):
        for j in range(i):
            if abs(numbers[i] - numbers[j]) < threshold:
                return True
    return False


# %% all combinations, O(n^2)
from itertools import combinations


def has_close_elements(numbers, threshold):
    return any(abs(a - b) < threshold for a, b in combinations(numbers, 2))


# %% wrong: neighbours in the given order
def has_close_elements(numbers, threshold):
    return any(abs(a - b) < threshold for a, b in zip(numbers, numbers[1:]))


# %% wrong: as near as the threshold counts as nearer
def has_close_elements(numbers, threshold):
    ordered = sorted(numbers)
    return any(b - a <= threshold for a, b in zip(ordered, ordered[1:]))
