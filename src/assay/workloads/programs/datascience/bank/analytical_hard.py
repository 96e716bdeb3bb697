"""Analytical, hard: sessions, islands, joins by time, hierarchies, several columns at once."""

from assay.workloads.programs.datascience.tables import (
    bundled,
    columns_of,
    day,
    frame,
    mean,
    rows,
    shop,
    staff,
    visits,
    weather,
)

# %% task
SIGNATURE = "def retention(df)"
TEXT = """Orders: df is a pandas DataFrame with columns order, day (as "2023-01-31"), customer, city, product,
units, price. A customer's first month is the month of the first order. Return a dict of dicts: for each first month
(as "2023-01") that occurs, for each number of months later from 0 on at which at least one of its customers
ordered, the share of its customers who ordered in that month."""


def cases(rng):
    for n in (60, 25):
        yield (frame(shop(rng, n)),)


def answer(df):
    table = columns_of(df)
    months = {}
    for customer, when in zip(table["customer"], table["day"], strict=True):
        months.setdefault(customer, set()).add(12 * int(when[:4]) + int(when[5:7]) - 1)
    found = {}
    for start in {min(own) for own in months.values()}:
        cohort = [own for own in months.values() if min(own) == start]
        shares = {later: sum(start + later in own for own in cohort) / len(cohort) for later in range(12)}
        found[f"{start // 12}-{start % 12 + 1:02d}"] = {later: share for later, share in shares.items() if share}
    return found


# %% solution
import pandas as pd


def retention(df):
    days = pd.to_datetime(df["day"])
    seen = pd.DataFrame({"customer": df["customer"], "month": days.dt.year * 12 + days.dt.month - 1}).drop_duplicates()
    seen["first"] = seen.groupby("customer")["month"].transform("min")
    seen["later"] = seen["month"] - seen["first"]
    size = seen.groupby("first")["customer"].nunique()
    found = {}
    for (first, later), count in seen.groupby(["first", "later"])["customer"].nunique().items():
        found.setdefault(f"{first // 12}-{first % 12 + 1:02d}", {})[int(later)] = float(count / size[first])
    return found


# %% wrong: orders are counted, not customers
import pandas as pd


def retention(df):
    days = pd.to_datetime(df["day"])
    seen = pd.DataFrame({"customer": df["customer"], "month": days.dt.year * 12 + days.dt.month - 1})
    seen["first"] = seen.groupby("customer")["month"].transform("min")
    seen["later"] = seen["month"] - seen["first"]
    size = seen.groupby("first")["customer"].size()
    found = {}
    for (first, later), count in seen.groupby(["first", "later"])["customer"].size().items():
        found.setdefault(f"{first // 12}-{first % 12 + 1:02d}", {})[int(later)] = float(count / size[first])
    return found


# %% task
SIGNATURE = "def sessions(rows)"
TEXT = """Visits of a web site: rows is a list of dicts with keys user, minute, page, in no order. A session of a
user ends when more than 30 minutes pass until that user's next visit. Return a dict with, for each user, a list of
the lengths of the sessions (last minute less first) in order of time."""


def cases(rng):
    for n in (48, 12):
        yield (rows(visits(rng, n)),)


def answer(rows):
    found = {}
    for user in {row["user"] for row in rows}:
        minutes = sorted(row["minute"] for row in rows if row["user"] == user)
        breaks = [0, *(at for at in range(1, len(minutes)) if minutes[at] - minutes[at - 1] > 30), len(minutes)]
        found[user] = [minutes[end - 1] - minutes[start] for start, end in zip(breaks, breaks[1:], strict=False)]
    return found


# %% solution
def sessions(rows):
    found, last = {}, {}
    for row in sorted(rows, key=lambda row: row["minute"]):
        user, minute = row["user"], row["minute"]
        if user not in last or minute - last[user] > 30:
            found.setdefault(user, []).append([minute, minute])
        found[user][-1][1] = minute
        last[user] = minute
    return {user: [end - start for start, end in spans] for user, spans in found.items()}


# %% wrong: 30 minutes end a session too
def sessions(rows):
    found, last = {}, {}
    for row in sorted(rows, key=lambda row: row["minute"]):
        user, minute = row["user"], row["minute"]
        if user not in last or minute - last[user] >= 30:
            found.setdefault(user, []).append([minute, minute])
        found[user][-1][1] = minute
        last[user] = minute
    return {user: [end - start for start, end in spans] for user, spans in found.items()}


