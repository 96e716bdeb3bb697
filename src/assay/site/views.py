"""What each page says, as plain dictionaries: the templates and the JSON are made of the same ones."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

from assay import catalogue
from assay.catalogue import FAMILIES, MODELS, SAVES, Claim, Paper
from assay.checks import choice
from assay.errors import InputError
from assay.evidence import samples
from assay.evidence.audit import audit
from assay.evidence.record import Evidence
from assay.evidence.report import over_text, point_text, quality_text, verdict_text
from assay.evidence.verdict import PAYS, figure, remarks, say
from assay.site import recipes
from assay.site.charts import Against, bar, gains, roofline
from assay.site.library import CODE, ORIGINS, PLANNED, WORDS, Library, Seen, cores, flags

MINE = "like-mine"
MODEL_WORDS = {
    "language": "language models",
    "encoder": "text encoders",
    "encoder-decoder": "encoder-decoders",
    "vision": "vision models",
    "diffusion": "diffusion models",
    "multimodal": "multimodal models",
    "graph": "graph networks",
    "any network": "any network",
    "no model": "",
}
AUDIT_FIELDS = ("samples", "before", "after", "paired")
CHIPS = (*WORDS, CODE, PLANNED)
SCALES = {"smoke": "seconds: a trial of the code", "small": "minutes on a CPU", "full": "hours, or a GPU"}


@dataclass(frozen=True)
class Filter:
    """What the list of papers is narrowed to; "" is everything. It is the query of the page's address."""

    q: str = ""
    family: str = ""
    saves: str = ""
    verdict: str = ""
    machine: str = ""
    model: str = ""

    @staticmethod
    def of(query: dict[str, str], library: Library) -> Filter:
        """From the query of an address. Raises InputError naming a parameter that is not known, or its value."""
        allowed: dict[str, Sequence[str]] = {
            "family": FAMILIES,
            "saves": SAVES,
            "verdict": CHIPS,
            "machine": (MINE, *library.machines),
            "model": MODELS,
        }
        for name, value in query.items():
            if name != "q" and name not in allowed:
                raise InputError(f"there is no parameter {name!r}; there are q, {', '.join(allowed)}")
            if name in allowed and value:
                try:
                    choice(name, value, allowed[name])
                except ValueError as error:
                    raise InputError(str(error)) from None
        if len(query.get("q", "")) > 500:
            raise InputError("q must be at most 500 characters long")
        return Filter(**query)

    @property
    def query(self) -> dict[str, str]:
        return {name: value for name, value in dataclasses.asdict(self).items() if value}


def machines_of(wanted: str, library: Library) -> frozenset[str] | None:
    """The machines that a filter allows; None for any."""
    if not wanted:
        return None
    return library.like(library.here) if wanted == MINE else frozenset([wanted])


