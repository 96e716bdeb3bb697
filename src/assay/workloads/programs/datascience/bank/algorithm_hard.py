"""Algorithm, hard: dynamic programmes, iterations to a fixed point, estimators of statistics."""

import math
from itertools import combinations, product

from assay.workloads.programs.datascience.tables import array

# %% task
SIGNATURE = "def viterbi(start, move, emit, seen)"
TEXT = """A hidden Markov model: start is a list of n probabilities, move a list of n lists (row i: from state i),
emit a list of n lists (row i: of each symbol in state i), seen a list of symbols (whole numbers from 0 on). Return
the list of the likeliest states; of equally likely sequences the one that is first in the order of lists."""


def cases(rng):
    def row(size):
        parts = [(rng.random() + 0.1) ** 3 for _ in range(size)]
        return [part / sum(parts) for part in parts]

    for n, length in ((2, 8), (3, 7), (3, 7), (4, 6)):
        yield row(n), [row(n) for _ in range(n)], [row(4) for _ in range(n)], [rng.randrange(4) for _ in range(length)]
    # the likeliest sequence does not begin with the state that is likeliest there
    yield [0.4, 0.6], [[0.9, 0.1], [0.5, 0.5]], [[0.5, 0.5], [0.5, 0.5]], [0, 0, 0]


def answer(start, move, emit, seen):
    def chance(path):
        found = start[path[0]] * emit[path[0]][seen[0]]
        for at in range(1, len(path)):
            found *= move[path[at - 1]][path[at]] * emit[path[at]][seen[at]]
        return found

    return list(max(product(range(len(start)), repeat=len(seen)), key=chance))


# %% solution
from math import log


def viterbi(start, move, emit, seen):
    n = len(start)
    score = [log(start[s]) + log(emit[s][seen[0]]) for s in range(n)]
    back = []
    for symbol in seen[1:]:
        best = [max(range(n), key=lambda s: score[s] + log(move[s][t])) for t in range(n)]
        score = [score[s] + log(move[s][t]) + log(emit[t][symbol]) for t, s in enumerate(best)]
        back.append(best)
    path = [max(range(n), key=score.__getitem__)]
    for best in reversed(back):
        path.append(best[path[-1]])
    return path[::-1]


# %% wrong: the best state at each step, going forward
def viterbi(start, move, emit, seen):
    n = len(start)
    path = [max(range(n), key=lambda s: start[s] * emit[s][seen[0]])]
    for symbol in seen[1:]:
        path.append(max(range(n), key=lambda s: move[path[-1]][s] * emit[s][symbol]))
    return path


# %% wrong: by what is seen alone
def viterbi(start, move, emit, seen):
    return [max(range(len(start)), key=lambda s: emit[s][symbol]) for symbol in seen]


# %% task
SIGNATURE = "def page_rank(links, damping)"
TEXT = """links is a list of n lists: the pages that each page links to. A random visitor follows a random link with
probability damping and goes to any of the n pages otherwise; from a page without links always to any page. Return
the list of the n probabilities to which this settles (up to 1e-8), which sum to 1."""


def cases(rng):
    yield [[1, 2], [2], [0], [0, 2]], 0.85
    yield [[1], [], [0, 1], [2]], 0.85
    yield [[other for other in range(6) if other != page and rng.random() < 0.4] for page in range(6)], 0.7


TOLERANCE = 1e-6


def answer(links, damping):
    n = len(links)
    rank = [1 / n] * n
    for _ in range(400):
        loose = sum(rank[page] for page in range(n) if not links[page])
        new = [(1 - damping) / n + damping * loose / n] * n
        for page, out in enumerate(links):
            for other in out:
                new[other] += damping * rank[page] / len(out)
        rank = new
    return rank


# %% solution
import numpy as np


def page_rank(links, damping):
    n = len(links)
    move = np.full((n, n), (1 - damping) / n)
    for page, out in enumerate(links):
        if out:
            move[page, out] += damping / len(out)
        else:
            move[page] = 1 / n
    left = np.vstack([move.T - np.eye(n), np.ones(n)])
    return np.linalg.lstsq(left, np.append(np.zeros(n), 1.0), rcond=None)[0]


# %% wrong: pages without links lose their visitors
def page_rank(links, damping):
    n = len(links)
    rank = [1 / n] * n
    for _ in range(400):
        new = [(1 - damping) / n] * n
        for page, out in enumerate(links):
            for other in out:
                new[other] += damping * rank[page] / len(out)
        rank = new
    return rank


