"""What the experiments of ellie_sql say if the router is broken, a rival is as good, or accuracy is lost; and what they are made of."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from tests.properties.sabotage import PAYS, record_of, verdict_of

from assay.evidence.types import Verdict
from assay.evidence.verdict import judge
from assay.experiments import experiments_of
from assay.experiments.serving import ellie_sql as room
from assay.experiments.serving.ellie_sql.databases import VIEWS, build
from assay.experiments.serving.ellie_sql.questions import EXAMPLES, QUERIES, questions
from assay.methods.serving.ellie_sql import Database, Executed, TierRouter, abstracted, read_schema

SAVED, TEP = "ellie_sql/token-reduction", "ellie_sql/tep"
CLAIMS = (SAVED, TEP)
POINT = room.SIZES["smoke"]
N = 80


def world(**changes):
    """Questions of which half are easy, and look it; what is hard takes the advanced pipeline, which is seldom wrong."""
    chance = np.random.default_rng(0)
    hard = np.arange(N) % 2 == 1
    words = chance.normal(size=(N, 8)) / 4
    words[:, 0] += np.where(hard, 1.0, -1.0)
    results = np.ones((N, 3))
    results[hard, :2] = 0
    results[chance.random(N) < 0.04] = 0
    tokens = np.stack([chance.uniform(*ends, N) for ends in ((180, 220), (500, 600), (1300, 1500))], axis=1)
    seen = room.Collected(
        asked=[SimpleNamespace(template=f"t{n}") for n in range(N)],
        results=results,
        tokens=tokens,
        failed=np.zeros((N, 3), bool),
        margins=chance.random((N, 3)),
        words=words,
        counts=chance.integers(1, 5, (N, 2)).astype(float),
        lengths=chance.random((N, 1)),
        details={},
    )
    return replace(seen, **{name: change(seen) for name, change in changes.items()})


@pytest.fixture(autouse=True)
def seen(monkeypatch):
    """The world that the experiments see; a test may set another one."""

    def install(**changes):
        made = world(**changes)
        monkeypatch.setattr(room, "collected", lambda **point: made)
        return made

    install()
    monkeypatch.setattr(room, "FOLDS", 2)
    monkeypatch.setattr(room, "RETRIEVED", 2)
    monkeypatch.setattr(room, "STRENGTHS", (0.3, 3.0))
    return install


def test_a_router_that_knows_pays():
    record = record_of(SAVED, POINT)
    assert judge(record).verdict is Verdict.REPRODUCED
    assert record.free == 0  # no rival keeps the accuracy
    assert record.measured.low > 35
    controls = record.quality.controls
    assert controls["deleted"] < controls["random"] < record.quality.low
    assert record.arms["oracle"] >= record.measured.median
    assert record.arms[room.LENGTH] < record.measured.low
    assert verdict_of(TEP, POINT) in PAYS


def by_chance(features, results, *rest):
    """A router of the honest one's shares that sees nothing."""
    router = TierRouter(how="cascade").fit(features, results)
    chance = np.random.default_rng(len(features))
    router.predict = lambda X: chance.choice([0, 2], len(X))
    return router, 1.0


@pytest.mark.parametrize("claim", CLAIMS)
def test_a_router_of_chance_does_not(claim, monkeypatch):
    monkeypatch.setattr(room, "tuned", by_chance)
    assert verdict_of(claim, POINT) not in PAYS


@pytest.mark.parametrize("claim", CLAIMS)
def test_features_that_say_nothing_do_not(claim, seen):
    seen(words=lambda world: np.random.default_rng(5).normal(size=world.words.shape))
    assert verdict_of(claim, POINT) not in PAYS


@pytest.mark.parametrize("claim", CLAIMS)
def test_everything_to_basic_loses_the_accuracy(claim, monkeypatch):
    cheap = lambda features, results, *rest: (TierRouter(how="cascade", threshold=0.0).fit(features, results), 1.0)  # noqa: E731
    monkeypatch.setattr(room, "tuned", cheap)
    assert verdict_of(claim, POINT) not in PAYS


