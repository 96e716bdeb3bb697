"""Algorithm, medium: methods of a first course, with their ties."""

import math

from assay.workloads.programs.datascience.tables import array, mean

# %% task
SIGNATURE = "def nearest_neighbours(X, y, queries, k)"
TEXT = """X is a numpy array (n, d), y a list of n whole-number labels, queries a numpy array (m, d). Return the
list of m labels found by the k nearest rows of X (Euclidean; of equally near ones the earlier row), by majority; of
equally frequent labels the smallest."""


def cases(rng):
    for n, k in ((20, 3), (15, 4)):
        X = [[rng.randint(0, 4), rng.randint(0, 4)] for _ in range(n)]
        yield (
            array(X),
            rng.choices((0, 1, 2), k=n),
            array([[rng.randint(0, 4), rng.randint(0, 4)] for _ in range(8)]),
            k,
        )
    yield array([[3, 0], [2, 2], [4, 4]]), [0, 1, 2], array([[0, 0]]), 1  # nearer across than along the streets


def answer(X, y, queries, k):
    found = []
    for query in queries["__array__"]:
        far = [(sum((a - b) ** 2 for a, b in zip(row, query)), at) for at, row in enumerate(X["__array__"])]
        labels = [y[at] for _, at in sorted(far)[:k]]
        found.append(min(labels, key=lambda label: (-labels.count(label), label)))
    return found


# %% solution
import numpy as np


def nearest_neighbours(X, y, queries, k):
    y = np.array(y)
    found = []
    for query in queries:
        order = np.argsort(((X - query) ** 2).sum(axis=1), kind="stable")[:k]
        labels, counts = np.unique(y[order], return_counts=True)
        found.append(int(labels[counts.argmax()]))
    return found


# %% wrong: of equally frequent labels the nearest
from collections import Counter

import numpy as np


def nearest_neighbours(X, y, queries, k):
    found = []
    for query in queries:
        order = np.argsort(((X - query) ** 2).sum(axis=1), kind="stable")[:k]
        found.append(Counter(y[at] for at in order).most_common(1)[0][0])
    return found


# %% wrong: one neighbour only
import numpy as np


def nearest_neighbours(X, y, queries, k):
    return [int(y[((X - query) ** 2).sum(axis=1).argmin()]) for query in queries]


# %% task
SIGNATURE = "def least_squares(X, y)"
TEXT = """X is a numpy array (n, d), y a numpy array (n,). Return the array (d + 1,) of the coefficients of the
linear regression of y on X with an intercept; the intercept comes first."""


def cases(rng):
    for n, d in ((12, 2), (30, 3)):
        X = [[rng.gauss(0, 1) + 2 for _ in range(d)] for _ in range(n)]
        yield array(X), array([3 + sum((at + 1) * x for at, x in enumerate(row)) + rng.gauss(0, 1) for row in X])


def answer(X, y):
    table = [[1.0, *row] for row in X["__array__"]]
    size = len(table[0])
    left = [[sum(row[i] * row[j] for row in table) for j in range(size)] for i in range(size)]
    right = [sum(row[i] * value for row, value in zip(table, y["__array__"])) for i in range(size)]
    for at in range(size):  # Gauss and Jordan
        pivot = left[at][at]
        left[at], right[at] = [x / pivot for x in left[at]], right[at] / pivot
        for other in range(size):
            if other != at:
                times = left[other][at]
                left[other] = [x - times * z for x, z in zip(left[other], left[at])]
                right[other] -= times * right[at]
    return right


# %% solution
import numpy as np


def least_squares(X, y):
    table = np.column_stack([np.ones(len(X)), X])
    return np.linalg.lstsq(table, y, rcond=None)[0]


# %% wrong: without an intercept
import numpy as np


def least_squares(X, y):
    return np.concatenate([[0.0], np.linalg.lstsq(X, y, rcond=None)[0]])


# %% wrong: the intercept comes last
import numpy as np


def least_squares(X, y):
    return np.linalg.lstsq(np.column_stack([X, np.ones(len(X))]), y, rcond=None)[0]


# %% task
SIGNATURE = "def roc_auc(labels, scores)"
TEXT = """labels is a list of 0 and 1, scores a list of numbers. Return the area under the ROC curve: the
probability that a random 1 has a higher score than a random 0, ties counted half."""


def cases(rng):
    for n in (30, 9):
        yield [1, 0, *rng.choices((0, 1), k=n)], [rng.randint(0, 6) for _ in range(n + 2)]


def answer(labels, scores):
    ones, zeros = ([s for label, s in zip(labels, scores, strict=True) if label == kind] for kind in (1, 0))
    return mean([1.0 if a > b else 0.5 if a == b else 0.0 for a in ones for b in zeros])


# %% solution
import numpy as np


def roc_auc(labels, scores):
    labels, scores = np.array(labels), np.array(scores)
    _, place, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[place]
    ones = int(labels.sum())
    return float((ranks[labels == 1].sum() - ones * (ones + 1) / 2) / (ones * (len(labels) - ones)))