def paper_rows(library: Library, wanted: Filter, ranking: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """The papers that fit, each with a line for each claim. `ranking` (slugs) orders them, and leaves out those it does not name."""
    order = {slug: place for place, slug in enumerate(ranking)} if ranking is not None else None
    allowed = machines_of(wanted.machine, library)
    rows: list[dict[str, Any]] = []
    for paper in library.papers:
        if order is not None and paper.slug not in order:
            continue
        if wanted.family not in ("", paper.family):
            continue
        if wanted.saves and wanted.saves not in paper.saves:
            continue
        if wanted.model and wanted.model not in paper.models and "any network" not in paper.models:
            continue
        claims = [claim_row(library, paper, claim, allowed) for claim in paper.claims]
        if wanted.verdict:
            claims = [claim for claim in claims if claim["word"] == wanted.verdict]
            if not claims:
                continue
        if allowed is not None and not any(claim["measured"] for claim in claims):
            continue
        rows.append(
            {
                "slug": paper.slug,
                "number": paper.number,
                "title": paper.title,
                "family": paper.family,
                "saves": list(paper.saves),
                "models": list(paper.models),
                "works_on": works_on(paper),
                "status": library.status[paper.slug],
                "summary": paper.summary,
                "claims": claims,
            }
        )
    place = {"measured": 0, "code": 1, "planned": 2}
    rows.sort(key=lambda row: (place[row["status"]], row["number"]) if order is None else (order[row["slug"]], 0))
    return rows


def works_on(paper: Paper) -> str:
    """What kinds of models the paper is for, in words; "" where it is about no model."""
    return ", ".join(filter(None, (MODEL_WORDS[name] for name in paper.models)))


def claim_row(library: Library, paper: Paper, claim: Claim, allowed: frozenset[str] | None = None) -> dict[str, Any]:
    """One line on a claim: the paper's number, ours, the verdict; where nothing was measured, why."""
    found = [s for s in library.of(claim) if allowed is None or s.summary.fingerprint in allowed]
    row: dict[str, Any] = {
        "id": claim.id,
        "name": claim.id.split("/")[1],
        "metric": claim.metric,
        "paper": "direction only" if claim.value is None else figure(claim.value, claim.unit),
        "measured": "",
        "drawing": "",
        "word": CODE if paper.status == "code" else PLANNED,
        "why": "not measured yet" if paper.status == "code" else "there is no code for this paper yet",
        "machines": len({s.summary.fingerprint for s in found}),
        "disagree": disagree(found),
    }
    if not found:
        return row
    first = found[0]
    record = first.record
    row |= {"word": first.word, "why": first.summary.reason, "origin": first.origin, "scale": record.scale}
    row["machine"] = first.summary.fingerprint
    if record.measured is not None:
        row |= {"measured": say(record.measured, record.unit), "drawing": bar(record)}
    return row


def disagree(found: Sequence[Seen]) -> bool:
    """Whether machines or runs come to different ends: on one it pays, on another it does not."""
    words = {s.summary.verdict for s in found if s.summary.verdict is not None}
    return any(s.word == "contested" for s in found) or bool(words & set(PAYS)) and bool(words - set(PAYS))


def paper_page(library: Library, slug: str, against: str = "paper") -> dict[str, Any]:
    """Everything about a paper. Raises InputError for one that does not exist, or a baseline that does not."""
    paper = catalogue.get(slug)
    if against not in get_args(Against):
        raise InputError(f"against must be one of {', '.join(get_args(Against))}; got {against!r}")
    arm: Against = against  # type: ignore[assignment]
    related = [p for p in library.papers if p.family == paper.family and p.slug != slug]
    related.sort(key=lambda p: (-len(set(p.saves) & set(paper.saves)), p.number))
    return {
        **dataclasses.asdict(paper),
        "works_on": works_on(paper),
        "claims": [claim_page(library, paper, claim, arm) for claim in paper.claims],
        "status": library.status[slug],
        "module": paper.module if paper.status == "code" else "",
        "import_line": f"from {paper.module.rsplit('.', 1)[0]} import {slug}" if paper.status == "code" else "",
        "command": f"assay verify {slug}",
        "not_for": when_not(paper) if paper.status == "code" else "",
        "against": against,
        "combines": recipes.combines(library, paper),
        "lineage": lineage(slug),
        "related": [{"slug": p.slug, "title": p.title} for p in related[:6]],
        "bibtex": bibtex(paper),
    }


def claim_page(library: Library, paper: Paper, claim: Claim, against: Against) -> dict[str, Any]:
    """A claim with all that was seen of it, machine by machine."""
    found = library.of(claim)
    return {
        **claim_row(library, paper, claim),
        "baseline": claim.baseline or "nothing stated",
        "conditions": claim.conditions,
        "form": catalogue.FORMS[claim.form],
        "seen": [seen_page(library, seen, against) for seen in found],
    }


def seen_page(library: Library, seen: Seen, against: Against) -> dict[str, Any]:
    """What was measured of a claim on one machine."""
    record = seen.record
    quality = record.quality
    found = gains(record, against)
    return {
        "record": record.id,
        "word": seen.word,
        "reason": seen.summary.reason,
        "origin": seen.origin,
        "by": ORIGINS[seen.origin],
        "machine": seen.summary.fingerprint,
        "machine_name": str(library.machines.get(seen.summary.fingerprint, {}).get("cpu", "unknown processor")),
        "scale": record.scale,
        "scale_words": SCALES[record.scale],
        "measured": "-" if record.measured is None else say(record.measured, record.unit),
        "over_free": over_text(record, "free"),
        "over_exact": over_text(record, "exact"),
        "gain": None if found is None else found.median,
        "drawing": bar(record, against),
        "quality": quality_text(record),
        "quality_controls": {} if quality is None else quality.controls,
        "controls": record.controls,
        "rule": record.refuted_if,
        "refuted": record.refuted,
        "measured_here": record.measured_here,
        "departures": record.departures,
        "remarks": remarks(record),
        "noisy": record.noise or ("the machine was busy" if record.noisy else ""),
        "command": record.command,
        "commit": record.commit or f"version {record.assay_version}",
        "created": record.created.isoformat(timespec="minutes"),
        "runs": [attempt(run) for run in seen.summary.runs],
        "points": [attempt(point) for point in seen.summary.points],
    }


def attempt(record: Evidence) -> dict[str, Any]:
    """A record in one line."""
    return {
        "record": record.id,
        "point": point_text(record.point),
        "measured": record.error or "-" if record.measured is None else say(record.measured, record.unit),
        "word": verdict_text(record).removesuffix(" *"),
        "noisy": record.noisy,
        "decides": record.decides,
        "created": record.created.isoformat(timespec="minutes"),
    }


@functools.cache
def when_not(paper: Paper) -> str:
    """What the module's docstring says about when not to use it, found in its source: nothing is imported."""
    import ast
    from importlib import util
    from pathlib import Path

    package = util.find_spec("assay.methods")
    for folder in package.submodule_search_locations or [] if package else []:
        room = Path(folder) / paper.family / paper.slug
        file = room / "__init__.py" if room.is_dir() else room.with_suffix(".py")
        if not file.is_file():
            continue
        text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
        blocks = [" ".join(block.split()) for block in text.split("\n\n")]
        found = [
            block
            for block in blocks
            if "when not" in block.lower() or "not to use" in block.lower() or "do not use" in block.lower()
        ]
        return re.sub(r"^when not to use it: *(.)", lambda m: m[1].upper(), " ".join(found), flags=re.IGNORECASE)
    return ""


def lineage(slug: str) -> list[dict[str, str]]:
    """How the paper and others of the catalogue speak of each other."""
    found = []
    for edge in catalogue.lineage():
        if edge.paper == slug:
            found.append({"relation": edge.relation, "slug": edge.other, "source": edge.source})
        elif edge.other == slug:
            found.append({"relation": catalogue.RELATIONS[edge.relation], "slug": edge.paper, "source": edge.source})
    return found


def bibtex(paper: Paper) -> str:
    """The paper as a BibTeX entry, of what the catalogue knows for certain."""
    kept = paper.title.replace("\\", "").replace("{", "").replace("}", "")
    fields = [("title", "{" + kept + "}")]
    if paper.year is not None:
        fields.append(("year", str(paper.year)))
    if paper.arxiv is not None:
        fields += [("eprint", paper.arxiv), ("archivePrefix", "arXiv")]
    lines = ",\n".join(f"  {name} = {{{value}}}" for name, value in fields)
    return f"@misc{{{paper.slug},\n{lines}\n}}\n"


def machine_page(library: Library, fingerprint: str) -> dict[str, Any]:
    """A machine: its facts, and how the claims came out on it. Raises InputError for one that is not known."""
    if fingerprint not in library.machines:
        raise InputError(f"no machine is called {fingerprint!r}")
    facts = library.machines[fingerprint]
    found = [s for seen in library.seen.values() for s in seen if s.summary.fingerprint == fingerprint]
    claims = {claim.id for paper in library.papers for claim in paper.claims}
    counts: dict[str, int] = {}
    for seen in found:
        counts[seen.word] = counts.get(seen.word, 0) + 1
    rows = [
        {"claim": s.record.claim, "slug": s.record.slug, "known": s.record.claim in claims, "word": s.word, "by": s.origin,
         "measured": "-" if s.record.measured is None else say(s.record.measured, s.record.unit)}
        for s in sorted(found, key=lambda s: s.record.claim)
    ]  # fmt: skip
    return {
        **machine_facts(facts, fingerprint),
        "here": fingerprint == library.here,
        "like": sorted(library.like(fingerprint) - {fingerprint}),
        "counts": dict(sorted(counts.items())),
        "rows": rows,
        "calibration": calibration() if fingerprint == library.here else None,
    }


def machine_facts(facts: dict[str, Any], fingerprint: str) -> dict[str, Any]:
    """What a reader wants to know of a machine; records from elsewhere may hold anything, so every field is looked at."""
    ram = facts.get("ram_bytes")
    versions = facts.get("versions")
    return {
        "fingerprint": fingerprint,
        "cpu": str(facts.get("cpu", "unknown processor")),
        "cores": cores(facts),
        "ram_gib": round(ram / 2**30, 1) if isinstance(ram, int | float) and 0 < ram < 2**60 else None,
        "flags": sorted(flags(facts)),
        "gpu": str(facts.get("gpu") or ""),
        "os": str(facts.get("os", "")),
        "virtual": facts.get("virtual") is True,
        "versions": {str(k): str(v) for k, v in versions.items()} if isinstance(versions, dict) else {},
    }


def calibration() -> dict[str, Any] | None:
    """The rates of this machine, if they were measured before; a page never starts a calibration."""
    from assay.measure.machine import stored_calibration

    found = stored_calibration()
    if found is None:
        return None
    return {
        "peak_flops": found.peak_flops,
        "bandwidth": found.memory_bandwidth,
        "ridge": {dtype: found.ridge(dtype) for dtype in found.peak_flops},
        "noisy": found.noisy,
        "drawing": roofline(found.peak_flops, found.memory_bandwidth),
    }


def audited(form: dict[str, str]) -> dict[str, Any]:
    """What the audit says of pasted samples: `Audit.document`. Raises InputError for what is no samples."""
    found = samples.read(form["samples"], before=form["before"].strip() or None, after=form["after"].strip() or None)
    return audit(found, paired=bool(form["paired"])).document()