def test_trying_in_turn_is_better_where_a_failure_tells(seen):
    """Where basic fails visibly whenever it is wrong, trying costs a little and loses nothing."""
    seen(
        failed=lambda world: world.results == 0,
        tokens=lambda world: world.tokens * [0.05, 0.05, 1.0],
        words=lambda world: world.words + np.random.default_rng(1).normal(size=world.words.shape),
    )
    record = record_of(SAVED, POINT)
    assert record.free > record.measured.high > 0
    assert judge(record).verdict is Verdict.DOES_NOT_PAY
    assert "trying in turn" in judge(record).reason


def test_a_model_s_own_doubt_may_be_the_better_router(seen):
    seen(
        margins=lambda world: np.where(world.results > 0, 0.9, 0.1),
        tokens=lambda world: world.tokens * [0.05, 0.05, 1.0],
        words=lambda world: world.words + np.random.default_rng(1).normal(size=world.words.shape),
    )
    record = record_of(SAVED, POINT)
    assert record.free == record.arms[room.DOUBT] > record.measured.high
    assert judge(record).verdict is Verdict.DOES_NOT_PAY


def test_one_cheaper_pipeline_may_be_enough(seen):
    seen(results=lambda world: np.stack([world.results[:, 0], world.results[:, 2], world.results[:, 2]], axis=1))
    record = record_of(SAVED, POINT)
    assert record.free >= record.arms["always intermediate"] > 50


def test_where_the_length_tells_as_much_the_claim_is_refuted(seen):
    seen(
        lengths=lambda world: world.words[:, :1],
        words=lambda world: world.words + np.random.default_rng(2).normal(size=world.words.shape),
    )
    record = record_of(SAVED, POINT)
    assert record.arms[room.LENGTH] > record.measured.median
    assert judge(record).verdict is Verdict.REFUTED


def test_little_saved_is_refuted(seen):
    """Where nearly everything needs the advanced pipeline, its tokens cannot be saved."""
    seen(results=lambda world: np.where(np.arange(N)[:, None] % 12 == 0, 1.0, [0.0, 0.0, 1.0]),
         words=lambda world: np.where(np.arange(N)[:, None] % 12 == 0, -1.0, 1.0) + world.words * 0)  # fmt: skip
    record = record_of(SAVED, POINT)
    assert 0 < record.measured.high < 20
    assert judge(record).verdict is Verdict.REFUTED


def test_elasticity_means_nothing_where_advanced_is_no_better(seen):
    seen(results=lambda world: np.stack([world.results[:, 2]] * 2 + [world.results[:, 0]], axis=1))
    record = record_of(TEP, POINT)
    assert record.measured.median == record.measured.low == 0
    assert judge(record).verdict not in PAYS


def test_no_question_is_routed_by_a_router_that_saw_its_template(monkeypatch, seen):
    pairs = {}
    made = seen(asked=lambda world: [SimpleNamespace(template=f"t{n // 2}") for n in range(N)])
    marked = replace(made, words=np.hstack([made.words, made.templates[:, None]]))
    monkeypatch.setattr(room, "collected", lambda **point: marked)
    real = room.tuned

    def noting(features, *rest):
        router, strength = real(features, *rest)
        if features.shape[1] == 9:
            known = set(features[:, -1])
            predict = router.predict
            router.predict = lambda X: (pairs.setdefault(len(pairs), (known, set(X[:, -1]))), predict(X))[1]
        return router, strength

    monkeypatch.setattr(room, "tuned", noting)
    record_of(SAVED, POINT)
    assert len(pairs) >= room.SEEDS * room.FOLDS
    assert all(known and asked and not known & asked for known, asked in pairs.values())


def test_the_line_of_chance_is_below_what_is_mixed(seen):
    study = room._Study(world())
    results, costs = study.seen.results.mean(0), study.seen.tokens.mean(0)
    assert study._chord(costs[0]) == pytest.approx(results[0])
    assert study._chord(costs[2]) == pytest.approx(results[2])
    middle = study._chord((costs[0] + costs[2]) / 2)
    assert middle == pytest.approx((results[0] + results[2]) / 2)
    assert study.gained(study.arms()[room.CHANCE]) <= 1e-9
    assert study.gained(study.candidate) > 0.1


def test_the_deciding_points_are_named():
    for found in experiments_of("ellie_sql"):
        assert set(found.decides) == {"smoke", "small", "full"}


# ---- what it is made of


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    files = build(tmp_path_factory.mktemp("databases"))
    files.pop("debian", None)
    databases = {name: Database(file) for name, file in files.items()}
    yield databases, {name: read_schema(file) for name, file in files.items()}
    for database in databases.values():
        database.close()


