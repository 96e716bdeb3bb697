"""Visualization, medium: scales, groups, several marks."""

from assay.workloads.programs.datascience.tables import bundled, mean, rows

# %% task
SIGNATURE = "def plot_power_law(sizes, costs)"
TEXT = """Draw costs against sizes (lists of numbers above 0) as a line with logarithmic scales on both axes. Label
the axes "Size" and "Cost". Return the matplotlib figure."""


def cases(rng):
    sizes = [2**at for at in range(3, 14)]
    yield sizes, [size**1.5 * rng.uniform(0.8, 1.2) for size in sizes]


def answer(sizes, costs):
    lines = [{"x": sizes, "y": costs}]
    return {"lines": lines, "xscale": "log", "yscale": "log", "xlabel": "Size", "ylabel": "Cost"}


# %% solution
import matplotlib.pyplot as plt


def plot_power_law(sizes, costs):
    fig, ax = plt.subplots()
    ax.loglog(sizes, costs)
    ax.set_xlabel("Size")
    ax.set_ylabel("Cost")
    return fig


# %% wrong: one axis is logarithmic
import matplotlib.pyplot as plt


def plot_power_law(sizes, costs):
    fig, ax = plt.subplots()
    ax.semilogx(sizes, costs)
    ax.set(xlabel="Size", ylabel="Cost")
    return fig


# %% wrong: logarithms on even scales
import matplotlib.pyplot as plt
import numpy as np


def plot_power_law(sizes, costs):
    fig, ax = plt.subplots()
    ax.plot(np.log10(sizes), np.log10(costs))
    ax.set(xlabel="Size", ylabel="Cost")
    return fig


# %% task
SIGNATURE = "def plot_stacked(quarters, goods, services)"
TEXT = """quarters is a list of texts, goods and services are lists of numbers. Draw one stacked bar for each
quarter: goods from 0, services on top of them, with a legend that says "goods" and "services". Label the y axis
"Revenue". Return the matplotlib figure."""


def cases(rng):
    yield ["Q1", "Q2", "Q3", "Q4"], *([rng.randint(10, 60) for _ in range(4)] for _ in range(2))


def answer(quarters, goods, services):
    low = {"length": goods, "from": [0] * len(goods), "label": "goods"}
    high = {"length": services, "from": goods, "label": "services"}
    return {"bars": [low, high], "xticks": quarters, "legend": {"goods", "services"}, "ylabel": "Revenue"}


# %% solution
import matplotlib.pyplot as plt


def plot_stacked(quarters, goods, services):
    fig, ax = plt.subplots()
    ax.bar(quarters, goods, label="goods")
    ax.bar(quarters, services, bottom=goods, label="services")
    ax.set_ylabel("Revenue")
    ax.legend()
    return fig


# %% wrong: in front of each other
import matplotlib.pyplot as plt


def plot_stacked(quarters, goods, services):
    fig, ax = plt.subplots()
    ax.bar(quarters, goods, label="goods")
    ax.bar(quarters, services, label="services")
    ax.set_ylabel("Revenue")
    ax.legend()
    return fig


# %% task
SIGNATURE = "def plot_grouped(names, before, after)"
TEXT = """names is a list of texts, before and after are lists of numbers. Draw two bars side by side for each name,
of width 0.4: before with its middle 0.2 left of the whole number of the name (0, 1, ...), after 0.2 right of it.
The ticks are at the whole numbers and say the names; a legend says "before" and "after". Return the matplotlib
figure."""


def cases(rng):
    yield ["ann", "bob", "cid"], *([rng.randint(10, 60) for _ in range(3)] for _ in range(2))


def answer(names, before, after):
    bars = [
        {"at": [at + off for at in range(len(names))], "length": values, "width": [0.4] * len(names), "label": label}
        for off, values, label in ((-0.2, before, "before"), (0.2, after, "after"))
    ]
    return {"bars": bars, "xticks": names, "xtickat": list(range(len(names))), "legend": {"before", "after"}}


# %% solution
import matplotlib.pyplot as plt
import numpy as np


def plot_grouped(names, before, after):
    at = np.arange(len(names))
    fig, ax = plt.subplots()
    ax.bar(at - 0.2, before, 0.4, label="before")
    ax.bar(at + 0.2, after, 0.4, label="after")
    ax.set_xticks(at, names)
    ax.legend()
    return fig


