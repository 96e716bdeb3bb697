"""The store: nothing lost, nothing changed, nothing twice, and clear words when something is wrong."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import sqlalchemy as sa
from evidence_maker import OLD, make

from assay.errors import InputError, MissingError
from assay.evidence import store as module
from assay.evidence.record import parse
from assay.evidence.store import Store, StoreError, default_url, keep_aside, merge_jsonl, read_jsonl, write_jsonl

HERE = Path(__file__).parent


def run_python(code, *arguments, wait=True):
    """A real process that can import the helpers of these tests."""
    path = os.pathsep.join([str(HERE), *filter(None, sys.path)])
    call = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
    process = subprocess.Popen(call, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    if not wait:
        return process
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out


def test_what_is_kept_comes_back_whole(url):
    records = [make(minutes=n, error="snow ☃ \x00 '; --", seed=n) for n in range(5)]
    with Store(url) as store:
        assert [store.append(record) for record in records] == [True] * 5
    with Store(url) as store:
        assert store.records() == records
        assert store.count() == 5


def test_a_record_is_kept_once(url):
    with Store(url) as store:
        assert store.append(make()) is True
        assert store.append(make()) is False
        done = store.add([make(), make(seed=1), make(seed=1)])
        assert (done.added, done.known) == (1, 2)
        assert store.count() == 2


def test_writing_into_a_file_replaces_the_same_points_and_keeps_the_others(tmp_path):
    file = tmp_path / "claims.jsonl"
    first, other, elsewhere = make(), make(claim="other/thing"), make(fingerprint="beef")
    merge_jsonl([first, other, elsewhere], file)
    again, more = make(minutes=5), make(point={"n": 2})
    merge_jsonl([again, more], file)
    assert read_jsonl(file) == [again, other, elsewhere, more]


def test_finding_records(url):
    a = make()
    b = make(claim="other/thing", minutes=1, scale="smoke", fingerprint="beef")
    c = make(status="timeout", minutes=2)
    with Store(url) as store:
        store.add([a, b, c])
        assert store.records(slug="toy") == [a, c]
        assert store.records(claim="other/thing") == [b]
        assert store.records(scale="smoke") == [b]
        assert store.records(status="timeout") == [c]
        assert store.records(fingerprint="beef") == [b]
        assert store.records(slug="toy", last=1) == [c]
        assert store.records(slug="nothing") == []
        assert store.get(b.id) == b
        assert store.get(b.id[:12]) == b
        with pytest.raises(InputError, match="no evidence with the id 'zzz'"):
            store.get("zzz")
        with pytest.raises(InputError, match="no evidence with the id '%'"):
            store.get("%")
        with pytest.raises(InputError, match="no evidence"):
            store.get("")


def test_an_ambiguous_id_is_refused(url):
    records = [make(seed=n) for n in range(40)]  # more than the 16 first digits
    with Store(url) as store:
        store.add(records)
        first = [record.id[0] for record in records]
        twice = next(digit for digit in first if first.count(digit) > 1)
        with pytest.raises(InputError, match="more than one id"):
            store.get(twice)


def test_the_database_refuses_changes(url):
    with Store(url) as store:
        store.append(make())
        for statement in ("UPDATE assay_evidence SET record = ''", "DELETE FROM assay_evidence"):
            with pytest.raises(sa.exc.DBAPIError, match="append-only"), store._begin(write=True) as connection:
                connection.execute(sa.text(statement))
        assert store.records() == [make()]
    assert not [name for name in dir(Store) if any(word in name for word in ("update", "delete", "remove", "clear"))]


def test_the_schema_is_the_one_in_the_code(url):
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext

    with Store(url) as store, store._begin() as connection:
        context = MigrationContext.configure(connection, opts={"version_table": module.VERSION_TABLE})
        assert compare_metadata(context, module.metadata) == []


def test_sqlite_writes_ahead(tmp_path):
    Store(f"sqlite:///{tmp_path / 'e.db'}").close()
    assert sqlite3.connect(tmp_path / "e.db").execute("PRAGMA journal_mode").fetchone() == ("wal",)


WRITER = """
import sys
from evidence_maker import make
from assay.evidence.store import Store
url, who, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
for start in range(0, count, 5):
    with Store(url) as store:
        for n in range(start, start + 5):
            assert store.append(make(seed=1000 * who + n))
