"""HumanEval/40 triples_sum_to_zero: are there three elements that sum to zero?"""

# %% task
SIZES = (8, 60, 150, 300)
COMPARE = "same"


def generate(size, rng):
    if size <= 8:
        return ([rng.randint(-12, 12) for _ in range(rng.randint(1, size))],)
    return ([4 * k + 1 for k in rng.sample(range(-25 * size, 25 * size), size)],)  # three of them leave 3 by 4, never 0


def contract(l):
    assert isinstance(l, list)
    assert all(isinstance(x, int) for x in l)


# %% expert: pairs of one sign against the set of the other, O(n^2)
from collections import Counter
from operator import neg


def triples_sum_to_zero(l):
    counts = Counter(l)
    if counts[0] >= 3 or any(many >= 2 and x and -2 * x in counts for x, many in counts.items()):
        return True
    above, below = {x for x in counts if x > 0}, {x for x in counts if x < 0}
    if 0 in counts and not above.isdisjoint(map(neg, below)):
        return True
    for same, other in ((above, below), (below, above)):
        values = list(same)
        for i, a in enumerate(values):
            if not other.isdisjoint([-a - b for b in values[i + 1 :]]):
                return True
    return False


# %% sorted, two pointers for every first, O(n^2)
def triples_sum_to_zero(l):
    l = sorted(l)
    for i in range(len(l) - 2):
        low, high = i + 1, len(l) - 1
        while low < high:
            total = l[i] + l[low] + l[high]
            if total == 0:
                return True
            if total < 0:
                low += 1
            else:
                high -= 1
    return False


# %% for every first a set of those seen after it, O(n^2)
def triples_sum_to_zero(l):
    for i, a in enumerate(l):
        seen = set()
        for b in l[i + 1 :]:
            if -a - b in seen:
                return True
            seen.add(b)
    return False


# %% sums of the pairs before it, O(n^2) in time and memory
def triples_sum_to_zero(l):
    sums = set()
    before = []
    for x in l:
        if -x in sums:
            return True
        sums.update(x + y for y in before)
        before.append(x)
    return False


# %% every pair, the third by bisection, O(n^2 log n)
from bisect import bisect_left


def triples_sum_to_zero(l):
    l = sorted(l)
    for i in range(len(l)):
        for j in range(i + 1, len(l)):
            k = bisect_left(l, -l[i] - l[j], j + 1)
            if k < len(l) and l[k] == -l[i] - l[j]:
                return True
    return False


# %% the third sought in the rest of the list, O(n^3) in C
def triples_sum_to_zero(l):
    for i in range(len(l)):
        for j in range(i + 1, len(l)):
            if -(l[i] + l[j]) in l[j + 1 :]:
                return True
    return False


# %% all combinations, O(n^3)
from itertools import combinations


def triples_sum_to_zero(l):
    return any(a + b + c == 0 for a, b, c in combinations(l, 3))


# %% wrong: equal elements count once
from itertools import combinations


def triples_sum_to_zero(l):
    values = set(l)
    return any(-a - b in values - {a, b} for a, b in combinations(values, 2))


# %% wrong: an element may be used twice
from itertools import combinations


def triples_sum_to_zero(l):
    values = set(l)
    return any(-a - b in values for a, b in combinations(l, 2))
