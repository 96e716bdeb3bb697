"""Analytical, easy: one table, one question, one step or two."""

from assay.workloads.programs.datascience.tables import bundled, columns_of, frame, mean, rows, shop, staff, weather

# %% task
SIGNATURE = "def mean_petal_length(rows)"
TEXT = """Iris flowers: rows is a list of dicts with keys sepal_length, sepal_width, petal_length, petal_width,
species. Return a dict with the mean petal_length for each species."""


def cases(rng):
    yield (rows(bundled("iris")),)
    yield (rows(bundled("iris", rng, 0.3)),)


def answer(rows):
    kinds = {row["species"] for row in rows}
    return {kind: mean([row["petal_length"] for row in rows if row["species"] == kind]) for kind in kinds}


# %% solution
from collections import defaultdict


def mean_petal_length(rows):
    total, count = defaultdict(float), defaultdict(int)
    for row in rows:
        total[row["species"]] += row["petal_length"]
        count[row["species"]] += 1
    return {species: total[species] / count[species] for species in total}


# %% wrong: of petals and sepals together
def mean_petal_length(rows):
    found = {}
    for row in rows:
        found.setdefault(row["species"], []).append((row["petal_length"] + row["sepal_length"]) / 2)
    return {species: sum(values) / len(values) for species, values in found.items()}


# %% wrong: the last two values averaged again and again
def mean_petal_length(rows):
    found = {}
    for row in rows:
        before = found.get(row["species"], row["petal_length"])
        found[row["species"]] = (before + row["petal_length"]) / 2
    return found


# %% task
SIGNATURE = "def total_revenue(df)"
TEXT = """Orders: df is a pandas DataFrame with columns order, day, customer, city, product, units, price. Return
the total revenue: the sum of units times price over all orders."""


def cases(rng):
    for n in (40, 7):
        yield (frame(shop(rng, n)),)


def answer(df):
    table = columns_of(df)
    return sum(units * price for units, price in zip(table["units"], table["price"], strict=True))


# %% solution
def total_revenue(df):
    return float((df["units"] * df["price"]).sum())


# %% wrong: all units at the mean price
def total_revenue(df):
    return float(df["units"].sum() * df["price"].mean())


# %% task
SIGNATURE = "def orders_by_city(rows)"
TEXT = """Orders: rows is a list of dicts with keys order, day, customer, city, product, units, price. Return a dict
with the number of orders for each city."""


def cases(rng):
    for n in (50, 6, 1):
        yield (rows(shop(rng, n)),)


def answer(rows):
    cities = [row["city"] for row in rows]
    return {city: cities.count(city) for city in set(cities)}


# %% solution
from collections import Counter


def orders_by_city(rows):
    return dict(Counter(row["city"] for row in rows))


# %% wrong: units, not orders
def orders_by_city(rows):
    found = {}
    for row in rows:
        found[row["city"]] = found.get(row["city"], 0) + row["units"]
    return found


# %% task
SIGNATURE = "def missing_share(rows)"
TEXT = """Weather: rows is a list of dicts with keys station, day, temp, rain; temp is None where it is missing.
Return the share of rows whose temp is missing, between 0 and 1."""


def cases(rng):
    yield (rows(weather(rng)),)
    yield (rows(weather(rng, missing=0.0)),)


def answer(rows):
    return [row["temp"] for row in rows].count(None) / len(rows)


# %% solution
def missing_share(rows):
    return sum(row["temp"] is None for row in rows) / len(rows)


# %% wrong: zero degrees count as missing
def missing_share(rows):
    return sum(not row["temp"] for row in rows) / len(rows)


# %% task
SIGNATURE = "def median_bmi_of_older(rows)"
TEXT = """Patients: rows is a list of dicts with keys age, sex, bmi, bp, s1, s2, s3, s4, s5, s6, progression. Return
the median bmi of the patients whose age is above the mean age of all."""


def cases(rng):
    yield (rows(bundled("diabetes")),)
    yield (rows(bundled("diabetes", rng, 0.1)),)
    yield (rows(bundled("diabetes", rng, 0.103)),)


