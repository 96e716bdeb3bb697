"""EllieSQL: SQL that a model wrote is run safely, questions are linked, examples are edited, and tiers count what they read."""

from __future__ import annotations

import hashlib
import math
import os
import sqlite3
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from assay.methods.serving.ellie_sql import (
    FUNCTIONS,
    MODES,
    TIERS,
    ChannelScorer,
    Database,
    Example,
    Executed,
    Library,
    Limits,
    Tier,
    abstracted,
    answer,
    bindings,
    edits,
    execution,
    functions,
    link,
    masked,
    read_schema,
    same_result,
)
from tiny import write_tiny_llama

SHOP = """
CREATE TABLE makers(maker_id INTEGER PRIMARY KEY, name TEXT, founded INTEGER);
CREATE TABLE bikes(bike_id INTEGER PRIMARY KEY, maker_id INTEGER REFERENCES makers, name TEXT, weight REAL, gear_count INTEGER);
CREATE TABLE towns(town_id INTEGER PRIMARY KEY, name TEXT);
CREATE TABLE sales(sale_id INTEGER PRIMARY KEY, bike_id INTEGER REFERENCES bikes(bike_id), town_id INTEGER REFERENCES towns, price INTEGER);
INSERT INTO makers VALUES (1, 'Alpha', 1900), (2, 'Beta', 1950), (3, 'O''Neil', 1999);
INSERT INTO bikes VALUES (1, 1, 'Swift', 8.5, 21), (2, 1, 'Tank', 20.0, 3), (3, 2, 'Dart', 9.5, 18);
INSERT INTO towns VALUES (1, 'Ulm'), (2, 'Bonn');
INSERT INTO sales VALUES (1, 1, 1, 900), (2, 3, 2, 700), (3, 1, 2, 800);
"""


@pytest.fixture(scope="session")
def shop(tmp_path_factory):
    path = tmp_path_factory.mktemp("shop ?#%") / "shop.db"
    made = sqlite3.connect(path)
    made.executescript(SHOP)
    made.close()
    return path


@pytest.fixture
def database(shop):
    with Database(shop) as found:
        yield found


@pytest.fixture(scope="session")
def schema(shop):
    return read_schema(shop)


# ---- running


def test_a_query_gives_its_rows(database):
    assert database.run("SELECT name FROM makers WHERE founded > 1920 ORDER BY 1").rows == (("Beta",), ("O'Neil",))
    assert database.run("WITH light AS (SELECT * FROM bikes WHERE weight < 10) SELECT COUNT(*) FROM light;").rows == (
        (2,),
    )
    ranks = database.run("SELECT name, RANK() OVER (ORDER BY weight) FROM bikes").rows
    assert set(ranks) == {("Swift", 1), ("Dart", 2), ("Tank", 3)}
    assert database.run("SELECT 1 FROM towns WHERE name LIKE 'u%'").rows == ((1,),)


HOSTILE = (
    "INSERT INTO towns VALUES (9, 'x')",
    "UPDATE towns SET name = 'x'",
    "DELETE FROM towns",
    "DROP TABLE towns",
    "CREATE TABLE x(a)",
    "CREATE TEMP TABLE x(a)",
    "ALTER TABLE towns RENAME TO x",
    "ATTACH 'other.db' AS other",
    "DETACH main",
    "VACUUM",
    "VACUUM INTO 'copy.db'",
    "PRAGMA table_info(towns)",
    "PRAGMA query_only = 0",
    "BEGIN",
    "SAVEPOINT x",
    "REINDEX",
    "ANALYZE",
    "SELECT load_extension('x')",
    "SELECT readfile('/etc/passwd')",
    "SELECT writefile('x', 'y')",
    "SELECT randomblob(9)",
    "SELECT zeroblob(9)",
    "SELECT hex(name) FROM towns",
    "SELECT printf('%9999d', 1)",
    "SELECT group_concat(name) FROM towns",
    "SELECT sql FROM sqlite_master",
    "SELECT name FROM sqlite_schema",
    "SELECT * FROM pragma_table_info('towns')",
    "SELECT * FROM pragma_database_list",
    "SELECT * FROM generate_series(1, 9)",
    "SELECT * FROM json_each('[1]')",
    "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT COUNT(*) FROM n",
    "INSERT INTO towns SELECT * FROM towns RETURNING name",
    "SELECT * FROM temp.sqlite_master",
)


