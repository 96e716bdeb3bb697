"""HumanEval/105 by_length: the digits from nine down to one, by name."""

# %% task
SIZES = (12, 1_000, 5_000, 20_000)  # numbers
COMPARE = "same"


def generate(size, rng):
    """Numbers in no order, two thirds of them digits; at small sizes a list may be empty."""
    if size < 100 and rng.random() < 0.1:
        return ([],)
    strange = (-55, -9, -1, 0, 10, 11, 99)
    return ([rng.randint(1, 9) if rng.random() < 0.66 else rng.choice(strange) for _ in range(size)],)


def contract(arr):
    assert isinstance(arr, list)
    assert all(type(number) is int for number in arr)


# %% expert: how often each occurs, O(n)
from collections import Counter


def by_length(arr):
    counts = Counter(arr)
    names = ("One", "Two", "Three", "Four", "Five", "Six", "Seven", "Eight", "Nine")
    result = []
    for digit in range(9, 0, -1):
        result += names[digit - 1 : digit] * counts[digit]
    return result


# %% filter, sort downwards, names by place, O(n log n)
def by_length(arr):
    names = ["", "One", "Two", "Three", "Four", "Five", "Six", "Seven", "Eight", "Nine"]
    digits = [number for number in arr if 1 <= number <= 9]
    digits.sort(reverse=True)
    return [names[digit] for digit in digits]


# %% nine calls of count, O(n)
def by_length(arr):
    names = "Nine Eight Seven Six Five Four Three Two One".split()
    result = []
    for number, name in zip(range(9, 0, -1), names):
        result.extend([name] * arr.count(number))
    return result


# %% nine passes with a loop, O(n)
def by_length(arr):
    names = {9: "Nine", 8: "Eight", 7: "Seven", 6: "Six", 5: "Five", 4: "Four", 3: "Three", 2: "Two", 1: "One"}
    result = []
    for digit, name in names.items():
        for number in arr:
            if number == digit:
                result.append(name)
    return result


# %% a list for each digit, O(n)
def by_length(arr):
    names = ("One", "Two", "Three", "Four", "Five", "Six", "Seven", "Eight", "Nine")
    buckets = [[] for _ in names]
    for number in arr:
        if 0 < number < 10:
            buckets[number - 1].append(names[number - 1])
    result = []
    while buckets:
        result += buckets.pop()
    return result


# %% sorted, reversed, then looked up one by one, O(n log n)
def by_length(arr):
    names = {
        1: "One", 2: "Two", 3: "Three", 4: "Four", 5: "Five", 6: "Six", 7: "Seven", 8: "Eight", 9: "Nine",
    }  # fmt: skip
    ordered = sorted(arr)
    ordered.reverse()
    return [name for name in map(names.get, ordered) if name is not None]


# %% each name put before those of the digits above it, quadratic in moves
def by_length(arr):
    names = ["One", "Two", "Three", "Four", "Five", "Six", "Seven", "Eight", "Nine"]
    result = []
    for number in sorted(arr):
        if number >= 1 and number <= 9:
            result = [names[number - 1]] + result
    return result


# %% heap, O(n log n)
import heapq


def by_length(arr):
    names = {
        -1: "One", -2: "Two", -3: "Three", -4: "Four", -5: "Five", -6: "Six", -7: "Seven", -8: "Eight", -9: "Nine",
    }  # fmt: skip
    heap = []
    for number in arr:
        if -number in names:
            heapq.heappush(heap, -number)
    return [names[heapq.heappop(heap)] for _ in range(len(heap))]


# %% insertion at the place that bisection finds, names last
from bisect import insort


def by_length(arr):
    words = ("Zero", "One", "Two", "Three", "Four", "Five", "Six", "Seven", "Eight", "Nine")
    digits = []
    for number in arr:
        if number in range(1, 10):
            insort(digits, number)
    return [words[digit] for digit in reversed(digits)]


# %% wrong: every digit once
def by_length(arr):
    names = ("One", "Two", "Three", "Four", "Five", "Six", "Seven", "Eight", "Nine")
    seen = set(arr)
    return [names[digit - 1] for digit in range(9, 0, -1) if digit in seen]


# %% wrong: negative digits too
def by_length(arr):
    names = ("One", "Two", "Three", "Four", "Five", "Six", "Seven", "Eight", "Nine")
    return [names[abs(n) - 1] for n in sorted(arr, reverse=True) if 1 <= abs(n) <= 9]