def test_the_databases_hold_real_things(made):
    databases, schemas = made
    assert databases["science"].run("SELECT COUNT(*) FROM flowers").rows == ((150,),)
    assert databases["science"].run("SELECT name FROM species ORDER BY name").rows == (
        ("setosa",),
        ("versicolor",),
        ("virginica",),
    )
    assert databases["library"].run("SELECT COUNT(*) FROM functions").rows[0][0] > 100
    assert databases["unicode"].run("SELECT code_point FROM characters WHERE name = 'latin small letter a'").rows == (
        (97,),
    )
    for view in VIEWS:
        assert schemas[view.database].between(view.child, view.parent)
        assert all(schemas[view.database].has(view.child, name) for name in (*view.numbers, view.child_name))


def test_the_debian_database_where_dpkg_is(tmp_path, monkeypatch):
    status = tmp_path / "status"
    status.write_text(
        "Package: a\nSection: libs\nInstalled-Size: 10\nDepends: b, c (>= 1)\nDescription: x\n more: y\n\nPackage: b\nInstalled-Size: 3\n\n"
        "Package: gone\n"
    )
    monkeypatch.setattr("assay.experiments.serving.ellie_sql.databases.DPKG", status)
    with Database(build(tmp_path)["debian"]) as database:
        assert database.run("SELECT name, installed_size, dependency_count FROM packages").rows == (
            ("a", 10, 2),
            ("b", 3, 0),
        )
        assert database.run("SELECT name FROM sections").rows == (("libs",), ("misc",))
    monkeypatch.setattr("assay.experiments.serving.ellie_sql.databases.DPKG", tmp_path / "nothing")
    (tmp_path / "again").mkdir()
    assert "debian" not in build(tmp_path / "again")


def test_questions_are_split_by_template(made):
    databases, schemas = made
    known = questions(VIEWS, databases, schemas, range(EXAMPLES), seed=1)
    asked = questions(VIEWS, databases, schemas, range(EXAMPLES, 5), seed=0)
    assert (len(known), len(asked)) == (48, 72)
    assert not {one.template for one in known} & {one.template for one in asked}
    assert len({one.template for one in (*known, *asked)}) == 5 * len(QUERIES) == 120
    assert sorted({one.kind for one in asked}) == [0, 1, 2]
    assert all(not one.gold.empty for one in (*known, *asked))
    assert asked == questions(VIEWS, databases, schemas, range(EXAMPLES, 5), seed=0)
    assert asked != questions(VIEWS, databases, schemas, range(EXAMPLES, 5), seed=3)
    for one in known:
        abstracted(room._example(one, schemas, databases))
    three = questions(VIEWS, databases, schemas, range(EXAMPLES, 3), seed=0, each=3, queries=QUERIES[:2])
    assert len({(one.template, one.database, one.sql) for one in three}) == 6


class Words:
    """A model that counts words and has no opinion."""

    def score(self, question, candidates):
        return [0.0] * len(candidates), sum(len(sql.split()) for sql in candidates) if len(candidates) > 1 else 0


def test_all_tiers_run_on_all_questions(monkeypatch):
    monkeypatch.undo()  # the real collection
    before = set(Path(tempfile.gettempdir()).glob("assay-databases*"))
    seen = room.collected(wordings=1, each=1, queries=6, debian=False, zero_shot=3, scorer=Words())
    assert seen.results.shape == seen.tokens.shape == seen.failed.shape == (6, 3)
    assert set(np.unique(seen.results)) <= {0.0, 1.0}
    assert (np.diff(seen.tokens.mean(0)) > 0).all()
    assert seen.results[:, -1].mean() >= 0.3
    assert len(set(seen.templates)) == 6
    assert seen.details["tokens_really_read"] == 0
    assert set(Path(tempfile.gettempdir()).glob("assay-databases*")) == before


def test_a_query_that_finds_nothing_is_drawn_again(made):
    databases, schemas = made
    empty = SimpleNamespace(
        run=lambda sql: (
            databases["science"].run(sql) if "GROUP" in sql or "IN (" in sql or "WHERE" not in sql else Executed("ok")
        )
    )
    with pytest.raises(ValueError, match="finds nothing"):
        questions(VIEWS[2:3], {"science": empty}, schemas, [0], seed=0, queries=QUERIES[1:2])
