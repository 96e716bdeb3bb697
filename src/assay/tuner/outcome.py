"""The result of a tuning run: what was seen, row by row, and what was found."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from assay.measure.stats import Interval, bootstrap, paired_ratio
from assay.tuner.recipe import Recipe
from assay.tuner.search import pareto
from assay.tuner.work import UNITS, Settings


@dataclass
class Row:
    """One line of the report: a recipe and what assessing it found (or that it failed, in whichever step)."""

    kind: str  # "baseline" | "free" | "candidate"
    recipe: Recipe
    status: str  # "ok" | "equivalent" | a failure of `run_isolated`
    cost: float | None = None  # the goal's cost, lower is better: the median of the samples
    drop: float | None = None  # relative perplexity increase over the baseline; the worst of the goal's paths
    drop_low: float | None = None
    drop_high: float | None = None
    predicted: float | None = None  # predicted time over the base's, from the roofline alone
    screened: float | None = None  # time over the base's on few layers: what it was chosen by, not a result
    seconds: float = 0.0  # the whole measurement
    run_seconds: float = 0.0  # one run of the work
    error: str = ""
    misfit: str = ""  # the transform that could not be applied, where that is why it failed
    function: str = ""
    structure: str = ""
    samples: list[float] = field(default_factory=list)
    quality: dict[str, list[float]] = field(default_factory=dict)
    options: list[str] = field(default_factory=list)
    text: float = 1.0  # share of the held-out text it was judged on
    hopeless: bool = False  # judged on the first part of the text only, where it already lost too much
    paths: dict[str, int] = field(
        default_factory=dict
    )  # which path each operator took: the kernel, or what it fell back to
    reached: dict[str, dict[str, Any]] = field(default_factory=dict)  # by transform: {"share", "reached"} of its Fit

    def label(self) -> str:
        return self.recipe.label()

    def document(self) -> dict[str, Any]:
        """As JSON, without the per-block likelihoods."""
        return {
            "row": self.kind,
            "label": self.label(),
            "recipe": [step.model_dump() for step in self.recipe.steps],
            "status": self.status,
            "cost": self.cost,
            "samples": self.samples,
            "drop": {"median": self.drop, "low": self.drop_low, "high": self.drop_high},
            "hopeless": self.hopeless,
            "predicted": self.predicted,
            "screened": self.screened,
            "seconds": self.seconds,
            "error": self.error,
            "misfit": self.misfit,
            "paths": self.paths,
            "reached": self.reached,
            "function": self.function,
            "structure": self.structure,
        }


@dataclass(frozen=True)
class Screened:
    """A candidate timed on `layers` of the model's `of` layers: `ratio` is its time over the base's on those layers."""

    recipe: Recipe
    ratio: float
    layers: int
    of: int

    def document(self) -> dict[str, Any]:
        return {"label": self.recipe.label(), "ratio": self.ratio, "layers": self.layers, "of": self.of}


@dataclass
class Outcome:
    """What `tune` found; `document()` is the JSON answer."""

    settings: Settings
    max_drop: float
    rows: list[Row]
    survey: dict[str, Any]
    best: Row
    free: Row
    baseline: Row
    final: dict[str, Any]
    helped: bool
    artefact: Path
    seconds: float
    machine: dict[str, Any]
    screened: list[Screened] = field(default_factory=list)
    after: dict[str, Any] = field(
        default_factory=dict
    )  # kinds of work of the best, as `survey` has them of the model as loaded
    notes: list[str] = field(default_factory=list)  # what was left out or made smaller for lack of time
    minutes: float | None = None
    nodes: list[dict[str, Any]] = field(
        default_factory=list
    )  # of a Ray cluster: which machines measured, which were left out and why

    def speedup(self, over: str) -> Interval:
        """Paired ratio of the final run; `over` is "baseline" or "free".

        If the two did not run alternately (`final["apart"]`), the ratio of the medians with its smallest and largest value.
        """
        before, after = self.final["samples"][over], self.final["samples"]["best"]
        if over in self.final.get("apart", []):
            middle = float(np.median(before) / np.median(after))
            return Interval(middle, min(before) / max(after), max(before) / min(after), min(len(before), len(after)))
        return paired_ratio(before, after)

    def proven(self) -> bool:
        """Whether a candidate took part in the proof, in as many rounds as its interval needs."""
        return bool(self.final.get("complete", True) and self.final.get("candidate", True))

    def kinds(self) -> dict[str, dict[str, float]]:
        """Cost by kind of work of the model as loaded ("before") and of the best ("after"); each adds up to its total figure.

        The shares come from profiles, the totals from the final run. Empty for goals that are not times.
        """
        if self.settings.goal in ("memory", "energy") or not self.after:
            return {}
        found: dict[str, dict[str, float]] = {}
        for when, kinds, label in (
            ("before", self.survey["kinds"], "baseline"),
            ("after", self.after["kinds"], "best"),
        ):
            whole = sum(kind["seconds"] for kind in kinds.values())
            cost = bootstrap(self.final["samples"][label]).median
            for name, kind in kinds.items():
                found.setdefault(name, {})[when] = cost * kind["seconds"] / whole if whole > 0 else 0.0
        return found

    def level(self, label: str) -> dict[str, Any]:
        """The goal's figure for "baseline", "free" or "best" in the final run, in its unit, with its interval."""
        unit = UNITS[self.settings.goal]
        cost = bootstrap(self.final["samples"][label])
        low, high = sorted((unit.show(cost.low), unit.show(cost.high)))
        row = {"baseline": self.baseline, "free": self.free, "best": self.best}[label]
        return {"label": row.label(), "value": unit.show(cost.median), "unit": unit.name, "low": low, "high": high}

    def quality(self) -> dict[str, Any]:
        """Perplexity of the path that lost most, before and after, and the relative increase with its interval."""
        before, after = self.final["quality"]["baseline"], self.final["quality"]["best"]
        drops = {path: drop_of(before, {path: values}) for path, values in after.items()}
        path = max(drops, key=lambda name: drops[name].median)
        return {
            "metric": f"perplexity ({path})",
            "baseline": float(np.exp(np.mean(reference(before, path)[: len(after[path])]))),
            "candidate": float(np.exp(np.mean(after[path]))),
            "drop": drops[path].median,
            "low": drops[path].low,
            "high": drops[path].high,
        }

    def document(self) -> dict[str, Any]:
        def interval(found: Interval) -> dict[str, float]:
            return {"median": found.median, "low": found.low, "high": found.high}

        return {
            "goal": self.settings.goal,
            "model": self.settings.model,
            "prompt_tokens": self.settings.prompt_tokens,
            "new_tokens": self.settings.new_tokens,
            "max_drop": self.max_drop,
            "baseline": self.level("baseline"),
            "free_baseline": self.level("free"),
            "best": self.level("best"),
            "speedup": interval(self.speedup("baseline")),
            "speedup_vs_free": interval(self.speedup("free")),
            "quality": self.quality(),
            "helped": self.helped,
            "recipe": [step.model_dump() for step in self.best.recipe.steps],
            "kinds": self.kinds(),
            "rows": len(self.rows),
            "candidates": sum(row.kind == "candidate" for row in self.rows),
            "screened": len(self.screened),
            "judged": sum(row.kind == "candidate" and row.drop is not None for row in self.rows),
            "proven": int(self.proven()),
            "pairs": len(self.final["samples"]["best"]),
            "screening": [found.document() for found in self.screened],
            "paths": self.best.paths,
            "reached": self.best.reached,
            "notes": self.notes,
            "nodes": self.nodes,
            "minutes": self.minutes,
            "failed_rows": sum(row.status not in ("ok", "equivalent") for row in self.rows),
            "seconds": self.seconds,
            "noisy": self.noisy(),
            "artefact": str(self.artefact),
            "report": str(self.artefact / "report.html"),
            "machine": self.machine,
        }

    def noisy(self) -> bool:
        """True if other processes kept the machine busy: a load of more than half a core before the final run."""
        return bool(self.final["load_before"] > float(os.cpu_count() or 1) + 0.5)


