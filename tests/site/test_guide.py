"""The guide: Markdown without raw HTML, links that lead somewhere, a page for every command."""

from __future__ import annotations

import re

import pytest
import typer

from assay.cli.main import build, main
from assay.cli.site import commands
from assay.errors import InputError
from assay.site import guide

HELP = commands(typer.main.get_command(build()))
COMMANDS = [guide.Page(f"command-{name}", f"assay {name}", text) for name, text in HELP.items()]


def link(path="", **query):
    return f"/{path}"


def test_raw_html_is_shown_and_not_run():
    html = guide.rendered("# Title\n\n<script>alert(1)</script>\n\n<b onclick='x()'>bold</b>\n", link)
    assert "<script" not in html
    assert "<b " not in html


def test_links_between_documents_become_links_between_pages():
    html = guide.rendered(
        "[a](measuring.md#a-time) [b](docs/serving.md) [c](../src/assay/x.py) [d](https://x.org) [e](#here)", link
    )
    assert re.findall(r'href="([^"]*)"', html) == [
        "/guide/measuring#a-time",
        "/guide/serving",
        "/guide",
        "https://x.org",
        "#here",
    ]


@pytest.mark.parametrize("found", [*guide.documents(), *COMMANDS], ids=lambda p: p.name)
def test_every_page_can_be_drawn_and_its_links_into_itself_exist(found):
    html = guide.rendered(found.text, link)
    ids = set(re.findall(r' id="([^"]*)"', html))
    for place in re.findall(r'href="#([^"]*)"', html):
        assert place in ids
    assert "javascript:" not in html
    assert found.title


def test_every_command_has_its_page_with_its_options(capsys):
    main(["--help"])
    listed = set(re.findall(r"^  ([a-z]+)  ", capsys.readouterr().out, re.MULTILINE))
    assert listed == set(HELP)
    assert "`--max-drop`" in HELP["tune"]
    assert "## assay evidence import" in HELP["evidence"]


def test_a_page_that_is_not_there():
    with pytest.raises(InputError, match="has no page 'x'"):
        guide.page("x", guide.documents())