# %% wrong: by the number of links that lead to a page
def page_rank(links, damping):
    n = len(links)
    counts = [sum(page in out for out in links) + 1 for page in range(n)]
    return [count / sum(counts) for count in counts]


# %% task
SIGNATURE = "def logistic_regression(X, y, penalty)"
TEXT = """X is a numpy array (n, d), y a numpy array (n,) of 0 and 1. Return the array (d + 1,) of the weights, the
intercept first, that minimise the sum over rows of the negative log-likelihood of a logistic regression, plus
penalty / 2 times the sum of the squared weights without the intercept (up to 1e-5)."""


def cases(rng):
    for n, d, penalty in ((40, 2, 1.0), (60, 3, 0.1)):
        X = [[rng.gauss(0.5, 1) for _ in range(d)] for _ in range(n)]
        y = [int(row[0] - row[1] + rng.gauss(0.3, 1) > 0) for row in X]
        yield array(X), array(y), penalty


TOLERANCE = 1e-4


def answer(X, y, penalty):
    table, n = [[1.0, *row] for row in X["__array__"]], len(y["__array__"])
    weights, step = [0.0] * len(table[0]), 2.0 / n
    for _ in range(4000):  # plain descent; the sum is convex and smooth
        off = [
            1 / (1 + math.exp(-sum(w * x for w, x in zip(weights, row)))) - label
            for row, label in zip(table, y["__array__"])
        ]
        slope = [sum(o * row[at] for o, row in zip(off, table)) for at in range(len(weights))]
        slope = [s + (penalty * w if at else 0.0) for at, (s, w) in enumerate(zip(slope, weights))]
        weights = [w - step * s for w, s in zip(weights, slope)]
        if max(map(abs, slope)) < 1e-9:
            break
    return weights


# %% solution
import numpy as np


def logistic_regression(X, y, penalty):
    table = np.column_stack([np.ones(len(X)), X])
    ridge = penalty * np.eye(table.shape[1])
    ridge[0, 0] = 0
    weights = np.zeros(table.shape[1])
    for _ in range(50):
        p = 1 / (1 + np.exp(-table @ weights))
        slope = table.T @ (p - y) + ridge @ weights
        curve = (table * (p * (1 - p))[:, None]).T @ table + ridge
        weights = weights - np.linalg.solve(curve, slope)
    return weights


# %% wrong: the intercept is penalised too
import numpy as np


def logistic_regression(X, y, penalty):
    table = np.column_stack([np.ones(len(X)), X])
    ridge = penalty * np.eye(table.shape[1])
    weights = np.zeros(table.shape[1])
    for _ in range(50):
        p = 1 / (1 + np.exp(-table @ weights))
        slope = table.T @ (p - y) + ridge @ weights
        weights = weights - np.linalg.solve((table * (p * (1 - p))[:, None]).T @ table + ridge, slope)
    return weights


# %% wrong: the mean over rows in place of the sum
import numpy as np


def logistic_regression(X, y, penalty):
    table = np.column_stack([np.ones(len(X)), X])
    ridge = penalty * len(X) * np.eye(table.shape[1])
    ridge[0, 0] = 0
    weights = np.zeros(table.shape[1])
    for _ in range(50):
        p = 1 / (1 + np.exp(-table @ weights))
        slope = table.T @ (p - y) + ridge @ weights
        weights = weights - np.linalg.solve((table * (p * (1 - p))[:, None]).T @ table + ridge, slope)
    return weights


# %% task
SIGNATURE = "def time_warping(a, b)"
TEXT = """Return the dynamic time warping distance of two lists of numbers: the smallest sum of absolute differences
over all ways to pair them in order that pair first with first and last with last, where each step goes on by one in
a, in b, or in both."""


def cases(rng):
    yield [1, 2, 3], [1, 2, 2, 3]
    for n, m in ((6, 8), (10, 5)):
        yield [rng.randint(0, 9) for _ in range(n)], [rng.randint(0, 9) for _ in range(m)]
    yield [4], [1, 2]


def answer(a, b):
    known = {}

    def cost(i, j):
        if (i, j) not in known:
            before = [(i - 1, j), (i, j - 1), (i - 1, j - 1)]
            ways = [cost(x, y) for x, y in before if x >= 0 and y >= 0]
            known[i, j] = abs(a[i] - b[j]) + (min(ways) if ways else 0)
        return known[i, j]

    return cost(len(a) - 1, len(b) - 1)


# %% solution
import numpy as np


def time_warping(a, b):
    table = np.full((len(a) + 1, len(b) + 1), np.inf)
    table[0, 0] = 0
    for i, x in enumerate(a, 1):
        for j, y in enumerate(b, 1):
            table[i, j] = abs(x - y) + min(table[i - 1, j], table[i, j - 1], table[i - 1, j - 1])
    return float(table[-1, -1])


