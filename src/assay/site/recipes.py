"""What runs of `assay tune` say: the recipes they found, and what methods gained beside each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from assay.catalogue import Paper
from assay.errors import InputError
from assay.evidence.tuned import Pair, Span, StepRecord, Tried, TuneRun, allowed_text, label, unit_of_loss
from assay.site.charts import LARGEST, Point, pareto
from assay.site.library import ORIGINS, Library, Tuned
from assay.tuner.recipe import as_toml

PAIRS = 60  # lines of a paper's page about pairs
RUNS = 200  # lines of the page of runs
ROWS = 100  # measured recipes of a run that its page lists
PROOF = {
    "proven": "it beat what is free for certain, and kept the quality on text or pictures that the search did not see",
    "not proven": "it did not beat what is free for certain, or its quality was not shown to be kept",
}
"""What is said of a recipe, besides that it is stale."""


def names_of(steps: Sequence[StepRecord]) -> str:
    """A recipe by the names of its transforms alone.

    >>> names_of([StepRecord(transform="dtype", config={"dtype": "bfloat16"}), StepRecord(transform="xattention")])
    'dtype + xattention'
    """
    return " + ".join(step.transform for step in steps) or "as loaded"


def facts(library: Library, steps: Sequence[StepRecord]) -> dict[str, Any]:
    """Which of the steps are papers' methods, and of which families, as words."""
    known = {paper.slug: paper.family for paper in library.papers}
    slugs = [step.transform for step in steps if step.transform in known]
    return {"papers": slugs, "families": " ".join(dict.fromkeys(known[slug] for slug in slugs))}


# Runs ----------------------------------------------------------------------------------------------------------------------


def recipe_rows(library: Library) -> list[dict[str, Any]]:
    """Every run in one line, the newest first."""
    return [recipe_line(library, one) for one in library.tuned.values()]


def recipe_line(library: Library, one: Tuned) -> dict[str, Any]:
    """A run in one line."""
    run = one.run
    return {
        "run": run.id,
        "name": names_of(run.steps),
        "label": label(run.steps),
        "papers": facts(library, run.steps)["papers"],
        "model": run.model,
        "kind": run.kind,
        "goal": run.goal,
        "prompt_tokens": run.prompt_tokens,
        "new_tokens": run.new_tokens,
        "word": one.word,
        "over_free": _span(run.over_free),
        "over_baseline": _span(run.over_baseline),
        "over_exact": _span(run.over_exact),
        "metric": run.metric,
        "unit": unit_of_loss(run),
        "allowed": allowed_text(run),
        "drop": run.drop,
        "drop_low": run.drop_low,
        "drop_high": run.drop_high,
        "max_drop": run.max_drop,
        "noisy": run.noisy,
        "machine": run.fingerprint,
        "machine_name": str(library.machines.get(run.fingerprint, {}).get("cpu", "unknown processor")),
        "by": one.origin,
        "created": run.created.isoformat(timespec="minutes"),
    }


def recipe_page(library: Library, id: str) -> dict[str, Any]:
    """A run, whole. Raises InputError when there is none of that id."""
    if id not in library.tuned:
        raise InputError(f"no run of `assay tune` has the id {id[:80]!r}")
    one = library.tuned[id]
    run = one.run
    base = next((row for row in run.rows if row.row == "baseline" and row.cost is not None), None)
    rows = [_tried(row, base, run) for row in run.rows]
    return {
        **recipe_line(library, one),
        "proof": PROOF["proven" if run.proven else "not proven"],
        "by_words": ORIGINS[one.origin],
        "changed": sorted(one.changed),
        "verdict": run.verdict,
        "pictures": None if run.pictures is None else run.pictures.model_dump(mode="json"),
        "drop_level": run.drop_level,
        "levels": {
            name: {"label": found.label, "value": found.value, "low": found.low, "high": found.high, "unit": found.unit}
            for name, found in (("as loaded", run.baseline), ("free", run.free), ("found", run.best))
        },
        "steps": [step.model_dump(mode="json") for step in run.steps],
        "toml": toml(run),
        "command": run.command,
        "commit": run.commit,
        "seconds": run.seconds,
        "notes": list(run.notes),
        "rows": rows,
        "drawing": pareto(
            _points(rows), f"{len(rows)} recipes of one run: times cheaper than as loaded, against quality lost"
        ),
        "pairs": [pair_line(library, one, pair) for pair in best_pairs(one)[:PAIRS]],
    }


def _tried(row: Tried, base: Tried | None, run: TuneRun) -> dict[str, Any]:
    """A measured recipe of a run; its gain is over the model as loaded."""
    gain = None if base is None or base.cost is None or row.cost is None else base.cost / row.cost
    return {
        "row": row.row,
        "name": names_of(row.steps),
        "label": row.label(),
        "status": row.status,
        "error": row.error,
        "gain": gain if gain is not None and 0 < gain < LARGEST else None,
        "drop": row.drop,
        "drop_low": row.drop_low,
        "drop_high": row.drop_high,
        "built_on": _span(row.ratio),
        "found": row.steps == run.steps,
    }


