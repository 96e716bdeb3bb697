"""Learning rates, searched once and checked in, so that no rival is beaten because nobody tuned it.

A room registers a search with `@searched`; `make rates` runs all of them (or those of SLUG=x) and writes `rates.json` beside this
file; experiments read it with `chosen`. Every arm of a search has the same grid at the same cost. A best rate at the grid's edge is
reported: the grid is too narrow.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from assay.paths import atomic_file

FILE = Path(__file__).parent / "rates.json"


@dataclass(frozen=True)
class Search:
    """A search: `score(arm, rate)` trains the arm once and returns its loss on data kept for the choice (less is better)."""

    name: str  # "slug/what"
    arms: tuple[str, ...]
    grid: tuple[float, ...]
    score: Callable[[str, float], float]


@dataclass(frozen=True)
class Rate:
    """The chosen rate of an arm and the grid it was chosen from; pass both on to `Trained`."""

    rate: float
    rates: tuple[float, ...]


_SEARCHES: dict[str, Search] = {}


def searched(
    name: str, *, arms: Sequence[str], grid: Sequence[float]
) -> Callable[[Callable[[str, float], float]], Callable[[str, float], float]]:
    """Register `score(arm, rate) -> loss` as the search `name` ("slug/what").

    Raises ValueError for fewer than three rates: then the best of them is at an edge.
    """
    if len(set(grid)) < 3:
        raise ValueError(f"grid of {name!r} must have at least three rates, got {list(grid)}")

    def register(score: Callable[[str, float], float]) -> Callable[[str, float], float]:
        _SEARCHES[name] = Search(name, tuple(arms), tuple(sorted(grid)), score)
        return score

    return register


def chosen(name: str, arm: str) -> Rate:
    """The rate found for `arm` by the search `name`. Raises KeyError that says how to search when it was not."""
    known = json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {}
    try:
        found = known[name]["arms"][arm]
    except KeyError:
        slug = name.split("/")[0]
        raise KeyError(f"no learning rate was searched for {arm!r} of {name!r}: make rates SLUG={slug}") from None
    return Rate(found["rate"], tuple(known[name]["grid"]))


def search(name: str, say: Callable[[str], None] = print) -> dict[str, object]:
    """Run one search; every arm at every rate, a rate that diverges (ValueError, or a NaN) counts as infinitely bad."""
    task = _SEARCHES[name]
    arms: dict[str, object] = {}
    for arm in task.arms:
        losses: dict[float, float] = {}
        for rate in task.grid:
            try:
                loss = task.score(arm, rate)
            except ValueError as error:  # the trainer says so when a loss is not finite
                say(f"{name} {arm} {rate:g}: {error}")
                loss = float("inf")
            losses[rate] = loss if loss == loss else float("inf")
            say(f"{name} {arm} {rate:g}: {losses[rate]:.5g}")
        best = min(losses, key=lambda rate: losses[rate])
        if best in (task.grid[0], task.grid[-1]):
            say(f"{name} {arm}: the best rate, {best:g}, is at the edge of the grid: widen it")
        arms[arm] = {"rate": best, "losses": {f"{r:g}": None if v == float("inf") else v for r, v in losses.items()}}
    return {"grid": list(task.grid), "command": f"make rates SLUG={name.split('/')[0]}", "arms": arms}


def main(slugs: list[str]) -> None:
    """Search the rates of some papers, or of all, and write the file after each search."""
    from assay.catalogue import papers
    from assay.experiments import experiments_of

    for slug in slugs or [paper.slug for paper in papers()]:
        experiments_of(slug)  # registers its searches
    for name in _SEARCHES:
        if slugs and name.split("/")[0] not in slugs:
            continue
        found = search(name)
        known = json.loads(FILE.read_text(encoding="utf-8")) if FILE.exists() else {}
        text = json.dumps(dict(sorted({**known, name: found}.items())), indent=1) + "\n"
        with atomic_file(FILE) as temporary:
            temporary.write_text(text, encoding="utf-8")
