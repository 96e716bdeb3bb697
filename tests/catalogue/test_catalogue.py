"""The catalogue is whole, its entries make sense, and search finds what a person means."""

from __future__ import annotations

import re
from collections import Counter
from importlib import util

import numpy as np
import pytest

from assay.catalogue import FAMILIES, SAVES, get, get_claim, papers
from assay.catalogue import search as searching
from assay.errors import InputError


def test_there_are_138_papers_numbered_once():
    assert sorted(p.number for p in papers()) == list(range(1, 139))
    assert len({p.slug for p in papers()}) == 138


@pytest.mark.parametrize("paper", papers(), ids=lambda p: p.slug)
def test_entry(paper):
    assert re.fullmatch(r"[a-z][a-z0-9_]*", paper.slug)
    assert paper.family in FAMILIES
    assert paper.saves
    assert set(paper.saves) <= set(SAVES)
    assert 30 <= len(paper.summary) <= 400
    assert paper.arxiv is None or re.fullmatch(r"\d{4}\.\d{4,5}", paper.arxiv)
    assert paper.year is None or 2010 <= paper.year <= 2026
    if paper.arxiv and paper.year:
        assert abs(2000 + int(paper.arxiv[:2]) - paper.year) <= 3
    assert paper.code is None or re.fullmatch(r"[\w.-]+/[\w.-]+", paper.code)
    assert len({c.id for c in paper.claims}) == len(paper.claims)
    for claim in paper.claims:
        assert re.fullmatch(rf"{paper.slug}/[a-z0-9-]+", claim.id)
        assert claim.metric
        assert claim.value is None or np.isfinite(claim.value)


def test_every_family_has_papers_and_every_paper_but_few_a_claim():
    assert set(Counter(p.family for p in papers())) == set(FAMILIES)
    assert sum(bool(p.claims) for p in papers()) >= 130


def test_status_follows_the_code():
    for paper in papers():
        there = util.find_spec(f"assay.methods.{paper.family}") is not None and util.find_spec(paper.module) is not None
        assert (paper.status == "works") == there
    for slug in ("prepacking", "xattention", "fp8_vs_int8", "greenformers", "idealized_runtime", "convfirst"):
        assert get(slug).status == "works"


def test_a_wrong_slug_suggests_the_nearest():
    with pytest.raises(InputError, match="did you mean xattention"):
        get("xatention")
    with pytest.raises(InputError, match="assay papers"):
        get("q" * 30)


def test_claims_are_found_by_id():
    assert get_claim("xattention/attention-speedup").value == 13.5
    with pytest.raises(InputError, match="xattention/attention-speedup"):
        get_claim("xattention/nothing")


def test_bm25_prefers_the_rare_word():
    texts = ["the cat sat", "the dog sat", "the antidiagonal sat", "the end"]
    scores = searching.bm25("the antidiagonals", texts)
    assert scores.argmax() == 2
    assert (searching.bm25("nothing here", ["a b", "c d"]) == 0).all()


QUESTIONS = [
    ("long prompts slow on CPU sparse attention prefill", {"xattention", "prepacking", "kv_prediction", "sinklora"}),
    ("padding wasted when prompts in a batch have different lengths", {"prepacking", "bytescale"}),
    ("8 bit quantisation floating point or integer", {"fp8_vs_int8", "mixpe"}),
]


@pytest.mark.parametrize(("question", "expected"), QUESTIONS)
def test_search_without_the_model(monkeypatch, question, expected):
    monkeypatch.setattr(searching, "model_folder", lambda: None)
    hits = searching.search(question, limit=8)
    assert {hit.method for hit in hits} == {"bm25"}
    assert expected & {hit.paper.slug for hit in hits}


@pytest.mark.skipif(util.find_spec(searching.PACKAGE) is None, reason="the MiniLM package is not installed")
@pytest.mark.parametrize(("question", "expected"), QUESTIONS)
def test_search_by_meaning(question, expected):
    hits = searching.search(question, limit=8)
    assert {hit.method for hit in hits} == {"embedding"}
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
    assert expected & {hit.paper.slug for hit in hits}


@pytest.mark.parametrize(("question", "limit", "says"), [(" ", 5, "empty"), ("x", 0, "at least 1")])
def test_bad_questions(question, limit, says):
    with pytest.raises(InputError, match=says):
        searching.search(question, limit=limit)
