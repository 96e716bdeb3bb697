"""Visualization, hard: something is computed first, or several axes have to agree."""

from assay.workloads.programs.datascience.tables import array, mean

# %% task
SIGNATURE = "def plot_correlations(names, X)"
TEXT = """names is a list of d texts, X a numpy array (n, d). Show the matrix of the Pearson correlations of the
columns as an image whose colours reach from -1 to 1; ticks on both axes say the names; in every cell stands its
correlation with two digits behind the point. Return the matplotlib figure."""


def cases(rng):
    X = [[rng.gauss(0, 1) for _ in range(3)] for _ in range(20)]
    yield ["a", "b", "a + c"], array([[row[0], row[1], row[0] + row[2]] for row in X])


def answer(names, X):
    columns = list(zip(*X["__array__"], strict=True))
    off = [[x - mean(c) for x in c] for c in columns]
    size = [sum(x * x for x in c) ** 0.5 for c in off]
    d = range(len(names))
    matrix = [[sum(x * y for x, y in zip(off[i], off[j])) / (size[i] * size[j]) for j in d] for i in d]
    texts = [f"{value:.2f}" for row in matrix for value in row]
    return {"images": [matrix], "limits": [[-1, 1]], "xticks": names, "yticks": names, "texts": texts}


# %% solution
import matplotlib.pyplot as plt
import numpy as np


def plot_correlations(names, X):
    matrix = np.corrcoef(X.T)
    fig, ax = plt.subplots()
    fig.colorbar(ax.imshow(matrix, vmin=-1, vmax=1, cmap="coolwarm"))
    ax.set_xticks(range(len(names)), names)
    ax.set_yticks(range(len(names)), names)
    for (i, j), value in np.ndenumerate(matrix):
        ax.text(j, i, f"{value:.2f}", ha="center", va="center")
    return fig


# %% wrong: the covariances
import matplotlib.pyplot as plt
import numpy as np


def plot_correlations(names, X):
    matrix = np.cov(X.T)
    fig, ax = plt.subplots()
    fig.colorbar(ax.imshow(matrix, vmin=-1, vmax=1, cmap="coolwarm"))
    ax.set_xticks(range(len(names)), names)
    ax.set_yticks(range(len(names)), names)
    for (i, j), value in np.ndenumerate(matrix):
        ax.text(j, i, f"{value:.2f}", ha="center", va="center")
    return fig


# %% wrong: colours from the smallest to the largest
import matplotlib.pyplot as plt
import numpy as np


def plot_correlations(names, X):
    matrix = np.corrcoef(X.T)
    fig, ax = plt.subplots()
    ax.imshow(matrix)
    ax.set_xticks(range(len(names)), names)
    ax.set_yticks(range(len(names)), names)
    for (i, j), value in np.ndenumerate(matrix):
        ax.text(j, i, f"{value:.2f}", ha="center", va="center")
    return fig


# %% task
SIGNATURE = "def plot_roc(labels, scores)"
TEXT = """labels is a list of 0 and 1, scores a list of different numbers. Draw the ROC curve as one line, first,
through the points (share of the 0 found, share of the 1 found) for the thresholds from above the largest score down
to the smallest, beginning at (0, 0); then the diagonal from (0, 0) to (1, 1) as a second line. The label of the
curve in the legend is "AUC = 0.87" with its area in two digits. Label the axes "False positive rate" and "True
positive rate". Return the matplotlib figure."""


def cases(rng):
    labels = [1, 0, *rng.choices((0, 1), k=18)]
    yield labels, [label + rng.gauss(0, 1) for label in labels]


def answer(labels, scores):
    ones = sum(labels)
    zeros = len(labels) - ones
    x, y = [0.0], [0.0]
    for limit in sorted(scores, reverse=True):
        found = [label for label, score in zip(labels, scores, strict=True) if score >= limit]
        x.append(found.count(0) / zeros)
        y.append(found.count(1) / ones)
    area = sum((b - a) * (c + d) / 2 for a, b, c, d in zip(x, x[1:], y, y[1:]))
    lines = [{"x": x, "y": y, "label": f"AUC = {area:.2f}"}, {"x": [0, 1], "y": [0, 1]}]
    return {
        "lines": lines,
        "xlabel": "False positive rate",
        "ylabel": "True positive rate",
        "legend": {f"AUC = {area:.2f}"},
    }


# %% solution
import matplotlib.pyplot as plt
import numpy as np