@pytest.mark.parametrize("sql", HOSTILE)
def test_nothing_but_reading_its_own_tables_is_done(shop, sql, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = hashlib.sha256(shop.read_bytes()).digest()
    with Database(shop) as database:
        found = database.run(sql)
        assert not found.ok
        assert found.error
        assert database.run("SELECT COUNT(*) FROM towns").rows == ((2,),)
    assert hashlib.sha256(shop.read_bytes()).digest() == before
    assert list(tmp_path.iterdir()) == []
    assert [path.name for path in shop.parent.iterdir()] == ["shop.db"]


def test_the_authorizer_alone_refuses_what_only_it_can_see(shop):
    """Reading the schema or a second database would pass the other fences."""
    with Database(shop) as database:
        for sql in (
            "SELECT sql FROM sqlite_master",
            "ATTACH ':memory:' AS m",
            "PRAGMA user_version",
            "SELECT hex('a')",
        ):
            assert database.run(sql).state == "denied", sql


def test_tables_may_be_narrowed(shop):
    with Database(shop, tables=["towns"]) as database:
        assert database.run("SELECT COUNT(*) FROM towns").ok
        assert database.run("SELECT COUNT(*) FROM makers").state == "denied"
    with pytest.raises(ValueError, match="nothing"):
        Database(shop, tables=["nothing"])


def test_two_statements_none_and_no_text(database):
    for sql in (
        "SELECT 1; SELECT 2",
        "",
        "   ",
        "-- nothing",
        "SELECT",
        "nonsense",
        "SELECT 'a\0b'",
        "SELECT '\ud800'",
        "SELECT 1;DROP TABLE towns",
    ):
        assert database.run(sql).state == "error", sql
    with pytest.raises(TypeError, match="sql"):
        database.run(None)


MANY = "SELECT COUNT(*) FROM " + ", ".join(f"sales {name}" for name in "abcdefghijklmnop")


def test_steps_end_a_query_where_the_clock_does_not_matter(shop):
    with Database(shop, limits=Limits(steps=100_000, seconds=1e6)) as database:
        assert database.run(MANY).state == "steps"
        assert database.run("SELECT COUNT(*) FROM sales").ok  # the next one has all its steps
        for _ in range(300):
            assert database.run("SELECT COUNT(*) FROM sales a, sales b, sales c, sales d").ok


def test_the_clock_ends_a_query(shop):
    with Database(shop, limits=Limits(steps=10**15, seconds=0.05)) as database:
        assert database.run(MANY).state == "time"
        assert database.run("SELECT COUNT(*) FROM sales").ok


def test_rows_and_bytes_are_bounded(shop):
    with Database(shop, limits=Limits(rows=9)) as database:
        assert len(database.run("SELECT 1 FROM sales a, sales b").rows) == 9
        found = database.run("SELECT 1 FROM sales a, sales b, sales c")
        assert (found.state, found.rows) == ("rows", ())
    with Database(shop, limits=Limits(result_bytes=40)) as database:
        assert database.run("SELECT name FROM towns").ok
        assert database.run("SELECT 'twenty characters ok' FROM sales").state == "memory"
    with Database(shop, limits=Limits(value_bytes=1000)) as database:
        doubled = "'0123456789'"
        for _ in range(8):
            doubled = f"replace({doubled}, '0', '00')"
        assert database.run(f"SELECT {doubled}").state == "denied"  # not on the list at all
        of_hundred = f"WITH one(x) AS (SELECT '{100 * 'x'}') SELECT "
        assert database.run(of_hundred + " || ".join(["x"] * 9) + " FROM one").ok
        assert database.run(of_hundred + " || ".join(["x"] * 11) + " FROM one").state == "memory"
    with Database(shop, limits=Limits(sql_bytes=100)) as database:
        assert database.run("SELECT 1 " + " " * 200).state in ("memory", "error")


def test_a_single_row_is_bounded(shop):
    """A hundred columns of a large value each would be returned as one row before its size could be counted."""
    value = f"WITH one(x) AS (SELECT '{100 * 'x'}') SELECT "
    with Database(shop, limits=Limits(columns=5)) as database:
        assert database.run(value + ", ".join("x" * 5) + " FROM one").ok
        assert database.run(value + ", ".join("x" * 6) + " FROM one").state == "error"
        assert database.run("SELECT * FROM bikes").ok
    with Database(shop, limits=Limits(columns=1)) as database:
        assert database.run("SELECT * FROM bikes").ok  # as many as the widest table has


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="temporary files are watched on Linux only")
def test_what_spills_to_the_disk_is_bounded(tmp_path):
    path = tmp_path / "many.db"
    made = sqlite3.connect(path)
    made.execute("CREATE TABLE t(a TEXT)")
    made.executemany("INSERT INTO t VALUES (?)", [("x" * 1000,)] * 2000)
    made.commit()
    made.close()
    spilling = "SELECT a.a FROM t a, t b ORDER BY a.a || b.a"
    with Database(path, limits=Limits(temp_bytes=1 << 20, cache_kib=64)) as database:
        assert database.run(spilling).state == "disk"
        assert database.run("SELECT COUNT(*) FROM t").rows == ((2000,),)
        assert execution._spilled() == 0  # gone with the query
    with Database(path, limits=Limits(steps=200_000, cache_kib=64)) as database:
        assert database.run(spilling).state == "steps"


@pytest.mark.parametrize(
    "expression",
    [
        "instr(x || x, x || 'b')",
        "trim(x, 'b' || y)",
        "ltrim(x, y)",
        "rtrim(x, y)",
        "x LIKE '%ab%'",
        "x LIKE 'a!%' ESCAPE '!'",
    ],
)
def test_the_clock_is_looked_at_inside_a_row(shop, expression, monkeypatch):
    """SQLite looks between rows only; a row may hold hundreds of such calls."""
    start, looks = execution.time.monotonic(), []

    def passing():
        looks.append(1)
        return start + 10 * len(looks)

    monkeypatch.setattr(execution.time, "monotonic", passing)
    with Database(shop, limits=Limits(steps=10**9)) as database:
        found = database.run(f"WITH one(x, y) AS (SELECT 'aaaa', 'ab') SELECT {', '.join([expression] * 9)} FROM one")
    assert found.state == "time"
    assert len(looks) == 2  # the first call was the last


