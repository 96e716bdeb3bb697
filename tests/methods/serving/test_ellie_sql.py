"""EllieSQL: SQL that a model wrote is run safely, questions are linked, examples are edited, and tiers count what they read."""

from __future__ import annotations

import hashlib
import math
import sqlite3
import string

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from assay.methods.serving.ellie_sql import (
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
    with pytest.raises(ValueError, match="identity"):
        ChannelScorer(*tiny, memory=memory)


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
    assert found.candidates == len(asked) <= 5
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


@settings(max_examples=30, deadline=None)
@given(st.text(string.printable, max_size=60))
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