# %% wrong: ties in the order of the list
import numpy as np


def roc_auc(labels, scores):
    labels = np.array(labels)
    ranks = np.argsort(np.argsort(scores, kind="stable"), kind="stable") + 1
    ones = int(labels.sum())
    return float((ranks[labels == 1].sum() - ones * (ones + 1) / 2) / (ones * (len(labels) - ones)))


# %% wrong: ties do not count
def roc_auc(labels, scores):
    pairs = [(a, b) for a, la in zip(scores, labels) if la for b, lb in zip(scores, labels) if not lb]
    return sum(a > b for a, b in pairs) / len(pairs)


# %% task
SIGNATURE = "def k_means(X, centres)"
TEXT = """X is a numpy array (n, d), centres a numpy array (k, d). Alternate: each row goes to its nearest centre
(of equally near ones the first), each centre becomes the mean of its rows (one without rows stays). Stop when no
row changes its centre. Return a pair: the list of the n numbers of the centres, and the centres, an array (k, d)."""


def cases(rng):
    points = [[rng.gauss(at % 3 * 4, 1), rng.gauss(at % 2 * 4, 1)] for at in range(24)]
    yield array(points), array([[0.0, 0.0], [1.0, 1.0], [8.0, 4.0]])
    yield array(points), array([[0.0, 0.0], [99.0, 99.0]])


def answer(X, centres):
    points, places, before = X["__array__"], [list(c) for c in centres["__array__"]], None
    while True:
        far = [[sum((a - b) ** 2 for a, b in zip(p, c)) for c in places] for p in points]
        labels = [row.index(min(row)) for row in far]
        if labels == before:
            return [labels, places]
        before = labels
        for at in range(len(places)):
            own = [p for p, label in zip(points, labels) if label == at]
            if own:
                places[at] = [mean(c) for c in zip(*own)]


# %% solution
import numpy as np


def k_means(X, centres):
    centres, labels = centres.astype(float).copy(), None
    while True:
        nearest = ((X[:, None] - centres[None]) ** 2).sum(axis=2).argmin(axis=1)
        if labels is not None and (nearest == labels).all():
            return labels.tolist(), centres
        labels = nearest
        for at in np.unique(labels):
            centres[at] = X[labels == at].mean(axis=0)


# %% wrong: one round only
import numpy as np


def k_means(X, centres):
    labels = ((X[:, None] - centres[None]) ** 2).sum(axis=2).argmin(axis=1)
    found = [X[labels == at].mean(axis=0) if (labels == at).any() else centres[at] for at in range(len(centres))]
    return labels.tolist(), np.array(found)


# %% wrong: a centre without rows becomes 0
import numpy as np


def k_means(X, centres):
    labels = None
    while True:
        nearest = ((X[:, None] - centres[None]) ** 2).sum(axis=2).argmin(axis=1)
        if labels is not None and (nearest == labels).all():
            return labels.tolist(), centres
        labels = nearest
        sums = np.array([X[labels == at].sum(axis=0) for at in range(len(centres))])
        centres = sums / np.maximum(np.bincount(labels, minlength=len(centres)), 1)[:, None]


# %% task
SIGNATURE = "def best_split(values, labels)"
TEXT = """values is a list of numbers, labels a list of 0 and 1. A threshold splits into values <= threshold and the
others; thresholds lie in the middle of two different neighbouring values. Return [threshold, gain] of the split
with the largest decrease of the Gini impurity (2 p (1 - p), the parts weighted by their sizes); of equally good
ones the smallest threshold."""


def cases(rng):
    for n in (12, 25):
        values = [rng.randint(0, 9) for _ in range(n)] + [-1]
        yield values, [int(v + rng.gauss(0, 3) > 4) for v in values]


def answer(values, labels):
    def gini(own):
        p = sum(own) / len(own)
        return 2 * p * (1 - p)

    best = [None, -1.0]
    levels = sorted(set(values))
    for low, high in zip(levels, levels[1:]):
        sides = [[label for v, label in zip(values, labels) if (v <= low) == side] for side in (True, False)]
        gain = gini(labels) - sum(len(own) * gini(own) for own in sides) / len(labels)
        if gain > best[1] + 1e-12:
            best = [(low + high) / 2, gain]
    return best


# %% solution
import numpy as np


def best_split(values, labels):
    order = np.argsort(values, kind="stable")
    v, y = np.array(values, dtype=float)[order], np.array(labels)[order]
    n, ones = len(y), np.cumsum(y)
    at = np.flatnonzero(v[1:] > v[:-1])
    left, right = at + 1.0, n - at - 1.0
    pl, pr, p = ones[at] / left, (ones[-1] - ones[at]) / right, ones[-1] / n
    gain = 2 * p * (1 - p) - (left * 2 * pl * (1 - pl) + right * 2 * pr * (1 - pr)) / n
    best = int(np.flatnonzero(gain >= gain.max() - 1e-12)[0])
    return [float((v[at[best]] + v[at[best] + 1]) / 2), float(gain[best])]