def answer(rows):
    ages = [row["age"] for row in rows]
    older = sorted(row["bmi"] for row in rows if row["age"] * len(ages) > sum(ages))
    return (older[(len(older) - 1) // 2] + older[len(older) // 2]) / 2


# %% solution
from statistics import mean, median


def median_bmi_of_older(rows):
    limit = mean(row["age"] for row in rows)
    return median(row["bmi"] for row in rows if row["age"] > limit)


# %% wrong: the mean in place of the median
from statistics import mean


def median_bmi_of_older(rows):
    limit = mean(row["age"] for row in rows)
    return mean(row["bmi"] for row in rows if row["age"] > limit)


# %% wrong: against the median age
from statistics import median


def median_bmi_of_older(rows):
    limit = median(row["age"] for row in rows)
    return median(row["bmi"] for row in rows if row["age"] > limit)


# %% task
SIGNATURE = "def best_seller(df)"
TEXT = """Orders: df is a pandas DataFrame with columns order, day, customer, city, product, units, price. Return
the product that most orders are for; of several with equally many the first in the alphabet."""


def cases(rng):
    yield (frame(shop(rng, 50)),)
    table = shop(rng, 9)
    table["product"] = ["vase", "pen", "pen", "mat", "vase", "lamp", "mat", "desk", "lamp"]
    yield (frame(table),)


def answer(df):
    products = columns_of(df)["product"]
    return min(products, key=lambda product: (-products.count(product), product))


# %% solution
def best_seller(df):
    counts = df["product"].value_counts()
    return min(counts[counts == counts.max()].index)


# %% wrong: of several the one that was seen first
def best_seller(df):
    return df["product"].value_counts().idxmax()


# %% wrong: by units
def best_seller(df):
    return df.groupby("product")["units"].sum().idxmax()


# %% task
SIGNATURE = "def top_three(rows)"
TEXT = """Staff: rows is a list of dicts with keys name, team, salary, start, manager. Return a list of the names of
the three with the highest salary, highest first; equal salaries in the order of the names."""


def cases(rng):
    yield (rows(staff(rng)),)
    table = staff(rng, 8)
    table["salary"] = [30000, 31000, 31000, 31000, 31000, 20000, 20000, 20000]
    yield (rows(table),)


def answer(rows):
    left, found = list(rows), []
    while len(found) < 3:
        most = max(row["salary"] for row in left)
        name = min(row["name"] for row in left if row["salary"] == most)
        left = [row for row in left if row["name"] != name]
        found.append(name)
    return found


# %% solution
def top_three(rows):
    ordered = sorted(rows, key=lambda row: (-row["salary"], row["name"]))
    return [row["name"] for row in ordered[:3]]


# %% wrong: equal salaries in the reverse order of names
def top_three(rows):
    ordered = sorted(rows, key=lambda row: (row["salary"], row["name"]), reverse=True)
    return [row["name"] for row in ordered[:3]]


# %% task
SIGNATURE = "def alcohol_and_color(rows)"
TEXT = """Wines: rows is a list of dicts; among its keys are alcohol and color_intensity. Return the Pearson
correlation of alcohol and color_intensity."""


def cases(rng):
    yield (rows(bundled("wine")),)
    yield (rows(bundled("wine", rng, 0.2)),)


def answer(rows):
    a, b = ([row[name] for row in rows] for name in ("alcohol", "color_intensity"))
    off = [(x - mean(a), y - mean(b)) for x, y in zip(a, b, strict=True)]
    across, own = sum(x * y for x, y in off), [sum(x * x for x, _ in off), sum(y * y for _, y in off)]
    return across / (own[0] * own[1]) ** 0.5


# %% solution
import numpy as np


def alcohol_and_color(rows):
    table = np.array([[row["alcohol"], row["color_intensity"]] for row in rows])
    return float(np.corrcoef(table.T)[0, 1])


# %% wrong: the correlation of ranks
import numpy as np


def alcohol_and_color(rows):
    table = np.array([[row["alcohol"], row["color_intensity"]] for row in rows])
    ranks = table.argsort(axis=0).argsort(axis=0)
    return float(np.corrcoef(ranks.T)[0, 1])


# %% wrong: the covariance
import numpy as np


def alcohol_and_color(rows):
    table = np.array([[row["alcohol"], row["color_intensity"]] for row in rows])
    return float(np.cov(table.T)[0, 1])
