"""Analytical, medium: joins, groups, windows and ranks."""

from assay.workloads.programs.datascience.tables import (
    bundled,
    columns_of,
    customers,
    day,
    frame,
    mean,
    rows,
    shop,
    staff,
    weather,
)

# %% task
SIGNATURE = "def revenue_by_segment(orders, customers)"
TEXT = """Orders and customers: orders is a pandas DataFrame with columns order, day, customer, city, product,
units, price, and customers one with columns customer, segment, since. Return a dict with the revenue (units times
price) for each segment; orders of customers who are not listed go to the segment "unknown"."""


def cases(rng):
    for n in (60, 20):
        yield frame(shop(rng, n)), frame(customers(rng))


def answer(orders, customers):
    known = dict(zip(*(columns_of(customers)[name] for name in ("customer", "segment")), strict=True))
    found = {}
    for row in rows(columns_of(orders)):
        segment = known.get(row["customer"], "unknown")
        found[segment] = found.get(segment, 0) + row["units"] * row["price"]
    return found


# %% solution
def revenue_by_segment(orders, customers):
    joined = orders.merge(customers[["customer", "segment"]], on="customer", how="left")
    revenue = joined["units"] * joined["price"]
    return revenue.groupby(joined["segment"].fillna("unknown")).sum().to_dict()


# %% wrong: customers who are not listed are lost
def revenue_by_segment(orders, customers):
    joined = orders.merge(customers, on="customer")
    return (joined["units"] * joined["price"]).groupby(joined["segment"]).sum().to_dict()


# %% task
SIGNATURE = "def monthly_revenue(df)"
TEXT = """Orders: df is a pandas DataFrame with columns order, day (as "2023-01-31"), customer, city, product,
units, price. Return a list of [month, revenue] (month as "2023-01", revenue the sum of units times price) for all
months from the first to the last that has an order, in order of time; months without orders have revenue 0."""


def cases(rng):
    table = shop(rng, 12)
    table["day"] = [day(at) for at in (3, 10, 40, 41, 125, 128, 190, 190, 191, 260, 5, 44)]
    yield (frame(table),)
    yield (frame(shop(rng, 8)),)


def answer(df):
    table = rows(columns_of(df))
    months = {row["day"][:7] for row in table}
    every = [f"2023-{number:02d}" for number in range(1, 13)]
    return [
        [month, sum(row["units"] * row["price"] for row in table if row["day"].startswith(month))]
        for month in every
        if min(months) <= month <= max(months)
    ]


# %% solution
import pandas as pd


def monthly_revenue(df):
    revenue = (df["units"] * df["price"]).groupby(pd.PeriodIndex(df["day"], freq="M")).sum()
    months = pd.period_range(revenue.index.min(), revenue.index.max(), freq="M")
    return [[str(month), float(value)] for month, value in revenue.reindex(months, fill_value=0).items()]


# %% wrong: months without orders are left out
def monthly_revenue(df):
    revenue = (df["units"] * df["price"]).groupby(df["day"].str[:7]).sum()
    return [[month, float(value)] for month, value in revenue.items()]


# %% task
SIGNATURE = "def week_means(rows, station)"
TEXT = """Weather: rows is a list of dicts with keys station, day, temp, rain, in no order; every station has at
most one row a day. For the given station return a list with, for each of its rows in order of time, the mean rain
of that row and the six rows before it, or None where there are fewer than six before it."""


def cases(rng):
    table = rows(weather(rng, 48))
    yield table, "east"
    yield table, "west"


def answer(rows, station):
    rain = [row["rain"] for row in sorted(rows, key=lambda row: row["day"]) if row["station"] == station]
    return [None if at < 6 else mean(rain[at - 6 : at + 1]) for at in range(len(rain))]


# %% solution
import numpy as np


def week_means(rows, station):
    own = sorted((row["day"], row["rain"]) for row in rows if row["station"] == station)
    rain = np.array([value for _, value in own])
    if len(rain) < 7:
        return [None] * len(rain)
    return [None] * 6 + np.convolve(rain, np.ones(7) / 7, mode="valid").tolist()


# %% wrong: in the order of the rows
def week_means(rows, station):
    rain = [row["rain"] for row in rows if row["station"] == station]
    return [None if at < 6 else sum(rain[at - 6 : at + 1]) / 7 for at in range(len(rain))]


# %% wrong: fewer than seven rows are averaged too
def week_means(rows, station):
    rain = [row["rain"] for row in sorted(rows, key=lambda row: row["day"]) if row["station"] == station]
    windows = [rain[max(at - 6, 0) : at + 1] for at in range(len(rain))]
    return [sum(window) / len(window) for window in windows]


# %% task
SIGNATURE = "def salary_ranks(df)"
TEXT = """Staff: df is a pandas DataFrame with columns name, team, salary, start, manager. Return a dict with the
rank of each name by salary within the team: 1 for the highest salary, equal salaries share a rank, and no rank is
left out after a tie (1, 2, 2, 3)."""


def cases(rng):
    for n in (24, 10):
        yield (frame(staff(rng, n)),)


def answer(df):
    table = rows(columns_of(df))
    return {
        row["name"]: 1
        + len({other["salary"] for other in table if other["team"] == row["team"] and other["salary"] > row["salary"]})
        for row in table
    }