TEXTS = st.text(alphabet="aAb%_!é ", max_size=7)


@settings(max_examples=60, deadline=None)
@given(TEXTS, TEXTS, st.sampled_from([None, "!", "a"]))
def test_like_instr_and_trim_are_sqlite_s(pattern, text, escape):
    made = sqlite3.connect(":memory:")
    escaping = () if escape is None else (escape,)
    wanted = made.execute("SELECT ? LIKE ?" + " ESCAPE ?" * len(escaping), (text, pattern, *escaping)).fetchone()[0]
    assert functions.like(pattern, text, *escaping) == wanted
    own = {name: call for (name, count), call in functions.replaced(lambda: None).items() if count == 2}
    for name in ("instr", "trim", "ltrim", "rtrim"):
        assert own[name](text, pattern) == made.execute(f"SELECT {name}(?, ?)", (text, pattern)).fetchone()[0]
    made.close()


@pytest.mark.parametrize("value", [None, 0, 12, -3, 2.0, 0.1, 1e21, -1e-7, 123456789.5, math.inf, -math.inf])
def test_values_that_are_no_text_are_compared_as_sqlite_does(value):
    made = sqlite3.connect(":memory:")
    for pattern in ("%1%", "%.0", "a_", "%inf", value):
        assert functions.like(pattern, value) == made.execute("SELECT ? LIKE ?", (value, pattern)).fetchone()[0]
    assert functions.like("%", b"ab") == functions.like(b"%", "ab") == 0
    assert functions.instr(value, "1") == made.execute("SELECT instr(?, '1')", (value,)).fetchone()[0]
    made.close()


def test_a_pattern_that_could_take_long_is_refused(database):
    assert database.run(f"SELECT name FROM towns WHERE name LIKE '{'_' * 201}'").state == "error"
    assert database.run(f"SELECT name FROM towns WHERE name LIKE '{'_' * 200}'").rows == ()
    assert database.run("SELECT name FROM towns WHERE name LIKE 'U!%' ESCAPE 'ab'").state == "error"


def test_expressions_that_double_are_not_even_read(database):
    """Thirty expressions, each naming the one before twice: SQLite would copy a billion while it reads the query."""
    doubled = ", ".join(f"c{n} AS (SELECT 1 AS x FROM c{n - 1}, c{n - 1} AS again)" for n in range(1, 30))
    noted = doubled.replace("FROM", "/* of */ FROM --\n")
    for sql in (
        f"WITH c0 AS (SELECT 1 AS x), {doubled} SELECT COUNT(*) FROM c29",
        f'WITH "c0"(x) AS MATERIALIZED (SELECT 1), {doubled} SELECT COUNT(*) FROM c29'.replace("c5", "[c5]").replace(
            "c6", '"C6"'
        ),
        f"WITH c0 AS (SELECT 1 AS x), {doubled} SELECT 1 FROM c29 AS a",
        f"SELECT * FROM (WITH c0 AS NOT MATERIALIZED (SELECT 1 AS x), {noted} SELECT COUNT(*) FROM c29)",
    ):
        assert functions.copies(sql) > functions.MOST_COPIES
        assert database.run(sql).state == "memory"
    many = ", ".join(f"c{n} AS (SELECT 1)" for n in range(500))
    assert database.run(f"WITH {many} SELECT 1").state == "memory"
    chain = ", ".join(
        f"c{n} AS (SELECT c{n - 1}.x, c{n - 1}.x AS c{n} FROM c{n - 1} WHERE c{n - 1}.x > 0)" for n in range(1, 9)
    )
    sql = (
        f"WITH c0 AS (SELECT 1 AS x), {chain} SELECT c8.x FROM c8 JOIN c7 ON c7.x = c8.x WHERE 'c1 c1' <> (SELECT 'c2')"
    )
    assert functions.copies(sql) <= 20
    assert database.run(sql).rows == ((1,),)
    assert functions.copies("SELECT COUNT(*) FROM bikes") == functions.copies(")( AS (") == functions.copies("") == 0


def test_common_functions_work_and_views_are_watched_too(tmp_path):
    path = tmp_path / "views.db"
    made = sqlite3.connect(path)
    made.executescript(
        "CREATE TABLE t(a TEXT); INSERT INTO t VALUES ('2026-11-29 10:20:30'); CREATE VIEW fine AS SELECT a FROM t WHERE a LIKE '2026%';"
        "CREATE VIEW bad AS SELECT hex(a) FROM t; CREATE TABLE gone(b); CREATE VIEW broken AS SELECT b FROM gone; DROP TABLE gone;"
    )
    made.close()
    with Database(path) as database:
        assert database.run("SELECT strftime('%Y', a), date(a), instr(a, ' ') FROM fine").rows == (
            ("2026", "2026-11-29", 11),
        )
        assert database.run("SELECT * FROM bad").state == "denied"
        assert "broken" not in database.tables
        assert not database.run("SELECT * FROM broken").ok
    with Database(path, tables=["fine"]) as database:
        assert database.run("SELECT * FROM fine").state == "denied"  # what it shows is in another table
    assert FUNCTIONS.isdisjoint(
        {"load_extension", "readfile", "randomblob", "zeroblob", "printf", "format", "replace", "hex", "random"}
    )


