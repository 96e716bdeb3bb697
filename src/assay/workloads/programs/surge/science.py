"""SC: numerical programs in Python's standard library, whose output is numbers."""

from __future__ import annotations

from assay.workloads.programs.surge.source import Source, filled

_PROGRAMS: dict[str, tuple[str, list[dict[str, object]]]] = {
    "power iteration": (r"""
matrix = $matrix
vector = [1.0] * len(matrix)
for _ in range(50):
    product = [sum(a * x for a, x in zip(row, vector)) for row in matrix]
    largest = max(map(abs, product))
    vector = [x / largest for x in product]
print(f"{largest:.6f}")
""", [{"matrix": "[[2, 1], [1, 3]]"}, {"matrix": "[[4, 1], [2, 3]]"}]),
    "Euler steps": (r"""
y, t, h = $start, 0.0, 0.1
for _ in range($steps):
    y += h * (t - y)
    t += h
print(f"{y:.6f}")
""", [{"start": 1.0, "steps": 10}, {"start": 2.0, "steps": 5}]),
    "Fourier transform": (r"""
import cmath


def fft(x):
    n = len(x)
    if n == 1:
        return x
    even, odd = fft(x[::2]), fft(x[1::2])
    turned = [cmath.exp(-2j * cmath.pi * k / n) * odd[k] for k in range(n // 2)]
    return [e + o for e, o in zip(even, turned)] + [e - o for e, o in zip(even, turned)]


print(" ".join(f"{abs(value):.4f}" for value in fft($signal)))
""", [{"signal": "[1, 2, 3, 4]"}, {"signal": "[3, 0, 1, 1]"}]),
    "LU": (r"""
a = $matrix
n = len(a)
for k in range(n):
    for i in range(k + 1, n):
        a[i][k] /= a[k][k]
        for j in range(k + 1, n):
            a[i][j] -= a[i][k] * a[k][j]
print(" ".join(f"{a[i][i]:.4f}" for i in range(n)))
""", [{"matrix": "[[4.0, 3.0], [6.0, 3.0]]"}, {"matrix": "[[2.0, 1.0, 1.0], [4.0, 3.0, 3.0], [8.0, 7.0, 9.0]]"}]),
    "Newton": (r"""
x = 1.0
for _ in range(20):
    x = 0.5 * (x + $n / x)
print(f"{x:.6f}")
""", [{"n": 2.0}, {"n": 10.0}]),
    "trapezoids": (r"""
import math

n, a, b = $n, 0.0, $b
h = (b - a) / n
total = 0.5 * (math.sin(a) + math.sin(b)) + sum(math.sin(a + k * h) for k in range(1, n))
print(f"{total * h:.6f}")
""", [{"n": 100, "b": 1.0}, {"n": 50, "b": 2.0}]),
    "bisection": (r"""
low, high = 0.0, $high
while high - low > 1e-9:
    middle = (low + high) / 2
    if middle**3 + middle < $target:
        low = middle
    else:
        high = middle
print(f"{low:.6f}")
""", [{"high": 4.0, "target": 10.0}, {"high": 2.0, "target": 1.0}]),
    "least squares": (r"""
x = [1.0, 2.0, 3.0, 4.0]
y = $y
mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
slope = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y)) / sum((a - mean_x) ** 2 for a in x)
print(f"{slope:.4f} {mean_y - slope * mean_x:.4f}")
""", [{"y": "[2.0, 4.1, 5.9, 8.2]"}, {"y": "[1.0, 0.5, 0.4, 0.1]"}]),
}  # fmt: skip


def made() -> list[Source]:
    """Eight kinds of numerical work, each twice."""
    return [
        source
        for name, (template, settings) in _PROGRAMS.items()
        for source in filled("SC", name, "python", template, settings, family="numerical")
    ]
