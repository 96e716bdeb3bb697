"""The overview and the page: what they say, and that nothing in a record can break them."""

import base64
import io
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import pytest
from evidence_maker import estimate, make
from rich.console import Console

from assay.evidence.report import html, overview, plot_svg, write_html
from assay.evidence.verdict import summaries


def show(records, width=200):
    out = io.StringIO()
    Console(file=out, width=width, highlight=False).print(overview(records))
    return out.getvalue()


QUALITY = {"metric": "top-1", "baseline": 0.9, "candidate": 0.89, "low": 0.88, "high": 0.9, "higher_is_better": True,
           "margin": 0.05, "controls": {"deleted": 0.1, "random": 0.2, "rival": 0.5}}  # fmt: skip
RECORDS = [
    make(vs_free=estimate(1.1, 1.2, 1.3), free_label="SDPA", quality=QUALITY, point={"tokens": 1024, "kind": "code"}),
    make(point={"tokens": 2048}, index=1, decides=False, measured=estimate(0.5, 0.6, 0.7), noisy=True),
    make(claim="other/memory", kind="figure", form="level", refuted_if="it takes more", measured_here="memory of a toy",
         unit="MB", paper_unit="MB", paper_value=100.0, measured=estimate(90.0),
         baseline=300.0, free=120.0, free_label="bf16", higher_is_better=False, metric="peak memory"),
    make(claim="other/time", status="timeout", error="killed after 600.0 s, its time limit"),
    make(claim="third/gpu", measured=None, needs=("cuda",)),
]  # fmt: skip


def test_the_overview_breaks_between_words():
    words = set(show(RECORDS).split())
    for width in (80, 60):
        text = show(RECORDS, width)
        assert max(map(len, text.splitlines())) <= width
        assert set(text.split()) == words


def test_the_overview_says_claim_against_measured():
    text = show(RECORDS)
    for words in (
        "toy/speedup  the paper: 2x, speed-up", "tokens=1024, kind=code", "2x [1.9, 2.1]", "1.2x [1.1, 1.3] vs SDPA",
        "top-1 0.89 [0.88, 0.9] against 0.9", "reproduced", "undecided *",
        "measured in its place: memory of a toy", "100 MB", "90 MB", "bf16: 120 MB", "timeout",
        "needs other hardware", "* measured while the machine was busy",
    ):  # fmt: skip
        assert words in text
    assert text.count("toy/speedup") == 1
    assert "busy" not in show(RECORDS[:1])


def test_marks_in_names_are_shown_as_they_stand():
    assert "x=[bold]boo[/bold]" in show([make(point={"x": "[bold]boo[/bold]"})])


class Page(HTMLParser):
    """Collects what a page refers to, and its pictures."""

    def __init__(self, text):
        super().__init__()
        self.addresses, self.tags = [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.addresses += [value for name, value in attributes if name in ("src", "href", "action", "srcset")]


def pictures(text):
    return [base64.b64decode(code).decode() for code in re.findall(r"data:image/svg\+xml;base64,([\w+/=]+)", text)]


def test_the_page_needs_nothing_beside_itself():
    text = html(RECORDS)
    page = Page(text)
    assert page.addresses
    assert all(address.startswith("data:image/svg+xml;base64,") for address in page.addresses)
    assert "script" not in page.tags
    assert "link" not in page.tags
    assert "@import" not in text
    assert "url(" not in text
    assert len(pictures(text)) == 2  # a claim with nothing measured has no picture
    for words in (
        "undecided",
        "the claim is refuted if it takes more",
        "needs other hardware",
        "timeout",
        "killed after 600.0 s",
        "Test CPU",
        "assay verify toy",
    ):
        assert words in text


def test_what_is_measured_cannot_write_html():
    attack = "<script>alert(1)</script>"
    text = html([make(point={"x": attack}, metric=attack, free_label=attack, vs_free=estimate(2.0), command=attack)])
    assert attack not in text
    for picture in pictures(text):
        ET.fromstring(picture)


@pytest.mark.parametrize("record", [RECORDS[0], RECORDS[2]])
def test_the_plot_has_the_interval_the_paper_and_no_gain(record):
    (summary,) = summaries([record])
    svg = plot_svg(summary)
    texts = {element.text for element in ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")}
    assert {"the paper", "no gain"} <= texts
    assert any(record.metric in text for text in texts if text)
    assert plot_svg(summary) == svg  # the same each time


def test_a_claim_without_a_number_is_drawn_without_it():
    (summary,) = summaries([make(paper_value=None)])
    assert "the paper" not in plot_svg(summary)


def test_odd_figures_can_be_drawn():
    for measured in (estimate(1e-9, 1.0, 1e9), estimate(-3.0, -2.0, 0.0), estimate(1.0)):
        record = make(kind="figure", unit="x", measured=measured)
        assert ET.fromstring(plot_svg(*summaries([record]))).tag.endswith("svg")


def test_an_empty_page(tmp_path):
    write_html([], tmp_path / "page.html")
    assert "No evidence" in (tmp_path / "page.html").read_text()


def test_a_stale_record_is_shown_as_such():
    text = show([make(hashes={})])
    assert "stale: what ran has changed since" in text
    assert "2x [1.9, 2.1]; stale" in text
    assert 'class="verdict stale"' in html([make(hashes={})])


def test_the_row_says_which_arm_does_better():
    record = make(ratios={"baseline": estimate(2.0), "a plain window": estimate(0.5, 0.6, 0.7)})
    assert "note: a plain window is faster (1.67x)" in show([record])
    assert "a plain window is faster" in html([record])