# %% solution
def salary_ranks(df):
    ranks = df.groupby("team")["salary"].rank(method="dense", ascending=False).astype(int)
    return dict(zip(df["name"], ranks))


# %% wrong: ranks are left out after a tie
def salary_ranks(df):
    ranks = df.groupby("team")["salary"].rank(method="min", ascending=False).astype(int)
    return dict(zip(df["name"], ranks))


# %% wrong: over all teams
def salary_ranks(df):
    return dict(zip(df["name"], df["salary"].rank(method="dense", ascending=False).astype(int)))


# %% task
SIGNATURE = "def unit_prices(rows)"
TEXT = """Orders: rows is a list of dicts with keys order, day, customer, city, product, units, price (of one unit).
Return a dict with, for each product, the mean price of a unit sold: the price of an order counts as often as it has
units."""


def cases(rng):
    for n in (60, 9):
        yield (rows(shop(rng, n)),)


def answer(rows):
    sold = {}
    for row in rows:
        sold.setdefault(row["product"], []).extend([row["price"]] * row["units"])
    return {product: mean(prices) for product, prices in sold.items()}


# %% solution
def unit_prices(rows):
    paid, units = {}, {}
    for row in rows:
        name = row["product"]
        paid[name] = paid.get(name, 0.0) + row["price"] * row["units"]
        units[name] = units.get(name, 0) + row["units"]
    return {name: paid[name] / units[name] for name in paid}


# %% wrong: every order counts once
def unit_prices(rows):
    found = {}
    for row in rows:
        found.setdefault(row["product"], []).append(row["price"])
    return {name: sum(prices) / len(prices) for name, prices in found.items()}


# %% task
SIGNATURE = "def city_by_product(df)"
TEXT = """Orders: df is a pandas DataFrame with columns order, day, customer, city, product, units, price. Return a
dict of dicts: for each city that occurs, for each product that occurs, the number of orders, 0 where there are
none."""


def cases(rng):
    for n in (30, 8):
        yield (frame(shop(rng, n)),)


def answer(df):
    table = columns_of(df)
    pairs = list(zip(table["city"], table["product"], strict=True))
    return {
        city: {product: pairs.count((city, product)) for product in set(table["product"])}
        for city in set(table["city"])
    }


# %% solution
import pandas as pd


def city_by_product(df):
    return pd.crosstab(df["city"], df["product"]).T.to_dict()


# %% wrong: the pairs that do not occur are left out
def city_by_product(df):
    found = {}
    for (city, product), group in df.groupby(["city", "product"]):
        found.setdefault(city, {})[product] = len(group)
    return found


# %% task
SIGNATURE = "def ash_outliers(rows)"
TEXT = """Wines: rows is a list of dicts; among its keys is ash. Quartiles are found by linear interpolation (as
numpy's). Return the sorted list of the positions of all rows whose ash lies more than 1.5 times the distance of the
quartiles below the first or above the third quartile of ash."""


def cases(rng):
    yield (rows(bundled("wine")),)
    table = rows(bundled("wine", rng, 0.5))
    table[3]["ash"], table[7]["ash"] = 9.0, 0.1
    yield (table,)


def answer(rows):
    values = sorted(row["ash"] for row in rows)

    def quantile(share):
        at = share * (len(values) - 1)
        low = values[int(at)]
        return low + (at - int(at)) * (values[min(int(at) + 1, len(values) - 1)] - low)

    first, third = quantile(0.25), quantile(0.75)
    reach = 1.5 * (third - first)
    return [at for at, row in enumerate(rows) if not first - reach <= row["ash"] <= third + reach]


# %% solution
import numpy as np


def ash_outliers(rows):
    ash = np.array([row["ash"] for row in rows])
    first, third = np.percentile(ash, [25, 75])
    reach = 1.5 * (third - first)
    return np.flatnonzero((ash < first - reach) | (ash > third + reach)).tolist()


# %% wrong: three standard deviations
import numpy as np


def ash_outliers(rows):
    ash = np.array([row["ash"] for row in rows])
    return np.flatnonzero(abs(ash - ash.mean()) > 3 * ash.std()).tolist()


# %% wrong: too large ones only
import numpy as np


def ash_outliers(rows):
    ash = np.array([row["ash"] for row in rows])
    first, third = np.percentile(ash, [25, 75])
    return np.flatnonzero(ash > third + 1.5 * (third - first)).tolist()


# %% task
SIGNATURE = "def loyal_customers(rows, first, second)"
TEXT = """Orders: rows is a list of dicts with keys order, day (as "2023-01-31"), customer, city, product, units,
price. Return the sorted list of the customers who ordered in both months; first and second are months such as
"2023-02"."""


def cases(rng):
    table = rows(shop(rng, 60))
    yield table, "2023-02", "2023-04"
    yield table, "2023-01", "2023-06"


def answer(rows, first, second):
    found = []
    for customer in sorted({row["customer"] for row in rows}):
        months = {row["day"][:7] for row in rows if row["customer"] == customer}
        if {first, second} <= months:
            found.append(customer)
    return found


# %% solution
def loyal_customers(rows, first, second):
    def who(month):
        return {row["customer"] for row in rows if row["day"].startswith(month)}

    return sorted(who(first) & who(second))


# %% wrong: in one of the months
def loyal_customers(rows, first, second):
    return sorted({row["customer"] for row in rows if row["day"][:7] in (first, second)})
