"""HumanEval/58 common: the different elements that two lists share, sorted."""

# %% task
SIZES = (8, 500, 2000, 5000)
COMPARE = "same"


def generate(size, rng):
    if size <= 8:
        values = range(-100, 1000, 97)
        return rng.choices(values, k=rng.randint(0, size)), rng.choices(values, k=rng.randint(0, size))
    numbers = rng.sample(range(-50 * size, 50 * size), size + size // 2)
    shared = size // 2
    one, other = numbers[:size], numbers[size - shared :]  # half of each is in the other
    rng.shuffle(one)
    rng.shuffle(other)
    return one, other


def contract(l1, l2):
    for l in (l1, l2):
        assert isinstance(l, list)
        assert all(isinstance(x, int) for x in l)


# %% expert: the intersection of sets, sorted, O(n log n)
def common(l1, l2):
    return sorted(set(l1).intersection(l2))


# %% both sorted and walked along, O(n log n)
def common(l1, l2):
    l1, l2 = sorted(l1), sorted(l2)
    result = []
    i = j = 0
    while i < len(l1) and j < len(l2):
        if l1[i] < l2[j]:
            i += 1
        elif l1[i] > l2[j]:
            j += 1
        else:
            if not result or result[-1] != l1[i]:
                result.append(l1[i])
            i += 1
            j += 1
    return result


# %% a dict of the one, asked for the other
def common(l1, l2):
    there = {}
    for x in l1:
        there[x] = False
    for x in l2:
        if x in there:
            there[x] = True
    return sorted(x for x in there if there[x])


# %% sorted together, neighbours equal
def common(l1, l2):
    both = sorted([*set(l1), *set(l2)])
    return [a for a, b in zip(both, both[1:]) if a == b]


# %% each element by bisection in the other
from bisect import bisect_left


def common(l1, l2):
    ordered = sorted(l2)
    result = []
    for x in sorted(set(l1)):
        at = bisect_left(ordered, x)
        if at < len(ordered) and ordered[at] == x:
            result.append(x)
    return result


# %% sought in the other list, O(n^2) in C
def common(l1, l2):
    return sorted({x for x in l1 if x in l2})


# %% sought in the other list and in the result, O(n^2) in C
def common(l1, l2):
    result = []
    for x in l1:
        if x in l2 and x not in result:
            result.append(x)
    result.sort()
    return result


# %% all pairs, O(n^2)
def common(l1, l2):
    return sorted({x for x in l1 for y in l2 if x == y})


# %% wrong: as often as the first list has them
def common(l1, l2):
    other = set(l2)
    return sorted(x for x in l1 if x in other)


# %% wrong: the order of a set
def common(l1, l2):
    return list(set(l1) & set(l2))
