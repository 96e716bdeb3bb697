"""HumanEval/88 sort_array: sort upwards or downwards, as the first and the last number say."""

# %% task
SIZES = (8, 400, 2_000, 6_000)  # numbers
COMPARE = "same"


def generate(size, rng):
    """Numbers in no order, many of them twice; at small sizes a list may be empty."""
    if size < 100 and rng.random() < 0.1:
        return ([],)
    return ([rng.randrange(3 * size) for _ in range(size)],)


def contract(array):
    assert isinstance(array, list)
    assert all(type(number) is int for number in array)
    assert all(number >= 0 for number in array)


# %% expert: sorted, O(n log n)
def sort_array(array):
    return sorted(array, reverse=bool(array) and (array[0] ^ array[-1]) & 1 == 0)


# %% copy, sort, turn round, O(n log n)
def sort_array(array):
    result = list(array)
    result.sort()
    if array and (array[0] + array[-1]) % 2 == 0:
        result.reverse()
    return result


# %% counting, a slot for every value, O(n + largest)
def sort_array(array):
    if not array:
        return []
    counts = [0] * (max(array) + 1)
    for number in array:
        counts[number] += 1
    values = range(len(counts))
    if (array[0] + array[-1]) % 2 == 0:
        values = reversed(values)
    result = []
    for value in values:
        result.extend([value] * counts[value])
    return result


# %% heap, O(n log n)
import heapq


def sort_array(array):
    if not array:
        return []
    sign = -1 if (array[0] + array[-1]) % 2 == 0 else 1
    heap = [sign * number for number in array]
    heapq.heapify(heap)
    return [sign * heapq.heappop(heap) for _ in range(len(heap))]


# %% merge sort, O(n log n)
def sort_array(array):
    def merged(left, right):
        result, i, j = [], 0, 0
        while i < len(left) and j < len(right):
            if (left[i] >= right[j]) if down else (left[i] <= right[j]):
                result.append(left[i])
                i += 1
            else:
                result.append(right[j])
                j += 1
        return result + left[i:] + right[j:]

    def halves(part):
        if len(part) < 2:
            return part
        middle = len(part) // 2
        return merged(halves(part[:middle]), halves(part[middle:]))

    down = bool(array) and (array[0] + array[-1]) % 2 == 0
    return halves(list(array))


# %% quicksort on new lists, O(n log n) as a rule
def sort_array(array):
    def ordered(numbers):
        if len(numbers) <= 1:
            return numbers
        pivot = numbers[len(numbers) // 2]
        below = [number for number in numbers if number < pivot]
        same = [number for number in numbers if number == pivot]
        above = [number for number in numbers if number > pivot]
        return ordered(below) + same + ordered(above)

    if not array:
        return []
    result = ordered(list(array))
    return result[::-1] if (array[0] + array[-1]) % 2 == 0 else result


# %% insertion at the place that bisection finds, quadratic in moves
from bisect import insort


def sort_array(array):
    result = []
    for number in array:
        insort(result, number)
    if len(array) > 0 and array[0] % 2 == array[-1] % 2:
        result = result[::-1]
    return result


# %% radix sort by bytes, O(n)
def sort_array(array):
    result, shift = list(array), 0
    while any(number >> shift for number in result):
        buckets = [[] for _ in range(256)]
        for number in result:
            buckets[number >> shift & 255].append(number)
        result = [number for bucket in buckets for number in bucket]
        shift += 8
    if array and (array[0] + array[-1]) % 2 == 0:
        result.reverse()
    return result


# %% the smallest taken out each time, quadratic
def sort_array(array):
    left, result = list(array), []
    down = len(array) > 0 and (array[0] + array[-1]) % 2 == 0
    while left:
        following = max(left) if down else min(left)
        left.remove(following)
        result.append(following)
    return result


# %% wrong: numbers that occur twice are kept once
def sort_array(array):
    if not array:
        return []
    return sorted(set(array), reverse=(array[0] + array[-1]) % 2 == 0)


# %% wrong: the sum of all numbers decides
def sort_array(array):
    return sorted(array, reverse=sum(array) % 2 == 0)
