"""`assay verify`: what it prints, what it writes, and its exit codes."""

import json
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parents[1] / "evidence"))  # the toy experiments of the runner's tests

import toy_experiments

import assay.cli.verify
from assay.errors import InputError, MissingError
from assay.evidence import place
from assay.evidence.store import Store, StoreError, read_jsonl

app = typer.Typer()
app.command()(assay.cli.verify.verify)


@pytest.fixture(autouse=True)
def _toys(monkeypatch):
    toy_experiments.install(monkeypatch)
    yield
    place.here.cache_clear()


def run(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def test_one_paper_as_json_and_in_files(tmp_path):
    page, lines = tmp_path / "page.html", tmp_path / "e.jsonl"
    result = run("toy", "--scale", "small", "--json", "--html", page, "--jsonl", lines)
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document["scale"] == "small"
    (record,) = document["evidence"]
    assert record["claim"] == "toy/speedup"
    assert record["paper_value"] == 5.0
    assert record["measured"]["low"] <= record["measured"]["median"] <= record["measured"]["high"]
    assert record["unit"] == "x"
    assert record["baseline"] > 0
    assert record["quality"]["metric"] == "accuracy"
    assert record["verdict"] == "reproduced"
    assert record["scale"] == "small"
    assert document["unavailable"] == {"toy/loss": "no points at scale small; it has smoke"}
    (claim,) = document["claims"]
    assert (claim["verdict"], claim["failed"], claim["decided_by"]) == ("reproduced", 0, record["id"])
    assert "toy/loss (no points at scale small; it has smoke)" in result.stderr
    assert "toy/speedup n=3: reproduced" in result.stderr
    assert [kept.id for kept in read_jsonl(lines)] == [record["id"]]
    assert "toy/speedup" in page.read_text()
    with Store() as store:
        assert store.get(record["id"]).id == record["id"]

    again = run("toy", "--scale", "small", "--resume", "--json")
    assert json.loads(again.stdout)["evidence"] == document["evidence"]
    assert "(recorded before)" in again.stderr


def test_the_table_and_the_check():
    result = run("toyneeds", "--scale", "smoke", "--check")
    assert result.exit_code == 0
    assert "toyneeds/gpu" in result.stdout
    assert "needs other hardware" in result.stdout
    refuted = run("toyrefuted", "--scale", "smoke", "--check", "--json")
    assert refuted.exit_code == 1
    assert json.loads(refuted.stdout)["evidence"][0]["verdict"] == "refuted here"
    assert "not met: toyrefuted/speedup" in refuted.stderr
    assert run("toyrefuted", "--scale", "smoke", "--resume").exit_code == 0


def test_a_failed_point_is_not_met(monkeypatch):
    monkeypatch.setattr(
        "assay.experiments.experiments_of",
        lambda slug, real=assay.experiments.experiments_of: [e for e in real(slug) if e.claim == "toybroken/raises"],
    )
    result = run("toybroken", "--scale", "smoke", "--check")
    assert result.exit_code == 1
    assert "ValueError: the stars are wrong" in result.stdout


def test_planned_papers():
    alone = run("toyplanned")
    assert isinstance(alone.exception, MissingError)
    assert "toyplanned (planned: it has no experiment yet)" in str(alone.exception)
    beside = run("toyplanned", "toyneeds", "--scale", "smoke", "--json")
    assert beside.exit_code == 3
    assert len(json.loads(beside.stdout)["evidence"]) == 2
    assert "nothing was measured for toyplanned" in beside.stderr


def test_families_and_all(monkeypatch):
    monkeypatch.setattr(
        toy_experiments, "PAPERS", {slug: toy_experiments.PAPERS[slug] for slug in ("toyneeds", "toyplanned")}
    )
    for words in (("--family", "toys"), ("--all",)):
        result = run(*words, "--scale", "smoke", "--json")
        assert result.exit_code == 0  # a planned paper that nobody named is no error
        assert {record["slug"] for record in json.loads(result.stdout)["evidence"]} == {"toyneeds"}
    assert isinstance(run("--family", "empty").exception, MissingError)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ((), "one of the three"),
        (("toy", "--all"), "one of the three"),
        (("--family", "toys", "--all"), "one of the three"),
        (("--family", "painting"), "--family must be one of toys, empty; got 'painting'"),
        (("toy", "--scale", "tiny"), "scale must be one of smoke, small, full, got 'tiny'"),
        (("nothing",), "no paper is called 'nothing'"),
    ],
)
def test_bad_usage(words, told):
    result = run(*words)
    assert isinstance(result.exception, InputError)
    assert told in str(result.exception)


def test_results_are_shown_even_when_the_store_takes_no_more(monkeypatch):
    def full(self, records):
        raise StoreError("cannot write to the evidence store: disk full")

    monkeypatch.setattr(Store, "add", full)
    result = run("toyneeds", "--scale", "smoke", "--json")
    assert result.exit_code == 2
    assert len(json.loads(result.stdout)["evidence"]) == 2
    assert "disk full; the record is kept in" in result.stderr
