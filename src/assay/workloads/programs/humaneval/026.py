"""HumanEval/26 remove_duplicates: the numbers that occur once, in their order."""

# %% task
SIZES = (8, 500, 2000, 5000)
COMPARE = "same"


def generate(size, rng):
    if size <= 8:
        return ([rng.randint(-4, 4) for _ in range(rng.randint(0, size))],)
    numbers = rng.sample(range(-20 * size, 20 * size), size - size // 10)
    numbers += rng.sample(numbers, size // 10)
    rng.shuffle(numbers)
    return (numbers,)


def contract(numbers):
    assert isinstance(numbers, list)
    assert all(isinstance(x, int) for x in numbers)


# %% expert: counts in the order of first sight, O(n)
from collections import Counter


def remove_duplicates(numbers):
    return [x for x, many in Counter(numbers).items() if many == 1]


# %% one set of numbers seen, one of those seen again
def remove_duplicates(numbers):
    seen = set()
    again = set()
    for x in numbers:
        if x in seen:
            again.add(x)
        seen.add(x)
    return [x for x in numbers if x not in again]


# %% a dict of counts by hand
def remove_duplicates(numbers):
    counts = {}
    for x in numbers:
        counts[x] = counts.get(x, 0) + 1
    result = []
    for x in numbers:
        if counts[x] == 1:
            result.append(x)
    return result


# %% places sorted by number, runs of one kept, O(n log n)
from itertools import groupby


def remove_duplicates(numbers):
    places = sorted(range(len(numbers)), key=numbers.__getitem__)
    kept = []
    for _, run in groupby(places, key=numbers.__getitem__):
        first, *rest = run
        if not rest:
            kept.append(first)
    return [numbers[i] for i in sorted(kept)]


# %% a dict from which a number is taken when it comes again
def remove_duplicates(numbers):
    alone, gone = {}, set()
    for x in numbers:
        if x in gone:
            continue
        if x in alone:
            del alone[x]
            gone.add(x)
        else:
            alone[x] = True
    return list(alone)


# %% count for every number, O(n^2) in C
def remove_duplicates(numbers):
    return [x for x in numbers if numbers.count(x) == 1]


# %% neither before nor after it in the list, O(n^2) in C
def remove_duplicates(numbers):
    return [x for i, x in enumerate(numbers) if x not in numbers[:i] and x not in numbers[i + 1 :]]


# %% two loops, left at the first equal one, O(n^2)
def remove_duplicates(numbers):
    result = []
    for i, x in enumerate(numbers):
        for j, y in enumerate(numbers):
            if x == y and i != j:
                break
        else:
            result.append(x)
    return result


# %% wrong: the first of equal numbers stays
def remove_duplicates(numbers):
    return list(dict.fromkeys(numbers))


# %% wrong: taken out of the list while walking along it
def remove_duplicates(numbers):
    numbers = list(numbers)
    for x in numbers:
        if numbers.count(x) > 1:
            numbers.remove(x)
    return numbers