# %% wrong: no step goes on in both
def time_warping(a, b):
    inf = float("inf")
    row = [0.0] + [inf] * len(b)
    for i, x in enumerate(a):
        new = [inf]
        for j, y in enumerate(b):
            new.append(abs(x - y) + (0 if i == j == 0 else min(row[j + 1], new[j])))
        row = new
    return row[-1]


# %% wrong: position by position
def time_warping(a, b):
    long, short = (a, b) if len(a) >= len(b) else (b, a)
    return float(sum(abs(x - short[min(at, len(short) - 1)]) for at, x in enumerate(long)))


# %% task
SIGNATURE = "def isotonic(values, weights)"
TEXT = """Return the list of the rising (never falling) numbers that are nearest to the list values in the weighted
sum of squares; weights are above 0."""


def cases(rng):
    yield [1, 3, 2, 4], [1, 1, 1, 1]
    yield [5, 4, 3, 2, 1], [1, 2, 3, 4, 5]
    yield [rng.randint(0, 20) + at for at in range(15)], [rng.randint(1, 4) for _ in range(15)]


def answer(values, weights):
    n = len(values)

    def middle(i, j):
        return sum(v * w for v, w in zip(values[i : j + 1], weights[i : j + 1])) / sum(weights[i : j + 1])

    return [max(min(middle(i, j) for j in range(at, n)) for i in range(at + 1)) for at in range(n)]


# %% solution
def isotonic(values, weights):
    blocks = []
    for value, weight in zip(values, weights):
        blocks.append([float(value), weight, 1])
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            high, heavy, count = blocks.pop()
            low, light, before = blocks.pop()
            total = heavy + light
            blocks.append([(high * heavy + low * light) / total, total, count + before])
    return [value for value, _, count in blocks for _ in range(count)]


# %% wrong: without the weights
def isotonic(values, weights):
    blocks = []
    for value in values:
        blocks.append([float(value), 1])
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            high, count = blocks.pop()
            low, before = blocks.pop()
            blocks.append([(high * count + low * before) / (count + before), count + before])
    return [value for value, count in blocks for _ in range(count)]


# %% wrong: the running maximum
from itertools import accumulate


def isotonic(values, weights):
    return [float(value) for value in accumulate(values, max)]


# %% task
SIGNATURE = "def single_link(X, k)"
TEXT = """X is a numpy array (n, d). Start with every row as a cluster and join the two clusters with the smallest
distance between any of their rows, until k are left (no two distances are equal). Return the list of n numbers of
clusters, numbered from 0 in the order of their first rows."""


def cases(rng):
    yield array([[at + rng.uniform(-0.2, 0.2), 3.0 * (at % 2)] for at in range(16)]), 2
    for n, k in ((12, 3), (20, 4), (5, 5)):
        yield array([[rng.gauss(rng.choice((0, 6)), 1), rng.gauss(rng.choice((0, 6)), 1)] for _ in range(n)]), k


def answer(X, k):
    points = X["__array__"]
    clusters = [{at} for at in range(len(points))]

    def gap(a, b):
        return min(sum((x - y) ** 2 for x, y in zip(points[i], points[j])) for i in a for j in b)

    while len(clusters) > k:
        pairs = [(gap(a, b), i, j) for i, a in enumerate(clusters) for j, b in enumerate(clusters) if i < j]
        _, i, j = min(pairs)
        clusters[i] |= clusters.pop(j)
    ordered = sorted(clusters, key=min)
    return [next(at for at, own in enumerate(ordered) if point in own) for point in range(len(points))]


# %% solution
import numpy as np


def single_link(X, k):
    n = len(X)
    gaps = ((X[:, None] - X[None]) ** 2).sum(axis=2)
    labels, left = np.arange(n), n
    rows, columns = np.triu_indices(n, 1)
    for at in np.argsort(gaps[rows, columns]):
        if left == k:
            break
        a, b = labels[rows[at]], labels[columns[at]]
        if a != b:
            labels[labels == b] = a
            left -= 1
    names = {}
    return [names.setdefault(int(label), len(names)) for label in labels]


# %% wrong: by the largest distance between rows (complete link)
import numpy as np


