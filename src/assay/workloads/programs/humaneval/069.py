"""HumanEval/69 search: the greatest number that occurs at least as often as it says."""

# %% task
SIZES = (12, 500, 2500, 8000)
COMPARE = "same"


def generate(size, rng):
    if size <= 12:
        return ([rng.randint(1, 6) for _ in range(rng.randint(1, size))],)
    numbers = rng.sample(range(3, 4 * size), size - 2)  # all differ: none but 2 is as frequent as it is large
    numbers += [2, 2]
    rng.shuffle(numbers)
    return (numbers,)


def contract(lst):
    assert isinstance(lst, list) and lst
    assert all(isinstance(x, int) and x > 0 for x in lst)


# %% expert: counted in C, then the greatest, O(n)
from collections import Counter


def search(lst):
    return max((x for x, many in Counter(lst).items() if many >= x), default=-1)


# %% places for the numbers up to the length, from above, O(n)
def search(lst):
    counts = [0] * (len(lst) + 1)
    for x in lst:
        if x <= len(lst):
            counts[x] += 1
    for x in range(len(lst), 0, -1):
        if counts[x] >= x:
            return x
    return -1


# %% a dict of counts, the best kept on the way
def search(lst):
    counts = {}
    best = -1
    for x in lst:
        counts[x] = counts.get(x, 0) + 1
        if counts[x] >= x and x > best:
            best = x
    return best


# %% sorted, lengths of runs, O(n log n)
from itertools import groupby


def search(lst):
    best = -1
    for x, run in groupby(sorted(lst)):
        if len(list(run)) >= x:
            best = x
    return best


# %% sorted, counted by bisection from above, O(n log n)
from bisect import bisect_left, bisect_right


def search(lst):
    ordered = sorted(lst)
    for x in sorted(set(lst), reverse=True):
        if bisect_right(ordered, x) - bisect_left(ordered, x) >= x:
            return x
    return -1


# %% count for every different number, O(n^2) in C
def search(lst):
    fitting = [x for x in set(lst) if lst.count(x) >= x]
    return max(fitting) if fitting else -1


# %% count for every number up to the length, O(n^2) in C
def search(lst):
    best = -1
    for x in range(1, len(lst) + 1):
        if lst.count(x) >= x:
            best = x
    return best


# %% equal neighbours of the sorted list counted by hand
def search(lst):
    ordered = sorted(lst, reverse=True)
    i = 0
    while i < len(ordered):
        j = i
        while j < len(ordered) and ordered[j] == ordered[i]:
            j += 1
        if j - i >= ordered[i]:
            return ordered[i]
        i = j
    return -1


# %% wrong: more often than it says
from collections import Counter


def search(lst):
    return max((x for x, many in Counter(lst).items() if many > x), default=-1)


# %% wrong: the most frequent number only
from collections import Counter


def search(lst):
    x, many = Counter(lst).most_common(1)[0]
    return x if many >= x else -1
