"""The one guard of all readers: whatever a record from elsewhere holds, it is a record that can be judged, or damaged and said to be."""

from __future__ import annotations

import io
import json
import math

import pytest
from benchmarks import pages
from damaged_records import FIGURE, NAMED, TRIAL, document, insert, mutated
from evidence_maker import estimate, make
from hypothesis import HealthCheck, example, given, settings
from rich.console import Console

from assay.cli.main import main
from assay.errors import InputError
from assay.evidence import hashes, shipped, trackers
from assay.evidence.reading import Damaged, Reading, misfit, read, read_file
from assay.evidence.report import documented, html, overview
from assay.evidence.store import Store


def every_reader(record):
    """All that is made of a record: it must not raise."""
    json.dumps(documented(record), allow_nan=False, default=str)
    Console(file=io.StringIO(), width=100).print(overview([record]))
    pages.pages([record])
    pages.claims_said([record])
    run = trackers.run_of(record, "you")
    assert all(math.isfinite(value) for value in run.metrics.values())
    return hashes.changes(record)


@given(text=mutated())
@example(text=NAMED["a negative factor"])
@example(text=NAMED["a bound of 1e308"])
@example(text=NAMED["a ratio of nothing"])
@example(text=NAMED["a moment before the calendar"])
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
def test_whatever_a_record_holds_it_is_damaged_or_every_reader_takes_it(text):
    found = read(text, "here")
    if isinstance(found, Damaged):
        assert found.where == "here"
        assert found.why
        assert "\n" not in found.why
        assert found.text == text
    else:
        every_reader(found)


@pytest.mark.parametrize("text", NAMED.values(), ids=NAMED)
def test_what_cannot_be_judged_is_damaged(text):
    found = read(text, "line 3")
    assert isinstance(found, Damaged)
    assert str(found).startswith("line 3: ")
    assert len(found.why) < 400


def test_what_is_as_it_should_be_is_not_damaged():
    """The property above says something only while both kinds come about."""
    good = [read(json.dumps(document(record)), "here") for record in (TRIAL, FIGURE)]
    assert good == [TRIAL, FIGURE]
    assert misfit(TRIAL) == misfit(FIGURE) == ""


@pytest.mark.parametrize(
    "changes",
    [
        {"measured": estimate(-1e308, 0, 1e308), "form": "bound"},
        {"measured": estimate(1e308), "paper_value": -1e308, "form": "points"},
        {"metric": "cost in $x_{", "unit": "\x00$\\bad$", "point": {"a$_{": "\x1b"}},
        {"point": {"x": "y" * 100_000}},
    ],
)
def test_pictures_of_odd_records_can_be_drawn(changes):
    assert "<table>" in html([make(**changes)])


def test_a_record_opens_no_file_but_our_sources(tmp_path, monkeypatch):
    secret = tmp_path / "secret.cpp"
    secret.write_bytes(b"\xff\xfe")
    opened = []
    monkeypatch.setattr(hashes, "of_file", lambda file: opened.append(file) or "x")
    names = [
        f"../../../../../../../..{secret}",
        str(secret),
        "assay./etc/passwd",
        "assay." + "x" * 5000,
        "x" * 5000 + ".cpp",
        "\x00",
        "/etc/passwd",
    ]
    for name in names:
        assert hashes.changes(make(hashes={name: "x"})) == [name]
    assert opened == []
    assert hashes.changes(make(hashes={"assay.measure.clock": "x"})) == []
    assert [file.name for file in opened] == ["clock.py"]


