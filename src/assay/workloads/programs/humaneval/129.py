"""HumanEval/129 minPath: the path of k cells with the least numbers."""

# %% task
SIZES = (3, 40, 120, 250)  # rows; the path has thirty cells for each
COMPARE = "same"


def generate(size, rng):
    """Numbers in no order; the 1 lies in one of the last two rows (anywhere in a small grid), the 2 near it but not beside it."""
    n = max(2, size)
    numbers = list(range(2, n * n + 1))
    rng.shuffle(numbers)
    one = rng.randrange(n * n) if n < 20 else n * n - 1 - rng.randrange(2 * n)
    numbers.insert(one, 1)
    i, j = divmod(one, n)
    corners = [(i + di, j + dj) for di in (-1, 1) for dj in (-1, 1) if 0 <= i + di < n and 0 <= j + dj < n]
    edges = (((i + 1) % n, j), ((i - 1) % n, j), (i, (j + 1) % n), (i, (j - 1) % n))
    across = [(x, y) for x, y in edges if abs(x - i) + abs(y - j) > 1]
    x, y = rng.choice(corners + across)
    two, place = numbers.index(2), x * n + y
    numbers[two], numbers[place] = numbers[place], numbers[two]
    return [numbers[row * n : row * n + n] for row in range(n)], rng.randint(1, 6) if n < 20 else 30 * n


def contract(grid, k):
    n = len(grid)
    assert n >= 2
    assert all(len(row) == n for row in grid)
    assert sorted(number for row in grid for number in row) == list(range(1, n * n + 1))
    assert type(k) is int
    assert k >= 1


# %% expert: the 1 found by the built-ins, its least neighbour, and to and fro
def minPath(grid, k):
    for i, row in enumerate(grid):
        if 1 in row:
            j = row.index(1)
            break
    around = row[max(0, j - 1) : j + 2 : 1 if j == 0 else 2]
    around = [number for number in around if number != 1]
    around += [grid[other][j] for other in (i - 1, i + 1) if 0 <= other < len(grid)]
    return ([1, min(around)] * ((k + 1) // 2))[:k]


# %% two loops until the 1 is found
def minPath(grid, k):
    n = len(grid)
    least = n * n
    for i in range(n):
        for j in range(n):
            if grid[i][j] != 1:
                continue
            for di, dj in ((0, 1), (1, 0), (0, -1), (-1, 0)):
                if 0 <= i + di < n and 0 <= j + dj < n:
                    least = min(least, grid[i + di][j + dj])
            return [least if step % 2 else 1 for step in range(k)]


# %% flat list, neighbours by arithmetic
def minPath(grid, k):
    n = len(grid)
    flat = [number for row in grid for number in row]
    place = flat.index(1)
    around = []
    if place % n:
        around.append(flat[place - 1])
    if place % n < n - 1:
        around.append(flat[place + 1])
    if place >= n:
        around.append(flat[place - n])
    if place < n * (n - 1):
        around.append(flat[place + n])
    second = min(around)
    path = []
    while len(path) < k:
        path.append(1 if len(path) % 2 == 0 else second)
    return path


# %% place of every number in a dictionary, the path walked step by step
def minPath(grid, k):
    place = {number: (i, j) for i, row in enumerate(grid) for j, number in enumerate(row)}
    by_place = {where: number for number, where in place.items()}
    path = [1]
    for _ in range(k - 1):
        i, j = place[path[-1]]
        sides = ((i + 1, j), (i - 1, j), (i, j + 1), (i, j - 1))
        path.append(min(by_place[side] for side in sides if side in by_place))
    return path


# %% neighbours of every cell listed before the walk
def minPath(grid, k):
    n = len(grid)
    neighbours = {}
    for i in range(n):
        for j in range(n):
            around = []
            if i > 0:
                around.append(grid[i - 1][j])
            if j > 0:
                around.append(grid[i][j - 1])
            if i + 1 < n:
                around.append(grid[i + 1][j])
            if j + 1 < n:
                around.append(grid[i][j + 1])
            neighbours[grid[i][j]] = around
    path = [1]
    while len(path) < k:
        path.append(min(neighbours[path[-1]]))
    return path


# %% a border of infinity round the grid
def minPath(grid, k):
    n = len(grid)
    infinity = float("inf")
    wide = [[infinity] * (n + 2)] + [[infinity, *row, infinity] for row in grid] + [[infinity] * (n + 2)]
    for i in range(1, n + 1):
        for j in range(1, n + 1):
            if wide[i][j] == 1:
                second = min(wide[i - 1][j], wide[i + 1][j], wide[i][j - 1], wide[i][j + 1])
    path = [1, second] * (k // 2)
    if k % 2:
        path.append(1)
    return path


# %% all pairs of neighbours that hold the 1, by rows and by columns
def minPath(grid, k):
    partners = []
    for lines in (grid, zip(*grid)):
        for line in lines:
            for a, b in zip(line, line[1:]):
                if a == 1 or b == 1:
                    partners.append(a * b)
    return [1 if step % 2 == 0 else min(partners) for step in range(k)]


# %% every step searched among the sorted cells
def minPath(grid, k):
    n = len(grid)
    cells = sorted((grid[i][j], i, j) for i in range(n) for j in range(n))
    at = cells[0]
    path = [at[0]]
    for _ in range(1, k):
        _, i, j = at
        for value, di, dj in cells:
            if abs(di - i) + abs(dj - j) == 1:
                at = (value, di, dj)
                break
        path.append(at[0])
        if path[-1] == 1 and len(path) > 2:
            rest = k - len(path)
            return path + (path[1:3] * rest)[:rest]
    return path


# %% cells as complex numbers, path by a generator
from itertools import cycle, islice


def minPath(grid, k):
    cells = {complex(i, j): value for i, row in enumerate(grid) for j, value in enumerate(row)}
    start = min(cells, key=cells.get)
    second = min(cells[start + step] for step in (1, -1, 1j, -1j) if start + step in cells)
    return list(islice(cycle((1, second)), k))


# %% wrong: the neighbours of an edge lie on the other edge
def minPath(grid, k):
    n = len(grid)
    for i, row in enumerate(grid):
        if 1 in row:
            j = row.index(1)
            second = min(row[j - 1], row[(j + 1) % n], grid[i - 1][j], grid[(i + 1) % n][j])
            return ([1, second] * k)[:k]


# %% wrong: steps across corners
def minPath(grid, k):
    n = len(grid)
    for i in range(n):
        if 1 in grid[i]:
            j = grid[i].index(1)
            near = [v for row in grid[max(0, i - 1) : i + 2] for v in row[max(0, j - 1) : j + 2] if v > 1]
            return ([1, min(near)] * k)[:k]
