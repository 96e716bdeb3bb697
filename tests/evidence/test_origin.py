"""Whose a record is follows from how it came into the store, not from what it says of itself."""

from __future__ import annotations

import json
import threading

import pytest
import sqlalchemy as sa
from evidence_maker import make

from assay.cli.main import main
from assay.cli.paper import latest_verdicts
from assay.evidence import runner, shipped
from assay.evidence.store import Store, read_jsonl, write_jsonl

CLAIM = "xattention/attention-speedup"


@pytest.fixture(autouse=True)
def _nothing_shipped(tmp_path, monkeypatch):
    monkeypatch.setattr(shipped, "folder", lambda: tmp_path / "shipped")


def test_the_store_knows_what_was_imported(url, tmp_path):
    mine, theirs, backup = make(claim=CLAIM), make(claim=CLAIM, seed=1), make(claim=CLAIM, seed=2)
    write_jsonl([mine, theirs], tmp_path / "theirs.jsonl")
    write_jsonl([backup], tmp_path / "backup.jsonl")
    with Store(url) as store:
        store.append(mine)
        assert store.import_jsonl(tmp_path / "theirs.jsonl").added == 1
        assert store.import_jsonl(tmp_path / "backup.jsonl", mine=True).added == 1
        assert store.read().imported == {theirs.id}
        assert store.records(imported=False) == [mine, backup]
        assert store.records(imported=True) == [theirs]
        assert [row.imported for row in store.news()] == [False, True, False]
        store.append(theirs)  # it came in first from elsewhere
        assert store.read().imported == {theirs.id}


def test_rows_from_before_stay_what_they_were_taken_for(url):
    with Store(url) as store:
        store.add([make(), make(seed=1)])
        with store._begin(write=True) as connection:
            connection.execute(sa.text("ALTER TABLE assay_evidence DROP COLUMN imported"))
            connection.execute(sa.text("UPDATE assay_version SET version_num = '0003'"))
    with Store(url) as store:
        assert store.read().imported == frozenset()
        assert store.count() == 2
        with pytest.raises(sa.exc.DBAPIError, match="append-only"), store._begin(write=True) as connection:
            connection.execute(sa.text("UPDATE assay_evidence SET imported = imported"))


def test_the_command_says_whose_they_are(tmp_path, capsys):
    write_jsonl([make(claim=CLAIM)], tmp_path / "a.jsonl")
    write_jsonl([make(claim=CLAIM, seed=1, minutes=1)], tmp_path / "b.jsonl")
    assert main(["evidence", "import", str(tmp_path / "a.jsonl")]) == 0
    assert [row["by"] for row in latest_verdicts("xattention")] == ["others"]
    assert main(["evidence", "import", str(tmp_path / "b.jsonl"), "--mine"]) == 0
    assert [row["by"] for row in latest_verdicts("xattention")] == ["you", "others"]
    capsys.readouterr()
    assert main(["paper", "xattention"]) == 0
    said = capsys.readouterr().out
    assert "seen: reproduced" in said
    assert "seen by others on Test CPU (f00d): reproduced" in said


def test_what_was_imported_is_not_taken_for_measured_here(monkeypatch):
    class Todo:
        jobs = (type("Job", (), {"claim": CLAIM})(),)

    mine, theirs = make(claim=CLAIM), make(claim=CLAIM, seed=1)
    with Store() as store:
        store.append(mine)
        store.add([theirs], imported=True)
        assert list(runner._recorded(Todo, store).values()) == [mine]


def test_the_hint_of_a_store_that_took_nothing_brings_ones_own_records_back(tmp_path, monkeypatch):
    from assay.evidence.store import StoreError

    url = f"sqlite:///{tmp_path / 'e.db'}"
    with Store(url) as store:
        sa.event.listen(store._engine, "begin", lambda connection: connection.exec_driver_sql("PRAGMA query_only = 1"))
        with pytest.raises(StoreError) as caught:
            store.append(make(claim=CLAIM))
    words = str(caught.value).rpartition("assay ")[2].split()
    monkeypatch.setenv("ASSAY_DATABASE_URL", url)
    assert main(words) == 0
    with Store(url) as store:
        assert store.read().imported == frozenset()
        assert store.count() == 1


def test_a_writer_waits_for_another_so_that_rows_appear_in_the_order_of_their_numbers(url):
    """A page asks for the rows behind the last one it knows: one that appeared late with a lower number would be missed."""
    inside, go_on, second_done = threading.Event(), threading.Event(), threading.Event()

    def slowly():
        yield make(seed=1)
        inside.set()
        assert go_on.wait(20)
        yield make(seed=2)

    def first():
        with Store(url) as store:
            store.add(slowly())

    def second():
        with Store(url) as store:
            store.add([make(seed=3)])
        second_done.set()

    Store(url).close()
    threads = [threading.Thread(target=first), threading.Thread(target=second)]
    threads[0].start()
    assert inside.wait(20)
    threads[1].start()
    assert not second_done.wait(0.4)
    with Store(url) as store:
        assert store.news() == []
    go_on.set()
    for thread in threads:
        thread.join(20)
    with Store(url) as store:
        assert [json.loads(row.text)["seed"] for row in store.news()] == [1, 2, 3]


def test_an_export_and_its_import_elsewhere(tmp_path, monkeypatch, capsys):
    with Store() as store:
        store.append(make(claim=CLAIM))
    assert main(["evidence", "export", str(tmp_path / "e.jsonl")]) == 0
    assert read_jsonl(tmp_path / "e.jsonl") == [make(claim=CLAIM)]
    monkeypatch.setenv("ASSAY_DATA_DIR", str(tmp_path / "elsewhere"))
    assert main(["evidence", "import", str(tmp_path / "e.jsonl")]) == 0
    with Store() as store:
        assert store.read().imported == {make(claim=CLAIM).id}
