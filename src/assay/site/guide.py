"""The guide: `docs/*.md`, and what the command line says of its commands, rendered by markdown-it without raw HTML."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from assay.errors import InputError

PACKAGE = Path(__file__).parents[1]
FIRST = (
    "quickstart",
    "verdicts",
    "measuring",
    "models",
    "workloads",
    "methods",
    "images",
    "serving",
    "simulate",
    "audit",
    "papers",
)
"""The pages in the order a reader wants them; others follow by name."""


@dataclass(frozen=True)
class Page:
    """A page of the guide. `text` is Markdown."""

    name: str
    title: str
    text: str


def folder() -> Path:
    """Where the documents lie: inside the package, or in the checkout it is part of."""
    inside = Path(__file__).parent / "docs"
    return inside if inside.is_dir() else PACKAGE.parents[1] / "docs"


@cache
def documents() -> tuple[Page, ...]:
    """A page for each document, in order."""
    found = {file.stem: file.read_text(encoding="utf-8") for file in sorted(folder().glob("*.md"))}
    order = sorted(found, key=lambda name: (FIRST.index(name) if name in FIRST else len(FIRST), name))
    return tuple(Page(name, _title(name, found[name]), found[name]) for name in order)


def page(name: str, pages: Sequence[Page]) -> Page:
    """The one of that name. Raises InputError when there is none."""
    for found in pages:
        if found.name == name:
            return found
    raise InputError(f"the guide has no page {name!r}; it has {', '.join(p.name for p in pages)}")


def rendered(text: str, link: Callable[[str], str]) -> str:
    """Markdown as HTML: raw HTML is shown, not run; headings get ids; links to other documents become links to pages of the guide.

    Links that lead out of the guide (into the source) stay as code: a page cannot follow them.
    """
    from markdown_it import MarkdownIt

    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    tokens = parser.parse(re.sub(r"<!--.*?-->\n?", "", text, flags=re.DOTALL))
    names = {p.name for p in documents()}
    for place, token in enumerate(tokens):
        if token.type == "heading_open":
            token.attrSet("id", anchor(tokens[place + 1].content))
        for child in token.children or []:
            if child.type == "link_open":
                child.attrSet("href", _target(str(child.attrGet("href")), names, link))
    html = str(parser.renderer.render(tokens, parser.options, {}))
    return html.replace("<table>", '<div class="scroll" tabindex="0" role="region" aria-label="table"><table>').replace(
        "</table>", "</table></div>"
    )


def anchor(heading: str) -> str:
    """The id of a heading.

    >>> anchor("Two baselines, `free` and `exact`")
    'two-baselines-free-and-exact'
    """
    return "-".join(re.findall(r"[a-z0-9]+", heading.lower()))


def _target(href: str, names: set[str], link: Callable[[str], str]) -> str:
    if re.match(r"https?://|#|mailto:", href):
        return href
    path, _, fragment = href.partition("#")
    name = Path(path).stem
    if path.endswith(".md") and name in names:
        return link(f"guide/{name}") + (f"#{fragment}" if fragment else "")
    return link("guide")


def _title(name: str, text: str) -> str:
    found = re.search(r"^# (.+)$", text, re.MULTILINE)
    return found[1].strip() if found else name
