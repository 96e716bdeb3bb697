"""What the pages know: origins apart, new records without reading the old ones again, damaged rows that break nothing."""

from __future__ import annotations

import json
import threading

import sqlalchemy as sa
from sqlalchemy import event
from tests.evidence.evidence_maker import estimate, make
from tests.evidence.tuned_maker import lines, run
from tests.site.conftest import BETTER, CLAIM, HERE, OTHER, known_records

from assay.evidence import hashes, shipped
from assay.evidence.reading import Reading
from assay.evidence.store import Store, table, tuned_table
from assay.evidence.tuned import of_lines
from assay.site import library as library_module
from assay.site.library import Shelf


def test_each_machine_has_its_own_verdict_and_its_origin(shelf):
    seen = {s.summary.fingerprint: s for s in shelf.library().of(CLAIM)}
    assert {name: (s.word, s.origin) for name, s in seen.items()} == {
        "mine": ("reproduced", "you"),
        "better": ("reproduced", "others"),
        "other": ("refuted here", "others"),
    }


def test_the_authors_records_are_theirs_on_the_same_machine_too(store, monkeypatch):
    theirs = make(claim=CLAIM, fingerprint="mine", machine=HERE, measured=estimate(0.4, 0.5, 0.6))
    monkeypatch.setattr(shipped, "read", lambda *_, **__: Reading((theirs,)))
    store.add([known_records()[0], theirs])  # imported: still theirs
    shelf = Shelf(str(store._url), here="mine", machine=HERE)
    assert {(s.origin, s.word) for s in shelf.library().of(CLAIM)} == {
        ("you", "reproduced"),
        ("authors", "refuted here"),
    }
    shelf.close()


def test_new_records_are_added_without_reading_the_old_ones(shelf, store):
    before = shelf.library()
    assert shelf.library() is before
    read = []
    original = shelf._store.news
    shelf._store.news = lambda **asked: read.append(rows := original(**asked)) or rows
    store.add([make(claim=CLAIM, fingerprint="new", machine=OTHER, minutes=9)])
    after = shelf.library()
    assert [len(rows) for rows in read] == [1]
    assert after.mark != before.mark
    assert len(after.of(CLAIM)) == len(before.of(CLAIM)) + 1
    assert len(before.of(CLAIM)) == 3  # what was handed out does not change


def test_asking_again_is_one_query(shelf):
    shelf.library()
    asked = []
    event.listen(shelf._store._engine, "before_cursor_execute", lambda *given: asked.append(given[2]))
    shelf.library()
    assert [text for text in asked if text.lstrip().upper().startswith("SELECT")] == asked[-1:]


def test_a_damaged_row_is_shown_and_breaks_nothing(shelf, store):
    with store._begin(write=True) as connection:
        values = {"claim": "x/y", "slug": "x", "scale": "small", "status": "ok", "fingerprint": "f"}
        connection.execute(sa.insert(table).values(id="bad1", record="{not json", **values))
        connection.execute(sa.insert(table).values(id="bad2", record='{"claim": "x/y", "measured": NaN}', **values))
    store.add([make(claim=CLAIM, fingerprint="after", machine=OTHER, minutes=9)])
    library = shelf.library()
    assert len(library.damaged) == 2
    assert all(row.why for row in library.damaged)
    assert "after" in {s.summary.fingerprint for s in library.of(CLAIM)}
    assert shelf.library() is library


def test_a_store_that_cannot_be_read_is_said(store, tmp_path):
    broken = tmp_path / "broken.db"
    broken.write_bytes(b"this is no database" * 100)
    shelf = Shelf(f"sqlite:///{broken}", here="mine", machine=HERE)
    assert "not an SQLite database" in shelf.library().trouble
    assert shelf.library().papers


def test_machines_like_mine_do_all_that_mine_does(shelf):
    assert shelf.library().like("mine") == {"mine", "better"}
    assert shelf.library().like("better") == {"better"}
    assert shelf.library().like("unknown") == set()


def test_stale_and_failed_ones_are_called_so(shelf):
    library = shelf.library()
    assert [s.word for s in library.of("prepacking/prefill-speedup-padded")] == ["stale"]
    assert [s.word for s in library.of("svg2/wan-speedup")] == ["failed"]
    assert library.machines["better"] == BETTER


def test_a_store_that_is_replaced_while_the_server_runs_is_read_anew(shelf, store, tmp_path):
    assert len(shelf.library().records) == 5
    store.close()
    for file in tmp_path.glob("evidence.db*"):
        file.unlink()
    assert shelf.library().records == {}
    assert not shelf.library().trouble
    with Store(f"sqlite:///{tmp_path / 'evidence.db'}") as new:
        new.add([make(claim=CLAIM, fingerprint="mine", machine=HERE, minutes=3)])
    assert len(shelf.library().records) == 1


def test_a_store_whose_folder_went_away_is_said_and_found_again(shelf, store, tmp_path):
    shelf.library()
    store.close()
    for file in tmp_path.glob("evidence.db*"):
        file.unlink()
    tmp_path.rmdir()
    tmp_path.write_text("a file where the folder was")
    assert "cannot open" in shelf.library().trouble
    assert shelf.library().papers
    tmp_path.unlink()
    assert not shelf.library().trouble


