"""Visualization, easy: one kind of mark, with its labels."""

from assay.workloads.programs.datascience.tables import bundled, rows

# %% task
SIGNATURE = "def plot_years(years, sales)"
TEXT = """Draw sales (a list of numbers) against years (a list of whole numbers) as a line. Label the x axis "Year"
and the y axis "Sales", and set the title "Sales by year". Return the matplotlib figure."""


def cases(rng):
    yield list(range(2015, 2024)), [rng.randint(10, 90) for _ in range(9)]


def answer(years, sales):
    return {"lines": [{"x": years, "y": sales}], "xlabel": "Year", "ylabel": "Sales", "title": "Sales by year"}


# %% solution
import matplotlib.pyplot as plt


def plot_years(years, sales):
    fig, ax = plt.subplots()
    ax.plot(years, sales)
    ax.set_xlabel("Year")
    ax.set_ylabel("Sales")
    ax.set_title("Sales by year")
    return fig


# %% wrong: axes exchanged
import matplotlib.pyplot as plt


def plot_years(years, sales):
    fig, ax = plt.subplots()
    ax.plot(sales, years)
    ax.set(xlabel="Year", ylabel="Sales", title="Sales by year")
    return fig


# %% wrong: no labels
import matplotlib.pyplot as plt


def plot_years(years, sales):
    fig, ax = plt.subplots()
    ax.plot(years, sales)
    ax.set_title("Sales by year")
    return fig


# %% task
SIGNATURE = "def plot_counts(values)"
TEXT = """values is a list of texts. Draw one vertical bar for each different text, in the order of the alphabet, as
high as the text is frequent. Label the y axis "Count". Return the matplotlib figure."""


def cases(rng):
    for weights in ((1, 4, 2, 2), (4, 1, 2, 3)):
        yield (rng.choices(["pear", "apple", "fig", "kiwi"], weights, k=40),)


def answer(values):
    kinds = sorted(set(values))
    return {"bars": [{"length": [values.count(kind) for kind in kinds]}], "xticks": kinds, "ylabel": "Count"}


# %% solution
from collections import Counter

import matplotlib.pyplot as plt


def plot_counts(values):
    counts = Counter(values)
    kinds = sorted(counts)
    fig, ax = plt.subplots()
    ax.bar(kinds, [counts[kind] for kind in kinds])
    ax.set_ylabel("Count")
    return fig


# %% wrong: in the order of frequency
from collections import Counter

import matplotlib.pyplot as plt


def plot_counts(values):
    counts = Counter(values).most_common()
    fig, ax = plt.subplots()
    ax.bar([kind for kind, _ in counts], [count for _, count in counts])
    ax.set_ylabel("Count")
    return fig


# %% task
SIGNATURE = "def plot_petals(rows)"
TEXT = """Iris flowers: rows is a list of dicts with keys sepal_length, sepal_width, petal_length, petal_width,
species. Draw petal_width (y) against petal_length (x) as a scatter plot. Label the axes "petal length (cm)" and
"petal width (cm)". Return the matplotlib figure."""


def cases(rng):
    yield (rows(bundled("iris", rng, 0.4)),)


def answer(rows):
    x, y = ([row[name] for row in rows] for name in ("petal_length", "petal_width"))
    return {"points": [{"x": x, "y": y}], "xlabel": "petal length (cm)", "ylabel": "petal width (cm)"}


# %% solution
import matplotlib.pyplot as plt


def plot_petals(rows):
    fig, ax = plt.subplots()
    ax.scatter([row["petal_length"] for row in rows], [row["petal_width"] for row in rows])
    ax.set_xlabel("petal length (cm)")
    ax.set_ylabel("petal width (cm)")
    return fig


# %% wrong: sepals
import matplotlib.pyplot as plt


def plot_petals(rows):
    fig, ax = plt.subplots()
    ax.scatter([row["sepal_length"] for row in rows], [row["sepal_width"] for row in rows])
    ax.set(xlabel="petal length (cm)", ylabel="petal width (cm)")
    return fig


# %% wrong: a line through the points
import matplotlib.pyplot as plt


def plot_petals(rows):
    fig, ax = plt.subplots()
    ax.plot([row["petal_length"] for row in rows], [row["petal_width"] for row in rows])
    ax.set(xlabel="petal length (cm)", ylabel="petal width (cm)")
    return fig


# %% task
SIGNATURE = "def plot_alcohol(rows)"
TEXT = """Wines: rows is a list of dicts; among its keys is alcohol. Draw a histogram of alcohol with 12 bins of
equal width between its smallest and its largest value. Label the x axis "Alcohol" and the y axis "Wines". Return
the matplotlib figure."""


def cases(rng):
    yield (rows(bundled("wine")),)


def answer(rows):
    values = [row["alcohol"] for row in rows]
    low, high = min(values), max(values)
    width = (high - low) / 12
    counts = [0] * 12
    for value in values:
        counts[min(int((value - low) / width), 11)] += 1
    bars = {"length": counts, "at": [low + (at + 0.5) * width for at in range(12)], "width": [width] * 12}
    return {"bars": [bars], "xlabel": "Alcohol", "ylabel": "Wines"}


