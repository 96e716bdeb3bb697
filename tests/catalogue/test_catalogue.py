"""The catalogue is whole, its entries make sense, and search finds what a person means."""

from __future__ import annotations

import re
import tomllib
from collections import Counter
from importlib import resources, util
from pathlib import Path

import numpy as np
import pytest

from assay.catalogue import FAMILIES, FORMS, MODELS, QUANTITIES, RELATIONS, SAVES, get, get_claim, lineage, papers
from assay.catalogue import search as searching
from assay.cli.papers import page
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
    assert paper.models
    assert set(paper.models) <= set(MODELS)
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


FILES = sorted(Path(str(resources.files("assay.catalogue") / "papers")).iterdir())
PAPER_KEYS = {"slug", "number", "title", "year", "arxiv", "family", "summary", "saves", "models", "code", "claims"}
CLAIM_KEYS = {"id", "metric", "value", "unit", "baseline", "conditions", "better", "form", "quantity", "baseline_value"}


def test_each_family_has_its_file_and_no_other_file_is_there():
    """A file of another name would never be read."""
    assert [file.name for file in FILES] == sorted(f"{family}.toml" for family in FAMILIES)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_file(file):
    """A misspelt key is ignored when the catalogue is read, so that it must be found here."""
    document = tomllib.loads(file.read_text(encoding="utf-8"))
    assert set(document) == {"paper"}
    for entry in document["paper"]:
        assert entry["family"] == file.stem, f"{entry['slug']} stands in {file.name}"
        assert set(entry) <= PAPER_KEYS, entry["slug"]
        assert {"slug", "number", "title", "family", "summary", "saves", "models"} <= set(entry), entry["slug"]
        kinds = {
            "slug": str,
            "number": int,
            "title": str,
            "summary": str,
            "saves": list,
            "models": list,
            "year": int,
            "arxiv": str,
            "code": str,
        }
        for key, kind in kinds.items():
            assert type(entry.get(key, kind())) is kind, f"{entry['slug']}: {key}"
            assert entry.get(key, "x") not in ("", []), f"{entry['slug']}: {key} is empty: leave it out"
        for claim in entry.get("claims", []):
            where = f"{entry['slug']}/{claim.get('id')}"
            assert set(claim) <= CLAIM_KEYS, where
            assert {"id", "metric"} <= set(claim), where
            assert claim.get("better", "higher") in ("higher", "lower"), where
            assert type(claim.get("value", 0)) in (int, float), where
            assert type(claim.get("baseline_value", 0)) in (int, float), where
            assert claim.get("form", "ratio") in FORMS, where
            assert claim.get("quantity", "time") in QUANTITIES, where
            assert all(type(claim.get(key, "")) is str for key in CLAIM_KEYS - {"value", "baseline_value"}), where


def test_lineage_names_papers_and_says_where_it_stands():
    known = {paper.slug for paper in papers()}
    pairs = [(edge.paper, edge.other) for edge in lineage()]
    assert len(pairs) == len(set(pairs)) > 0
    for edge in lineage():
        assert {edge.paper, edge.other} <= known
        assert edge.paper != edge.other
        assert edge.relation in RELATIONS
        assert len(edge.source) > 10


def test_ids_are_those_of_one_paper():
    for what in ("slug", "number", "title", "arxiv"):
        counts = Counter(getattr(paper, what) for paper in papers())
        del counts[None]
        assert [value for value, count in counts.items() if count > 1] == []
    assert max(Counter(claim.id for paper in papers() for claim in paper.claims).values()) == 1


def test_the_list_of_papers_with_code_is_up_to_date():
    """`assay papers --markdown > docs/papers.md` writes it."""
    rows = [paper for paper in papers() if paper.status == "code"]
    file = Path(__file__).parents[2] / "docs" / "papers.md"
    assert file.read_text(encoding="utf-8") == page(rows)
    for paper in papers():
        assert (f"- `{paper.slug}`:" in page(rows)) == (paper.status == "code")


def test_every_family_has_papers_and_every_paper_but_few_a_claim():
    assert set(Counter(p.family for p in papers())) == set(FAMILIES)
    assert sum(bool(p.claims) for p in papers()) >= 130


def test_status_follows_the_code():
    for paper in papers():
        there = util.find_spec(f"assay.methods.{paper.family}") is not None and util.find_spec(paper.module) is not None
        assert (paper.status == "code") == there
    for slug in ("prepacking", "xattention", "fp8_vs_int8", "greenformers", "idealized_runtime", "convfirst"):
        assert get(slug).status == "code"


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


@pytest.mark.parametrize("damage", [b"", b"\x93NUMPY", b"nothing of the kind", "object"])
def test_a_damaged_cache_of_embeddings_is_made_again(tmp_path, monkeypatch, damage):
    monkeypatch.setenv("ASSAY_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(searching, "embed", lambda folder, texts: np.eye(len(texts), dtype=np.float32))
    made = searching.embedded(tmp_path, ["a", "b"])
    (file,) = (tmp_path / "search").iterdir()
    if damage == "object":
        np.save(file, np.array([{}, {}]), allow_pickle=True)
    else:
        file.write_bytes(damage)
    assert (searching.embedded(tmp_path, ["a", "b"]) == made).all()
    assert (np.load(file) == made).all()


@pytest.mark.parametrize(("question", "limit", "says"), [(" ", 5, "empty"), ("x", 0, "at least 1")])
def test_bad_questions(question, limit, says):
    with pytest.raises(InputError, match=says):
        searching.search(question, limit=limit)