def test_pages_do_not_wait_for_one_that_waits_for_the_store(shelf, store, monkeypatch):
    monkeypatch.setattr(library_module, "WAIT", 0.05)
    before = shelf.library()
    asked, answer = threading.Event(), threading.Event()

    def news(**_):
        asked.set()
        assert answer.wait(20)
        return []

    shelf._store.news = news
    slow = threading.Thread(target=shelf.library)
    slow.start()
    assert asked.wait(20)
    assert shelf.library() is before
    answer.set()
    slow.join(20)
    assert not slow.is_alive()


def test_runs_have_an_origin_and_their_machine(shelf):
    library = shelf.library()
    assert [(one.run.goal, one.origin, one.word) for one in library.tuned.values()] == [
        ("decode", "others", "proven"),
        ("ttft", "you", "proven"),
    ]
    assert library.machines["mine"] == HERE
    assert library.machines["other"] == OTHER


def test_a_run_that_comes_is_added_and_brings_its_machine(shelf, store):
    before = shelf.library()
    given = lines(minutes=9)
    given[0]["machine"] |= {"fingerprint": "new"}
    store.add_runs([of_lines(given)])
    after = shelf.library()
    assert (len(before.tuned), len(after.tuned)) == (2, 3)
    assert after.mark != before.mark
    assert after.machines["new"]["cpu"] == "Run CPU"
    assert shelf.library() is after


def test_the_authors_runs_are_theirs_when_imported_too(store, monkeypatch):
    monkeypatch.setattr(shipped, "runs", lambda *_: [run()])
    store.add_runs([run(), run(minutes=1)])
    shelf = Shelf(str(store._url), here="mine", machine=HERE)
    assert [one.origin for one in shelf.library().tuned.values()] == ["you", "authors"]
    shelf.close()


def test_a_damaged_run_is_shown_and_breaks_nothing(shelf, store):
    evil = json.loads(run(minutes=2).to_json()) | {"id": "", "fingerprint": "../evil"}
    texts = {"bad1": "{not json", "bad2": "{}", "bad3": json.dumps(evil)}
    with store._begin(write=True) as connection:
        for id, text in texts.items():
            connection.execute(sa.insert(tuned_table).values(id=id, fingerprint="f", run=text))
    store.add_runs([run(minutes=3)])
    library = shelf.library()
    assert [row.where.split(",")[0] for row in library.damaged] == [f"run {n} of the store" for n in (3, 4, 5)]
    assert "fingerprint must be" in library.damaged[-1].why
    assert len(library.tuned) == 3
    assert shelf.library() is library


def test_stale_is_what_a_recipe_holds_and_not_what_the_run_tried(store, monkeypatch):
    now = hashes.of_closure
    store.add_runs([run(minutes=1), run(minutes=2, best=("dtype", "fp8_vs_int8"))])
    monkeypatch.setattr(hashes, "of_closure", lambda name: "other" if name.endswith("xattention") else now(name))
    shelf = Shelf(str(store._url), here="mine", machine=HERE)
    first, second = shelf.library().tuned.values()
    assert (first.word, second.word) == ("proven", "stale")
    [pair] = first.pairs
    assert first.stale(pair.steps)
    shelf.close()


def test_two_threads_at_once_read_each_record_once(store, monkeypatch):
    store.add(known_records())
    shelf = Shelf(str(store._url), here="mine", machine=HERE)
    found = []
    threads = [threading.Thread(target=lambda: found.append(shelf.library())) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert [len(library.records) for library in found] == [5] * 6
    assert all(len(library.of(CLAIM)) == 3 for library in found)
    shelf.close()


def test_an_imported_record_is_others_even_if_it_names_this_machine(store):
    mine = make(claim=CLAIM, fingerprint="mine", machine=HERE)
    forged = make(claim=CLAIM, fingerprint="mine", machine=HERE, measured=estimate(8.9, 9.0, 9.1), minutes=1)
    store.add([mine])
    store.add([forged], imported=True)
    shelf = Shelf(str(store._url), here="mine", machine=HERE)
    library = shelf.library()
    assert {record.id: origin for record, origin in library.records.values()} == {mine.id: "you", forged.id: "others"}
    assert [(s.origin, s.record.id) for s in library.of(CLAIM)] == [("you", mine.id), ("others", forged.id)]
    assert [len(s.summary.runs) for s in library.of(CLAIM)] == [1, 1]  # never mixed into one verdict
    shelf.close()


def test_two_servers_on_one_store_show_the_same(store):
    shelves = [Shelf(str(store._url), here="mine", machine=HERE) for _ in range(2)]
    assert [len(shelf.library().records) for shelf in shelves] == [0, 0]
    for minutes in range(3):
        store.add([make(claim=CLAIM, fingerprint="mine", machine=HERE, minutes=minutes)])
        first, second = (shelf.library() for shelf in shelves)
        assert len(first.records) == minutes + 1
        assert (first.mark, first.of(CLAIM)) == (second.mark, second.of(CLAIM))
    for shelf in shelves:
        shelf.close()
