"""The evidence that travels with assay: files by paper, machines once, and what a fresh machine shows."""

import json
import tomllib
from pathlib import Path

import pytest
from evidence_maker import estimate, make

from assay import catalogue
from assay.cli.paper import latest_verdicts
from assay.errors import InputError
from assay.evidence import hashes, shipped
from assay.evidence.store import Store
from assay.evidence.verdict import summaries


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(shipped, "folder", lambda: tmp_path)
    return tmp_path


def test_records_go_into_a_file_a_paper_and_machines_into_one(folder):
    a, b = make(), make(claim="other/thing", machine={"cpu": "Another"}, fingerprint="beef")
    shipped.add([a, b], folder)
    assert sorted(path.name for path in folder.rglob("*.json*")) == ["machines.json", "other.jsonl", "toy.jsonl"]
    assert "Test CPU" not in (folder / "claims" / "toy.jsonl").read_text()
    assert json.loads((folder / "machines.json").read_text())["beef"]["cpu"] == "Another"
    assert shipped.records("toy") == [a]
    assert shipped.records("toy")[0].machine == a.machine
    assert shipped.records() == [b, a]
    assert shipped.records("nothing") == []


def test_a_new_run_replaces_what_is_stale_or_failed_and_stands_beside_what_is_fresh(folder):
    stale, elsewhere = make(hashes={}), make(hashes={}, fingerprint="beef")
    shipped.add([stale, elsewhere, make(point={"n": 2}, status="timeout")], folder)
    first = make(minutes=1)
    shipped.add([first, make(point={"n": 2}, minutes=1)], folder)
    assert [r.created.minute for r in shipped.records("toy") if r.fingerprint == "f00d"] == [5, 5]
    assert elsewhere in shipped.records("toy")  # old runs on other machines are kept
    disagrees = make(minutes=2, measured=estimate(0.5, 0.6, 0.7))
    shipped.add([disagrees], folder)
    found = {summary.fingerprint: summary.word for summary in summaries(shipped.records("toy"))}
    assert found == {"f00d": "contested", "beef": "stale"}
    shipped.add([disagrees], folder)
    assert shipped.records("toy").count(disagrees) == 1


def test_a_damaged_folder_is_named(folder):
    (folder / "machines.json").write_text("[")
    with pytest.raises(InputError, match=r"machines\.json: not JSON"):
        shipped.records()
    (folder / "machines.json").write_text("[]")
    with pytest.raises(InputError, match=r"machines\.json: must be a JSON object, got list"):
        shipped.records()


def test_status(folder):
    assert shipped.status("toy", "planned") == "planned"
    assert shipped.status("toy", "code") == "code"
    shipped.add([make(hashes={})], folder)
    assert shipped.status("toy", "code") == "code"  # a stale record decides nothing
    shipped.add([make(minutes=1)], folder)
    assert shipped.status("toy", "code") == "measured"


def test_a_fresh_machine_sees_what_the_authors_measured_marked_as_theirs(folder):
    theirs, mine = make(), make(minutes=5, fingerprint="beef", measured=estimate(0.5, 0.6, 0.7))
    shipped.add([theirs], folder)
    (row,) = latest_verdicts("toy")
    assert (row["by"], row["verdict"], row["machine"]) == ("assay's authors", "reproduced", "Test CPU (f00d)")
    with Store() as store:
        store.append(mine)
    assert [(row["by"], row["verdict"]) for row in latest_verdicts("toy")] == [
        ("you", "refuted here"),
        ("assay's authors", "reproduced"),
    ]


def test_the_checked_in_evidence_is_whole():
    """Every shipped record can be read, belongs to a claim of the catalogue, and its machine is described."""
    found = shipped.records()
    assert found
    claims = {claim.id for paper in catalogue.papers() for claim in paper.claims}
    assert {record.claim for record in found} <= claims
    assert all(record.machine.get("cpu") for record in found)
    assert len({record.id for record in found}) == len(found)
    assert all(hashes.changes(record) is not None for record in found)
    assert shipped.read().damaged == ()


def test_the_wheel_carries_the_evidence_where_the_package_looks_for_it():
    root = Path(__file__).parents[2]
    wheel = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    inside = "assay/evidence/shipped"
    assert wheel["force-include"] == {
        "evidence/claims": f"{inside}/claims",
        "evidence/machines.json": f"{inside}/machines.json",
        **{f"evidence/{file.name}": f"{inside}/{file.name}" for file in (root / "evidence").glob("demo*.jsonl")},
        "docs": "assay/site/docs",
    }
    assert Path(shipped.__file__).parent / "shipped" == shipped.PACKAGE.parent / inside
    assert shipped.folder() == root / "evidence"  # a checkout has them outside of the package
