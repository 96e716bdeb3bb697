"""Renders pages from views and templates; the server and the export both call it, with links of their own kind."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from assay import __version__
from assay.catalogue import FAMILIES, MODELS, SAVES
from assay.errors import InputError
from assay.evidence.record import Evidence
from assay.site import comparison, guide, recipes, views
from assay.site.charts import AGAINST, clean, pareto
from assay.site.comparison import Choice
from assay.site.jobs import GOALS, STATES, Job
from assay.site.library import ORIGINS, Library
from assay.site.views import CHIPS, MINE, Filter

STATIC = Path(__file__).parent / "static"
MOST = 100  # lines of a list that a record may make as long as it likes
LONGEST = 2000  # characters of a text from a record; its own page shows it whole
MEANINGS = {
    "reproduced": "at least 80 % of the paper's gain, quality held, better than what is free",
    "direction holds": "a gain over everything that is free, smaller than the paper's",
    "does not pay here": "something free, or our own exact code, is as good",
    "refuted here": "what was said beforehand to refute the claim came about",
    "undecided": "the interval reaches both ways, or the machine was busy",
    "quality not shown": "the quality metric could not tell the method from its controls",
    "contested": "runs on one machine disagree",
    "computed": "arithmetic on sizes chosen beforehand",
    "needs other hardware": "this machine lacks what the experiment needs",
    "stale": "the code it measured has changed since: it decides nothing",
    "failed": "the run ended with an error",
    "not measured": "there is code, and no record yet",
    "planned": "there is no code yet",
}


@dataclass(frozen=True)
class Links:
    """How pages point at each other: from the root of a server, or from file to file in an export."""

    root: str = ""
    static: bool = False  # files: `papers/x.html`, relative
    depth: int = 0  # of the page that the links stand on

    def __call__(self, path: str = "", **query: str | list[str]) -> str:
        if not self.static:
            asked = "?" + urlencode(query, doseq=True) if query else ""
            return f"{self.root}/{path}{asked}"
        up = "../" * self.depth
        if not path:
            return f"{up}index.html" + (f"#{urlencode(query, doseq=True)}" if query else "")
        return up + (path if "." in path.rsplit("/", 1)[-1] else f"{path}.html")


@dataclass
class Pages:
    """The pages of one library. `commands` are those of the guide that the command line says about itself."""

    library: Library
    links: Links = field(default_factory=Links)
    commands: tuple[guide.Page, ...] = ()
    jobs: bool = False  # work can be started from here

    def papers(self, wanted: Filter, ranking: list[str] | None = None, method: str = "", *, part: bool = False) -> str:
        rows = views.paper_rows(self.library, wanted, ranking)
        name = "rows.html" if part else "papers.html"
        return self._page(
            name,
            rows=rows,
            wanted=wanted,
            method=method,
            choices={
                "family": FAMILIES,
                "saves": SAVES,
                "verdict": CHIPS,
                "machine": (MINE, *self.library.machines),
                "model": MODELS,
            },
            machine_names=self._machine_names(),
            overview=self._overview(),
            like=sorted(self.library.like(self.library.here)),
        )

    def paper(self, slug: str, against: str = "paper") -> str:
        return self._page("paper.html", paper=views.paper_page(self.library, slug, against), against_all=AGAINST)

    def record(self, id: str) -> str:
        record, origin = self.found(id)
        text = json.dumps(json.loads(record.to_json()), indent=2, ensure_ascii=False)
        return self._page(
            "record.html",
            record=record,
            origin=ORIGINS[origin],
            text=escape(clean(text)),
            word=views.attempt(record)["word"],
            known=any(paper.slug == record.slug for paper in self.library.papers),
        )

    def compare(self, wanted: Choice | None = None) -> str:
        wanted = wanted or Choice()
        seen = comparison.compare(self.library, wanted)
        names = self._machine_names()
        all_of = {
            "machine": {name: names[name] for name in (MINE, *seen["choices"]["machine"], *wanted.machine)},
            "paper": {slug: slug for slug in (*seen["choices"]["paper"], *wanted.paper)},
            "recipe": seen["choices"]["recipe"]
            | {id: id[:12] for id in wanted.recipe if id not in seen["choices"]["recipe"]},
        }
        return self._page(
            "compare.html",
            seen=seen,
            rows=comparison.shown(seen["rows"]),
            wanted=wanted,
            drawing=Markup(self.plot(seen)),
            families=FAMILIES,
            boxes_of={name: _offered(options, getattr(wanted, name)) for name, options in all_of.items()},
            against_all=AGAINST,
            what_all=comparison.WHAT,
        )

    def plot(self, seen: dict[str, Any], *, standalone: bool = False) -> str:
        """The plot of a comparison. On its own it holds its colours, and links nowhere."""
        link: Callable[[str], str] | None = None if standalone else self.links
        points = [comparison.as_point(row, link) for row in comparison.shown(seen["rows"])]
        title = f"gain over {seen['against_words']} against quality lost, {len(points)} claims and recipes"
        return pareto(points, title, standalone=standalone)

    def recipes(self) -> str:
        rows = recipes.recipe_rows(self.library)
        return self._page("recipes.html", found=rows[: recipes.RUNS], count=len(rows))

    def recipe(self, id: str) -> str:
        return self._page("recipe.html", recipe=recipes.recipe_page(self.library, id), rows_shown=recipes.ROWS)

    def machines(self) -> str:
        found = [views.machine_page(self.library, name) for name in self.library.machines]
        return self._page("machines.html", machines=found)

    def machine(self, fingerprint: str) -> str:
        return self._page(
            "machine.html", machine=views.machine_page(self.library, fingerprint), names=self._machine_names()
        )

    def audit(self) -> str:
        """The form."""
        return self._page("audit.html", asked=dict.fromkeys(views.AUDIT_FIELDS, ""), seen=None, error="")

    def audited(self, form: dict[str, str]) -> tuple[str, int]:
        """The form with its answer, and the status: 400 where what was pasted is no samples."""
        asked = {name: form.get(name, "") for name in views.AUDIT_FIELDS}
        try:
            return self._page("audit.html", asked=asked, seen=views.audited(asked), error=""), 200
        except InputError as error:
            return self._page("audit.html", asked=asked, seen=None, error=str(error)), 400

    def contents(self) -> str:
        return self._page("guide.html", pages=self.texts())

    def guide_page(self, name: str) -> str:
        found = guide.page(name, self.texts())
        body = Markup(guide.rendered(found.text, self.links))
        return self._page("guide_page.html", page=found, body=body, pages=self.texts())

    def texts(self) -> tuple[guide.Page, ...]:
        """Every page of the guide."""
        return (*guide.documents(), *self.commands)

    def job_list(self, found: list[Job], secret: str) -> str:
        """The jobs, and the forms that start one; `secret` is "" for who may not."""
        ready = [paper.slug for paper in self.library.papers if paper.status == "code"]
        return self._page("jobs.html", found=found, secret=secret, ready=sorted(ready), states=STATES, goals=GOALS)

    def job(self, job: Job, log: str, secret: str) -> str:
        """A job with all that its command said: that may be longer than other texts."""
        return self._page("job.html", job=job, log=escape(clean(log)), secret=secret, states=STATES)

    def error(self, status: int, message: str) -> str:
        return self._page("error.html", status=status, message=message)

    def found(self, id: str) -> tuple[Evidence, Any]:
        """The record of that id. Raises InputError when there is none."""
        if id not in self.library.records:
            raise InputError(f"no record has the id {id!r}")
        return self.library.records[id]

    def _overview(self) -> dict[str, Any]:
        first = [found[0] for found in self.library.seen.values() if found]
        counts = {word: sum(seen.word == word for seen in first) for word in CHIPS}
        status = list(self.library.status.values())
        return {
            "papers": len(status),
            "code": sum(word != "planned" for word in status),
            "measured": sum(word == "measured" for word in status),
            "counts": {word: count for word, count in counts.items() if count},
        }

    def _machine_names(self) -> dict[str, str]:
        names = {MINE: "machines like mine"}
        for fingerprint, facts in self.library.machines.items():
            here = ", this one" if fingerprint == self.library.here else ""
            names[fingerprint] = f"{facts.get('cpu', 'unknown processor')} ({fingerprint[:6]}{here})"
        return names

    def _page(self, name: str, **more: Any) -> str:
        template = _environment().get_template(name)
        return template.render(
            link=self.links,
            static=self.links.static,
            jobs=self.jobs,
            library=self.library,
            meanings=MEANINGS,
            most=MOST,
            version=__version__,
            **more,
        )


def _offered(options: dict[str, str], picked: tuple[str, ...]) -> dict[str, str]:
    """What a form offers to tick: as many as a page bears, and all that is ticked."""
    first = dict(list(options.items())[: comparison.OFFERED])
    return first | {name: options[name] for name in picked}


_made: list[Environment] = []


def _environment() -> Environment:
    if not _made:
        environment = Environment(
            loader=PackageLoader("assay.site"),
            autoescape=True,
            trim_blocks=True,
            lstrip_blocks=True,
            undefined=StrictUndefined,
            finalize=_finalized,
        )
        environment.filters["chip"] = chip
        environment.filters["drawn"] = Markup  # drawings escape their own texts
        _made.append(environment)
    return _made[0]


def _finalized(value: Any) -> Any:
    """What a template writes: texts, which may be anybody's, without hidden characters and of a length that a page bears."""
    if not isinstance(value, str) or hasattr(value, "__html__"):
        return value
    return clean(value if len(value) <= LONGEST else f"{value[:LONGEST]} ... ({len(value):,} characters)")


def chip(word: str) -> Markup:
    """A verdict as a small coloured label, with what it means as its title.

    >>> print(chip("stale"))
    <span class="chip chip-stale" title="the code it measured has changed since: it decides nothing">stale</span>
    """
    known = MEANINGS | recipes.PROOF
    name = word if word in known else "failed"
    return Markup('<span class="chip chip-{}" title="{}">{}</span>').format(name.replace(" ", "-"), known[name], word)