# %% wrong: the parts weigh the same
def best_split(values, labels):
    def gini(own):
        p = sum(own) / len(own)
        return 2 * p * (1 - p)

    best = [None, -9.0]
    levels = sorted(set(values))
    for low, high in zip(levels, levels[1:]):
        sides = [[label for v, label in zip(values, labels) if (v <= low) == side] for side in (True, False)]
        gain = gini(labels) - sum(gini(own) for own in sides) / 2
        if gain > best[1]:
            best = [(low + high) / 2, gain]
    return best


# %% wrong: thresholds at the values
def best_split(values, labels):
    def gini(own):
        p = sum(own) / len(own)
        return 2 * p * (1 - p)

    best = [None, -9.0]
    for low in sorted(set(values))[:-1]:
        sides = [[label for v, label in zip(values, labels) if (v <= low) == side] for side in (True, False)]
        gain = gini(labels) - sum(len(own) * gini(own) for own in sides) / len(labels)
        if gain > best[1]:
            best = [float(low), gain]
    return best


# %% task
SIGNATURE = "def smoothed(values, alpha)"
TEXT = """values is a list of numbers and None (missing). Return the exponentially smoothed list: the first number
starts it, then each number moves it by alpha times its distance; a missing value leaves it where it is (None before
the first number)."""


def cases(rng):
    values = [None, *(rng.randint(0, 20) if rng.random() > 0.2 else None for _ in range(20))]
    yield values, 0.3
    yield [5, 7, None, 1], 0.5
    yield [None], 0.5


def answer(values, alpha):
    found = []
    for value in values:
        last = found[-1] if found else None
        found.append(last if value is None else float(value) if last is None else (1 - alpha) * last + alpha * value)
    return found


# %% solution
def smoothed(values, alpha):
    level, found = None, []
    for value in values:
        if value is not None:
            level = float(value) if level is None else level + alpha * (value - level)
        found.append(level)
    return found


# %% wrong: alpha weighs the past
def smoothed(values, alpha):
    level, found = None, []
    for value in values:
        if value is not None:
            level = float(value) if level is None else alpha * level + (1 - alpha) * value
        found.append(level)
    return found


# %% wrong: it starts at 0
def smoothed(values, alpha):
    level, found = 0.0, []
    for value in values:
        level += alpha * (value - level) if value is not None else 0.0
        found.append(level)
    return found


# %% task
SIGNATURE = "def edit_distance(a, b)"
TEXT = """Return the fewest insertions, deletions and replacements of single letters that turn the text a into the
text b."""


def cases(rng):
    yield from (("kitten", "sitting"), ("", "abc"), ("same", "same"))
    yield "".join(rng.choices("abc", k=12)), "".join(rng.choices("abc", k=9))
    yield "abcdef", "bcdefa"


def answer(a, b):
    table = {(i, 0): i for i in range(len(a) + 1)} | {(0, j): j for j in range(len(b) + 1)}
    for i in range(1, len(a) + 1):
        for j in range(1, len(b) + 1):
            table[i, j] = min(table[i - 1, j] + 1, table[i, j - 1] + 1, table[i - 1, j - 1] + (a[i - 1] != b[j - 1]))
    return table[len(a), len(b)]


# %% solution
def edit_distance(a, b):
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (x != y))
    return row[-1]


# %% wrong: positions compared
def edit_distance(a, b):
    return sum(x != y for x, y in zip(a, b)) + abs(len(a) - len(b))


# %% wrong: a replacement counts two
def edit_distance(a, b):
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + 2 * (x != y))
    return row[-1]


# %% task
SIGNATURE = "def tf_idf(documents)"
TEXT = """documents is a list of texts; words are what stands between spaces, in lower case. Return a list of dicts:
for each document, for each of its words, its count in the document times the natural logarithm of (number of
documents / number of documents with the word)."""


def cases(rng):
    words = ["the", "sun", "sea", "is", "blue", "red", "warm", "A"]
    yield ([" ".join(rng.choices(words, k=7)) for _ in range(5)],)
    yield (["One two two", "two three"],)


def answer(documents):
    split = [text.lower().split() for text in documents]
    return [
        {word: own.count(word) * math.log(len(split) / sum(word in other for other in split)) for word in own}
        for own in split
    ]


# %% solution
from collections import Counter
from math import log


def tf_idf(documents):
    counts = [Counter(text.lower().split()) for text in documents]
    holding = Counter(word for own in counts for word in own)
    return [{word: n * log(len(documents) / holding[word]) for word, n in own.items()} for own in counts]


# %% wrong: counts of words in place of documents
from collections import Counter
from math import log


def tf_idf(documents):
    counts = [Counter(text.lower().split()) for text in documents]
    total = sum(counts, Counter())
    return [{word: n * log(len(documents) / total[word]) for word, n in own.items()} for own in counts]


# %% wrong: letters as they are
from collections import Counter
from math import log


def tf_idf(documents):
    counts = [Counter(text.split()) for text in documents]
    holding = Counter(word for own in counts for word in own)
    return [{word: n * log(len(documents) / holding[word]) for word, n in own.items()} for own in counts]