# %% wrong: a session lasts 30 minutes from its start
def sessions(rows):
    found = {}
    for row in sorted(rows, key=lambda row: row["minute"]):
        spans = found.setdefault(row["user"], [])
        if not spans or row["minute"] - spans[-1][0] > 30:
            spans.append([row["minute"], row["minute"]])
        spans[-1][1] = row["minute"]
    return {user: [end - start for start, end in spans] for user, spans in found.items()}


# %% task
SIGNATURE = "def longest_wet_spell(df)"
TEXT = """Weather: df is a pandas DataFrame with columns station, day (as "2023-01-31"), temp, rain, in no order; a
day may be missing. Return a dict with, for each station, the length of the longest run of consecutive days with
rain above 0; a missing day ends a run; 0 where it never rained."""


def cases(rng):
    yield (frame(weather(rng, 48)),)
    table = weather(rng, 40)
    table["rain"] = [
        0.0 if station == "west" else max(rain, 0.1) for station, rain in zip(table["station"], table["rain"])
    ]
    yield (frame(table),)


def answer(df):
    table = rows(columns_of(df))
    found = {}
    for station in {row["station"] for row in table}:
        wet = {row["day"] for row in table if row["station"] == station and row["rain"] > 0}
        best = run = 0
        for at in range(400):
            run = run + 1 if day(at) in wet else 0
            best = max(best, run)
        found[station] = best
    return found


# %% solution
import pandas as pd


def longest_wet_spell(df):
    found = dict.fromkeys(df["station"].unique(), 0)
    wet = df[df["rain"] > 0].assign(day=lambda d: pd.to_datetime(d["day"]))
    for station, own in wet.groupby("station"):
        days = own["day"].sort_values()
        runs = (days.diff() != pd.Timedelta(days=1)).cumsum()
        found[station] = int(runs.value_counts().max())
    return found


# %% wrong: missing days do not end a run
def longest_wet_spell(df):
    found = {}
    for station, own in df.sort_values("day").groupby("station"):
        best = run = 0
        for rain in own["rain"]:
            run = run + 1 if rain > 0 else 0
            best = max(best, run)
        found[station] = best
    return found


# %% wrong: stations without rain are left out
import pandas as pd


def longest_wet_spell(df):
    found = {}
    wet = df[df["rain"] > 0].assign(day=lambda d: pd.to_datetime(d["day"]))
    for station, own in wet.groupby("station"):
        runs = (own["day"].sort_values().diff() != pd.Timedelta(days=1)).cumsum()
        found[station] = int(runs.value_counts().max())
    return found


# %% task
SIGNATURE = "def cost_of_orders(orders, prices)"
TEXT = """Orders and price lists: orders is a list of dicts with keys day, product, units; prices is a list of dicts
with keys day (from which the price holds), product, price, in no order. Days look like "2023-01-31". Return a list
with the cost of each order: its units times the latest price of its product from that day or before; None where
there is none."""


def cases(rng):
    products = ("desk", "lamp", "mat")
    for n in (15, 30):
        starts = rng.sample([(name, at) for name in products for at in range(5, 60)], 12)
        prices = [{"day": day(at), "product": name, "price": rng.randint(10, 90)} for name, at in starts]
        orders = [
            {"day": day(rng.randrange(70)), "product": rng.choice(products), "units": rng.randint(1, 5)}
            for _ in range(n)
        ]
        orders.append({"day": prices[0]["day"], "product": prices[0]["product"], "units": 2})
        yield orders, prices


def answer(orders, prices):
    found = []
    for order in orders:
        held = [p for p in prices if p["product"] == order["product"] and p["day"] <= order["day"]]
        found.append(order["units"] * max(held, key=lambda p: p["day"])["price"] if held else None)
    return found


# %% solution
from bisect import bisect_right


def cost_of_orders(orders, prices):
    lists = {}
    for entry in sorted(prices, key=lambda entry: entry["day"]):
        days, values = lists.setdefault(entry["product"], ([], []))
        days.append(entry["day"])
        values.append(entry["price"])
    found = []
    for order in orders:
        days, values = lists.get(order["product"], ([], []))
        at = bisect_right(days, order["day"])
        found.append(order["units"] * values[at - 1] if at else None)
    return found


