"""Algorithm, easy: a few lines, with an edge or two."""

from assay.workloads.programs.datascience.tables import array, mean

# %% task
SIGNATURE = "def moving_average(values, window)"
TEXT = """Return the list of the means of every window consecutive numbers of the list values, from the first window
to the last; an empty list where values has fewer than window numbers."""


def cases(rng):
    values = [rng.randint(-50, 50) for _ in range(20)]
    yield values, 3
    yield values, 1
    yield values, 20
    yield values[:2], 3


def answer(values, window):
    return [mean(values[at : at + window]) for at in range(len(values) - window + 1)]


# %% solution
def moving_average(values, window):
    if len(values) < window:
        return []
    total = sum(values[:window])
    found = [total / window]
    for at in range(window, len(values)):
        total += values[at] - values[at - window]
        found.append(total / window)
    return found


# %% wrong: the last window is forgotten
def moving_average(values, window):
    return [sum(values[at : at + window]) / window for at in range(len(values) - window)]


# %% task
SIGNATURE = "def scale_columns(X)"
TEXT = """X is a numpy array of shape (rows, columns). Return an array of the same shape in which every column is
scaled linearly so that its smallest value becomes 0 and its largest 1; a column whose values are all equal becomes
0."""


def cases(rng):
    table = [[rng.randint(-9, 9), rng.random(), 4.0] for _ in range(8)]
    yield (array(table),)
    yield (array([[1.0, 2.0]]),)


def answer(X):
    columns = list(zip(*X["__array__"], strict=True))
    return [
        [(x - min(c)) / (max(c) - min(c)) if max(c) > min(c) else 0.0 for x, c in zip(row, columns)]
        for row in X["__array__"]
    ]


# %% solution
import numpy as np


def scale_columns(X):
    low, spread = X.min(axis=0), np.ptp(X, axis=0)
    return (X - low) / np.where(spread == 0, 1, spread)


# %% wrong: equal columns become NaN
import numpy as np


def scale_columns(X):
    with np.errstate(invalid="ignore"):
        return (X - X.min(axis=0)) / np.ptp(X, axis=0)


# %% wrong: over the whole array
import numpy as np


def scale_columns(X):
    return (X - X.min()) / max(np.ptp(X), 1e-12)


# %% task
SIGNATURE = "def confusion_matrix(actual, predicted, labels)"
TEXT = """actual and predicted are lists of labels of equal length, labels the list of all labels. Return a list of
lists: row i, column j holds how often labels[i] was actual and labels[j] predicted."""


def cases(rng):
    labels = ["cat", "dog", "elk"]
    for n in (30, 4):
        yield rng.choices(labels, k=n), rng.choices(labels[:2], k=n), ["elk", "cat", "dog"]


def answer(actual, predicted, labels):
    pairs = list(zip(actual, predicted, strict=True))
    return [[pairs.count((a, b)) for b in labels] for a in labels]


# %% solution
import numpy as np


def confusion_matrix(actual, predicted, labels):
    place = {label: at for at, label in enumerate(labels)}
    found = np.zeros((len(labels), len(labels)), dtype=int)
    for a, b in zip(actual, predicted):
        found[place[a], place[b]] += 1
    return found.tolist()


# %% wrong: transposed
def confusion_matrix(actual, predicted, labels):
    pairs = list(zip(predicted, actual))
    return [[pairs.count((a, b)) for b in labels] for a in labels]


# %% wrong: labels in the order of the alphabet
def confusion_matrix(actual, predicted, labels):
    pairs = list(zip(actual, predicted))
    return [[pairs.count((a, b)) for b in sorted(labels)] for a in sorted(labels)]


# %% task
SIGNATURE = "def one_hot(values)"
TEXT = """values is a list of texts. Return a pair: the sorted list of the different texts, and a list with, for
each value, the list of 0 and 1 that marks which of them it is."""


def cases(rng):
    yield (rng.choices(["red", "blue", "green"], k=9),)
    yield (["b", "a", "b"],)
    yield ([],)


def answer(values):
    kinds = sorted(set(values))
    return [kinds, [[int(value == kind) for kind in kinds] for value in values]]


# %% solution
import numpy as np


def one_hot(values):
    kinds = sorted(set(values))
    marks = np.eye(len(kinds), dtype=int)
    return kinds, [marks[kinds.index(value)].tolist() for value in values]


# %% wrong: in the order of appearance
def one_hot(values):
    kinds = list(dict.fromkeys(values))
    return kinds, [[int(value == kind) for kind in kinds] for value in values]


