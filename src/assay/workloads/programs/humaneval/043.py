"""HumanEval/43 pairs_sum_to_zero: are there two elements that sum to zero?"""

# %% task
SIZES = (8, 500, 2000, 6000)
COMPARE = "same"


def generate(size, rng):
    if size <= 8:
        return ([rng.randint(-12, 12) for _ in range(rng.randint(1, size))],)
    return ([rng.choice((-1, 1)) * x for x in rng.sample(range(1, 20 * size), size)],)  # all of different size


def contract(l):
    assert isinstance(l, list)
    assert all(isinstance(x, int) for x in l)


# %% expert: a set against its own negatives, O(n)
from operator import neg


def pairs_sum_to_zero(l):
    values = set(l)
    if 0 in values:
        if l.count(0) > 1:
            return True
        values.discard(0)
    return not values.isdisjoint(map(neg, values))


# %% a set of those seen
def pairs_sum_to_zero(l):
    seen = set()
    for x in l:
        if -x in seen:
            return True
        seen.add(x)
    return False


# %% sorted, two pointers, O(n log n)
def pairs_sum_to_zero(l):
    l = sorted(l)
    i, j = 0, len(l) - 1
    while i < j:
        total = l[i] + l[j]
        if total == 0:
            return True
        if total < 0:
            i += 1
        else:
            j -= 1
    return False


# %% sorted by size without sign, neighbours only, O(n log n)
def pairs_sum_to_zero(l):
    l = sorted(l, key=abs)
    return any(a + b == 0 for a, b in zip(l, l[1:]))


# %% counted, and the negative looked up
from collections import Counter


def pairs_sum_to_zero(l):
    counts = Counter(l)
    for x in counts:
        if x == 0 and counts[0] > 1 or x > 0 and counts[-x] > 0:
            return True
    return False


# %% sorted, the negative by bisection, O(n log n)
from bisect import bisect_left


def pairs_sum_to_zero(l):
    l = sorted(l)
    for i, x in enumerate(l):
        at = bisect_left(l, -x, i + 1)
        if at < len(l) and l[at] == -x:
            return True
    return False


# %% the negative sought in the rest of the list, O(n^2) in C
def pairs_sum_to_zero(l):
    return any(-x in l[i + 1 :] for i, x in enumerate(l))


# %% all combinations, O(n^2)
from itertools import combinations


def pairs_sum_to_zero(l):
    for a, b in combinations(l, 2):
        if a == -b:
            return True
    return False


# %% wrong: a zero pairs with itself
def pairs_sum_to_zero(l):
    values = set(l)
    return any(-x in values for x in values)


# %% wrong: the smallest with the largest, and so on
def pairs_sum_to_zero(l):
    l = sorted(l)
    return any(a + b == 0 for a, b in zip(l[: len(l) // 2], reversed(l)))