"""


def test_processes_that_write_at_once_lose_nothing(url):
    """They also race to create the schema: none is there when they start."""
    writers = [run_python(WRITER, url, who, 25, wait=False) for who in range(3)]
    for writer in writers:
        _, err = writer.communicate(timeout=120)
        assert writer.returncode == 0, err
    with Store(url) as store:
        assert sorted(record.seed for record in store.records()) == [
            1000 * who + n for who in range(3) for n in range(25)
        ]


def test_a_killed_writer_loses_nothing_it_has_kept(url):
    Store(url).close()
    code = """
    import sys
    from evidence_maker import make
    from assay.evidence.store import Store
    store = Store(sys.argv[1])
    n = 0
    while True:
        store.append(make(seed=n))
        print(n, flush=True)
        n += 1
    """
    writer = run_python(code, url, wait=False)
    told = -1
    for line in writer.stdout:
        told = int(line)
        if told == 20:
            writer.send_signal(signal.SIGKILL)
    writer.wait(30)
    with Store(url) as store:
        seeds = [record.seed for record in store.records()]
    assert seeds == list(range(len(seeds)))
    assert len(seeds) >= told + 1


def test_a_newer_database_is_left_alone(url):
    with Store(url) as store, store._begin(write=True) as connection:
        connection.execute(sa.text(f"UPDATE {module.VERSION_TABLE} SET version_num = '9999'"))
    with pytest.raises(InputError, match=r"newer assay \(schema 9999\): upgrade assay"):
        Store(url)


def test_a_file_that_is_no_database(tmp_path):
    file = tmp_path / "e.db"
    file.write_text("these are not the pages you are looking for\n" * 200)
    with pytest.raises(InputError, match=r"e\.db is not an SQLite database"):
        Store(f"sqlite:///{file}")
    assert file.read_text().startswith("these are not")


def test_a_cut_off_database_is_named(tmp_path):
    file = tmp_path / "e.db"
    with Store(f"sqlite:///{file}") as store:
        store.add([make(seed=n) for n in range(50)])
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match="damaged"), Store(f"sqlite:///{file}") as store:
        store.records()


def test_a_full_disk_keeps_the_record_beside_the_store(tmp_path):
    """A limit on the size of files stands in for a disk that is full: the database can grow no more, a small file still can."""
    url = f"sqlite:///{tmp_path / 'e.db'}"
    Store(url).close()
    code = """
    import resource, signal, sys
    from evidence_maker import make
    from assay.evidence.store import Store, StoreError
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    with Store(sys.argv[1]) as store:
        store.append(make(seed=0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        for n in (1, 2):
            try:
                store.append(make(seed=n))
            except StoreError as error:
                print(error)
    """
    told = run_python(code, url).splitlines()
    kept = tmp_path / module.FALLBACK
    assert len(told) == 2
    assert all(
        "cannot write to the evidence store" in line and f"assay evidence import {kept}" in line for line in told
    )
    with Store(url) as store:
        assert [record.seed for record in store.records()] == [0]
        assert store.import_jsonl(kept).added == 2
        assert sorted(record.seed for record in store.records()) == [0, 1, 2]
        assert store.import_jsonl(kept).known == 2


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_a_store_that_cannot_be_written(tmp_path):
    """As a user who may read the files but not write them."""
    folder = tmp_path / "store"
    url = f"sqlite:///{folder / 'e.db'}"
    with Store(url) as store:
        store.append(make())
    for path in (folder, *tmp_path.parents[:2], tmp_path):
        path.chmod(path.stat().st_mode | 0o055)
    code = """
    import os, sys
    from evidence_maker import make
    from assay.evidence.store import Store, StoreError
    Store(sys.argv[1]).close()  # imports everything, while we still may
    record = make(seed=1)
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
    for attempt in ("check", "append"):
        try:
            with Store(sys.argv[1]) as store:
                store.check_writable() if attempt == "check" else store.append(record)
            print("written")
        except StoreError as error:
            print(error)
    """
    told = run_python(code, url).splitlines()
    assert len(told) == 2
    assert all("the evidence store" in line and line.startswith("cannot") for line in told)


def test_a_read_only_database_keeps_the_record_beside_it(tmp_path):
    with Store(f"sqlite:///{tmp_path / 'e.db'}") as store:
        event = sa.event.listens_for(store._engine, "begin")
        event(lambda connection: connection.exec_driver_sql("PRAGMA query_only = 1"))
        with pytest.raises(StoreError, match="readonly database"):
            store.add([make()])
        with pytest.raises(StoreError, match=f"import {tmp_path / module.FALLBACK}"):
            store.append(make())
    assert read_jsonl(tmp_path / module.FALLBACK) == [make()]


def test_a_server_that_went_away_keeps_the_record(postgres_url, tmp_path, monkeypatch):
    monkeypatch.setenv("ASSAY_DATA_DIR", str(tmp_path / "data"))
    with Store(postgres_url) as store:
        store._engine.dispose()
        store._engine = sa.create_engine(store._url.set(host="127.0.0.1", port=1), connect_args={"connect_timeout": 2})
        with pytest.raises(StoreError, match="cannot write to the evidence store.*kept in .*data"):
            store.append(make())
    with Store(postgres_url) as store:
        assert store.import_jsonl(tmp_path / "data" / module.FALLBACK).added == 1


def test_keeping_aside_tries_the_next_place(tmp_path, capsys):
    blocked = tmp_path / "file"
    blocked.write_text("")
    kept = keep_aside([make()], [blocked / "x.jsonl", tmp_path / "b" / "x.jsonl"])
    assert kept == tmp_path / "b" / "x.jsonl"
    keep_aside([make(seed=1)], [kept])
    assert read_jsonl(kept) == [make(), make(seed=1)]
    assert keep_aside([make()], [blocked / "x.jsonl"]) is None
    assert capsys.readouterr().err == make().to_json() + "\n"


def test_json_lines_there_and_back(url, tmp_path):
    records = [make(seed=n, error="é\u2028") for n in range(3)]
    file = tmp_path / "out" / "e.jsonl"
    with Store(url) as store:
        store.add(records)
        write_jsonl(store.records(), file)
        done = store.import_jsonl(file)
        assert (done.added, done.known) == (0, 3)
    assert read_jsonl(file) == records
    with Store(f"sqlite:///{tmp_path / 'other.db'}") as other:
        assert other.import_jsonl(file).added == 3
        assert other.records() == records


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (b"{not json", "not JSON"),
        (b'{"claim": 3}', "claim"),
        (b"\xff\xfe", "not UTF-8"),
        (make().to_json()[:100].encode(), "not JSON"),
        (make().to_json().replace("toy/speedup", "toy/slowdown").encode(), "does not fit the content"),
        (b'{"schema_version": 7}', "upgrade assay"),
    ],
)
def test_a_bad_line_is_named_and_nothing_is_taken(tmp_path, bad, words):
    file = tmp_path / "in.jsonl"
    file.write_bytes(make().to_json().encode() + b"\n\n" + bad + b"\n" + make(seed=1).to_json().encode())
    with Store(f"sqlite:///{tmp_path / 'e.db'}") as store:
        with pytest.raises(InputError, match=rf"in\.jsonl, line 3: .*{words}"):
            store.import_jsonl(file)
        assert store.count() == 0


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match="cannot read .*nothing.jsonl: No such file"):
        read_jsonl(tmp_path / "nothing.jsonl")


def test_an_interrupted_export_leaves_the_old_file(tmp_path, monkeypatch):
    file = tmp_path / "e.jsonl"
    file.write_text("the old one")

    def records():
        yield make()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_jsonl(records(), file)
    assert file.read_text() == "the old one"
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".tmp"] == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("mysql://host/db", "must begin with sqlite:// or postgresql://"),
        ("sqlite://", "must name a file"),
        ("sqlite:///:memory:", "must name a file"),
        ("no url", "must be a URL"),
    ],
)
def test_urls_that_are_refused(text, words):
    with pytest.raises(InputError, match=words):
        Store(text)


def test_the_default_is_a_file_in_the_data_folder(tmp_path, monkeypatch):
    assert default_url() == f"sqlite:///{tmp_path / 'assay-data' / 'evidence.db'}"
    monkeypatch.setenv("ASSAY_DATABASE_URL", f"sqlite:///{tmp_path / 'mine.db'}")
    with Store() as store:
        assert store.path == tmp_path / "mine.db"
    assert (tmp_path / "mine.db").exists()


def test_nobody_answers(tmp_path):
    pytest.importorskip("psycopg")
    start = time.monotonic()
    with pytest.raises(StoreError, match="cannot open the evidence store") as caught:
        Store("postgresql://user:secret@127.0.0.1:1/db")
    assert "secret" not in str(caught.value)
    assert "\n" not in str(caught.value)
    assert time.monotonic() - start < 20


def test_the_driver_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(MissingError, match=r"pip install 'assay\[postgres\]'"):
        Store("postgresql://user@127.0.0.1:1/db")


def test_records_of_schema_1_are_migrated_and_stay_append_only(url):
    """As a store that assay 0.1 has left: one record of schema 1, with the verdict it was given then."""
    with Store(url) as store, store._begin(write=True) as connection:
        if not store._is_sqlite:
            connection.execute(sa.text("ALTER TABLE assay_evidence DISABLE TRIGGER USER"))
        connection.execute(sa.text("ALTER TABLE assay_evidence DROP COLUMN imported"))
        connection.execute(sa.text("ALTER TABLE assay_evidence ADD COLUMN verdict TEXT"))
        if not store._is_sqlite:
            connection.execute(sa.text("ALTER TABLE assay_evidence ENABLE TRIGGER USER"))
        connection.execute(sa.text("DROP TABLE assay_tuned"))
        connection.execute(sa.text(f"UPDATE {module.VERSION_TABLE} SET version_num = '0001'"))
        row = {"i": OLD["id"], "c": OLD["claim"], "r": json.dumps(OLD)}
        connection.execute(
            sa.text(
                "INSERT INTO assay_evidence (id, claim, slug, scale, status, verdict, fingerprint, record) "
                "VALUES (:i, :c, 'toy', 'small', 'ok', 'reproduced', 'f00d', :r)"
            ),
            row,
        )
    with Store(url) as store:
        (record,) = store.records()
        assert record == parse(json.dumps(OLD))
        assert store.get(record.id) == record
        with pytest.raises(sa.exc.DBAPIError, match="append-only"), store._begin(write=True) as connection:
            connection.execute(sa.text("DELETE FROM assay_evidence"))
        assert store.append(make()) is True
        assert store.append(record) is False


def test_an_older_database_is_brought_up_to_date(url):
    """A store without the table (as after a failed first step) is completed, one with it is left as it is."""
    with Store(url) as store:
        store.append(make())
    with Store(url) as store:
        assert store.count() == 1
        with store._begin() as connection:
            assert connection.execute(sa.text(f"SELECT version_num FROM {module.VERSION_TABLE}")).scalar() == "0004"


def test_the_migrations_are_part_of_the_package():
    folder = Path(module.__file__).parent / "migrations"
    assert (folder / "env.py").is_file()
    assert list((folder / "versions").glob("v0001*.py"))


def test_records_are_lines_of_json(tmp_path):
    write_jsonl([make()], tmp_path / "e.jsonl")
    (line,) = (tmp_path / "e.jsonl").read_text().splitlines()
    assert json.loads(line)["measured"] == {"high": 2.1, "low": 1.9, "median": 2.0}
