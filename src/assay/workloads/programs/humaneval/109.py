"""HumanEval/109 move_one_ball: is a list a sorted one, turned?"""

# %% task
SIZES = (7, 400, 2_000, 5_500)  # numbers
COMPARE = "same"


def generate(size, rng):
    """A sorted list, turned about by half; in every second case two neighbours near its end are exchanged, so that it is none."""
    if size < 20 and rng.random() < 0.1:
        return ([],)
    numbers = sorted(rng.sample(range(-2 * size, 8 * size), size))
    if rng.random() < 0.5 and size > 2:
        numbers[-2], numbers[-3] = numbers[-3], numbers[-2]
    start = rng.choice((0, rng.randrange(size))) if size < 20 else rng.randrange(size * 2 // 5, size * 3 // 5)
    return (numbers[start:] + numbers[:start],)


def contract(arr):
    assert isinstance(arr, list)
    assert all(type(number) is int for number in arr)
    assert len(set(arr)) == len(arr)


# %% expert: at most one descent on the circle, O(n)
from operator import gt


def move_one_ball(arr):
    return sum(map(gt, arr, arr[1:] + arr[:1])) <= 1


# %% descents counted in a loop, stops at the second, O(n)
def move_one_ball(arr):
    descents = 0
    for i in range(len(arr)):
        if arr[i - 1] > arr[i]:
            descents += 1
            if descents > 1:
                return False
    return True


# %% every turn compared with the sorted list, quadratic
def move_one_ball(arr):
    if not arr:
        return True
    wanted = sorted(arr)
    return any(arr[i:] + arr[:i] == wanted for i in range(len(arr)))


# %% turned ball by ball until sorted, quadratic
from collections import deque


def move_one_ball(arr):
    balls = deque(arr)
    for _ in range(max(1, len(arr))):
        previous = None
        for ball in balls:
            if previous is not None and ball < previous:
                break
            previous = ball
        else:
            return True
        balls.rotate(1)
    return False


# %% turned to its smallest number, compared with the sorted list, O(n log n)
def move_one_ball(arr):
    if len(arr) < 2:
        return True
    start = arr.index(min(arr))
    return arr[start:] + arr[:start] == sorted(arr)


# %% walk on the circle from the smallest number, O(n)
def move_one_ball(arr):
    n = len(arr)
    if n == 0:
        return True
    lowest = 0
    for i in range(1, n):
        if arr[i] < arr[lowest]:
            lowest = i
    for step in range(n - 1):
        if arr[(lowest + step) % n] > arr[(lowest + step + 1) % n]:
            return False
    return True


# %% ranks must follow each other, O(n log n)
def move_one_ball(arr):
    rank = {number: place for place, number in enumerate(sorted(arr))}
    n = len(arr)
    return all((rank[arr[i]] - rank[arr[i - 1]]) % n == 1 % n for i in range(n))


# %% split at the first descent, both parts sorted, O(n)
def move_one_ball(arr):
    cut = next((i for i in range(1, len(arr)) if arr[i] < arr[i - 1]), 0)
    if cut == 0:
        return True
    first, second = arr[:cut], arr[cut:]
    return second == sorted(second) and second[-1] < first[0]


# %% the last ball put first each time, quadratic
def move_one_ball(arr):
    balls, wanted = list(arr), sorted(arr)
    for _ in arr:
        if balls == wanted:
            return True
        balls.insert(0, balls.pop())
    return balls == wanted


# %% wrong: the end of the list is not compared with its beginning
def move_one_ball(arr):
    return sum(arr[i] > arr[i + 1] for i in range(len(arr) - 1)) <= 1


# %% wrong: only looks whether the largest stands before the smallest
def move_one_ball(arr):
    if not arr:
        return True
    return (arr.index(max(arr)) + 1) % len(arr) == arr.index(min(arr))
