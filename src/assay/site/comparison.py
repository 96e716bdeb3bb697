"""Speed against quality: claims and proven recipes side by side, narrowed by what stands in the address of the page."""

from __future__ import annotations

import csv as writer
import io
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from assay.catalogue import FAMILIES
from assay.checks import choice
from assay.errors import InputError
from assay.evidence.record import QualityRecord
from assay.evidence.tuned import Span
from assay.evidence.verdict import loss
from assay.site.charts import AGAINST, LARGEST, Against, Point, front, gains
from assay.site.library import Library, Seen, Tuned
from assay.site.recipes import facts, names_of
from assay.site.views import MINE, machines_of

WHAT = {"": "papers and recipes", "papers": "papers", "recipes": "recipes"}
SHOWN = 250  # lines and points of a page; the CSV and the JSON hold all
OFFERED = 150  # papers, recipes and machines that a form offers, of each
CHOSEN = 200  # papers, recipes and machines that an address may name, of each
MANY = ("paper", "recipe", "machine")
ONE = ("against", "what", "family", "older")


@dataclass(frozen=True)
class Choice:
    """What is compared; empty is everything. It is the query of the page's address, where `paper`, `recipe`, `machine` may stand often.

    `older` lets in what stale records and runs say, whose code has changed since.
    """

    against: Against = "free"
    what: str = ""
    family: str = ""
    paper: tuple[str, ...] = ()
    recipe: tuple[str, ...] = ()
    machine: tuple[str, ...] = ()
    older: bool = False

    @staticmethod
    def of(query: Iterable[tuple[str, str]], library: Library) -> Choice:
        """From the query of an address. Raises InputError naming a parameter that is not known, or its value."""
        given: dict[str, list[str]] = {}
        for name, value in query:
            if name not in (*ONE, *MANY):
                raise InputError(f"there is no parameter {name[:40]!r}; there are {', '.join((*ONE, *MANY))}")
            if value and value not in given.setdefault(name, []):
                given[name].append(value)
        allowed: dict[str, Sequence[str]] = {
            "against": get_args(Against),
            "what": tuple(filter(None, WHAT)),
            "family": FAMILIES,
            "older": ("1",),
            "paper": [paper.slug for paper in library.papers],
            "recipe": list(library.tuned),
            "machine": (MINE, *library.machines),
        }
        for name, values in given.items():
            if len(values) > (CHOSEN if name in MANY else 1):
                raise InputError(
                    f"{name} may be given {f'{CHOSEN} times' if name in MANY else 'once'}, got {len(values)}"
                )
            for value in values:
                if name == "recipe" and value not in library.tuned:
                    raise InputError(f"recipe must be the id of a run of `assay tune`, got {value[:80]!r}")
                try:
                    choice(name, value, allowed[name])
                except ValueError as error:
                    raise InputError(str(error)) from None
        one = {name: given[name][0] for name in ("against", "what", "family") if given.get(name)}
        many = {name: tuple(given.get(name, ())) for name in MANY}
        return Choice(**one, **many, older=bool(given.get("older")))  # type: ignore[arg-type]

    @property
    def query(self) -> dict[str, str | list[str]]:
        """As the query of an address, without what is as it is anyway."""
        found: dict[str, str | list[str]] = {"against": self.against} if self.against != "free" else {}
        found |= {name: getattr(self, name) for name in ("what", "family") if getattr(self, name)}
        found |= {name: list(getattr(self, name)) for name in MANY if getattr(self, name)}
        return found | ({"older": "1"} if self.older else {})


def compare(library: Library, wanted: Choice | None = None) -> dict[str, Any]:
    """Every claim and every recipe that has a gain and a quality, for the plot and the tables.

    `choices` are the papers, recipes and machines that there is something of to compare, whatever was chosen.
    """
    wanted = wanted or Choice()
    found = _all(library, wanted)
    rows = [row for row in found if _fits(library, wanted, row)]
    points = [as_point(row) for row in rows]
    best = set(map(id, front(points)))
    for row, point in zip(rows, points, strict=True):
        row["dominated"] = id(point) not in best
    rows.sort(key=lambda row: -row["gain"])
    return {
        "against": wanted.against,
        "against_words": AGAINST[wanted.against],
        "query": wanted.query,
        "rows": rows,
        "choices": {
            "paper": sorted({row["slug"] for row in found if row["kind"] == "paper"}),
            "recipe": {row["run"]: _chosen_as(row) for row in found if row["kind"] == "recipe"},
            "machine": [name for name in library.machines if any(row["machine"] == name for row in found)],
        },
        "stale": 0 if wanted.older else len(_all(library, Choice(wanted.against, older=True))) - len(found),
    }


