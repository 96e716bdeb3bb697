"""The result of a tuning run: what was seen, row by row, and what was found.

The words of the two baselines: *free* is what a user had without assay in ten lines (another dtype, torch.compile, sorted batches);
*exact* is assay's own best code that loses nothing. What is called the papers' is over both.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from assay.measure.stats import Interval, paired_ratio, positive_median
from assay.tuner.noninferiority import increase, mean_interval
from assay.tuner.recipe import Recipe
from assay.tuner.search import pareto
from assay.tuner.transforms import get_transform, is_paper
from assay.tuner.work import UNITS, Settings


@dataclass
class Row:
    """One line of the report: a recipe and what assessing it found (or that it failed, in whichever step)."""

    kind: str  # "baseline" | "free" | "candidate"
    recipe: Recipe
    status: str  # "ok" | "equivalent" | a failure of `run_isolated`
    cost: float | None = None  # the goal's cost, lower is better: the median of the samples
    drop: float | None = (
        None  # relative perplexity increase over the baseline on the search's text; the worst of the goal's paths
    )
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
        """As JSON, without the likelihoods. Its figures are the search's, by which recipes were chosen."""
        return finite(
            {
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
        )


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
            cost = positive_median(self.final["samples"][label]).median
            for name, kind in kinds.items():
                found.setdefault(name, {})[when] = cost * kind["seconds"] / whole if whole > 0 else 0.0
        return found

    def level(self, label: str) -> dict[str, Any]:
        """The goal's figure for "baseline", "free" or "best" in the final run, in its unit, with its interval.

        A single sample has none: `low` and `high` are None.
        """
        unit = UNITS[self.settings.goal]
        cost = positive_median(self.final["samples"][label])
        low, high = sorted((unit.show(cost.low), unit.show(cost.high))) if cost.n > 1 else (None, None)
        row = {"baseline": self.baseline, "free": self.free, "best": self.best}[label]
        return {"label": row.label(), "value": unit.show(cost.median), "unit": unit.name, "low": low, "high": high}

    def judged(self) -> bool:
        """Whether the quality of what is saved was measured in the proof, on text of its own; the model as loaded has nothing to lose."""
        return self.best is self.baseline or bool((self.final.get("judged") or {}).get("looks"))

    def quality(self) -> dict[str, Any]:
        """What is saved against the model as loaded: perplexity with the interval that decides, KL, top-1 agreement, the user's scores.

        "judged" says whether it was measured in the proof. If not, there was no time for it: the figures are the search's, by which
        it was chosen, and decide nothing.
        """
        found = self.final.get("judged") or {}
        if not found.get("looks"):
            return self._searched(found)
        look, path = found["looks"][-1], found["looks"][-1]["path"]
        figures = {name: values[: look["documents"]] for name, values in found["figures"][path].items()}
        return {
            "judged": True,
            "verdict": found["verdict"],
            "metric": f"perplexity ({path})",
            "baseline": _perplexity(figures["baseline"]),
            "candidate": _perplexity(figures["candidate"]),
            **{name: look[name] for name in ("drop", "low", "high", "level", "documents")},
            "looks": found["looks"],
            "text": found["source"],
            "kl": found["kl"],
            "top1": found["top1"],
            "eval": found["eval"],
            "reason": found["reason"],
        }

    def _searched(self, found: dict[str, Any]) -> dict[str, Any]:
        """The quality of what is saved as the search saw it; for the model as loaded, nothing lost."""
        same = self.best is self.baseline
        before, after = self.baseline.quality, self.best.quality
        drops = {path: drop_of(before, {path: values}) for path, values in after.items()}
        path = max(drops, key=lambda name: drops[name].median)
        drop = drops[path]
        one = {"path": path, "mean": 1.0, "low": 1.0, "high": 1.0}
        return {
            "judged": same,
            "verdict": "holds" if same else "undecided",
            "metric": f"perplexity ({path})",
            "baseline": _perplexity(reference(before, path)[: len(after[path])]),
            "candidate": _perplexity(after[path]),
            "drop": 0.0 if same else drop.median,
            "low": 0.0 if same else drop.low,
            "high": 0.0 if same else drop.high,
            "level": 0.95,
            "documents": drop.n,
            "looks": [],
            "text": "the windows of the search",
            "kl": {**one, "mean": 0.0, "low": 0.0, "high": 0.0} if same else None,
            "top1": one if same else None,
            "eval": None,
            "reason": "" if same else found.get("reason") or "it was not judged",
        }

    def tried(self) -> list[dict[str, Any]]:
        """The candidates that were judged in the proof, in order, and what was decided about each."""
        return [
            {name: one[name] for name in ("label", "words", "verdict", "reason", "looks")} | {"eval": one.get("eval")}
            for one in self.final.get("tried", [])
        ]

    def papers(self) -> dict[str, Any]:
        """What of the ratio over the free baseline is the papers': their methods, and the ratio they add with its interval.

        "over" is what stands before them: the free baseline, or the same recipe without them if that is cheaper. "share" is their
        part of the ratio over free, by logarithms; None, like the ratio, where it was not measured. "own" are assay's own
        transforms that the free baseline lacks; "exact" says whether these lose nothing.
        """
        steps = self.best.recipe.steps
        methods = [step.transform for step in steps if is_paper(step.transform)]
        own = [s.transform for s in steps if s not in self.free.recipe.steps and not is_paper(s.transform)]
        found: dict[str, Any] = {"methods": methods, "own": own, "speedup": None, "share": None, "over": ""}
        found["exact"] = all(get_transform(name).exact for name in own)
        samples = self.final["samples"]
        if not methods or (own and "plain" not in samples) or "best" in self.final.get("apart", []):
            return found
        rivals = {"free": self.free.label()} | ({"plain": self.final["plain"]} if "plain" in samples else {})
        rival = min(rivals, key=lambda name: np.median(samples[name]))
        ratio, whole = paired_ratio(samples[rival], samples["best"]), self.speedup("free").median
        found |= {"speedup": _interval(ratio), "over": rivals[rival]}
        if whole > 1:
            found["share"] = math.log(ratio.median) / math.log(whole)
        return found

    def document(self) -> dict[str, Any]:
        """The JSON answer: finite numbers only; None stands for one that is not."""
        paths = self.final.get("paths", {}).get("best")
        return finite(
            {
                "goal": self.settings.goal,
                "model": self.settings.model,
                "prompt_tokens": self.settings.prompt_tokens,
                "new_tokens": self.settings.new_tokens,
                "max_drop": self.max_drop,
                "baseline": self.level("baseline"),
                "free_baseline": self.level("free"),
                "best": self.level("best"),
                "speedup_vs_free": _interval(self.speedup("free")),
                "speedup": _interval(self.speedup("baseline")),
                "papers": self.papers(),
                "quality": self.quality(),
                "tried": self.tried(),
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
                "measured_again": {
                    "cost": "best" not in self.final.get("apart", []),
                    "quality": self.judged(),
                    "paths": paths is not None,
                },
                "paths": self.best.paths if paths is None else paths,
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
        )

    def noisy(self) -> bool:
        """True if other processes kept the machine busy: a load of more than half a core before the final run."""
        return bool(self.final["load_before"] > float(os.cpu_count() or 1) + 0.5)


def reference(baseline: dict[str, list[float]], path: str) -> list[float]:
    """The baseline's quality for `path`. The untouched model has only one path, so its prefill is the reference for decoding too."""
    return baseline.get(path) or baseline["prefill"]


def drop_of(baseline: dict[str, list[float]], candidate: dict[str, list[float]]) -> Interval:
    """Relative perplexity increase of the path that lost most, paired window by window: what the search goes by.

    Each window has documents of its own. A candidate assessed only on the first part of the text is compared with that part of
    the baseline. A single window has an endless interval.
    """
    found = []
    for path, values in candidate.items():
        before = reference(baseline, path)[: len(values)]
        lost = [after - known for after, known in zip(values, before, strict=True)]
        found.append(increase(mean_interval(lost, 0.025)))
    return max(found, key=lambda interval: interval.median)


def finite(value: Any) -> Any:
    """`value` without numbers that JSON does not have: None stands for them.

    >>> finite({"a": [1.0, float("inf")], "b": (float("nan"),)})
    {'a': [1.0, None], 'b': [None]}
    """
    if isinstance(value, dict):
        return {key: finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _interval(found: Interval) -> dict[str, float]:
    return {"median": found.median, "low": found.low, "high": found.high}


def _perplexity(nll: list[float]) -> float:
    mean = float(np.mean(nll))
    return math.exp(mean) if mean < 700 else mean if math.isnan(mean) else math.inf


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