# %% solution
import matplotlib.pyplot as plt


def plot_alcohol(rows):
    fig, ax = plt.subplots()
    ax.hist([row["alcohol"] for row in rows], bins=12)
    ax.set_xlabel("Alcohol")
    ax.set_ylabel("Wines")
    return fig


# %% wrong: ten bins, as by default
import matplotlib.pyplot as plt


def plot_alcohol(rows):
    fig, ax = plt.subplots()
    ax.hist([row["alcohol"] for row in rows])
    ax.set(xlabel="Alcohol", ylabel="Wines")
    return fig


# %% wrong: shares in place of counts
import matplotlib.pyplot as plt


def plot_alcohol(rows):
    fig, ax = plt.subplots()
    ax.hist([row["alcohol"] for row in rows], bins=12, density=True)
    ax.set(xlabel="Alcohol", ylabel="Wines")
    return fig


# %% task
SIGNATURE = "def plot_shares(amounts)"
TEXT = """amounts is a dict of names and amounts. Draw a pie chart with one labelled wedge for each name, in the
order of the dict, and set the title "Shares". Return the matplotlib figure."""


def cases(rng):
    yield ({name: rng.randint(5, 60) for name in ("rent", "food", "books", "other")},)


def answer(amounts):
    total = sum(amounts.values())
    return {"wedges": [{"share": value / total, "label": name} for name, value in amounts.items()], "title": "Shares"}


# %% solution
import matplotlib.pyplot as plt


def plot_shares(amounts):
    fig, ax = plt.subplots()
    ax.pie(list(amounts.values()), labels=list(amounts))
    ax.set_title("Shares")
    return fig


# %% wrong: largest first, the labels as before
import matplotlib.pyplot as plt


def plot_shares(amounts):
    fig, ax = plt.subplots()
    ax.pie(sorted(amounts.values(), reverse=True), labels=sorted(amounts))
    ax.set_title("Shares")
    return fig


# %% task
SIGNATURE = "def plot_ranking(scores)"
TEXT = """scores is a dict of names and numbers. Draw horizontal bars, one for each name, sorted so that the largest
number is at the top (at the highest position). Label the x axis "Score". Return the matplotlib figure."""


def cases(rng):
    names = ("ann", "bob", "cid", "dee", "eve")
    yield (dict(zip(names, rng.sample(range(10, 99), 5), strict=True)),)


def answer(scores):
    ordered = sorted(scores, key=lambda name: scores[name])
    bars = {"length": [scores[name] for name in ordered], "horizontal": True}
    return {"bars": [bars], "yticks": ordered, "xlabel": "Score"}


# %% solution
import matplotlib.pyplot as plt


def plot_ranking(scores):
    names = sorted(scores, key=scores.get)
    fig, ax = plt.subplots()
    ax.barh(names, [scores[name] for name in names])
    ax.set_xlabel("Score")
    return fig


# %% wrong: the largest at the bottom
import matplotlib.pyplot as plt


def plot_ranking(scores):
    names = sorted(scores, key=scores.get, reverse=True)
    fig, ax = plt.subplots()
    ax.barh(names, [scores[name] for name in names])
    ax.set_xlabel("Score")
    return fig


# %% wrong: upright bars
import matplotlib.pyplot as plt


def plot_ranking(scores):
    names = sorted(scores, key=scores.get)
    fig, ax = plt.subplots()
    ax.bar(names, [scores[name] for name in names])
    ax.set_xlabel("Score")
    return fig


# %% task
SIGNATURE = "def plot_two_stations(days, east, west)"
TEXT = """days, east and west are lists of numbers of equal length. Draw east and west against days as two lines in
one pair of axes, with a legend that says "east" and "west". Label the x axis "Day". Return the matplotlib figure."""


def cases(rng):
    yield list(range(14)), *([rng.randint(-5, 25) for _ in range(14)] for _ in range(2))


def answer(days, east, west):
    lines = [{"x": days, "y": east, "label": "east"}, {"x": days, "y": west, "label": "west"}]
    return {"lines": lines, "legend": {"east", "west"}, "xlabel": "Day"}


# %% solution
import matplotlib.pyplot as plt


def plot_two_stations(days, east, west):
    fig, ax = plt.subplots()
    ax.plot(days, east, label="east")
    ax.plot(days, west, label="west")
    ax.set_xlabel("Day")
    ax.legend()
    return fig


# %% wrong: the legend is not drawn
import matplotlib.pyplot as plt


def plot_two_stations(days, east, west):
    fig, ax = plt.subplots()
    ax.plot(days, east, label="east")
    ax.plot(days, west, label="west")
    ax.set_xlabel("Day")
    return fig


# %% wrong: names exchanged
import matplotlib.pyplot as plt


def plot_two_stations(days, east, west):
    fig, ax = plt.subplots()
    ax.plot(days, west)
    ax.plot(days, east)
    ax.set_xlabel("Day")
    ax.legend(["east", "west"])
    return fig