@pytest.mark.parametrize("place", ["_allowed", "_too_long", "_look"])
def test_a_ctrl_c_inside_a_query_is_not_swallowed(shop, place, monkeypatch):
    """SQLite calls back into Python and drops what is raised there."""
    with Database(shop) as database:
        if place == "_allowed":

            class Pressing(frozenset):
                def __contains__(self, name):
                    raise KeyboardInterrupt

            database.tables = Pressing()
        else:
            real, calls = execution.time.monotonic, []

            def pressing():
                calls.append(1)
                if len(calls) > 1:
                    raise KeyboardInterrupt
                return real()

            monkeypatch.setattr(execution.time, "monotonic", pressing)
        with pytest.raises(KeyboardInterrupt):
            database.run(MANY if place == "_too_long" else "SELECT instr(name, 'U') FROM towns")
        monkeypatch.undo()
        database.tables = frozenset(["towns"])
        assert database.run("SELECT COUNT(*) FROM towns").ok


def test_a_database_is_its_thread_s_and_ends_with_close(shop):
    database = Database(shop)
    raised = []

    def elsewhere():
        try:
            database.run("SELECT 1")
        except RuntimeError as error:
            raised.append(str(error))

    other = threading.Thread(target=elsewhere)
    other.start()
    other.join()
    assert raised == ["a Database may be used by one thread only"]
    database.close()
    with pytest.raises(RuntimeError, match="closed"):
        database.run("SELECT 1")


def test_a_writer_s_lock_is_waited_for_no_longer_than_a_query_may_take(shop, tmp_path):
    path = tmp_path / "busy.db"
    path.write_bytes(shop.read_bytes())
    with Database(path, limits=Limits(seconds=0.05)) as database:
        writing = sqlite3.connect(path, isolation_level=None)
        writing.execute("BEGIN EXCLUSIVE")
        found = database.run("SELECT COUNT(*) FROM towns")
        assert (found.state, found.error) == ("error", "database is locked")
        writing.execute("ROLLBACK")
        writing.close()
        assert database.run("SELECT COUNT(*) FROM towns").ok


def test_reading_a_wal_database_makes_no_files(shop, tmp_path):
    path = tmp_path / "wal.db"
    path.write_bytes(shop.read_bytes())
    made = sqlite3.connect(path)
    assert made.execute("PRAGMA journal_mode = WAL").fetchone() == ("wal",)
    made.execute("INSERT INTO towns VALUES (3, 'Köln')")
    made.commit()
    # a program has it open: what it wrote is seen, through its own files
    with Database(path) as database:
        assert database.run("SELECT COUNT(*) FROM towns").rows == ((3,),)
    files = {name: (tmp_path / name).read_bytes() for name in ("wal.db", "wal.db-wal")}
    made.close()
    assert [one.name for one in tmp_path.iterdir()] == ["wal.db"]
    before = path.read_bytes()
    with Database(path) as database:
        assert database.run("SELECT COUNT(*) FROM towns").rows == ((3,),)
        assert list(read_schema(path).tables) == ["makers", "bikes", "towns", "sales"]
        assert [one.name for one in tmp_path.iterdir()] == ["wal.db"]
    assert [one.name for one in tmp_path.iterdir()] == ["wal.db"]
    assert path.read_bytes() == before
    # one that was left behind by a program that died would have to be written to be read
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    for read in (Database, read_schema):
        with pytest.raises(ValueError, match="write-ahead log"):
            read(path)
    assert sorted(one.name for one in tmp_path.iterdir()) == ["wal.db", "wal.db-wal"]


def test_files_that_are_none(tmp_path):
    with pytest.raises(ValueError, match="SQLite file"):
        Database(tmp_path / "nothing.db")
    other = tmp_path / "other.db"
    other.write_bytes(b"no database at all" * 100)
    with pytest.raises(ValueError, match="SQLite file"):
        Database(other)
    for bad in ({"seconds": math.nan}, {"rows": 0}, {"steps": 1.5}):
        with pytest.raises((ValueError, TypeError), match=next(iter(bad))):
            Limits(**bad)


