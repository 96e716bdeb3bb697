"""What the papers say: 138 entries in `papers/<family>.toml`, read as frozen dataclasses.

No file states a paper's `status`: it is `code` if a module `assay.methods.<family>.<slug>` exists, else `planned`.
"""

from __future__ import annotations

import difflib
import tomllib
from dataclasses import dataclass
from functools import cache
from importlib import resources, util
from typing import Any

from assay.errors import InputError

SAVES = ("time", "memory", "energy", "communication", "data", "money", "tokens")
MODELS = (
    "language", "encoder", "encoder-decoder", "vision", "diffusion", "multimodal", "graph", "any network", "no model",
)  # fmt: skip
"""What kind of model a paper works on; "language" are decoders, "any network" whatever has weights."""
FAMILIES = (
    "attention", "mixers", "layers", "inference", "serving", "compression", "reasoning", "code", "moe", "training",
    "hardware", "federated", "multimodal", "vision", "generation", "alignment", "graphs", "estimators", "science",
)  # fmt: skip

FORMS = {
    "ratio": "value over the baseline's; 1 is no gain",
    "saved": "per cent less than the baseline; 0 is no gain",
    "added": "per cent more than the baseline; 0 is no gain",
    "points": "a difference from the baseline; 0 is no gain",
    "level": "an absolute figure; the baseline's own figure is no gain",
    "bound": "a cost or loss kept within the value, or a share kept above it",
    "about": "two-sided: as good as, comparable, about so many",
}
QUANTITIES = ("time", "memory", "quality", "count")
RELATIONS = {"builds on": "is built on by", "compares with": "is compared with by", "covers": "is covered by"}
"""How one paper speaks of another, and how the other sees it."""


@dataclass(frozen=True)
class Claim:
    """One number of a paper. `value` is None where the paper states a direction only (or the number could not be confirmed).

    `higher_is_better` tells the direction of `metric`; `baseline` is what the number is measured against, `baseline_value` its own
    number where the claim is an absolute level. `form` says how the number is to be read (`FORMS`), `quantity` what it counts
    (`QUANTITIES`; "" where nobody has said so yet).
    """

    id: str  # "slug/what"
    metric: str
    value: float | None
    unit: str
    baseline: str
    conditions: str
    higher_is_better: bool = True
    form: str = "ratio"
    quantity: str = ""
    baseline_value: float | None = None


@dataclass(frozen=True)
class Paper:
    """A catalogue entry. `year` and `arxiv` are None where they are not sure; `code` is the official repository or None."""

    slug: str
    number: int
    title: str
    family: str
    summary: str
    saves: tuple[str, ...]
    models: tuple[str, ...]
    claims: tuple[Claim, ...]
    year: int | None = None
    arxiv: str | None = None
    code: str | None = None

    @property
    def status(self) -> str:
        """`code` when the method's module exists, else `planned`. Whether it was measured too, `assay.evidence.shipped` knows."""
        return "code" if _has_module(self.family, self.slug) else "planned"

    @property
    def module(self) -> str:
        return f"assay.methods.{self.family}.{self.slug}"


@dataclass(frozen=True)
class Edge:
    """One paper of the catalogue speaks of another: `paper` `relation` `other`, as `source` says."""

    paper: str
    relation: str
    other: str
    source: str


@cache
def lineage() -> tuple[Edge, ...]:
    """What is known of how the papers of the catalogue follow from each other; far from all of it."""
    file = resources.files(__package__) / "lineage.toml"
    return tuple(Edge(**entry) for entry in tomllib.loads(file.read_text(encoding="utf-8"))["edge"])


@cache
def papers() -> tuple[Paper, ...]:
    """All papers, by number."""
    files = [resources.files(__package__) / "papers" / f"{family}.toml" for family in FAMILIES]
    entries = [entry for file in files for entry in tomllib.loads(file.read_text(encoding="utf-8"))["paper"]]
    return tuple(sorted(map(_paper, entries), key=lambda paper: paper.number))


def get(slug: str) -> Paper:
    """The paper of that slug. Raises InputError with the nearest slugs when there is none.

    >>> get("xattention").title
    'XAttention: Block Sparse Attention with Antidiagonal Scoring'
    """
    known = {paper.slug: paper for paper in papers()}
    if slug not in known:
        near = difflib.get_close_matches(slug, known, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}?" if near else "`assay papers` lists them"
        raise InputError(f"no paper is called {slug!r}; {hint}")
    return known[slug]


def get_claim(claim_id: str) -> Claim:
    """The claim with that id ("slug/what"). Raises InputError naming the paper's claims when there is none.

    >>> get_claim("xattention/attention-speedup").value
    13.5
    """
    paper = get(claim_id.split("/", 1)[0])
    for claim in paper.claims:
        if claim.id == claim_id:
            return claim
    raise InputError(f"no claim is called {claim_id!r}; {paper.slug} has: {', '.join(c.id for c in paper.claims)}")


def _paper(entry: dict[str, Any]) -> Paper:
    slug = entry["slug"]
    claims = tuple(
        Claim(
            id=f"{slug}/{claim['id']}",
            metric=claim["metric"],
            value=claim.get("value"),
            unit=claim.get("unit", ""),
            baseline=claim.get("baseline", ""),
            conditions=claim.get("conditions", ""),
            higher_is_better=claim.get("better", "higher") == "higher",
            form=claim.get("form") or {"x": "ratio", "points": "points"}.get(claim.get("unit", ""), "level"),
            quantity=claim.get("quantity", ""),
            baseline_value=claim.get("baseline_value"),
        )
        for claim in entry.get("claims", [])
    )
    fields = {name: entry.get(name) for name in ("year", "arxiv", "code")}
    return Paper(
        slug,
        entry["number"],
        entry["title"],
        entry["family"],
        entry["summary"],
        tuple(entry["saves"]),
        tuple(entry["models"]),
        claims,
        **fields,
    )


@cache
def _has_module(family: str, slug: str) -> bool:
    # looked up on the package's own path, so that neither the family nor the method is imported
    package = util.find_spec("assay.methods")
    for folder in package.submodule_search_locations or [] if package else []:
        from pathlib import Path

        room = Path(folder) / family / slug
        if room.with_suffix(".py").is_file() or (room / "__init__.py").is_file():
            return True
    return False
