"""What the tasks are about: scikit-learn's bundled data sets as columns, and small made-up tables, fixed by a random stream.

A value travels to a program as plain data: a table as a list of rows, or marked as a data frame or an array, which the harness makes of
it where the program runs (`harness.prepared`).
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from datetime import date, timedelta
from functools import cache
from typing import Any

Columns = dict[str, list[Any]]
BUNDLED = ("iris", "wine", "diabetes", "breast_cancer")
CITIES = ("Aarhus", "Bergen", "Cork", "Delft")
PRODUCTS = ("desk", "lamp", "mat", "pen", "vase")
TEAMS = ("data", "field", "legal")


def frame(columns: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    """Columns as what becomes a data frame."""
    return {"__frame__": {name: list(values) for name, values in columns.items()}}


def array(values: Sequence[Any]) -> dict[str, Any]:
    """Nested lists as what becomes an array."""
    return {"__array__": list(values)}


def mean(values: Sequence[float]) -> float:
    """The mean of numbers, added up without rounding in between."""
    return math.fsum(values) / len(values)


def rows(columns: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Columns as a list of rows.

    >>> rows({"a": [1, 2], "b": [3, 4]})
    [{'a': 1, 'b': 3}, {'a': 2, 'b': 4}]
    """
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def columns_of(table: Sequence[Mapping[str, Any]] | Mapping[str, Any]) -> Columns:
    """The columns of rows, or of what becomes a data frame."""
    if isinstance(table, Mapping):
        return {name: list(values) for name, values in table["__frame__"].items()}
    return {name: [row[name] for row in table] for name in table[0]} if table else {}


@cache
def _bundled(name: str) -> Columns:
    from sklearn import datasets

    found = getattr(datasets, f"load_{name}")(**({"scaled": False} if name == "diabetes" else {}))
    names = [text.replace(" (cm)", "").replace(" ", "_").replace("/", "_") for text in found.feature_names]
    columns: Columns = {column: [float(x) for x in found.data[:, at]] for at, column in enumerate(names)}
    if name == "diabetes":
        return columns | {"progression": [float(x) for x in found.target]}
    kinds = [str(text) for text in found.target_names]
    label = {"iris": "species", "wine": "cultivar", "breast_cancer": "diagnosis"}[name]
    return columns | {label: [kinds[at] for at in found.target]}


def bundled(name: str, rng: random.Random | None = None, share: float = 1.0) -> Columns:
    """One of scikit-learn's bundled data sets (`BUNDLED`); with `rng` a random share of its rows, in a random order."""
    columns = _bundled(name)
    if rng is None:
        return {column: list(values) for column, values in columns.items()}
    n = len(next(iter(columns.values())))
    chosen = rng.sample(range(n), int(share * n))
    return {column: [values[at] for at in chosen] for column, values in columns.items()}


def day(number: int) -> str:
    """The day so many days after the first of January 2023, as text."""
    return (date(2023, 1, 1) + timedelta(days=number)).isoformat()


def shop(rng: random.Random, n: int = 60, days: int = 180) -> Columns:
    """Orders of a shop: order, day, customer, city, product, units, price."""
    return {
        "order": list(range(1, n + 1)),
        "day": [day(rng.randrange(days)) for _ in range(n)],
        "customer": [f"c{rng.randrange(12):02d}" for _ in range(n)],
        "city": [rng.choice(CITIES) for _ in range(n)],
        "product": [rng.choice(PRODUCTS) for _ in range(n)],
        "units": [rng.randint(1, 9) for _ in range(n)],
        "price": [rng.randint(100, 5000) / 100 for _ in range(n)],
    }


def customers(rng: random.Random, n: int = 9) -> Columns:
    """Customers of the shop, not all of them: customer, segment, since."""
    return {
        "customer": [f"c{number:02d}" for number in sorted(rng.sample(range(14), n))],
        "segment": [rng.choice(("home", "office", "school")) for _ in range(n)],
        "since": [rng.randint(2015, 2022) for _ in range(n)],
    }


def weather(rng: random.Random, n: int = 40, missing: float = 0.2) -> Columns:
    """Readings of three stations in a random order: station, day, temp (None where missing, 0.0 now and then), rain in mm."""
    keys = rng.sample([(station, at) for station in ("east", "north", "west") for at in range(n // 2)], n)
    return {
        "station": [station for station, _ in keys],
        "day": [day(at) for _, at in keys],
        "temp": [
            None if rng.random() < missing else 0.0 if rng.random() < 0.1 else rng.randint(-80, 250) / 10 for _ in keys
        ],
        "rain": [0.0 if rng.random() < 0.4 else rng.randint(1, 200) / 10 for _ in keys],
    }


def staff(rng: random.Random, n: int = 24) -> Columns:
    """Staff: name, team, salary (ties are there), start, manager (the first has none)."""
    names = [f"{first}{at:02d}" for at, first in enumerate(rng.choices("abcdefgh", k=n))]
    return {
        "name": names,
        "team": [rng.choice(TEAMS) for _ in names],
        "salary": [rng.randint(20, 32) * 1000 for _ in names],
        "start": [rng.randint(2005, 2023) for _ in names],
        "manager": [None if at == 0 else names[rng.randrange(at)] for at in range(n)],
    }


def visits(rng: random.Random, n: int = 50) -> Columns:
    """Visits of a web site in a random order: user, minute (of a week), page. Some follow each other by exactly 30 minutes."""
    found: list[tuple[str, int]] = []
    for user in ("u1", "u2", "u3", "u4"):
        minute = rng.randrange(500)
        for _ in range(n // 4):
            found.append((user, minute))
            minute += rng.choice((1, 5, 12, 29, 30, 30, 31, 200))
    rng.shuffle(found)
    return {
        "user": [user for user, _ in found],
        "minute": [minute for _, minute in found],
        "page": [rng.choice(("cart", "home", "search")) for _ in found],
    }