# %% wrong: prices hold from the day after
def cost_of_orders(orders, prices):
    found = []
    for order in orders:
        held = [p for p in prices if p["product"] == order["product"] and p["day"] < order["day"]]
        found.append(order["units"] * max(held, key=lambda p: p["day"])["price"] if held else None)
    return found


# %% wrong: the last price in the order of the list
def cost_of_orders(orders, prices):
    found = []
    for order in orders:
        held = [p["price"] for p in prices if p["product"] == order["product"] and p["day"] <= order["day"]]
        found.append(order["units"] * held[-1] if held else None)
    return found


# %% task
SIGNATURE = "def filled_temperatures(rows, station)"
TEXT = """Weather: rows is a list of dicts with keys station, day (as "2023-01-31"), temp (None where missing),
rain, in no order; days may be missing. For the given station return the list of temperatures in order of time, a
missing one interpolated linearly in time between the nearest known ones before and after it, by days; None where
there is none on one side."""


def cases(rng):
    table = rows(weather(rng, 48, missing=0.35))
    for station in ("east", "north", "west"):
        yield table, station


def answer(rows, station):
    own = sorted((row["day"], row["temp"]) for row in rows if row["station"] == station)
    index = {day(at): at for at in range(400)}
    found = []
    for when, temp in own:
        before = [(d, t) for d, t in own if d < when and t is not None]
        after = [(d, t) for d, t in own if d > when and t is not None]
        if temp is None and before and after:
            (d0, t0), (d1, t1) = before[-1], after[0]
            temp = t0 + (t1 - t0) * (index[when] - index[d0]) / (index[d1] - index[d0])
        found.append(temp)
    return found


# %% solution
from datetime import date

import numpy as np


def filled_temperatures(rows, station):
    own = sorted((row for row in rows if row["station"] == station), key=lambda row: row["day"])
    days = np.array([date.fromisoformat(row["day"]).toordinal() for row in own], dtype=float)
    known = np.array([row["temp"] is not None for row in own])
    if not known.any():
        return [None] * len(own)
    temps = np.array([row["temp"] for row in own if row["temp"] is not None], dtype=float)
    filled = np.interp(days, days[known], temps, left=np.nan, right=np.nan)
    return [None if np.isnan(value) else float(value) for value in filled]


# %% wrong: by positions, not by days
import numpy as np


def filled_temperatures(rows, station):
    own = sorted((row for row in rows if row["station"] == station), key=lambda row: row["day"])
    at = np.arange(len(own))
    known = np.array([row["temp"] is not None for row in own])
    temps = np.array([row["temp"] for row in own if row["temp"] is not None], dtype=float)
    filled = np.interp(at, at[known], temps, left=np.nan, right=np.nan)
    return [None if np.isnan(value) else float(value) for value in filled]


# %% wrong: the last known temperature is carried on
def filled_temperatures(rows, station):
    found, last = [], None
    for row in sorted((row for row in rows if row["station"] == station), key=lambda row: row["day"]):
        last = row["temp"] if row["temp"] is not None else last
        found.append(last)
    return found


# %% task
SIGNATURE = "def most_telling_feature(rows)"
TEXT = """Tumours: rows is a list of dicts of numbers but for the key diagnosis, which is "malignant" or "benign".
For each number take Cohen's d: the mean of the malignant less the mean of the benign, divided by the pooled
standard deviation (variances with n - 1, weighted by n - 1). Return [name, d] of the one whose d is largest in
absolute value."""


def cases(rng):
    yield (rows(bundled("breast_cancer")),)
    yield (rows(bundled("breast_cancer", rng, 0.1)),)


def answer(rows):
    best = ["", 0.0]
    for name in rows[0]:
        if name == "diagnosis":
            continue
        bad, good = ([row[name] for row in rows if row["diagnosis"] == kind] for kind in ("malignant", "benign"))
        squares = sum((x - mean(own)) ** 2 for own in (bad, good) for x in own)
        d = (mean(bad) - mean(good)) / (squares / (len(rows) - 2)) ** 0.5
        if abs(d) > abs(best[1]):
            best = [name, d]
    return best


# %% solution
import numpy as np