def test_results_are_equal_in_three_ways():
    def is_same(a, b):
        return [same_result(Executed("ok", tuple(a)), Executed("ok", tuple(b)), mode=mode) for mode in MODES]

    assert is_same([(1,), (2,)], [(1,), (2,)]) == [True, True, True]
    assert is_same([(1,), (2,)], [(2,), (1,)]) == [True, True, False]
    assert is_same([(1,), (1,)], [(1,)]) == [True, False, False]
    assert is_same([(1, 2)], [(2, 1)]) == [False, False, False]  # columns are not sorted
    assert is_same([], []) == [True, True, True]
    assert is_same([(None,)], []) == [False, False, False]
    assert is_same([(0.1 + 0.2,)], [(0.3,)]) == [True, True, True]
    assert is_same([(1.0,)], [(1,)]) == [True, True, True]
    assert is_same([("1",)], [(1,)]) == [False, False, False]
    assert is_same([(12345678901.0,)], [(12345678901,)]) == [True, True, True]
    assert is_same([(12345678901.000004,)], [(12345678901.0,)]) == [True, True, True]
    assert is_same([(12345678901,)], [(12345678902,)]) == [False, False, False]
    assert is_same([(math.inf,)], [(math.inf,)]) == [True, True, True]
    failed = Executed("error", (), "x")
    assert not same_result(failed, Executed("ok", ()))
    with pytest.raises(ValueError, match="gold"):
        same_result(Executed("ok", ()), failed)
    with pytest.raises(ValueError, match="mode"):
        same_result(failed, Executed("ok", ()), mode="bag")


# ---- linking


def test_a_schema_is_read(schema):
    assert list(schema.tables) == ["makers", "bikes", "towns", "sales"]
    assert [c.kind for c in schema.tables["bikes"]] == ["key", "key", "text", "number", "number"]
    assert schema.between("bikes", "makers") == "maker_id"
    assert schema.between("makers", "bikes") is None
    assert schema.foreign["sales", "town_id"] == ("towns", "town_id")
    with pytest.raises(KeyError, match="towns.price"):
        schema.column("towns", "price")


def test_a_question_is_linked(schema, database):
    found = link('Which bikes of "alpha" have a weight above nine?', schema, database)
    assert found.tables == ("makers", "bikes")  # the maker by its value only
    assert found.values == {"alpha": ("makers.name",)}
    assert found.numbers == ("9",)
    names = {c.full for c in found.columns}
    assert {"bikes.weight", "bikes.maker_id", "makers.name"} <= names
    assert not {"bikes.gear_count", "makers.founded"} & names
    between = link("Makers and their sales", schema, database)
    assert between.tables == ("makers", "bikes", "sales")  # joined through what neither names
    assert link("What is up?", schema, database).tables == tuple(schema.tables)
    quoting = link('Where is "O\'Neil"?', schema, database)
    assert quoting.values == {"O'Neil": ("makers.name",)}


def test_many_quoted_texts_are_not_all_looked_up(schema, database, monkeypatch):
    asked = []
    monkeypatch.setattr(database, "holds", lambda *given: bool(asked.append(given)))
    found = link(" ".join(f'"text {n}"' for n in range(500)), schema, database)
    assert list(found.values) == [f"text {n}" for n in range(16)]
    assert len(asked) == 16 * 3


STRANGE = '''
CREATE TABLE "Order"("order id" INTEGER PRIMARY KEY, "group" TEXT, "Größe" REAL);
CREATE TABLE "line ""items"""("id" INTEGER PRIMARY KEY, "order" INTEGER REFERENCES "ORDER"("ORDER ID"), "unit price" REAL);
INSERT INTO "Order" VALUES (1, 'a', 2.5), (2, 'b', 7.5);
INSERT INTO "line ""items""" VALUES (1, 1, 10.0), (2, 1, 20.0), (3, 2, 30.0);
'''


def test_names_that_need_quotes(tmp_path):
    path = tmp_path / "strange.db"
    made = sqlite3.connect(path)
    made.executescript(STRANGE)
    made.close()
    schema = read_schema(path)
    items = 'line "items"'
    assert schema.between(items, "Order") == "order"  # in whatever case the key names its parent
    with Database(path) as database:
        assert database.columns(items) == ("id", "order", "unit price")
        assert database.holds("Order", "group", "A")
        known = example(
            'Which order has the group "a" and a größe above 2?',
            'SELECT "Order"."Größe" FROM "Order" WHERE "Order"."group" = \'a\' AND "Order"."Größe" > 2',
            schema, database,
        )  # fmt: skip
        asked = link('Which order has the group "b" and a größe above 5?', schema, database)
        best = bindings(abstracted(known), asked, schema)[0].sql
        assert best == known.sql.replace("'a'", "'b'").replace("> 2", "> 5")
        assert database.run(best).rows == ((7.5,),)
        joined = example(
            "What is the unit price of the line items of each order?",
            'SELECT "Order"."order id", "line ""items"""."unit price" FROM "Order" JOIN "line ""items""" '
            'ON "line ""items"""."order" = "Order"."order id"',
            schema, database,
        )  # fmt: skip
        again = bindings(abstracted(joined), joined.linked, schema)[0].sql
        assert again == joined.sql
        assert len(database.run(again).rows) == 3


def test_a_database_without_tables(tmp_path, library):
    path = tmp_path / "empty.db"
    made = sqlite3.connect(path)
    made.executescript("CREATE TABLE t(a); DROP TABLE t; VACUUM")
    made.close()
    with Database(path) as database:
        found = link("How many bikes are there?", read_schema(path), database)
        assert (found.tables, found.columns) == ((), ())
        assert answer(TIERS[-1], found, read_schema(path), database, library, Says()).sql == ""


