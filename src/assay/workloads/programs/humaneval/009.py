"""HumanEval/9 rolling_max: the largest number so far, at every place."""

# %% task
SIZES = (8, 1000, 4000, 12000)
COMPARE = "same"


def generate(size, rng):
    if size <= 8:
        return ([rng.randint(-20, 5) for _ in range(rng.randint(0, size))],)
    return ([3 * i + rng.randint(-6, 6) for i in range(size)],)  # it rises, with steps back


def contract(numbers):
    assert isinstance(numbers, list)
    assert all(isinstance(x, int) for x in numbers)


# %% expert: one comprehension that remembers the best, O(n)
def rolling_max(numbers):
    if not numbers:
        return []
    best = numbers[0]
    return [best := x if x > best else best for x in numbers]


# %% accumulate with max
from itertools import accumulate


def rolling_max(numbers):
    return list(accumulate(numbers, max))


# %% a loop that compares
def rolling_max(numbers):
    result = []
    best = float("-inf")
    for x in numbers:
        if x > best:
            best = x
        result.append(best)
    return result


# %% max of the last result and the next number, by index
def rolling_max(numbers):
    result = list(numbers)
    for i in range(1, len(result)):
        result[i] = max(result[i], result[i - 1])
    return result


# %% two halves, the right one lifted to the maximum of the left, O(n log n)
def rolling_max(numbers):
    if len(numbers) < 2:
        return list(numbers)
    middle = len(numbers) // 2
    left, right = rolling_max(numbers[:middle]), rolling_max(numbers[middle:])
    return left + [max(left[-1], x) for x in right]


# %% runs: the next larger number is sought, and the best repeated until there
def rolling_max(numbers):
    result = []
    at = 0
    while at < len(numbers):
        best = numbers[at]
        end = at + 1
        while end < len(numbers) and numbers[end] <= best:
            end += 1
        result += [best] * (end - at)
        at = end
    return result


# %% max of every prefix, O(n^2)
def rolling_max(numbers):
    return [max(numbers[: i + 1]) for i in range(len(numbers))]


# %% wrong: begins with 0
def rolling_max(numbers):
    best, result = 0, []
    for x in numbers:
        best = max(best, x)
        result.append(best)
    return result


# %% wrong: the larger of two neighbours
def rolling_max(numbers):
    return numbers[:1] + [max(pair) for pair in zip(numbers, numbers[1:])]