def reference(baseline: dict[str, list[float]], path: str) -> list[float]:
    """The baseline's quality for `path`. The untouched model has only one path, so its prefill is the reference for decoding too."""
    return baseline.get(path) or baseline["prefill"]


def drop_of(baseline: dict[str, list[float]], candidate: dict[str, list[float]]) -> Interval:
    """Relative perplexity increase of the path that lost most, paired block by block.

    A candidate assessed only on the first part of the text is compared with that part of the baseline.
    """

    def increase(differences: np.ndarray, axis: int) -> np.ndarray:
        return np.expm1(differences.mean(axis=axis))

    found = []
    for path, values in candidate.items():
        before = reference(baseline, path)
        difference = np.asarray(values) - np.asarray(before[: len(values)])
        if not np.isfinite(difference).all():
            return Interval(float("inf"), float("inf"), float("inf"), len(difference))
        found.append(bootstrap(difference, increase))
    return max(found, key=lambda interval: interval.median)


def front(rows: list[Row]) -> list[Row]:
    """The rows that no other row beats in both cost and quality loss."""
    done = [row for row in rows if row.cost is not None and row.drop is not None]
    return [done[i] for i in pareto([(row.cost or 0.0, row.drop or 0.0) for row in done])]


def base_row(rows: list[Row]) -> Row | None:
    """The row that candidates build on: the fastest dtype alone, or the model as loaded if there is no other."""
    casts = [row for row in rows if row.status == "ok" and [step.transform for step in row.recipe.steps] == ["dtype"]]
    if casts:
        return min(casts, key=lambda row: row.cost if row.cost is not None else float("inf"))
    return rows[0] if rows and rows[0].status == "ok" else None