# %% wrong: the edges there in place of the middles
import matplotlib.pyplot as plt
import numpy as np


def plot_grouped(names, before, after):
    at = np.arange(len(names))
    fig, ax = plt.subplots()
    ax.bar(at - 0.2, before, 0.4, align="edge", label="before")
    ax.bar(at + 0.2, after, 0.4, align="edge", label="after")
    ax.set_xticks(at, names)
    ax.legend()
    return fig


# %% wrong: ticks say numbers
import matplotlib.pyplot as plt
import numpy as np


def plot_grouped(names, before, after):
    at = np.arange(len(names))
    fig, ax = plt.subplots()
    ax.bar(at - 0.2, before, 0.4, label="before")
    ax.bar(at + 0.2, after, 0.4, label="after")
    ax.legend()
    return fig


# %% task
SIGNATURE = "def plot_species(rows)"
TEXT = """Iris flowers: rows is a list of dicts with keys sepal_length, sepal_width, petal_length, petal_width,
species. Draw sepal_width (y) against sepal_length (x) as a scatter plot with one colour for each species, drawn in
the order of the alphabet, and a legend with their names. Return the matplotlib figure."""


def cases(rng):
    yield (rows(bundled("iris", rng, 0.5)),)


def answer(rows):
    kinds = sorted({row["species"] for row in rows})
    own = [[row for row in rows if row["species"] == kind] for kind in kinds]
    points = [
        {"x": [row["sepal_length"] for row in each], "y": [row["sepal_width"] for row in each], "label": kind}
        for kind, each in zip(kinds, own, strict=True)
    ]
    return {"points": points, "legend": kinds}


# %% solution
import matplotlib.pyplot as plt


def plot_species(rows):
    fig, ax = plt.subplots()
    for kind in sorted({row["species"] for row in rows}):
        own = [row for row in rows if row["species"] == kind]
        ax.scatter([row["sepal_length"] for row in own], [row["sepal_width"] for row in own], label=kind)
    ax.legend()
    return fig


# %% wrong: all in one colour
import matplotlib.pyplot as plt


def plot_species(rows):
    fig, ax = plt.subplots()
    ax.scatter([row["sepal_length"] for row in rows], [row["sepal_width"] for row in rows], label="iris")
    ax.legend()
    return fig


# %% wrong: axes exchanged
import matplotlib.pyplot as plt


def plot_species(rows):
    fig, ax = plt.subplots()
    for kind in sorted({row["species"] for row in rows}):
        own = [row for row in rows if row["species"] == kind]
        ax.scatter([row["sepal_width"] for row in own], [row["sepal_length"] for row in own], label=kind)
    ax.legend()
    return fig


# %% task
SIGNATURE = "def plot_two_groups(first, second)"
TEXT = """first and second are lists of numbers. Draw both as histograms in one pair of axes, each normalised so
that its bars have a total area of 1, both with the same 8 bins of equal width from the smallest to the largest
number of both. A legend says "first" and "second". Return the matplotlib figure."""


def cases(rng):
    yield [rng.gauss(0, 1) for _ in range(60)], [rng.gauss(1, 2) for _ in range(25)]


def answer(first, second):
    low, high = min(first + second), max(first + second)
    width = (high - low) / 8
    bars = []
    for values, label in ((first, "first"), (second, "second")):
        counts = [0] * 8
        for value in values:
            counts[min(int((value - low) / width), 7)] += 1
        length = [count / len(values) / width for count in counts]
        bars.append({"at": [low + (at + 0.5) * width for at in range(8)], "length": length, "label": label})
    return {"bars": bars, "legend": {"first", "second"}}


# %% solution
import matplotlib.pyplot as plt
import numpy as np


def plot_two_groups(first, second):
    edges = np.histogram_bin_edges(first + second, bins=8)
    fig, ax = plt.subplots()
    ax.hist(first, edges, density=True, alpha=0.5, label="first")
    ax.hist(second, edges, density=True, alpha=0.5, label="second")
    ax.legend()
    return fig


# %% wrong: each with its own bins
import matplotlib.pyplot as plt


def plot_two_groups(first, second):
    fig, ax = plt.subplots()
    ax.hist(first, 8, density=True, alpha=0.5, label="first")
    ax.hist(second, 8, density=True, alpha=0.5, label="second")
    ax.legend()
    return fig