def most_telling_feature(rows):
    names = [name for name in rows[0] if name != "diagnosis"]
    table = np.array([[row[name] for name in names] for row in rows])
    malignant = np.array([row["diagnosis"] == "malignant" for row in rows])
    a, b = table[malignant], table[~malignant]
    pooled = ((len(a) - 1) * a.var(axis=0, ddof=1) + (len(b) - 1) * b.var(axis=0, ddof=1)) / (len(table) - 2)
    d = (a.mean(axis=0) - b.mean(axis=0)) / np.sqrt(pooled)
    at = int(abs(d).argmax())
    return [names[at], float(d[at])]


# %% wrong: by the standard deviation of all
import numpy as np


def most_telling_feature(rows):
    names = [name for name in rows[0] if name != "diagnosis"]
    table = np.array([[row[name] for name in names] for row in rows])
    malignant = np.array([row["diagnosis"] == "malignant" for row in rows])
    d = (table[malignant].mean(axis=0) - table[~malignant].mean(axis=0)) / table.std(axis=0, ddof=1)
    at = int(abs(d).argmax())
    return [names[at], float(d[at])]


# %% task
SIGNATURE = "def first_component_share(rows)"
TEXT = """Wines: rows is a list of dicts of numbers but for the key cultivar. Standardise every number to mean 0 and
variance 1. Return the share of the variance that the first principal component explains."""


def cases(rng):
    yield (rows(bundled("wine")),)
    yield (rows(bundled("wine", rng, 0.3)),)


def answer(rows):
    names = [name for name in rows[0] if name != "cultivar"]
    columns = []
    for name in names:
        values = [row[name] for row in rows]
        spread = sum((x - mean(values)) ** 2 for x in values) ** 0.5
        columns.append([(x - mean(values)) / spread for x in values])
    vector = [1.0] * len(names)  # the power method on the correlations
    related = [[sum(x * y for x, y in zip(a, b, strict=True)) for b in columns] for a in columns]
    for _ in range(500):
        vector = [sum(x * y for x, y in zip(row, vector, strict=True)) for row in related]
        size = sum(x * x for x in vector) ** 0.5
        vector = [x / size for x in vector]
    return size / len(names)


# %% solution
import numpy as np


def first_component_share(rows):
    names = [name for name in rows[0] if name != "cultivar"]
    table = np.array([[row[name] for name in names] for row in rows])
    table = (table - table.mean(axis=0)) / table.std(axis=0)
    values = np.linalg.svd(table, compute_uv=False) ** 2
    return float(values[0] / values.sum())


# %% wrong: without standardising
import numpy as np


def first_component_share(rows):
    names = [name for name in rows[0] if name != "cultivar"]
    table = np.array([[row[name] for name in names] for row in rows])
    values = np.linalg.svd(table - table.mean(axis=0), compute_uv=False) ** 2
    return float(values[0] / values.sum())


# %% wrong: singular values in place of their squares
import numpy as np


def first_component_share(rows):
    names = [name for name in rows[0] if name != "cultivar"]
    table = np.array([[row[name] for name in names] for row in rows])
    values = np.linalg.svd((table - table.mean(axis=0)) / table.std(axis=0), compute_uv=False)
    return float(values[0] / values.sum())


# %% task
SIGNATURE = "def salaries_below(df)"
TEXT = """Staff: df is a pandas DataFrame with columns name, team, salary, start, manager (the name of the manager;
None for one). Return a dict with, for each name, the sum of the salaries of all who are below, directly or further
down; 0 for nobody."""


def cases(rng):
    for n in (24, 9):
        yield (frame(staff(rng, n)),)


def answer(df):
    table = rows(columns_of(df))
    boss = {row["name"]: row["manager"] for row in table}
    found = dict.fromkeys(boss, 0)
    for row in table:
        above = boss[row["name"]]
        while above is not None:
            found[above] += row["salary"]
            above = boss[above]
    return found


# %% solution
def salaries_below(df):
    below = {}
    for name, manager in zip(df["name"], df["manager"]):
        below.setdefault(manager, []).append(name)
    salary = dict(zip(df["name"], df["salary"]))

    def total(name):
        return sum(salary[one] + total(one) for one in below.get(name, []))

    return {name: int(total(name)) for name in df["name"]}


# %% wrong: those directly below only
def salaries_below(df):
    own = df.groupby("manager")["salary"].sum()
    return {name: int(own.get(name, 0)) for name in df["name"]}
