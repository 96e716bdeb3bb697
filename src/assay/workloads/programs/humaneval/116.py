"""HumanEval/116 sort_array: sort by the ones of the binary form, then by value."""

# %% task
SIZES = (8, 300, 1_200, 4_000)  # numbers
COMPARE = "same"


def generate(size, rng):
    """Numbers in no order, many of them with as many ones; at small sizes a list may be empty."""
    if size < 20 and rng.random() < 0.1:
        return ([],)
    return ([rng.randrange(40 if size < 20 else 10**6) for _ in range(size)],)


def contract(arr):
    assert isinstance(arr, list)
    assert all(type(number) is int for number in arr)
    assert all(number >= 0 for number in arr)


# %% expert: sorted by value, then stably by ones
def sort_array(arr):
    return sorted(sorted(arr), key=int.bit_count)


# %% one sort by pairs, ones counted in the text
def sort_array(arr):
    return sorted(arr, key=lambda number: (bin(number).count("1"), number))


# %% ones counted by clearing the lowest
def sort_array(arr):
    def ones(number):
        number, count = abs(number), 0
        while number:
            number &= number - 1
            count += 1
        return count

    decorated = [(ones(number), number) for number in arr]
    decorated.sort()
    return [number for _, number in decorated]


# %% ones counted by halving
def sort_array(arr):
    def ones(number):
        left, count = abs(number), 0
        while left > 0:
            count += left % 2
            left //= 2
        return count

    result = sorted(arr)
    result.sort(key=ones)
    return result


# %% ones looked up byte by byte
TABLE = [0]
for _ in range(8):
    TABLE += [count + 1 for count in TABLE]


def sort_array(arr):
    def key(number):
        left, count = abs(number), 0
        while left:
            count += TABLE[left & 255]
            left >>= 8
        return count, number

    return sorted(arr, key=key)


# %% a bucket for every number of ones
from collections import defaultdict


def sort_array(arr):
    buckets = defaultdict(list)
    for number in arr:
        buckets[format(abs(number), "b").count("1")].append(number)
    result = []
    for ones in sorted(buckets):
        result.extend(sorted(buckets[ones]))
    return result


# %% heap of pairs
import heapq


def sort_array(arr):
    heap = []
    for number in arr:
        heapq.heappush(heap, (sum(bit == "1" for bit in f"{abs(number):b}"), number))
    result = []
    while heap:
        result.append(heapq.heappop(heap)[1])
    return result


# %% insertion at the place that bisection finds
from bisect import insort


def sort_array(arr):
    result = []
    for number in arr:
        insort(result, number, key=lambda value: (abs(value).bit_count(), value))
    return result


# %% the least taken out each time, quadratic
def sort_array(arr):
    left = [(bin(number)[2:].count("1"), number) for number in arr]
    result = []
    while left:
        least = min(left)
        left.remove(least)
        result.append(least[1])
    return result


# %% wrong: equal numbers of ones stay in the order of the list
def sort_array(arr):
    return sorted(arr, key=int.bit_count)


# %% wrong: sorted by the length of the binary form
def sort_array(arr):
    return sorted(arr, key=lambda number: (number.bit_length(), number))