def test_questions_in_any_script_are_read(schema, database):
    from assay.methods.serving.ellie_sql.schema import words

    assert words("Größe_in_mm > 2.5, Сколько 長さ?") == ["größe", "in", "mm", "2.5", "сколько", "長", "さ"]
    one = link("Сколько bikes?", schema, database)
    assert "сколько" in masked(one.question, schema, one)


def test_names_are_taken_out(schema, database):
    one = link('How many bikes of "Alpha" have a weight above 9?', schema, database)
    other = link('How many sales of "Bonn" have a price above 700?', schema, database)
    assert masked(one.question, schema, one) == masked(other.question, schema, other)
    assert "<value>" in masked(one.question, schema, one)


# ---- editing


def example(question, sql, schema, database):
    return Example(question, sql, schema, link(question, schema, database))


def test_an_example_becomes_another_question(schema, database):
    known = example(
        'Which bikes of the maker "Alpha" have a weight above 9?',
        "SELECT bikes.name FROM makers JOIN bikes ON bikes.maker_id = makers.maker_id WHERE makers.name = 'Alpha' AND bikes.weight > 9",
        schema,
        database,
    )
    skeleton = abstracted(known)
    asked = link('Which sales in the town "Bonn" have a price above 750?', schema, database)
    wanted = "SELECT sales.price FROM towns JOIN sales ON sales.town_id = towns.town_id WHERE towns.name = 'Bonn' AND sales.price > 750"
    assert wanted not in {one.sql for one in bindings(skeleton, asked, schema)}  # a name is no number
    again = bindings(
        skeleton, link('Which bikes of the maker "Beta" have a gear count above 2?', schema, database), schema
    )
    assert again[0].sql == known.sql.replace("Alpha", "Beta").replace("bikes.weight > 9", "bikes.gear_count > 2")
    assert [one.fit for one in again] == sorted((one.fit for one in again), reverse=True)
    assert bindings(skeleton, link("Which bikes have a weight above 9?", schema, database), schema) == []  # no value
    assert abstracted(known) == skeleton


def test_an_edit_of_an_example_by_its_own_question_gives_it_back(schema, database):
    for question, sql in (
        ("How many bikes are there?", "SELECT COUNT(*) FROM bikes"),
        ("Which makers have no bike with a weight above 9?",
         "SELECT makers.name FROM makers WHERE NOT EXISTS "
         "(SELECT 1 FROM bikes WHERE bikes.maker_id = makers.maker_id AND bikes.weight > 9)"),
        ("Which bikes weigh above the average weight?",
         "SELECT bikes.name FROM bikes WHERE bikes.weight > (SELECT AVG(bikes.weight) FROM bikes)"),
        ("Which 2 bikes have the largest weight?", "SELECT bikes.name FROM bikes ORDER BY bikes.weight DESC LIMIT 2"),
        ('What is founded of "O\'Neil"?', "SELECT makers.founded FROM makers WHERE makers.name = 'O''Neil'"),
    ):  # fmt: skip
        known = example(question, sql, schema, database)
        found = [one.sql for one in bindings(abstracted(known), known.linked, schema)]
        assert found[0] == sql
        assert len(found) == len(set(found))
        assert all(database.run(one).ok for one in found)


def test_numbers_stay_at_their_places_in_the_question(schema, database):
    known = example(
        "Which 2 bikes above a weight of 9 are first?",
        "SELECT bikes.name FROM bikes WHERE bikes.weight > 9 LIMIT 2",  # the other way round
        schema,
        database,
    )
    assert bindings(abstracted(known), known.linked, schema)[0].sql == known.sql
    asked = link("Which 7 bikes above a weight of 5 are first?", schema, database)
    assert bindings(abstracted(known), asked, schema)[0].sql.endswith("bikes.weight > 5 LIMIT 7")
    same = example(
        "Bikes with a weight from 9 to 9",
        "SELECT bikes.name FROM bikes WHERE bikes.weight BETWEEN 9 AND 9",
        schema,
        database,
    )
    asked = link("Bikes with a weight from 5 to 8", schema, database)
    assert bindings(abstracted(same), asked, schema)[0].sql.endswith("BETWEEN 5 AND 8")


def test_a_question_full_of_quotes_takes_no_longer(schema, database, monkeypatch):
    known = example(
        'Are "Swift" and "Tank" and "Dart" bikes?',
        "SELECT COUNT(*) FROM bikes WHERE bikes.name = 'Swift' OR bikes.name = 'Tank' OR bikes.name = 'Dart'",
        schema,
        database,
    )
    monkeypatch.setattr(database, "holds", lambda table, column, value: (table, column) == ("bikes", "name"))
    asked = link("Are these bikes: " + " ".join(f'"{n}"' for n in range(99)), schema, database)
    filled = []
    real = edits._filled
    monkeypatch.setattr(edits, "_filled", lambda *given: filled.append(1) or real(*given))
    assert len(bindings(abstracted(known), asked, schema)) == len(filled) == edits.MOST_FILLINGS


def test_numbers_that_no_question_names_stay(schema, database):
    known = example(
        "Which bike is heaviest in weight?",
        "SELECT bikes.name FROM bikes ORDER BY bikes.weight DESC LIMIT 1",
        schema,
        database,
    )
    assert "LIMIT 1" in bindings(abstracted(known), known.linked, schema)[0].sql


