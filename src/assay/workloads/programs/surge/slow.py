"""TC: algorithms that take time: sorting, random sampling with a generator of its own, counting and searching."""

from __future__ import annotations

from assay.workloads.programs.surge.source import Source, filled

_PROGRAMS: dict[str, tuple[str, str, list[dict[str, object]]]] = {
    "bubble sort": ("sorting", r"""
numbers = $numbers
for _ in range(20000):  # again and again, from the beginning
    a = list(numbers)
    for end in range(len(a) - 1, 0, -1):
        for i in range(end):
            if a[i] > a[i + 1]:
                a[i], a[i + 1] = a[i + 1], a[i]
print(*a)
""", [{"numbers": "[5, 2, 9, 1, 7]"}, {"numbers": "[12, 3, 8, 20, 4]"}]),
    "sort by permutations": ("sorting", r"""
from itertools import permutations

numbers = $numbers
for order in permutations(numbers):
    if all(a <= b for a, b in zip(order, order[1:])):
        break
print(*order)
""", [{"numbers": "[9, 8, 7, 6, 5, 4, 3, 2, 1]"}, {"numbers": "[8, 9, 5, 7, 6, 1, 4, 3, 2]"}]),
    "pi by darts": ("monte carlo", r"""
state, inside = $seed, 0
for _ in range(300000):
    state = (1103515245 * state + 12345) % 2**31
    x = state / 2**31
    state = (1103515245 * state + 12345) % 2**31
    y = state / 2**31
    inside += x * x + y * y <= 1
print(f"estimate: {4 * inside / 300000:.4f}")
""", [{"seed": 1}, {"seed": 42}]),
    "dice": ("monte carlo", r"""
state, wins = $seed, 0
for _ in range(300000):
    state = (1103515245 * state + 12345) % 2**31
    first = (state >> 16) % 6 + 1
    state = (1103515245 * state + 12345) % 2**31
    second = (state >> 16) % 6 + 1
    wins += first + second >= $least
print(f"share of throws: {wins / 300000:.4f}")
""", [{"seed": 3, "least": 10}, {"seed": 4, "least": 7}]),
    "queens": ("counting", r"""
def place(row, columns, left, right, n):
    if row == n:
        return 1
    found = 0
    for column in range(n):
        if column not in columns and row - column not in left and row + column not in right:
            found += place(row + 1, columns | {column}, left | {row - column}, right | {row + column}, n)
    return found


print(place(0, frozenset(), frozenset(), frozenset(), $n))
""", [{"n": 6}, {"n": 8}]),
    "longest Collatz": ("counting", r"""
best = (0, 0)
for start in range(1, $limit):
    n, steps = start, 0
    while n != 1:
        n = n // 2 if n % 2 == 0 else 3 * n + 1
        steps += 1
    best = max(best, (steps, start))
print(best[1])
""", [{"limit": 1000}, {"limit": 20000}]),
    "primes": ("counting", r"""
found = 0
for n in range(2, $limit):
    for d in range(2, n):
        if n % d == 0:
            break
    else:
        found += 1
print(found)
""", [{"limit": 100}, {"limit": 5000}]),
    "partitions": ("counting", r"""
def partitions(n, largest):
    if n == 0:
        return 1
    return sum(partitions(n - part, part) for part in range(1, min(n, largest) + 1))


print(partitions($n, $n))
""", [{"n": 10}, {"n": 35}]),
}  # fmt: skip


def made() -> list[Source]:
    """Eight algorithms, each twice."""
    return [
        source
        for name, (family, template, settings) in _PROGRAMS.items()
        for source in filled("TC", name, "python", template, settings, family=family)
    ]