def shown(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows that a page draws: all that nothing beats, then the largest gains; as many as it bears, by falling gain."""
    kept = sorted(rows, key=lambda row: (row["dominated"], -row["gain"]))[:SHOWN]
    return sorted(kept, key=lambda row: -row["gain"])


def _all(library: Library, wanted: Choice) -> list[dict[str, Any]]:
    found = []
    for paper in library.papers:
        for claim in paper.claims:
            for seen in library.of(claim):
                row = compared(seen, wanted.against, older=wanted.older)
                if row is not None:
                    found.append({"family": paper.family, **row})
    for one in library.tuned.values():
        row = recipe_row(library, one, wanted.against, older=wanted.older)
        if row is not None:
            found.append(row)
    return found


def _fits(library: Library, wanted: Choice, row: dict[str, Any]) -> bool:
    """Whether a row is among what was chosen: papers narrow the claims, recipes the recipes, all else both."""
    if wanted.what and row["kind"] != wanted.what.removesuffix("s"):
        return False
    if wanted.family and wanted.family not in row["family"].split(" "):
        return False
    if wanted.machine and not any(row["machine"] in (machines_of(name, library) or ()) for name in wanted.machine):
        return False
    if row["kind"] == "recipe":
        return row["run"] in wanted.recipe if wanted.recipe else not wanted.paper
    return row["slug"] in wanted.paper if wanted.paper else not wanted.recipe


def _chosen_as(row: dict[str, Any]) -> str:
    return f"{row['name']}: {row['model']}, {row['goal']}, {row['created'][:10]}, {row['machine'][:6]}"


def compared(seen: Seen, against: Against, *, older: bool = False) -> dict[str, Any] | None:
    """A claim as a row of the comparison; None when it is stale (unless `older`) or failed, or has no ratio or no quality."""
    record = seen.record
    fresh = seen.summary.verdict is not None
    quality = record.quality
    if not fresh and not (older and seen.word == "stale") or record.measured is None:
        return None
    found = gains(record, against)
    if found is None or not found.log or quality is None or not quality.baseline:
        return None
    lost = _percent(quality, quality.candidate)
    if not (0 < found.median < LARGEST and abs(lost) < LARGEST):
        return None
    ends = (
        None
        if quality.low is None or quality.high is None
        else [_percent(quality, end) for end in (quality.low, quality.high)]
    )
    return {
        "kind": "paper",
        "name": record.claim,
        "slug": record.slug,
        "run": "",
        "gain": found.median,
        "low": found.low,
        "high": found.high,
        "quality": quality.metric,
        "quality_lost_percent": lost,
        "quality_lost_low": None if ends is None else min(ends),
        "quality_lost_high": None if ends is None else max(ends),
        "verdict": seen.word,
        "scale": record.scale,
        "model": "",
        "goal": "",
        "machine": seen.summary.fingerprint,
        "by": seen.origin,
        "created": record.created.isoformat(timespec="minutes"),
        "record": record.id,
    }


def _percent(quality: QualityRecord, value: float) -> float:
    """How much worse than the baseline a value is, in per cent of it."""
    assert quality.baseline
    return 100 * loss(quality, value) / abs(quality.baseline)


def recipe_row(library: Library, one: Tuned, against: Against, *, older: bool = False) -> dict[str, Any] | None:
    """A proven recipe as a row of the comparison; None when it is not, when it is stale (unless `older`), or lacks that ratio.

    What a claim's gain over the paper's baseline is, is for a recipe the gain over the model as loaded. Pictures that are lost are, as a
    claim's quality, a share of those that the model as loaded has.
    """
    run = one.run
    ratio: Span | None = {"free": run.over_free, "paper": run.over_baseline, "exact": run.over_exact}[against]
    whole = 1.0 if run.pictures is None else run.pictures.baseline
    if not run.proven or one.stale() and not older or ratio is None or run.drop is None or not whole:
        return None
    lost = 100 * run.drop / whole
    ends = [None if end is None else 100 * end / whole for end in (run.drop_low, run.drop_high)]
    if not (0 < ratio.median < LARGEST and all(abs(value) < LARGEST for value in (lost, *ends) if value is not None)):
        return None
    return {
        "kind": "recipe",
        "name": names_of(run.steps),
        "slug": "",
        "run": run.id,
        "family": facts(library, run.steps)["families"],
        "gain": ratio.median,
        "low": ratio.low,
        "high": ratio.high,
        "quality": run.metric,
        "quality_lost_percent": lost,
        "quality_lost_low": ends[0],
        "quality_lost_high": ends[1],
        "verdict": one.word,
        "scale": "",
        "model": run.model,
        "goal": run.goal,
        "machine": run.fingerprint,
        "by": one.origin,
        "created": run.created.isoformat(timespec="minutes"),
        "record": "",
    }


def as_point(row: dict[str, Any], link: Callable[[str], str] | None = None) -> Point:
    """A row of the comparison as a point of its plot."""
    recipe = row["kind"] == "recipe"
    target = "" if link is None else link(f"recipes/{row['run']}" if recipe else f"papers/{row['slug']}")
    name = f"{row['name']} ({row['model']}, {row['goal']})" if recipe else row["name"]
    return Point(
        name,
        row["gain"],
        row["quality_lost_percent"],
        row["verdict"],
        target,
        _ends(row["low"], row["high"]),
        _ends(row["quality_lost_low"], row["quality_lost_high"]),
        recipe,
    )


def _ends(low: float | None, high: float | None) -> tuple[float, float] | None:
    return None if low is None or high is None or math.isnan(low) or math.isnan(high) else (low, high)


COLUMNS = (
    "kind", "name", "family", "gain", "low", "high", "quality", "quality_lost_percent", "quality_lost_low", "quality_lost_high",
    "verdict", "scale", "model", "goal", "machine", "by", "dominated", "created", "record", "run",
)  # fmt: skip


def csv(rows: Sequence[dict[str, Any]]) -> str:
    """The comparison as CSV; a cell that a spreadsheet would run as a formula is kept from it by an apostrophe."""
    text = io.StringIO()
    out = writer.writer(text, lineterminator="\r\n")
    out.writerow(COLUMNS)
    for row in rows:
        cells = [row[name] for name in COLUMNS]
        out.writerow(
            [f"'{c}" if isinstance(c, str) and c[:1] in ("=", "+", "-", "@", "\t", "\r") else c for c in cells]
        )
    return text.getvalue()