def test_what_cannot_be_edited_is_refused(schema, database):
    for sql, message in (
        ("SELECT weight FROM bikes", "with their tables"),
        ("SELECT bikes.colour FROM bikes", "no column"),
        ("SELECT b.gear_count FROM bikes AS b", "with their tables"),
        ("SELECT COUNT(*) FROM bikes WHERE bikes.maker_id = 1", "without the table makers"),
    ):
        with pytest.raises(ValueError, match=message):
            abstracted(example("How many bikes?", sql, schema, database))
    with pytest.raises(ValueError, match="examples"):
        Library([])


@pytest.fixture
def library(schema, database):
    return Library(
        [
            example(question, sql, schema, database)
            for question, sql in (
                ("How many bikes are there?", "SELECT COUNT(*) FROM bikes"),
                ("Which bikes have a weight above 9?", "SELECT bikes.name FROM bikes WHERE bikes.weight > 9"),
                ("Which bikes have a weight below 9?", "SELECT bikes.name FROM bikes WHERE bikes.weight < 9"),
                (
                    "How many bikes does each maker have?",
                    "SELECT makers.name, COUNT(*) FROM makers JOIN bikes ON bikes.maker_id = makers.maker_id GROUP BY makers.name",
                ),
            )
        ]  # fmt: skip
    )


def test_like_questions_come_first(library, schema, database):
    asked = link("Which sales have a price above 750?", schema, database)
    best = library.candidates(
        link("Which makers have a founded above 1920?", schema, database), schema, skeletons=1, most=1
    )
    assert best[0].sql == "SELECT makers.name FROM makers WHERE makers.founded > 1920"
    wide = library.candidates(asked, schema, skeletons=4, most=50)
    assert len(wide) == len({one.sql for one in wide})
    assert [one.prior for one in wide] == sorted((one.prior for one in wide), reverse=True)
    narrow = library.candidates(asked, schema, skeletons=4, most=3)
    assert narrow == wide[:3]


# ---- the model


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = write_tiny_llama(tmp_path_factory.mktemp("channel") / "tiny")
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


CANDIDATES = ["SELECT COUNT(*) FROM bikes", "SELECT bikes.name FROM bikes", "SELECT 1"]


@pytest.mark.parametrize("head", ["", "SQL: SELECT 2\nQuestion: What is two?\n\n"])
def test_scores_are_those_of_whole_texts_read_one_by_one(tiny, head):
    model, tokenizer = tiny
    if not head and tokenizer.bos_token_id is None:
        with pytest.raises(ValueError, match="head"):
            ChannelScorer(model, tokenizer)
        head = "-"
    scorer = ChannelScorer(model, tokenizer, head=head, batch=2)
    scores, tokens = scorer.score("How many bikes?", CANDIDATES)
    counted = 0
    for sql, score in zip(CANDIDATES, scores, strict=True):
        context = tokenizer(f"SQL: {sql}\nQuestion:", add_special_tokens=False)["input_ids"]
        target = tokenizer(" How many bikes?", add_special_tokens=False)["input_ids"]
        ids = torch.tensor([[*scorer.head, *context, *target]])
        counted += len(context) + len(target)
        with torch.inference_mode():
            logs = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        wanted = logs[-len(target) :].gather(1, torch.tensor(target)[:, None]).mean()
        assert score == pytest.approx(float(wanted), abs=1e-4)
    assert tokens == len(scorer.head) + counted


def test_one_candidate_is_no_choice(tiny):
    scorer = ChannelScorer(*tiny, head="-")
    assert scorer.score("What?", ["SELECT 1"]) == ([0.0], 0)
    assert scorer.score("What?", []) == ([], 0)
    assert scorer.read == 0


def test_kept_scores_cost_no_time_and_count_all_the_same(tiny, tmp_path):
    memory = tmp_path / "kept" / "scores.json"

    def fresh(identity="tiny"):
        return ChannelScorer(*tiny, head="-", memory=memory, identity=identity)

    first = fresh()
    scores, tokens = first.score("How many bikes?", CANDIDATES)
    first.save()
    assert first.read > 0
    second = fresh()
    assert second.score("How many bikes?", CANDIDATES) == (scores, tokens)
    assert second.read == 0
    other = fresh("another model")
    other.score("How many bikes?", CANDIDATES)
    assert other.read == first.read
    memory.write_text("{damaged", encoding="utf-8")
    assert fresh().score("How many bikes?", CANDIDATES)[1] == tokens
    memory.write_text('{"a": NaN}', encoding="utf-8")
    assert fresh().known == {}
    with pytest.raises(ValueError, match="identity"):
        ChannelScorer(*tiny, memory=memory)


def test_a_model_without_finite_scores_is_refused(tiny, tmp_path, monkeypatch):
    scorer = ChannelScorer(*tiny, head="-", memory=tmp_path / "scores.json", identity="x")
    monkeypatch.setattr(scorer, "_run", lambda rows, target: [math.nan] * len(rows))
    with pytest.raises(ValueError, match="finite"):
        scorer.score("How many bikes?", CANDIDATES)
    assert scorer.known == {}