# %% task
SIGNATURE = "def precision_recall(actual, predicted)"
TEXT = """actual and predicted are lists of 0 and 1. Return a dict with keys precision, recall and f1; each is 0.0
where its denominator is 0."""


def cases(rng):
    for n in (30, 12):
        yield rng.choices((0, 1), k=n), rng.choices((0, 1), (0.7, 0.3), k=n)
    yield [1, 1, 0], [0, 0, 0]
    yield [0, 0], [1, 0]


def answer(actual, predicted):
    both = sum(map(int.__mul__, actual, predicted))
    said, there = sum(predicted), sum(actual)
    return {
        "precision": both / said if said else 0.0,
        "recall": both / there if there else 0.0,
        "f1": 2 * both / (said + there) if both else 0.0,
    }


# %% solution
def precision_recall(actual, predicted):
    both = sum(a and p for a, p in zip(actual, predicted))
    precision = both / sum(predicted) if any(predicted) else 0.0
    recall = both / sum(actual) if any(actual) else 0.0
    total = precision + recall
    return {"precision": precision, "recall": recall, "f1": 2 * precision * recall / total if total else 0.0}


# %% wrong: no care for denominators of 0
def precision_recall(actual, predicted):
    both = sum(a and p for a, p in zip(actual, predicted))
    precision, recall = both / sum(predicted), both / sum(actual)
    return {"precision": precision, "recall": recall, "f1": 2 * precision * recall / (precision + recall)}


# %% wrong: f1 as the plain mean
def precision_recall(actual, predicted):
    both = sum(a and p for a, p in zip(actual, predicted))
    precision = both / sum(predicted) if any(predicted) else 0.0
    recall = both / sum(actual) if any(actual) else 0.0
    return {"precision": precision, "recall": recall, "f1": (precision + recall) / 2}


# %% task
SIGNATURE = "def distances(A, B)"
TEXT = """A and B are numpy arrays of shapes (n, d) and (m, d). Return the array of shape (n, m) of the Euclidean
distances between the rows of A and the rows of B."""


def cases(rng):
    for n, m, d in ((4, 3, 2), (1, 5, 3)):
        yield tuple(array([[rng.uniform(-5, 5) for _ in range(d)] for _ in range(size)]) for size in (n, m))


def answer(A, B):
    return [[sum((x - y) ** 2 for x, y in zip(a, b)) ** 0.5 for b in B["__array__"]] for a in A["__array__"]]


# %% solution
import numpy as np


def distances(A, B):
    return np.linalg.norm(A[:, None] - B[None], axis=2)


# %% wrong: without the root
import numpy as np


def distances(A, B):
    return ((A[:, None] - B[None]) ** 2).sum(axis=2)


# %% wrong: along the streets
import numpy as np


def distances(A, B):
    return np.abs(A[:, None] - B[None]).sum(axis=2)


# %% task
SIGNATURE = "def run_lengths(values)"
TEXT = """Return a list of [value, length] for every run of equal consecutive values of the list values, in order."""


def cases(rng):
    yield (rng.choices("ab", k=20),)
    yield ([1, 1, 2, 1],)
    yield ([],)


def answer(values):
    found = []
    for value in values:
        if found and found[-1][0] == value:
            found[-1][1] += 1
        else:
            found.append([value, 1])
    return found


# %% solution
from itertools import groupby


def run_lengths(values):
    return [[value, len(list(run))] for value, run in groupby(values)]


# %% wrong: counts of values, not of runs
from collections import Counter


def run_lengths(values):
    return [[value, count] for value, count in Counter(values).items()]


# %% task
SIGNATURE = "def folds(n, k)"
TEXT = """Return a list of k lists that together hold the numbers 0 to n - 1 in order; each holds consecutive
numbers, and the first n % k lists hold one more than the others."""


def cases(rng):
    yield from ((10, 3), (9, 3), (11, 4), (3, 5))


def answer(n, k):
    found, start = [], 0
    for fold in range(k):
        size = n // k + (fold < n % k)
        found.append(list(range(start, start + size)))
        start += size
    return found


# %% solution
import numpy as np


def folds(n, k):
    return [part.tolist() for part in np.array_split(np.arange(n), k)]


# %% wrong: the rest goes to the last
def folds(n, k):
    size = n // k
    return [list(range(fold * size, (fold + 1) * size if fold < k - 1 else n)) for fold in range(k)]


# %% wrong: dealt out in turns
def folds(n, k):
    return [list(range(fold, n, k)) for fold in range(k)]
