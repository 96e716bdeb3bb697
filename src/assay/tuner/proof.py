"""The proof: the best candidate and both baselines in one process, interleaved."""

from __future__ import annotations

import contextlib
import os
from typing import Any

from assay.errors import AssayError
from assay.measure.stats import paired_ratio
from assay.tuner.assessing import peaks, reserve
from assay.tuner.budget import LEAST_PAIRS
from assay.tuner.outcome import Row, drop_of
from assay.tuner.run import Run

PAIRS = 11  # rounds, if there is time for more than the minimum
GRACE = 0.5  # share of the time for writing the artefact that a late proof may take, rather than be lost


def prove(run: Run, best: Row) -> tuple[Row, dict[str, Any], bool]:
    """Run the best recipe and both baselines in one process, interleaved. Returns what to save, the proof, and whether a candidate holds.

    If the best does not beat the free baseline for certain, or loses too much, the free baseline is saved instead.
    """
    baseline, free = run.baseline, run.free
    rows = {"baseline": baseline, "free": free, "best": best}
    key = "final:" + "+".join(row.recipe.key() for row in rows.values())
    with run.telling(f"proving {best.label()} against both baselines, interleaved in one process"):
        final = run.journal.get(key, lambda: _interleaved(run, rows))
    if not final["complete"]:
        run.note(f"the proof has {len(final['samples']['best'])} of at least {LEAST_PAIRS} rounds: the time was over")
    candidate = best.kind == "candidate"
    apart = "best" in final.get("apart", [])
    helped = candidate and not apart and paired_ratio(final["samples"]["free"], final["samples"]["best"]).low > 1
    if candidate and not drop_of(final["quality"]["baseline"], final["quality"]["best"]).median <= run.max_drop:
        helped = False
    final = {**final, "candidate": candidate and not apart}
    if not helped and best is not free:
        run.tell("nothing beats the free baseline for certain; it is what will be saved")
        best = free
        final["samples"] = {**final["samples"], "best": final["samples"]["free"]}
        final["quality"] = {**final["quality"], "best": final["quality"]["free"]}
    return best, final, helped


def _interleaved(run: Run, rows: dict[str, Row]) -> dict[str, Any]:
    """The samples of each label, round by round; without time for that, the samples from when each row was assessed."""
    known = {name: row.quality for name, row in rows.items()}
    load = os.getloadavg()[0]
    if run.settings.goal == "memory":
        with contextlib.suppress(AssayError):  # a process died, or the time was over
            samples = {name: peaks(run, row.recipe, 3) for name, row in rows.items()}
            loads = {"load_before": load, "load_after": os.getloadavg()[0]}
            return {"samples": samples, "quality": known, "complete": True, **loads}
        return _apart(run, rows)
    distinct = {name: row for name, row in rows.items() if row is not rows["baseline"] or name == "baseline"}
    if rows["best"] is rows["free"]:
        distinct.pop("best", None)
    left = run.budget.left() - run.budget.tail()
    quality_seconds = run.baseline.text * run.budget.costs.quality
    spare = (
        left > reserve(run, LEAST_PAIRS) - run.budget.tail() + quality_seconds
    )  # else the best one keeps the quality from when it was assessed, like the others
    assessed = ["best"] if rows["best"].kind == "candidate" and spare else []
    loaded = (1 + LEAST_PAIRS) * run.budget.costs.loaded_run
    alone = (
        run.budget.costs.slow and len(distinct) > 1 and left < reserve(run, LEAST_PAIRS) - run.budget.tail() + loaded
    )
    if alone:
        distinct.pop("baseline")
    found: dict[str, Any] = {}
    if left > 0:
        result = run.child(
            "prove",
            left + GRACE * run.budget.tail(),
            recipes={name: row.recipe.model_dump(mode="json") for name, row in distinct.items()},
            assess=assessed,
            pairs=PAIRS,
            seconds=0.6 * left,
            text=run.baseline.text,
            end=max(left - (quality_seconds if assessed else 0.0), 0.0),
        )
        found = dict(result.value) if result.status == "ok" else {}
        if not found:
            run.note(f"the proof ended with {result.status}: {result.error}")
    if not found:
        return _apart(run, rows)
    if alone:
        run.note("the model as loaded is so slow that it did not run in the proof: its figure is from its own process")
        found["apart"] = ["baseline"]
        found["samples"]["baseline"] = rows["baseline"].samples
    for name in rows:
        if name not in found["samples"]:
            same = next(other for other in distinct if distinct[other] is rows[name])
            found["samples"][name] = found["samples"][same]
    found["quality"] = (
        known | found["quality"]
    )  # all are judged on the same text; those of `known` each in its own process
    return found


def _apart(run: Run, rows: dict[str, Row]) -> dict[str, Any]:
    """The substitute when there was no time for a proof: what each recipe took in its own process. It proves nothing."""
    run.note("no time was left for a proof: the figures are those of each recipe's own process")
    load = os.getloadavg()[0]
    return {
        "samples": {name: row.samples for name, row in rows.items()},
        "quality": {name: row.quality for name, row in rows.items()},
        "complete": False,
        "apart": ["baseline", "free", "best"],
        "load_before": load,
        "load_after": load,
    }
