"""HumanEval/126 is_sorted: ascending, and no number more than twice?"""

# %% task
SIZES = (8, 500, 2_500, 7_000)  # numbers
COMPARE = "same"


def generate(size, rng):
    """Sorted pairs; in two of three cases the end breaks a rule: one number too low, or one a third time."""
    if size < 20 and rng.random() < 0.2:
        return ([rng.randrange(size) for _ in range(rng.randint(0, 3))],)
    numbers = sorted(2 * list(range(1, (size + 1) // 2 + 1)))[:size]
    kind = rng.randrange(3)
    if kind == 1 and size > 1:
        numbers[-1] = numbers[-1] - 1 if numbers[-1] > numbers[-2] else numbers[-2] - 1
    elif kind == 2 and size > 2:
        numbers[-3:] = [numbers[-3]] * 3
    return (numbers,)


def contract(lst):
    assert isinstance(lst, list)
    assert all(type(number) is int for number in lst)
    assert all(number >= 0 for number in lst)


# %% expert: neighbours ascend, and no number equals the next but one, O(n)
from operator import eq, le


def is_sorted(lst):
    return all(map(le, lst, lst[1:])) and not any(map(eq, lst, lst[2:]))


# %% one loop, length of the run carried along, O(n)
def is_sorted(lst):
    run = 1
    for i in range(1, len(lst)):
        if lst[i] < lst[i - 1]:
            return False
        run = run + 1 if lst[i] == lst[i - 1] else 1
        if run > 2:
            return False
    return True


# %% sorted copy and Counter, O(n log n)
from collections import Counter


def is_sorted(lst):
    return lst == sorted(lst) and all(many <= 2 for many in Counter(lst).values())


# %% sorted copy and count of each number, quadratic
def is_sorted(lst):
    return lst == sorted(lst) and all(lst.count(number) <= 2 for number in lst)


# %% count of each distinct number, quadratic, then neighbours
def is_sorted(lst):
    for number in set(lst):
        if lst.count(number) > 2:
            return False
    for before, after in zip(lst, lst[1:]):
        if before > after:
            return False
    return True


# %% groups of equal neighbours, O(n)
from itertools import groupby


def is_sorted(lst):
    last = -1
    for number, group in groupby(lst):
        if number <= last or len(list(group)) > 2:
            return False
        last = number
    return True


# %% dictionary of how often, checked on the way, O(n)
def is_sorted(lst):
    seen = {}
    highest = float("-inf")
    for number in lst:
        if number < highest:
            return False
        highest = number
        seen[number] = seen.get(number, 0) + 1
        if seen[number] == 3:
            return False
    return True


# %% places of each number, compared with those of a sort, O(n log n)
def is_sorted(lst):
    order = sorted(range(len(lst)), key=lambda place: lst[place])
    if order != list(range(len(lst))):
        return False
    for place in range(2, len(lst)):
        if lst[place] == lst[place - 1] == lst[place - 2]:
            return False
    return True


# %% halves, each sorted in itself, O(n)
def is_sorted(lst):
    def fine(low, high):
        if high - low < 2:
            return True
        if high - low == 2:
            return lst[low] <= lst[low + 1]
        middle = (low + high) // 2
        if not fine(low, middle) or not fine(middle, high):
            return False
        if lst[middle - 1] > lst[middle]:
            return False
        around = lst[max(low, middle - 2) : min(high, middle + 2)]
        return all(around.count(number) <= 2 for number in around)

    return fine(0, len(lst))


# %% wrong: the rule about duplicates forgotten
def is_sorted(lst):
    return all(before <= after for before, after in zip(lst, lst[1:]))


# %% wrong: strictly ascending
def is_sorted(lst):
    return all(before < after for before, after in zip(lst, lst[1:]))