def _points(rows: Sequence[dict[str, Any]]) -> list[Point]:
    drawn = [
        row for row in rows if row["gain"] is not None and row["drop"] is not None and abs(row["drop"]) < LARGEST / 100
    ]
    return [
        Point(
            row["name"],
            row["gain"],
            100 * row["drop"],
            "what was found" if row["found"] else row["row"],
            losses=None
            if row["drop_low"] is None or row["drop_high"] is None
            else (100 * row["drop_low"], 100 * row["drop_high"]),
            recipe=True,
        )
        for row in drawn[:ROWS]
    ]


def toml(run: TuneRun) -> str:
    """The recipe as the file that `assay apply --recipe` replays."""
    if run.kind == "images":
        options = [{"option": step.transform, "config": step.config} for step in run.steps]
        head = {"kind": "images", "format": 1, "goal": run.goal, "architecture": run.architecture}
        return as_toml({**head, "steps": options})
    document: dict[str, Any] = {
        "format": 1,
        "architecture": run.architecture,
        "goal": run.goal,
        "prompt_tokens": run.prompt_tokens,
        "new_tokens": run.new_tokens,
        "steps": [step.model_dump(mode="json") for step in run.steps],
    }
    return as_toml(document)


# Pairs ---------------------------------------------------------------------------------------------------------------------


def combines(library: Library, paper: Paper) -> dict[str, Any]:
    """What a paper's method goes together with: by the rules of recipes, and as runs measured it."""
    found: dict[str, Any] = {"slot": "", "goals": [], "instead": [], "beside": [], "trouble": ""}
    if paper.status == "code":
        found |= _by_rule(library, paper.slug)
    lines = [
        pair_line(library, one, pair, paper.slug)
        for one in library.tuned.values()
        if any(step.transform == paper.slug for row in one.run.rows for step in row.steps)
        for pair in best_pairs(one)
        if paper.slug in (step.transform for step in pair.steps)
    ]
    lines.sort(key=lambda line: line["stale"])  # fresh ones first, each the newest first
    return {**found, "pairs": lines[:PAIRS], "tried": len(lines)}


def _by_rule(library: Library, slug: str) -> dict[str, Any]:
    from assay.tuner import combining

    known = {paper.slug for paper in library.papers}
    try:
        own = combining.parts().get(slug)
        if own is None:
            return {}
        return {
            "slot": own.slot,
            "goals": list(own.goals),
            "instead": [{"name": part.name, "paper": part.name in known} for part in combining.instead_of(slug)],
            "beside": [
                {"name": part.name, "paper": part.name in known, "slot": part.slot, "goals": list(goals)}
                for part, goals in combining.beside(slug)
            ],
        }
    except (ValueError, KeyError) as error:  # a source that states something else than plain values
        return {"trouble": str(error)}


def best_pairs(one: Tuned) -> list[Pair]:
    """Of each two transforms that a run measured together, the settings that gained most, those that lost no more than is allowed first."""
    best: dict[tuple[str, ...], Pair] = {}
    for pair in one.pairs:
        names = tuple(step.transform for step in pair.steps)
        known = best.get(names)
        if known is None or _worth(pair, one.run) > _worth(known, one.run):
            best[names] = pair
    return list(best.values())


def _worth(pair: Pair, run: TuneRun) -> tuple[bool, float]:
    kept = pair.drop is not None and pair.drop <= run.max_drop
    return kept, 0.0 if pair.joint is None else pair.joint.median


def pair_line(library: Library, one: Tuned, pair: Pair, slug: str = "") -> dict[str, Any]:
    """A pair in one line, that of `slug` first if it is one of the two."""
    known = {paper.slug for paper in library.papers}
    order = (1, 0) if pair.steps[1].transform == slug else (0, 1)
    first, second = (pair.steps[place] for place in order)
    own, other = (pair.alone[place] for place in order)
    return {
        "first": first.transform,
        "second": second.transform,
        "first_label": first.label(),
        "second_label": second.label(),
        "second_paper": second.transform in known,
        "on_top_of": label(pair.rest),
        "joint": _span(pair.joint),
        "first_alone": _span(own),
        "second_alone": _span(other),
        "product": pair.expected,
        "unit": unit_of_loss(one.run),
        "allowed": allowed_text(one.run),
        "drop": pair.drop,
        "drop_low": pair.drop_low,
        "drop_high": pair.drop_high,
        "max_drop": one.run.max_drop,
        "run": one.run.id,
        "model": one.run.model,
        "goal": one.run.goal,
        "machine": one.run.fingerprint,
        "by": one.origin,
        "created": one.run.created.isoformat(timespec="minutes"),
        "stale": one.stale([*pair.steps, *pair.rest]),
    }


def _span(found: Span | None) -> dict[str, float | None] | None:
    return None if found is None else {"median": found.median, "low": found.low, "high": found.high}
