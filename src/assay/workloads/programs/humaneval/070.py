"""HumanEval/70 strange_sort_list: the minimum, the maximum of the rest, the minimum of the rest, and so on."""

# %% task
SIZES = (9, 500, 2000, 6000)
COMPARE = "same"


def generate(size, rng):
    if size <= 9:
        return ([rng.randint(-9, 9) for _ in range(rng.randint(0, size))],)
    return (rng.sample(range(-20 * size, 20 * size), size),)


def contract(lst):
    assert isinstance(lst, list)
    assert all(isinstance(x, int) for x in lst)


# %% expert: sorted, each half to every other place, O(n log n)
def strange_sort_list(lst):
    ordered = sorted(lst)
    half = (len(ordered) + 1) // 2
    result = [0] * len(ordered)
    result[::2] = ordered[:half]
    result[1::2] = ordered[: half - 1 : -1] if half else []
    return result


# %% sorted, two places that meet
def strange_sort_list(lst):
    ordered = sorted(lst)
    i, j = 0, len(ordered) - 1
    result = []
    while i < j:
        result.append(ordered[i])
        result.append(ordered[j])
        i += 1
        j -= 1
    if i == j:
        result.append(ordered[i])
    return result


# %% a deque of the sorted list
from collections import deque


def strange_sort_list(lst):
    rest = deque(sorted(lst))
    result = []
    while rest:
        result.append(rest.popleft())
        if rest:
            result.append(rest.pop())
    return result


# %% pairs of the sorted list and its reverse
def strange_sort_list(lst):
    ordered = sorted(lst)
    return [x for pair in zip(ordered, reversed(ordered)) for x in pair][: len(ordered)]


# %% place by place, from the front or the back
def strange_sort_list(lst):
    ordered = sorted(lst)
    return [ordered[-(i // 2) - 1] if i % 2 else ordered[i // 2] for i in range(len(ordered))]


# %% two heaps, O(n log n)
import heapq


def strange_sort_list(lst):
    low = list(lst)
    high = [-x for x in lst]
    heapq.heapify(low)
    heapq.heapify(high)
    result = []
    for i in range(len(lst)):
        result.append(-heapq.heappop(high) if i % 2 else heapq.heappop(low))
    return result


# %% sorted, turned round after every step, O(n^2) in C
def strange_sort_list(lst):
    rest = sorted(lst, reverse=True)
    result = []
    while rest:
        result.append(rest.pop())
        rest.reverse()
    return result


# %% the minimum or maximum sought and removed, O(n^2) in C
def strange_sort_list(lst):
    rest = list(lst)
    result = []
    while rest:
        pick = max(rest) if len(result) % 2 else min(rest)
        result.append(pick)
        rest.remove(pick)
    return result


# %% wrong: the maximum first
def strange_sort_list(lst):
    rest = sorted(lst)
    result = []
    while rest:
        result.append(rest.pop(0 if len(result) % 2 else -1))
    return result


# %% wrong: of an odd number the middle one is lost
def strange_sort_list(lst):
    ordered = sorted(lst)
    half = len(ordered) // 2
    return [x for pair in zip(ordered[:half], ordered[::-1]) for x in pair]