def plot_roc(labels, scores):
    found = np.array(labels)[np.argsort(scores)[::-1]]
    tpr = np.concatenate([[0], np.cumsum(found) / found.sum()])
    fpr = np.concatenate([[0], np.cumsum(1 - found) / (1 - found).sum()])
    area = (np.diff(fpr) * (tpr[1:] + tpr[:-1]) / 2).sum()
    fig, ax = plt.subplots()
    ax.plot(fpr, tpr, label=f"AUC = {area:.2f}")
    ax.plot([0, 1], [0, 1], "--")
    ax.set_xlabel("False positive rate")
    ax.set_ylabel("True positive rate")
    ax.legend()
    return fig


# %% wrong: thresholds from below
import matplotlib.pyplot as plt
import numpy as np


def plot_roc(labels, scores):
    found = np.array(labels)[np.argsort(scores)]
    tpr = np.concatenate([[0], np.cumsum(found) / found.sum()])
    fpr = np.concatenate([[0], np.cumsum(1 - found) / (1 - found).sum()])
    area = (np.diff(fpr) * (tpr[1:] + tpr[:-1]) / 2).sum()
    fig, ax = plt.subplots()
    ax.plot(fpr, tpr, label=f"AUC = {area:.2f}")
    ax.plot([0, 1], [0, 1], "--")
    ax.set(xlabel="False positive rate", ylabel="True positive rate")
    ax.legend()
    return fig


# %% wrong: precision against recall
import matplotlib.pyplot as plt
import numpy as np


def plot_roc(labels, scores):
    found = np.array(labels)[np.argsort(scores)[::-1]]
    precision = np.cumsum(found) / np.arange(1, len(found) + 1)
    recall = np.cumsum(found) / found.sum()
    area = (np.diff(recall) * (precision[1:] + precision[:-1]) / 2).sum()
    fig, ax = plt.subplots()
    ax.plot(recall, precision, label=f"AUC = {area:.2f}")
    ax.plot([0, 1], [0, 1], "--")
    ax.set(xlabel="False positive rate", ylabel="True positive rate")
    ax.legend()
    return fig


# %% task
SIGNATURE = "def plot_regression(x, y)"
TEXT = """x and y are lists of numbers. Draw them as points, and the least squares line as a line with two ends: at
the smallest and the largest x. The title is "y = 1.50 x + 0.25" with the slope and the intercept in two digits each
(an intercept below 0 as "- 0.25"). Return the matplotlib figure."""


def cases(rng):
    for shift in (3, -8):
        x = [rng.uniform(0, 10) for _ in range(20)]
        yield x, [1.5 * value + shift + rng.gauss(0, 1) for value in x]


def answer(x, y):
    slope = sum((a - mean(x)) * (b - mean(y)) for a, b in zip(x, y)) / sum((a - mean(x)) ** 2 for a in x)
    start = mean(y) - slope * mean(x)
    ends = [min(x), max(x)]
    title = f"y = {slope:.2f} x {'-' if start < 0 else '+'} {abs(start):.2f}"
    line = {"x": ends, "y": [start + slope * end for end in ends]}
    return {"points": [{"x": x, "y": y}], "lines": [line], "title": title}


# %% solution
import matplotlib.pyplot as plt
import numpy as np


def plot_regression(x, y):
    slope, intercept = np.polyfit(x, y, 1)
    ends = np.array([min(x), max(x)])
    fig, ax = plt.subplots()
    ax.scatter(x, y)
    ax.plot(ends, slope * ends + intercept)
    ax.set_title(f"y = {slope:.2f} x {'-' if intercept < 0 else '+'} {abs(intercept):.2f}")
    return fig


# %% wrong: the sign of the intercept stands in the number
import matplotlib.pyplot as plt
import numpy as np


def plot_regression(x, y):
    slope, intercept = np.polyfit(x, y, 1)
    ends = np.array([min(x), max(x)])
    fig, ax = plt.subplots()
    ax.scatter(x, y)
    ax.plot(ends, slope * ends + intercept)
    ax.set_title(f"y = {slope:.2f} x + {intercept:.2f}")
    return fig


# %% wrong: x from y
import matplotlib.pyplot as plt
import numpy as np


def plot_regression(x, y):
    slope, intercept = np.polyfit(y, x, 1)
    slope, intercept = 1 / slope, -intercept / slope
    ends = np.array([min(x), max(x)])
    fig, ax = plt.subplots()
    ax.scatter(x, y)
    ax.plot(ends, slope * ends + intercept)
    ax.set_title(f"y = {slope:.2f} x {'-' if intercept < 0 else '+'} {abs(intercept):.2f}")
    return fig


