"""The checked-in pages of evidence say what the checked-in records say."""

from __future__ import annotations

import pytest
from benchmarks.pages import ROOT, all_pages, digits, pages, readme

from assay.evidence import hashes, shipped
from assay.evidence.record import changed
from assay.evidence.types import Estimate


def test_the_pages_are_up_to_date():
    """Also when only code has changed: then records have become stale, and the pages must say so. `make evidence-pages` writes them."""
    for name, text in all_pages().items():
        assert (ROOT / name).read_text(encoding="utf-8") == text, f"{name}: run make evidence-pages"


@pytest.mark.parametrize(
    ("low", "median", "high", "word"), [(9.0, 9.5, 9.9, "reproduced"), (0.4, 0.5, 0.6, "refuted here")]
)
def test_a_page_follows_the_figures(low, median, high, word):
    old = next(
        r for r in shipped.records("prepacking") if r.claim == "prepacking/prefill-speedup-padded" and r.status == "ok"
    )
    guard = {
        "metric": "error", "baseline": 0.0, "candidate": 0.0, "low": None, "high": None, "higher_is_better": False, "margin": 1e-3,
        "relative": False, "controls": {"deleted": 1.0, "random": 1.0, "rival": 0.5},
    }  # fmt: skip
    estimate = Estimate(median=median, low=low, high=high)
    new = changed(
        old,
        measured=estimate,
        ratios={},
        form="ratio",
        quality=guard,
        decides=True,
        noisy=False,
        hashes=hashes.versions(),
    )
    page = pages([new])["docs/evidence/inference.md"]
    assert f"| {median:.3g}x ({low:.3g} to {high:.3g}) |" in page
    assert f"| {word} |" in page
    guard["controls"]["rival"] = 0.0  # an arm that does as well stands in the row
    equal = pages([changed(new, quality=guard)])["docs/evidence/inference.md"]
    assert f"| {word}; the cheapest rival keeps as much quality at this budget" in equal
    stale = pages([changed(new, hashes={"package torch": "0.1"})])
    assert "| *stale* |" in stale["docs/evidence/inference.md"]
    assert "[inference](../docs/evidence/inference.md) | 1 |" in stale["evidence/README.md"]


def test_the_figures_of_the_readme_are_those_of_the_records():
    """Another figure in a record is another figure in the README; without its marks it is refused."""
    import json

    from benchmarks.pages import DEMO

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    demo = json.loads(DEMO.read_text(encoding="utf-8").splitlines()[0])
    records = shipped.records(where=ROOT / "evidence")
    faster = demo | {"speedup_vs_free": {"median": 77.7, "low": 66.6, "high": 88.8}}
    assert "77.7 times what is free (66.6 to 88.8)" in readme(text, records, faster)
    assert "77.7 times" not in text
    with pytest.raises(ValueError, match="must hold the two marks"):
        readme("# assay", records, demo)


def test_numbers_are_written_out():
    assert [digits(value) for value in (0.06534, 9.876, 999.4, 1827.3, -2371.6)] == [
        "0.0653",
        "9.88",
        "999",
        "1,827",
        "-2,372",
    ]