# %% wrong: counts
import matplotlib.pyplot as plt
import numpy as np


def plot_two_groups(first, second):
    edges = np.histogram_bin_edges(first + second, bins=8)
    fig, ax = plt.subplots()
    ax.hist(first, edges, alpha=0.5, label="first")
    ax.hist(second, edges, alpha=0.5, label="second")
    ax.legend()
    return fig


# %% task
SIGNATURE = "def plot_band(x, runs)"
TEXT = """x is a list of n numbers, runs a list of lists of n numbers. Draw the mean over the runs against x as a
line, and a band from one standard deviation (with n - 1, over the runs) below it to one above. Label the y axis
"Loss". Return the matplotlib figure."""


def cases(rng):
    yield list(range(10)), [[5 / (at + 1) + rng.gauss(0, 0.3) for at in range(10)] for _ in range(5)]


def answer(x, runs):
    columns = list(zip(*runs, strict=True))
    middle = [mean(c) for c in columns]
    spread = [(sum((v - m) ** 2 for v in c) / (len(c) - 1)) ** 0.5 for c, m in zip(columns, middle)]
    ends = [m - s for m, s in zip(middle, spread)], [m + s for m, s in zip(middle, spread)]
    return {"lines": [{"x": x, "y": middle}], "bands": [{"x": x, "low": ends[0], "high": ends[1]}], "ylabel": "Loss"}


# %% solution
import matplotlib.pyplot as plt
import numpy as np


def plot_band(x, runs):
    runs = np.array(runs)
    middle, spread = runs.mean(axis=0), runs.std(axis=0, ddof=1)
    fig, ax = plt.subplots()
    ax.plot(x, middle)
    ax.fill_between(x, middle - spread, middle + spread, alpha=0.3)
    ax.set_ylabel("Loss")
    return fig


# %% wrong: the standard deviation with n
import matplotlib.pyplot as plt
import numpy as np


def plot_band(x, runs):
    runs = np.array(runs)
    middle, spread = runs.mean(axis=0), runs.std(axis=0)
    fig, ax = plt.subplots()
    ax.plot(x, middle)
    ax.fill_between(x, middle - spread, middle + spread, alpha=0.3)
    ax.set_ylabel("Loss")
    return fig


# %% wrong: from the smallest to the largest
import matplotlib.pyplot as plt
import numpy as np


def plot_band(x, runs):
    runs = np.array(runs)
    fig, ax = plt.subplots()
    ax.plot(x, runs.mean(axis=0))
    ax.fill_between(x, runs.min(axis=0), runs.max(axis=0), alpha=0.3)
    ax.set_ylabel("Loss")
    return fig


# %% task
SIGNATURE = "def plot_side_by_side(x, speed, height)"
TEXT = """x, speed and height are lists of numbers. Draw two plots side by side in one figure: on the left speed
against x as a line with the title "Speed", on the right height against x as points with the title "Height". Return
the matplotlib figure."""


def cases(rng):
    yield list(range(12)), *([rng.randint(0, 50) for _ in range(12)] for _ in range(2))


def answer(x, speed, height):
    return [
        {"lines": [{"x": x, "y": speed}], "title": "Speed", "row": 0, "column": 0},
        {"points": [{"x": x, "y": height}], "title": "Height", "row": 0, "column": 1},
    ]


# %% solution
import matplotlib.pyplot as plt


def plot_side_by_side(x, speed, height):
    fig, (left, right) = plt.subplots(1, 2)
    left.plot(x, speed)
    left.set_title("Speed")
    right.scatter(x, height)
    right.set_title("Height")
    return fig


# %% wrong: in one plot
import matplotlib.pyplot as plt


def plot_side_by_side(x, speed, height):
    fig, ax = plt.subplots()
    ax.plot(x, speed)
    ax.scatter(x, height)
    ax.set_title("Speed")
    return fig


# %% wrong: left and right exchanged
import matplotlib.pyplot as plt


def plot_side_by_side(x, speed, height):
    fig, (left, right) = plt.subplots(1, 2)
    right.plot(x, speed)
    right.set_title("Speed")
    left.scatter(x, height)
    left.set_title("Height")
    return fig
