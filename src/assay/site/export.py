"""The pages as files that a browser opens from disk, or any web server serves: nothing in them asks a server anything."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

from assay.errors import InputError
from assay.paths import atomic_dir
from assay.site import comparison, guide, recipes, views
from assay.site.app import bare
from assay.site.charts import bar, embedded
from assay.site.library import Library
from assay.site.pages import STATIC, Links, Pages
from assay.site.views import Filter

SIGN = "assay-site.json"  # an export is written over no folder but an earlier export's


def export(library: Library, target: Path, commands: tuple[guide.Page, ...] = ()) -> int:
    """Write every page to the folder `target`, whole or not at all; returns how many files. A link to a folder stays a link.

    Raises InputError where something else than an earlier export is there.
    """
    target = Path(os.path.realpath(target))
    if target.exists() and not (target / SIGN).is_file() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"{target} is there and is no earlier export: choose another folder, or remove it")
    target.parent.mkdir(parents=True, exist_ok=True)
    count = 0
    with atomic_dir(target) as folder:
        (folder / "static").mkdir()
        for file in STATIC.iterdir():
            if file.name != "htmx.min.js":  # it would have nobody to ask
                (folder / "static" / file.name).write_bytes(file.read_bytes())
        for name, text in files(library, commands):
            file = folder / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
            count += 1
        (folder / SIGN).write_text(json.dumps({"files": count, "mark": library.mark}) + "\n", encoding="utf-8")
    return count


def files(library: Library, commands: tuple[guide.Page, ...] = ()) -> Iterator[tuple[str, str]]:
    """The name and the text of each file."""
    top = Pages(library, Links(static=True), commands)
    below = Pages(library, Links(static=True, depth=1), commands)
    yield "index.html", top.papers(Filter())
    yield "compare.html", top.compare()
    yield "recipes.html", top.recipes()
    yield "machines.html", top.machines()
    yield "guide.html", top.contents()
    for paper in library.papers:
        yield f"papers/{paper.slug}.html", below.paper(paper.slug)
        yield f"papers/{paper.slug}.bib", views.bibtex(paper)
        yield f"api/papers/{paper.slug}.json", _json(bare(views.paper_page(library, paper.slug)))
        for claim in paper.claims:
            found = library.of(claim)
            if found and (drawing := bar(found[0].record)):
                yield f"charts/{claim.id}.svg", embedded(drawing)
    for id in library.records:
        yield f"records/{id}.html", below.record(id)
    for fingerprint in library.machines:
        yield f"machines/{fingerprint}.html", below.machine(fingerprint)
    for id, tuned in library.tuned.items():
        yield f"recipes/{id}.html", below.recipe(id)
        yield f"recipes/{id}.toml", recipes.toml(tuned.run)
        yield f"api/recipes/{id}.json", _json(bare(recipes.recipe_page(library, id)))
    for page in top.texts():
        yield f"guide/{page.name}.html", below.guide_page(page.name)
    seen = comparison.compare(library)
    yield "compare.csv", comparison.csv(seen["rows"])
    yield "compare.svg", top.plot(seen, standalone=True)
    yield "api/papers.json", _json([bare(row) for row in views.paper_rows(library, Filter())])
    yield "api/compare.json", _json(bare(seen))
    yield "api/recipes.json", _json(recipes.recipe_rows(library))


def _json(document: object) -> str:
    return json.dumps(document, indent=1, allow_nan=False, ensure_ascii=False, default=list) + "\n"
