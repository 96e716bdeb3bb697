"""HumanEval/20 find_closest_elements: the two numbers that are nearest to each other."""

# %% task
SIZES = (8, 300, 1000, 3000)
COMPARE = "same"


def generate(size, rng):
    if size <= 8:
        numbers = [rng.uniform(-9.0, 9.0) for _ in range(rng.randint(2, size))]
        if rng.random() < 0.3:
            numbers.append(numbers[0])
    else:
        numbers = [i + rng.uniform(0.0, 0.8) for i in range(size)]  # all differ, one gap is the smallest
    rng.shuffle(numbers)
    return (numbers,)


def contract(numbers):
    assert isinstance(numbers, list) and len(numbers) >= 2
    assert all(isinstance(x, (int, float)) and x - x == 0 for x in numbers)


# %% expert: all gaps of neighbours in sorted order, O(n log n)
from operator import sub


def find_closest_elements(numbers):
    ordered = sorted(numbers)
    gaps = list(map(sub, ordered[1:], ordered))
    at = gaps.index(min(gaps))
    return ordered[at], ordered[at + 1]


# %% min of sorted neighbours with a key
def find_closest_elements(numbers):
    ordered = sorted(numbers)
    return min(zip(ordered, ordered[1:]), key=lambda pair: pair[1] - pair[0])


# %% sorted, a loop that keeps the best
def find_closest_elements(numbers):
    numbers = sorted(numbers)
    best = None
    for i in range(len(numbers) - 1):
        gap = numbers[i + 1] - numbers[i]
        if best is None or gap < best:
            best, pair = gap, (numbers[i], numbers[i + 1])
    return pair


# %% an ordered list grown by bisection
from bisect import bisect_left


def find_closest_elements(numbers):
    kept = []
    best = (float("inf"), None, None)
    for x in numbers:
        at = bisect_left(kept, x)
        if at < len(kept):
            best = min(best, (kept[at] - x, x, kept[at]))
        if at > 0:
            best = min(best, (x - kept[at - 1], kept[at - 1], x))
        kept.insert(at, x)
    return best[1], best[2]


# %% two halves around the middle value, and the pair across, O(n log n)
def find_closest_elements(numbers):
    def nearest(ordered):
        if len(ordered) < 2:
            return float("inf"), ()
        middle = len(ordered) // 2
        left, right = ordered[:middle], ordered[middle:]
        across = (right[0] - left[-1], (left[-1], right[0]))
        return min(nearest(left), nearest(right), across, key=lambda found: found[0])

    return nearest(sorted(numbers))[1]


# %% each pair once in two loops, O(n^2)
def find_closest_elements(numbers):
    best = float("inf")
    pair = None
    for i in range(len(numbers)):
        for j in range(i + 1, len(numbers)):
            gap = abs(numbers[i] - numbers[j])
            if gap < best:
                best = gap
                pair = (numbers[i], numbers[j])
    return min(pair), max(pair)


# %% min of all combinations, O(n^2)
from itertools import combinations


def find_closest_elements(numbers):
    return tuple(sorted(min(combinations(numbers, 2), key=lambda pair: abs(pair[0] - pair[1]))))


# %% wrong: neighbours in the given order
def find_closest_elements(numbers):
    return tuple(sorted(min(zip(numbers, numbers[1:]), key=lambda pair: abs(pair[0] - pair[1]))))


# %% wrong: the larger number first
def find_closest_elements(numbers):
    ordered = sorted(numbers, reverse=True)
    return min(zip(ordered, ordered[1:]), key=lambda pair: pair[0] - pair[1])