def single_link(X, k):
    clusters = [[at] for at in range(len(X))]
    gaps = ((X[:, None] - X[None]) ** 2).sum(axis=2)
    while len(clusters) > k:
        pairs = [
            (gaps[np.ix_(a, b)].max(), i, j) for i, a in enumerate(clusters) for j, b in enumerate(clusters) if i < j
        ]
        _, i, j = min(pairs)
        clusters[i] += clusters.pop(j)
    clusters.sort(key=min)
    return [next(at for at, own in enumerate(clusters) if point in own) for point in range(len(X))]


# %% wrong: numbered by size, the largest first
import numpy as np


def single_link(X, k):
    n = len(X)
    gaps = ((X[:, None] - X[None]) ** 2).sum(axis=2)
    labels, left = np.arange(n), n
    rows, columns = np.triu_indices(n, 1)
    for at in np.argsort(gaps[rows, columns]):
        if left == k:
            break
        a, b = labels[rows[at]], labels[columns[at]]
        if a != b:
            labels[labels == a] = b
            left -= 1
    names, places, counts = np.unique(labels, return_inverse=True, return_counts=True)
    return np.argsort(np.argsort(-counts))[places].tolist()


# %% task
SIGNATURE = "def frequent_sets(baskets, least)"
TEXT = """baskets is a list of lists of texts. Return the list of all sets of one, two or three different texts that
are together in at least least baskets, each as [sorted list of the texts, number of baskets], by size and then in
the order of the lists."""


def cases(rng):
    for n in (12, 20):
        yield [rng.choices(["ale", "bun", "egg", "fig", "jam"], k=rng.randint(1, 5)) for _ in range(n)], n // 4


def answer(baskets, least):
    items = sorted({item for basket in baskets for item in basket})
    found = []
    for size in (1, 2, 3):
        for chosen in combinations(items, size):
            count = sum(set(chosen) <= set(basket) for basket in baskets)
            if count >= least:
                found.append([list(chosen), count])
    return found


# %% solution
from collections import Counter
from itertools import combinations


def frequent_sets(baskets, least):
    found, kept = [], None
    for size in (1, 2, 3):
        counts = Counter()
        for basket in baskets:
            items = sorted(set(basket) & kept) if kept is not None else sorted(set(basket))
            counts.update(combinations(items, size))
        frequent = {chosen: n for chosen, n in counts.items() if n >= least}
        found += [[list(chosen), frequent[chosen]] for chosen in sorted(frequent)]
        kept = {item for chosen in frequent for item in chosen}
    return found


# %% wrong: a text that is twice in a basket counts twice
from collections import Counter
from itertools import combinations


def frequent_sets(baskets, least):
    found = []
    for size in (1, 2, 3):
        counts = Counter(chosen for basket in baskets for chosen in combinations(sorted(basket), size))
        found += [[list(chosen), n] for chosen, n in sorted(counts.items()) if n >= least]
    return found


# %% wrong: in more than so many baskets
from collections import Counter
from itertools import combinations


def frequent_sets(baskets, least):
    found = []
    for size in (1, 2, 3):
        counts = Counter(chosen for basket in baskets for chosen in combinations(sorted(set(basket)), size))
        found += [[list(chosen), n] for chosen, n in sorted(counts.items()) if n > least]
    return found


# %% task
SIGNATURE = "def kaplan_meier(times, died)"
TEXT = """times is a list of the times at which each of n patients died or was last seen, died a list that says
which of the two (True: died). Return the Kaplan-Meier estimate: a list of [time, share alive after it] for every
different time at which somebody died, in order. Who was last seen at a time was still at risk at that time."""


def cases(rng):
    for n in (10, 25):
        yield [rng.randint(1, 9) for _ in range(n)], [rng.random() < 0.6 for _ in range(n)]
    yield [3, 3, 5], [True, False, True]


def answer(times, died):
    found, share = [], 1.0
    for time in range(1, 10):
        deaths = sum(t == time and d for t, d in zip(times, died, strict=True))
        if deaths:
            share *= 1 - deaths / sum(t >= time for t in times)
            found.append([time, share])
    return found


# %% solution
import numpy as np


def kaplan_meier(times, died):
    times, died = np.array(times), np.array(died)
    found, share = [], 1.0
    for time in np.unique(times[died]):
        share *= 1 - (died & (times == time)).sum() / (times >= time).sum()
        found.append([time.item(), float(share)])
    return found


# %% wrong: who was last seen is left out
import numpy as np


def kaplan_meier(times, died):
    times = np.array([t for t, d in zip(times, died) if d])
    return [[time.item(), float((times > time).mean())] for time in np.unique(times)]


# %% wrong: who was last seen counts as dead
import numpy as np


def kaplan_meier(times, died):
    times = np.array(times)
    return [[time.item(), float((times > time).mean())] for time in np.unique(times)]
