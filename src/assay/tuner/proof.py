"""The proof: the best candidate is judged on text the search did not see, then timed against both baselines, interleaved in one process.

What the search saw of a candidate only chose it. Everything that is reported of what is saved is measured here, after it was chosen;
where the time was over, the outcome says what is from the search instead.
"""

from __future__ import annotations

import contextlib
import os
from typing import Any

from assay.errors import AssayError
from assay.measure.stats import paired_ratio
from assay.tuner.assessing import peaks, reserve
from assay.tuner.budget import LEAST_PAIRS
from assay.tuner.noninferiority import SPENT
from assay.tuner.outcome import Row
from assay.tuner.recipe import Recipe
from assay.tuner.run import Run
from assay.tuner.transforms import get_transform, is_paper

PAIRS = 11  # rounds, if there is time for more than the minimum
JUDGING = 0.8  # share of the time that the timing does not need: what judging plans with, for it may take longer
GRACE = 0.5  # share of the time for writing the artefact that a late proof may take, rather than be lost


def judging(run: Run) -> float:
    """Seconds to keep for judging a candidate on the least text that decides anything, against the model as loaded."""
    costs = run.budget.costs
    slower = min(max(costs.loaded_run / costs.run, 1.0), 5.0) if costs.run > 0 else 1.0
    return costs.start + 2 * costs.load + (1 + slower) * run.survey["proof_share"] * costs.quality


def prove(run: Run, ranked: list[Row]) -> tuple[Row, dict[str, Any], bool]:
    """Judge the candidates that beat the free baseline in the search, best first, until one holds; time it against both baselines.

    Returns what to save, the proof, and whether a candidate holds. If none holds, or it does not beat the free baseline for
    certain, the free baseline is saved; if that has lost more than is allowed itself, the model as loaded.
    """
    tried: list[dict[str, Any]] = []
    chosen: Row | None = None
    judged: dict[str, Any] | None = None
    failed: list[set[str]] = []
    for row in ranked:
        attempt, steps = len(tried), _lossy(row)
        if attempt == len(SPENT):
            break
        if any(known <= steps for known in failed):  # it holds all that has lost too much
            continue
        if attempt and run.budget.left() < judging(run) + reserve(run, LEAST_PAIRS):
            run.note("no time was left to judge the next best candidate")
            break
        judged = _judged(run, row, attempt)
        tried.append({"label": row.label(), "words": row.recipe.words(), **judged})
        if judged["verdict"] == "holds":
            chosen = row
            break
        failed.append(steps)
    best = chosen or run.free
    final = _timed(run, best)
    apart = "best" in final.get("apart", [])
    helped = (
        chosen is not None and not apart and paired_ratio(final["samples"]["free"], final["samples"]["best"]).low > 1
    )
    if not helped:
        run.tell("nothing beats the free baseline for certain within the allowed loss; it is what will be saved")
        best, judged = run.free, None
        if best is not run.baseline:
            judged = _judged(run, best, 0)
            if judged["verdict"] == "lost":
                run.note(
                    f"the free baseline ({best.label()}) loses more than is allowed itself: the model as loaded is saved"
                )
                best, judged = run.baseline, None
        same = "baseline" if best is run.baseline else "free"
        final["samples"] = {**final["samples"], "best": final["samples"][same]}
        if "paths" in final:
            final["paths"] = {**final["paths"], "best": final["paths"].get(same, {})}
        if "weights" in final:
            kept = {label: digest for label, digest in final["weights"].items() if label != "best"}
            final["weights"] = kept | ({"best": kept[same]} if same in kept else {})
    candidate = chosen is not None and not apart
    return best, {**final, "judged": judged, "tried": tried, "candidate": candidate}, helped


def _lossy(row: Row) -> set[str]:
    """The steps of a recipe that may cost quality."""
    return {step.model_dump_json() for step in row.recipe.steps if not get_transform(step.transform).exact}


def _judged(run: Run, row: Row, attempt: int) -> dict[str, Any]:
    """What judging a recipe found: from the journal, or from a child process; a child that fails leaves it undecided."""

    def judge() -> dict[str, Any]:
        left = run.budget.left() - run.budget.tail()
        if left <= 0:
            return {"verdict": "undecided", "reason": "no time was left to judge it", "looks": [], "complete": False}
        seconds = max(JUDGING * (run.budget.left() - reserve(run, LEAST_PAIRS)), min(judging(run), left))
        result = run.child(
            "judge",
            left + GRACE * run.budget.tail(),
            recipe=row.recipe.model_dump(mode="json"),
            attempt=attempt,
            max_drop=run.max_drop,
            seconds=seconds,
        )
        if result.status == "ok":
            return dict(result.value)
        reason = f"judging it ended with {result.status}: {result.error}"
        return {"verdict": "undecided", "reason": reason, "looks": [], "complete": False}

    key = f"judge:{attempt}:{run.max_drop!r}:{row.recipe.key()}"
    with run.telling(f"judging {row.label()} on text that the search did not see"):
        found = run.journal.get(key, judge)
    looks = found["looks"]
    spread = "" if not looks else f", perplexity {100 * looks[-1]['drop']:+.2f} % ({100 * looks[-1]['low']:+.2f} to "
    spread += f"{100 * looks[-1]['high']:+.2f}) over {looks[-1]['documents']} documents" if looks else ""
    run.tell(f"{row.label()}: quality {found['verdict']}{spread}")
    if found["reason"]:
        run.note(f"the quality of {row.label()} is undecided: {found['reason']}")
    return found