# ---- the tiers


class Says:
    """A model that likes what it is told to like, and counts a token a character."""

    def __init__(self, **likes):
        self.likes, self.asked = likes, []

    def score(self, question, candidates):
        self.asked.append(list(candidates))
        scores = [max((v for k, v in self.likes.items() if k in sql), default=0.0) for sql in candidates]
        return scores, sum(map(len, candidates))


def ask(tier, text, library, schema, database, scorer):
    return answer(tier, link(text, schema, database), schema, database, library, scorer)


def test_a_tier_reads_what_it_says(library, schema, database):
    scorer = Says()
    found = ask(Tier("x", 4, 5), "Which bikes have a weight above 9?", library, schema, database, scorer)
    (asked,) = scorer.asked
    assert found.tokens == sum(map(len, asked)) > 0
    assert list(found.candidates) == asked
    assert len(asked) <= 5
    assert found.executed.rows == (("Tank",), ("Dart",))
    assert found.seconds > 0


def test_wider_tiers_read_no_less(library, schema, database):
    assert [t.name for t in TIERS] == ["basic", "intermediate", "advanced"]
    wider = 0
    for text in (
        "How many bikes are there?",
        "Which bikes have a gear count above 9?",
        "How many bikes does each maker have?",
    ):
        costs = [ask(tier, text, library, schema, database, Says()).tokens for tier in TIERS]
        assert costs == sorted(costs)
        wider += costs[0] < costs[-1]
    assert wider >= 2


def test_execution_repairs_and_votes(library, schema, database):
    text = "Which bikes have a weight above 100?"
    likes = {">": 5.0}
    blind = ask(Tier("x", 4, 9), text, library, schema, database, Says(**likes))
    assert "> 100" in blind.sql
    assert blind.executed.empty
    repaired = ask(Tier("x", 4, 9, "repair"), text, library, schema, database, Says(**likes))
    assert not repaired.executed.empty
    voted = ask(Tier("x", 4, 9, "vote"), text, library, schema, database, Says(**likes))
    assert not voted.executed.empty
    assert blind.tokens == repaired.tokens == voted.tokens  # running costs no tokens


def test_candidates_of_one_result_vote_together(database):
    from assay.methods.serving.ellie_sql.pipelines import CHOOSERS

    alone = "SELECT COUNT(*) FROM towns"
    together = ["SELECT COUNT(*) FROM bikes", "SELECT COUNT(*) FROM sales"]  # both 3
    ranked = [(0.0, alone), *((-0.1, sql) for sql in together)]
    assert CHOOSERS["none"](ranked, database)[0] == alone
    assert CHOOSERS["vote"](ranked, database)[0] == together[0]
    assert CHOOSERS["vote"]([(0.0, alone), *((-9.0, sql) for sql in together)], database)[0] == alone
    broken = [(1.0, "SELECT nothing"), (0.0, alone)]
    assert CHOOSERS["vote"](broken, database)[0] == CHOOSERS["repair"](broken, database)[0] == alone
    assert CHOOSERS["repair"]([(1.0, "SELECT nothing")], database)[0] == "SELECT nothing"


def test_no_candidate_is_an_answer_too(library, schema, database):
    found = ask(TIERS[0], 'Is "Ulm" or "Bonn" above 1, 2, 3?', Library(library.examples[1:2]), schema, database, Says())
    assert found.tokens >= 0
    empty = ask(TIERS[0], "Which bikes are heavy?", Library(library.examples[1:2]), schema, database, Says())
    assert (empty.sql, empty.tokens, empty.executed.ok, empty.margin) == ("", 0, False, 0.0)


def test_settings_of_a_tier():
    for bad in ({"skeletons": 0}, {"candidates": 0}, {"execution": "always"}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            Tier(**({"name": "x", "skeletons": 1, "candidates": 1} | bad))


@settings(max_examples=12, deadline=None)
@given(st.text(max_size=60) | st.text("aé\"'1 長.", max_size=60))
def test_no_question_breaks_the_way_to_an_answer(shop_for_all, text):
    database, schema, library = shop_for_all
    for tier in TIERS:
        found = answer(tier, link(text, schema, database), schema, database, library, Says())
        assert found.executed.state in ("ok", "error", "memory")


@pytest.fixture(scope="module")
def shop_for_all(shop, schema):
    with Database(shop) as database:
        known = [("How many bikes?", "SELECT COUNT(*) FROM bikes"),
                 ("Bikes above 9 weight", "SELECT bikes.name FROM bikes WHERE bikes.weight > 9"),
                 ('Bikes "Swift"', "SELECT bikes.weight FROM bikes WHERE bikes.name = 'Swift'")]  # fmt: skip
        yield database, schema, Library([example(*pair, schema, database) for pair in known])


def test_a_model_that_writes_by_itself(tiny, schema, database):
    from assay.methods.serving.ellie_sql import written_sql

    found = written_sql(*tiny, link("How many bikes?", schema, database), new_tokens=5)
    assert found.startswith("SELECT")
    assert ";" not in found
    assert not database.run(found).ok  # of random weights
