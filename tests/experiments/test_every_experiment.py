"""Every experiment of the house declares what the rules of a proof ask for, and has a test that breaks its method."""

from pathlib import Path

import pytest

from assay import catalogue
from assay.catalogue import QUANTITIES
from assay.experiments import experiments_of

EXPERIMENTS = [found for paper in catalogue.papers() for found in experiments_of(paper.slug)]
TESTS = "\n".join(
    file.read_text(encoding="utf-8") for file in Path(__file__).parent.rglob("test_*_proof.py") if file.is_file()
)


def test_every_paper_with_code_has_experiments():
    with_code = {paper.slug for paper in catalogue.papers() if paper.status == "code"}
    assert {found.slug for found in EXPERIMENTS} == with_code


@pytest.mark.parametrize("found", EXPERIMENTS, ids=lambda found: found.claim)
def test_it_fits_its_claim(found):
    claim = catalogue.get_claim(found.claim)
    assert claim.quantity in QUANTITIES, "the catalogue must say what the claim counts"
    assert {"smoke", "small", "full"} == set(found.points)
    assert found.operator.free, "what is free must be named"
    if claim.form == "about" or claim.form == "bound" and claim.value is None:
        assert found.tolerance is not None or found.computed, "how far 'about' reaches must be said beforehand"
    if claim.quantity in ("time", "memory") and claim.form not in ("about", "bound") and not found.computed:
        assert found.guard is not None, "a gain in time or memory needs a quality that must hold"
    if found.guard is not None:
        assert {"deleted", "random"} - set(found.guard.without), (
            "one control at least must show that the metric can fail"
        )


@pytest.mark.parametrize("found", EXPERIMENTS, ids=lambda found: found.claim)
def test_a_test_breaks_its_method(found):
    slug, what = found.claim.split("/")
    assert found.claim in TESTS or (f"{slug}/" in TESTS and what in TESTS), f"no test_*_proof.py breaks {found.claim}"