def _timed(run: Run, best: Row) -> dict[str, Any]:
    """The samples of the model as loaded, the free baseline and the best; from the journal if they are there."""
    rows = {"baseline": run.baseline, "free": run.free, "best": best}
    plain = _plain(run, best)
    parts = [*(row.recipe.key() for row in rows.values()), *([plain.key()] if plain else [])]
    with run.telling(f"timing {best.label()} against both baselines, interleaved in one process"):
        final = dict(run.journal.get("final:" + "+".join(parts), lambda: _interleaved(run, rows, plain)))
    if not final["complete"]:
        run.note(f"the proof has {len(final['samples']['best'])} of at least {LEAST_PAIRS} rounds: the time was over")
    if plain is not None:
        final["plain"] = plain.label()
    return final


def _plain(run: Run, best: Row) -> Recipe | None:
    """The best recipe without the papers' methods, to tell what is theirs; None where a baseline already is just that."""
    steps = tuple(step for step in best.recipe.steps if not is_paper(step.transform))
    plain = run.recipe(steps)
    known = [row.recipe.key() for row in (run.baseline, run.free, best)]
    return None if plain.key() in known else plain


def _interleaved(run: Run, rows: dict[str, Row], plain: Recipe | None) -> dict[str, Any]:
    """The samples of each label, round by round; without time for that, the samples from when each row was assessed."""
    distinct = {name: row.recipe for name, row in rows.items() if _first(rows, name) == name}
    if run.settings.goal == "memory":
        found = _peaks(run, distinct | ({"plain": plain} if plain and run.budget.left() > 2 * reserve(run, 2) else {}))
        return _shared(rows, found) if found else _apart(run, rows)
    left = run.budget.left() - run.budget.tail()
    needed = reserve(run, LEAST_PAIRS) - run.budget.tail()
    costs = run.budget.costs
    if costs.slow and len(distinct) > 1 and left < needed + (1 + LEAST_PAIRS) * costs.loaded_run:
        distinct.pop("baseline")
    alone = "baseline" not in distinct
    if plain is not None and left > needed + costs.load + (1 + LEAST_PAIRS) * costs.run:
        distinct["plain"] = plain
    found = {}
    if left > 0:
        result = run.child(
            "prove",
            left + GRACE * run.budget.tail(),
            recipes={name: recipe.model_dump(mode="json") for name, recipe in distinct.items()},
            pairs=PAIRS,
            seconds=0.6 * left,
            end=left,
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
    return _shared(rows, found)


def _first(rows: dict[str, Row], name: str) -> str:
    """The first label of the row that `name` stands for."""
    return next(other for other in rows if rows[other] is rows[name])


def _shared(rows: dict[str, Row], found: dict[str, Any]) -> dict[str, Any]:
    """The same, with what labels of the same row share."""
    for part in ("samples", "paths", "weights"):
        for name in rows:
            if part in found and name not in found[part] and _first(rows, name) in found[part]:
                found[part][name] = found[part][_first(rows, name)]
    return found


def _peaks(run: Run, recipes: dict[str, Recipe]) -> dict[str, Any]:
    """Peaks of fresh processes for each recipe; empty when one died, or the time was over."""
    load = os.getloadavg()[0]
    with contextlib.suppress(AssayError):
        samples = {name: peaks(run, recipe, 3) for name, recipe in recipes.items()}
        return {"samples": samples, "complete": True, "load_before": load, "load_after": os.getloadavg()[0]}
    return {}


def _apart(run: Run, rows: dict[str, Row]) -> dict[str, Any]:
    """The substitute when there was no time for a proof: what each recipe took in its own process. It proves nothing."""
    run.note("no time was left for a proof: the figures are those of each recipe's own process, by which it was chosen")
    load = os.getloadavg()[0]
    return {
        "samples": {name: row.samples for name, row in rows.items()},
        "complete": False,
        "apart": ["baseline", "free", "best"],
        "load_before": load,
        "load_after": load,
    }