# %% task
SIGNATURE = "def plot_distribution(values)"
TEXT = """values is a list of different numbers above 0. Draw their empirical distribution function as one line of
steps that go up at each value (drawstyle "steps-post"), through the sorted values and the shares 1/n, 2/n, ... up
to 1, with a logarithmic x axis. Label the axes "Value" and "Share". Return the matplotlib figure."""


def cases(rng):
    yield ([rng.lognormvariate(2, 1) for _ in range(25)],)


def answer(values):
    line = {
        "x": sorted(values),
        "y": [(at + 1) / len(values) for at in range(len(values))],
        "drawstyle": "steps-post",
    }
    return {"lines": [line], "xscale": "log", "yscale": "linear", "xlabel": "Value", "ylabel": "Share"}


# %% solution
import matplotlib.pyplot as plt
import numpy as np


def plot_distribution(values):
    fig, ax = plt.subplots()
    ax.step(np.sort(values), np.arange(1, len(values) + 1) / len(values), where="post")
    ax.set_xscale("log")
    ax.set_xlabel("Value")
    ax.set_ylabel("Share")
    return fig


# %% wrong: shares from 0 on
import matplotlib.pyplot as plt
import numpy as np


def plot_distribution(values):
    fig, ax = plt.subplots()
    ax.step(np.sort(values), np.arange(len(values)) / len(values), where="post")
    ax.set_xscale("log")
    ax.set(xlabel="Value", ylabel="Share")
    return fig


# %% wrong: steps before the values
import matplotlib.pyplot as plt
import numpy as np


def plot_distribution(values):
    fig, ax = plt.subplots()
    ax.step(np.sort(values), np.arange(1, len(values) + 1) / len(values))
    ax.set_xscale("log")
    ax.set(xlabel="Value", ylabel="Share")
    return fig


# %% task
SIGNATURE = "def plot_climate(months, rain, temperature)"
TEXT = """months is a list of texts, rain and temperature are lists of numbers. Draw rain as bars on the left y
axis, labelled "Rain (mm)", and temperature as a line on a second y axis on the right that shares the x axis,
labelled "Temperature (C)". Return the matplotlib figure."""


def cases(rng):
    months = ["Jan", "Feb", "Mar", "Apr", "May", "Jun"]
    yield months, [rng.randint(20, 120) for _ in months], [rng.randint(-5, 25) for _ in months]


def answer(months, rain, temperature):
    return [
        {"bars": [{"length": rain}], "xticks": months, "ylabel": "Rain (mm)", "yside": "left", "row": 0, "column": 0},
        {"lines": [{"y": temperature}], "ylabel": "Temperature (C)", "yside": "right", "row": 0, "column": 0},
    ]


# %% solution
import matplotlib.pyplot as plt


def plot_climate(months, rain, temperature):
    fig, left = plt.subplots()
    left.bar(months, rain, color="tab:blue")
    left.set_ylabel("Rain (mm)")
    right = left.twinx()
    right.plot(months, temperature, color="tab:red")
    right.set_ylabel("Temperature (C)")
    return fig


# %% wrong: on one axis
import matplotlib.pyplot as plt


def plot_climate(months, rain, temperature):
    fig, ax = plt.subplots()
    ax.bar(months, rain, color="tab:blue")
    ax.plot(months, temperature, color="tab:red")
    ax.set_ylabel("Rain (mm)")
    return fig


# %% wrong: labels exchanged
import matplotlib.pyplot as plt


def plot_climate(months, rain, temperature):
    fig, left = plt.subplots()
    left.bar(months, rain, color="tab:blue")
    left.set_ylabel("Temperature (C)")
    right = left.twinx()
    right.plot(months, temperature, color="tab:red")
    right.set_ylabel("Rain (mm)")
    return fig


# %% task
SIGNATURE = "def plot_smoothed(values)"
TEXT = """values is a list of at least 7 numbers. Draw them against their positions from 0 on as one line labelled
"raw", and the mean of each 7 consecutive numbers, against the position of the middle one, as a second line labelled
"7-point mean"; with a legend. The title says where the second line is highest: "peak at 12" (the position; of
several the first). Return the matplotlib figure."""


def cases(rng):
    values = [rng.randint(0, 9) + (12 if 12 <= at <= 20 else 0) for at in range(40)]
    yield ([*values[:35], 99, *values[36:]],)  # a peak of one number, and one of the mean
    yield (values,)


def answer(values):
    n = len(values)
    means = [mean(values[at - 3 : at + 4]) for at in range(3, n - 3)]
    lines = [
        {"x": list(range(n)), "y": values, "label": "raw"},
        {"x": list(range(3, n - 3)), "y": means, "label": "7-point mean"},
    ]
    return {"lines": lines, "legend": {"raw", "7-point mean"}, "title": f"peak at {means.index(max(means)) + 3}"}


