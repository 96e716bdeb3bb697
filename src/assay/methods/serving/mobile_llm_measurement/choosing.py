"""Which cells will do, which are worth looking at, and which to take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

from assay import checks
from assay.methods.serving.mobile_llm_measurement.matrix import Row


@dataclass(frozen=True)
class Limits:
    """What a cell may cost and must do; None is no limit. What a row does not have (joules without a counter) fails a limit on it.

    `seconds` bounds the 95th percentile of the warm answers, `cold_seconds` the cold one; `accuracy`, `parse_failures` and `available` are
    shares, 0 to 1. Raises ValueError or TypeError for a limit out of range.
    """

    memory_bytes: float | None = None
    seconds: float | None = None
    cold_seconds: float | None = None
    parse_failures: float | None = None
    price: float | None = None
    joules: float | None = None
    accuracy: float | None = None
    available: float | None = None

    def __post_init__(self) -> None:
        for one in fields(self):
            if getattr(self, one.name) is not None:
                checks.number(one.name, getattr(self, one.name), low=0, high=1 if one.name in SHARES else None)


AT_LEAST = ("accuracy", "available")
SHARES = (*AT_LEAST, "parse_failures")


def measured(row: Row) -> dict[str, float | None]:
    """The figures of a row that limits speak of; all None for one that did not run."""
    if not row.ok:
        return {one.name: None for one in fields(Limits)}
    return {
        "memory_bytes": float(row.peak_bytes),
        "seconds": row.quantile(0.95),
        "cold_seconds": None if row.cold is None else float(row.cold["seconds"]),
        "parse_failures": row.parse_failures,
        "price": row.price,
        "joules": row.joules,
        "accuracy": row.accuracy,
        "available": row.available,
    }


def why_not(row: Row, limits: Limits) -> list[str]:
    """The limits that a row breaks, in words; empty where it will do. A row that did not run breaks one in any case."""
    if not row.ok:
        return [f"{row.status}: {row.reason}"]
    found = measured(row)
    broken = []
    for one in fields(limits):
        limit, value = getattr(limits, one.name), found[one.name]
        if limit is None:
            continue
        fits = value is not None and (value >= limit if one.name in AT_LEAST else value <= limit)
        if not fits:
            word = "not measured" if value is None else f"{value:.4g}"
            broken.append(
                f"{one.name} {word}, {'at least' if one.name in AT_LEAST else 'at most'} {limit:.4g} is wanted"
            )
    return broken


def feasible(rows: Sequence[Row], limits: Limits) -> list[Row]:
    """The rows that will do. Tighter limits never add one."""
    return [row for row in rows if not why_not(row, limits)]


BETTER = {"memory_bytes": -1, "seconds": -1, "price": -1, "parse_failures": -1, "accuracy": 1, "available": 1}


def pareto(rows: Sequence[Row]) -> list[Row]:
    """Rows that ran and than which no other is at least as good in memory, seconds (P95), price, parse failures, accuracy and availability,
    and better in one of them."""
    ran = [row for row in rows if row.ok]
    known = [[sign * float(measured(row)[name] or 0.0) for name, sign in BETTER.items()] for row in ran]

    def beaten(mine: list[float]) -> bool:
        return any(all(a >= b for a, b in zip(other, mine, strict=True)) and other != mine for other in known)

    return [row for row, mine in zip(ran, known, strict=True) if not beaten(mine)]


def recommend(rows: Sequence[Row], wishes: Mapping[str, Limits]) -> dict[str, Row | None]:
    """For each set of limits the row to take: of those that will do the cheapest, of equally cheap ones the fastest (P95); None where
    none will do."""
    found: dict[str, Row | None] = {}
    for name, limits in wishes.items():
        will_do = feasible(rows, limits)
        found[name] = min(will_do, key=lambda row: (row.price, row.quantile(0.95)), default=None)
    return found


def table(rows: Sequence[Row]) -> str:
    """The matrix as Markdown, a line a cell; rows on the Pareto front have a star."""
    best = {row.cell for row in pareto(rows)}
    lines = [
        "| model | format | engine | site | threads | MiB | cold s | P50 s | P95 s | first token s | ms a token | network s | right | "
        "no answer | |",
        "| --- | --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for row in rows:
        head = f"| {row.model} | {row.format} | {row.engine} | {row.site} | {row.threads} |"
        if not row.ok:
            lines.append(f"{head} {' |' * 9} {row.status}: {row.reason} |")
            continue
        assert row.cold is not None
        cells = [
            f"{row.peak_bytes / 2**20:.0f}", f"{row.cold['seconds']:.2f}", f"{row.quantile(0.5):.3f}", f"{row.quantile(0.95):.3f}",
            f"{row.quantile(0.5, 'first'):.3f}", f"{1e3 * row.figures.token:.1f}", f"{row.part('network'):.3f}", f"{row.accuracy:.2f}",
            f"{row.parse_failures:.2f}",
        ]  # fmt: skip
        said = ["*"] if row.cell in best else []
        said += [] if row.adds_up else [f"parts leave {row.unaccounted:.0%}"]
        lines.append(f"{head} {' | '.join(cells)} | {' '.join(said)} |")
    return "\n".join(lines)
