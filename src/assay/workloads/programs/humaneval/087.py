"""HumanEval/87 get_row: where in ragged rows does a number stand?"""

# %% task
SIZES = (40, 2_000, 20_000, 120_000)  # numbers in all rows together, about
COMPARE = "same"


def generate(size, rng):
    """Ragged rows; one number in forty (in four at small sizes) is the one that is asked for."""
    if size < 100 and rng.random() < 0.1:
        return [], 3
    width = max(1, round(size**0.5))
    kinds = 4 if size < 100 else 40
    return [[rng.randrange(kinds) for _ in range(rng.randint(0, 2 * width))] for _ in range(width)], 3


def contract(lst, x):
    assert isinstance(lst, list)
    assert all(isinstance(row, list) for row in lst)
    assert all(type(number) is int for row in lst for number in row)
    assert type(x) is int


# %% expert: list.index from one find to the next, O(n)
def get_row(lst, x):
    found = []
    for number, row in enumerate(lst):
        here, column = [], -1
        for _ in range(row.count(x)):
            column = row.index(x, column + 1)
            here.append((number, column))
        here.reverse()
        found += here
    return found


# %% two loops, columns from the right, O(n)
def get_row(lst, x):
    places = []
    for i in range(len(lst)):
        for j in range(len(lst[i]) - 1, -1, -1):
            if lst[i][j] == x:
                places.append((i, j))
    return places


# %% the reversed row enumerated, O(n)
def get_row(lst, x):
    result = []
    for i, row in enumerate(lst):
        last = len(row) - 1
        result.extend((i, last - steps) for steps, value in enumerate(reversed(row)) if value == x)
    return result


# %% all places, one sort by row and negated column, O(n + m log m)
def get_row(lst, x):
    places = [(i, j) for i, row in enumerate(lst) for j, value in enumerate(row) if value == x]
    places.sort(key=lambda place: (place[0], -place[1]))
    return places


# %% each find put before those of its row, quadratic in the finds of a row
def get_row(lst, x):
    result = []
    for i, row in enumerate(lst):
        of_row = []
        for j, value in enumerate(row):
            if value == x:
                of_row.insert(0, (i, j))
        result.extend(of_row)
    return result


# %% columns by row in a dictionary, O(n + m log m)
from collections import defaultdict


def get_row(lst, x):
    columns = defaultdict(set)
    for i, row in enumerate(lst):
        for j in range(len(row)):
            if row[j] == x:
                columns[i].add(j)
    return [(i, j) for i in sorted(columns) for j in sorted(columns[i], reverse=True)]


# %% heap of places, O(n + m log m)
import heapq


def get_row(lst, x):
    heap = []
    for i, row in enumerate(lst):
        for j, value in enumerate(row):
            if value == x:
                heapq.heappush(heap, (i, -j))
    ordered = []
    while heap:
        i, j = heapq.heappop(heap)
        ordered.append((i, -j))
    return ordered


# %% next place chosen among all that are left, quadratic in the finds
def get_row(lst, x):
    left = []
    for i in range(len(lst)):
        for j in range(len(lst[i])):
            if lst[i][j] == x:
                left.append((i, j))
    ordered = []
    while left:
        best = 0
        for k in range(1, len(left)):
            if left[k][0] < left[best][0] or left[k][0] == left[best][0] and left[k][1] > left[best][1]:
                best = k
        ordered.append(left.pop(best))
    return ordered


# %% first every cell with its place, then a filter, O(n) with much memory
def get_row(lst, x):
    cells = []
    for i, row in enumerate(lst):
        cells += sorted(zip([i] * len(row), range(len(row)), row), key=lambda cell: cell[1], reverse=True)
    return [(i, j) for i, j, value in cells if value == x]


# %% wrong: columns ascend
def get_row(lst, x):
    return [(i, j) for i, row in enumerate(lst) for j, value in enumerate(row) if value == x]


# %% wrong: sorted by column before row
def get_row(lst, x):
    places = [(i, j) for i, row in enumerate(lst) for j, value in enumerate(row) if value == x]
    return sorted(places, key=lambda place: (-place[1], place[0]))