# %% solution
import matplotlib.pyplot as plt
import numpy as np


def plot_smoothed(values):
    sums = np.convolve(values, np.ones(7, dtype=int), mode="valid")
    at = np.arange(len(sums)) + 3
    fig, ax = plt.subplots()
    ax.plot(range(len(values)), values, label="raw")
    ax.plot(at, sums / 7, label="7-point mean")
    ax.legend()
    ax.set_title(f"peak at {at[sums.argmax()]}")
    return fig


# %% wrong: the mean stands at the last position
import matplotlib.pyplot as plt
import numpy as np


def plot_smoothed(values):
    sums = np.convolve(values, np.ones(7, dtype=int), mode="valid")
    at = np.arange(len(sums)) + 6
    fig, ax = plt.subplots()
    ax.plot(range(len(values)), values, label="raw")
    ax.plot(at, sums / 7, label="7-point mean")
    ax.legend()
    ax.set_title(f"peak at {at[sums.argmax()]}")
    return fig


# %% wrong: the peak of the raw numbers
import matplotlib.pyplot as plt
import numpy as np


def plot_smoothed(values):
    sums = np.convolve(values, np.ones(7, dtype=int), mode="valid")
    fig, ax = plt.subplots()
    ax.plot(range(len(values)), values, label="raw")
    ax.plot(np.arange(len(sums)) + 3, sums / 7, label="7-point mean")
    ax.legend()
    ax.set_title(f"peak at {np.argmax(values)}")
    return fig


# %% task
SIGNATURE = "def plot_confusion(labels, actual, predicted)"
TEXT = """labels is a list of all labels, actual and predicted are lists of labels. Show the confusion matrix as an
image: a row for each actual label and a column for each predicted one, in the order of labels, each row divided by
its sum (a row without counts is 0); the colours reach from 0 to 1. Ticks say the labels, the axes are labelled
"Predicted" (x) and "Actual" (y). Return the matplotlib figure."""


def cases(rng):
    actual = rng.choices(["no", "maybe", "yes"], k=30)
    yield ["no", "maybe", "yes", "never"], actual, [a if rng.random() < 0.7 else "maybe" for a in actual]


def answer(labels, actual, predicted):
    pairs = list(zip(actual, predicted, strict=True))
    matrix = [[pairs.count((a, b)) / max(actual.count(a), 1) for b in labels] for a in labels]
    return {
        "images": [matrix],
        "limits": [[0, 1]],
        "xticks": labels,
        "yticks": labels,
        "xlabel": "Predicted",
        "ylabel": "Actual",
    }


# %% solution
import matplotlib.pyplot as plt
import numpy as np


def plot_confusion(labels, actual, predicted):
    counts = np.zeros((len(labels), len(labels)))
    for a, b in zip(actual, predicted):
        counts[labels.index(a), labels.index(b)] += 1
    fig, ax = plt.subplots()
    ax.imshow(counts / np.maximum(counts.sum(axis=1, keepdims=True), 1), vmin=0, vmax=1)
    ax.set_xticks(range(len(labels)), labels)
    ax.set_yticks(range(len(labels)), labels)
    ax.set_xlabel("Predicted")
    ax.set_ylabel("Actual")
    return fig


# %% wrong: columns divided by their sums
import matplotlib.pyplot as plt
import numpy as np


def plot_confusion(labels, actual, predicted):
    counts = np.zeros((len(labels), len(labels)))
    for a, b in zip(actual, predicted):
        counts[labels.index(a), labels.index(b)] += 1
    fig, ax = plt.subplots()
    ax.imshow(counts / np.maximum(counts.sum(axis=0), 1), vmin=0, vmax=1)
    ax.set_xticks(range(len(labels)), labels)
    ax.set_yticks(range(len(labels)), labels)
    ax.set(xlabel="Predicted", ylabel="Actual")
    return fig


# %% wrong: a row for each predicted label
import matplotlib.pyplot as plt
import numpy as np


def plot_confusion(labels, actual, predicted):
    counts = np.zeros((len(labels), len(labels)))
    for a, b in zip(actual, predicted):
        counts[labels.index(b), labels.index(a)] += 1
    fig, ax = plt.subplots()
    ax.imshow(counts / np.maximum(counts.sum(axis=1, keepdims=True), 1), vmin=0, vmax=1)
    ax.set_xticks(range(len(labels)), labels)
    ax.set_yticks(range(len(labels)), labels)
    ax.set(xlabel="Predicted", ylabel="Actual")
    return fig