@pytest.mark.parametrize("text", NAMED.values(), ids=NAMED)
def test_a_damaged_row_stands_in_nobodys_way(text, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(shipped, "folder", lambda: tmp_path)
    good = make(claim="xattention/attention-speedup", minutes=1)
    with Store() as store:
        insert(store, text)
        store.add([good])
        found = store.read()
        assert found.records == (good,)
        [damaged] = found.damaged
        assert damaged.where == "row 1 of the store, id bad0"
        assert store.records() == [good]
        assert store.find("bad") == damaged
        with pytest.raises(InputError, match="row 1 of the store"):
            store.get("bad")
        assert store.records(claim=good.claim) == [good]
    assert main(["evidence", "list", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [one["id"] for one in listed["evidence"]] == [good.id]
    assert listed["damaged"] == [{"where": damaged.where, "why": damaged.why}]
    assert main(["evidence", "list"]) == 0
    out, err = capsys.readouterr()
    assert good.id[:8] in out
    assert "damaged: row 1 of the store, id bad0: " in err
    assert main(["evidence", "list", "--verdict", "reproduced"]) == 0
    capsys.readouterr()
    assert main(["evidence", "show", "bad0"]) == 0
    assert "damaged: row 1" in capsys.readouterr().out
    assert main(["evidence", "show", "bad0", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["text"] == text
    assert main(["paper", "xattention"]) == 0
    assert "seen: reproduced" in capsys.readouterr().out
    assert main(["papers"]) == 0
    capsys.readouterr()
    file = tmp_path / "e.jsonl"
    assert main(["evidence", "export", str(file), "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == {"exported": 1, "file": str(file), "damaged": 1}
    assert "damaged, and left out: row 1" in err
    assert read_file(file) == Reading((good,))
    assert main(["digest", "--since", "2020-01-01"]) == 0
    assert "1 new" in capsys.readouterr().err


def test_bytes_that_are_no_text_are_one_damaged_row(tmp_path):
    with Store(f"sqlite:///{tmp_path / 'e.db'}") as store:
        store.add([make()])
        with store._begin(write=True) as connection:
            connection.exec_driver_sql(
                "INSERT INTO assay_evidence (id, claim, slug, scale, status, fingerprint, record) "
                "VALUES ('b', 'a/b', 'a', 'small', 'ok', 'f', CAST(x'fffe7b' AS TEXT)), ('c', 'a/b', 'a', 'small', 'ok', 'f', x'ff7b')"
            )
        found = store.read()
    assert found.records == (make(),)
    assert ["not JSON" in one.why for one in found.damaged] == [True, True]


@pytest.mark.parametrize("text", [NAMED["a negative factor"], NAMED["NaN"], "{"])
def test_files_with_a_damaged_line_are_read_but_not_extended_nor_imported(tmp_path, text, capsys, monkeypatch):
    monkeypatch.setattr(shipped, "folder", lambda: tmp_path)
    good = make(claim="xattention/attention-speedup")
    shipped.add([good], tmp_path)
    file = tmp_path / "claims" / "xattention.jsonl"
    file.write_text(file.read_text() + text + "\n")
    assert shipped.records("xattention") == [good]
    assert str(shipped.read().damaged[0]).startswith(f"{file}, line 2: ")
    assert shipped.status("xattention", "code") == "measured"
    before = file.read_text()
    with pytest.raises(InputError, match="line 2"):
        shipped.add([make(claim="xattention/attention-speedup", minutes=3)], tmp_path)
    assert file.read_text() == before
    assert main(["evidence", "import", str(file)]) == 2
    assert "line 2: " in capsys.readouterr().err
    assert main(["evidence", "stale"]) == 0
    assert f"damaged: {file}, line 2" in capsys.readouterr().err
    made = pages.pages(shipped.records(), shipped.read().damaged)
    assert "Damaged lines" in made["evidence/README.md"]
    assert "Damaged lines" not in pages.pages(shipped.records())["evidence/README.md"]


def test_pages_of_records_of_no_paper_and_of_many_odd_machines():
    machines = [
        {"flags": 7, "ram_bytes": "much"},
        {"flags": [[], "avx2"], "ram_bytes": 10**400},
        *({"cpu": str(i)} for i in range(28)),
    ]
    records = [
        make(claim="xattention/attention-speedup", fingerprint=f"m{i}", machine=m, minutes=i)
        for i, m in enumerate(machines)
    ]
    made = pages.pages([make(claim="nosuch/thing"), *records])
    assert "nosuch" not in "".join(made.values())
    assert "- AD: 27 (m29)" in made["evidence/README.md"]
