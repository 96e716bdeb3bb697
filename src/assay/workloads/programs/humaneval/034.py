"""HumanEval/34 unique: the different elements of a list, sorted."""

# %% task
SIZES = (8, 1000, 4000, 10000)
COMPARE = "same"


def generate(size, rng):
    if size <= 8:
        few = [rng.randint(-200, 2000) for _ in range(5)]
        return (rng.choices(few, k=rng.randint(0, size)),)
    numbers = rng.sample(range(-50 * size, 50 * size), size - size // 4)
    numbers += rng.sample(numbers, size // 4)
    rng.shuffle(numbers)
    return (numbers,)


def contract(l):
    assert isinstance(l, list)
    assert all(isinstance(x, int) for x in l)


# %% expert: a set, sorted, O(n log n)
def unique(l):
    return sorted(set(l))


# %% sorted, then one of each run
from itertools import groupby


def unique(l):
    return [x for x, _ in groupby(sorted(l))]


# %% sorted, then all that differ from the last one kept
def unique(l):
    result = []
    for x in sorted(l):
        if not result or x != result[-1]:
            result.append(x)
    return result


# %% put where bisection says, unless it is there
from bisect import bisect_left


def unique(l):
    result = []
    for x in l:
        at = bisect_left(result, x)
        if at == len(result) or result[at] != x:
            result.insert(at, x)
    return result


# %% a heap of the set
from heapq import heapify, heappop


def unique(l):
    heap = list(dict.fromkeys(l))
    heapify(heap)
    return [heappop(heap) for _ in range(len(heap))]


# %% merge sort that drops what is equal, O(n log n)
def unique(l):
    if len(l) < 2:
        return list(l)
    left, right = unique(l[: len(l) // 2]), unique(l[len(l) // 2 :])
    merged = []
    i = j = 0
    while i < len(left) and j < len(right):
        if left[i] < right[j]:
            merged.append(left[i])
            i += 1
        elif right[j] < left[i]:
            merged.append(right[j])
            j += 1
        else:
            merged.append(left[i])
            i, j = i + 1, j + 1
    return merged + left[i:] + right[j:]


# %% a list of those not yet in it, sorted at the end, O(n^2) in C
def unique(l):
    result = []
    for x in l:
        if x not in result:
            result.append(x)
    result.sort()
    return result


# %% the smallest again and again, O(n^2) in C
def unique(l):
    rest = set(l)
    result = []
    while rest:
        smallest = min(rest)
        result.append(smallest)
        rest.discard(smallest)
    return result


# %% wrong: the order of a set
def unique(l):
    return list(set(l))


# %% wrong: equal neighbours only are dropped
def unique(l):
    return sorted(x for i, x in enumerate(l) if i == 0 or x != l[i - 1])
