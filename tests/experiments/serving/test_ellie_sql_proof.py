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
from assay.experiments.serving.ellie_sql import collecting, study
from assay.experiments.serving.ellie_sql.databases import JUDGED, VIEWS, build
from assay.experiments.serving.ellie_sql.questions import NEW_QUERIES, QUERIES, questions
from assay.methods.serving.ellie_sql import (
    TIERS,
    ChannelScorer,
    Database,
    Executed,
    TierRouter,
    abstracted,
    oracle,
    read_schema,
)
from tiny import write_tiny_llama

SAVED, TEP = "ellie_sql/token-reduction", "ellie_sql/tep"
CLAIMS = (SAVED, TEP)
POINT = room.SIZES["smoke"]
OTHERS = study.Study._others  # arms that decide nothing: most tests leave them out
N = 160  # the first half is learnt from


def world(**changes):
    """Questions of which half are easy, and look it; what is hard takes the advanced pipeline, which is seldom wrong.

    Changes are applied one after the other, each to what the ones before it left.
    """
    chance = np.random.default_rng(0)
    hard = np.arange(N) % 2 == 1
    words = chance.normal(size=(N, 8)) / 4
    words[:, 0] += np.where(hard, 1.0, -1.0)
    results = np.ones((N, 3))
    results[hard, :2] = 0
    results[chance.random(N) < 0.04] = 0
    tokens = np.stack([chance.uniform(*ends, N) for ends in ((180, 220), (500, 600), (1300, 1500))], axis=1)
    seen = collecting.Collected(
        asked=[SimpleNamespace(template=f"t{n}", query=f"q{n // 2}") for n in range(N)],
        judged=np.arange(N) >= N // 2,
        results=results,
        tokens=tokens,
        failed=np.zeros((N, 3), bool),
        margins=chance.random((N, 3)),
        retried=tokens,
        narrow=(np.repeat(results[:, :1], len(study.WIDTHS), 1), np.outer(tokens[:, 2], study.WIDTHS) / 12),
        silent=np.zeros(N),
        words=words,
        counts=chance.integers(1, 5, (N, 2)).astype(float),
        lengths=chance.random((N, 1)),
        details={},
    )
    for name, change in changes.items():
        seen = replace(seen, **{name: change(seen)})
    return seen


@pytest.fixture(autouse=True)
def seen(monkeypatch):
    """The world that the experiments see; a test may set another one."""

    def install(**changes):
        made = world(**changes)
        monkeypatch.setattr(room, "collected", lambda **point: made)
        return made

    install()
    monkeypatch.setattr(study.Study, "_others", lambda made: {"oracle": made._sent(oracle(made.results))})
    monkeypatch.setattr(study, "FOLDS", 2)
    monkeypatch.setattr(study, "RETRIEVED", 2)
    monkeypatch.setattr(study, "STRENGTHS", (0.3, 3.0))
    return install


def test_a_router_that_knows_pays():
    record = record_of(SAVED, POINT)
    assert judge(record).verdict is Verdict.REPRODUCED
    assert record.free == 0  # no rival keeps the accuracy
    assert record.measured.low > 35
    controls = record.quality.controls
    assert controls["deleted"] < controls["random"] < record.quality.low
    assert record.arms["oracle"] >= record.measured.median
    assert record.arms[study.LENGTH] < record.measured.low
    assert verdict_of(TEP, POINT) in PAYS


def by_chance(features, results, *rest):
    """A router of the honest one's shares that sees nothing."""
    router = TierRouter(how="cascade").fit(features, results)
    chance = np.random.default_rng(len(features))
    router.predict = lambda X: chance.choice([0, 2], len(X))
    return router, 1.0


@pytest.mark.parametrize("claim", CLAIMS)
def test_a_router_of_chance_does_not(claim, monkeypatch):
    monkeypatch.setattr(study, "tuned", by_chance)
    assert verdict_of(claim, POINT) not in PAYS


@pytest.mark.parametrize("claim", CLAIMS)
def test_features_that_say_nothing_do_not(claim, seen):
    seen(words=lambda world: np.random.default_rng(5).normal(size=world.words.shape))
    assert verdict_of(claim, POINT) not in PAYS


@pytest.mark.parametrize("claim", CLAIMS)
def test_everything_to_basic_loses_the_accuracy(claim, monkeypatch):
    cheap = lambda features, results, *rest: (TierRouter(how="cascade", threshold=0.0).fit(features, results), 1.0)  # noqa: E731
    monkeypatch.setattr(study, "tuned", cheap)
    assert verdict_of(claim, POINT) not in PAYS


def test_trying_in_turn_is_better_where_a_failure_tells(seen):
    """Where basic fails visibly whenever it is wrong, trying costs a little and loses nothing."""
    seen(
        failed=lambda world: world.results == 0,
        tokens=lambda world: world.tokens * [0.05, 0.05, 1.0],
        retried=lambda world: world.tokens,
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
        retried=lambda world: world.tokens,
        words=lambda world: world.words + np.random.default_rng(1).normal(size=world.words.shape),
    )
    record = record_of(SAVED, POINT)
    assert record.free == record.arms[study.DOUBT] > record.measured.high
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
    assert record.arms[study.LENGTH] > record.measured.median
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


@pytest.mark.parametrize("claim", CLAIMS)
def test_an_advanced_pipeline_of_fewer_candidates_may_be_the_better_saving(claim, seen):
    """Where two candidates of twelve do as well, nobody needs a router."""
    seen(narrow=lambda world: (np.repeat(world.results[:, 2:], len(study.WIDTHS), 1), world.narrow[1]))
    record = record_of(claim, POINT)
    assert record.arms[study.NARROW] > record.measured.high
    assert judge(record).verdict is Verdict.DOES_NOT_PAY
    assert "fewer candidates" in judge(record).reason


def test_how_narrow_is_chosen_where_routers_learn(seen):
    """A width that is fine where is learnt and not where is judged is taken and loses; the other way round it is not taken."""
    narrow = lambda good: lambda world: (  # noqa: E731
        np.where(good(world)[:, None], world.results[:, 2:], 0.0).repeat(len(study.WIDTHS), 1), world.narrow[1])  # fmt: skip
    seen(narrow=narrow(lambda world: ~world.judged))
    assert record_of(SAVED, POINT).quality.controls[study.NARROW] == 0
    seen(narrow=narrow(lambda world: world.judged))
    record = record_of(SAVED, POINT)
    assert record.quality.controls[study.NARROW] == pytest.approx(record.quality.baseline)
    assert record.arms[study.NARROW] == 0


@pytest.mark.parametrize("claim", CLAIMS)
def test_a_pipeline_without_a_model_may_be_enough(claim, seen):
    """It reads no token: where it keeps the accuracy, there is nothing that a router could save."""
    seen(silent=lambda world: world.results[:, 2])
    record = record_of(claim, POINT)
    assert record.quality.controls[study.SILENT] == pytest.approx(record.quality.baseline)
    assert judge(record).verdict is Verdict.DOES_NOT_PAY


def test_trying_in_turn_reads_no_candidate_twice(seen):
    seen(failed=lambda world: world.results == 0)
    dear = record_of(SAVED, POINT).arms[study.FAILURE]
    seen(
        failed=lambda world: world.results == 0,
        retried=lambda world: np.diff(
            world.tokens, axis=1, prepend=0.0
        ),  # each tier's candidates are among the next one's
    )
    record = record_of(SAVED, POINT)
    made = study.Study(world())
    assert record.arms[study.FAILURE] == pytest.approx(made.saved(made._sent(oracle(made.results, hopeless="last"))))
    assert record.arms[study.FAILURE] > dear


def test_routers_learn_from_no_question_that_is_judged(monkeypatch, seen):
    made = seen(words=lambda world: np.hstack([world.words, np.arange(N)[:, None] / N]))
    real, known, judged = study.tuned, [], []

    def noting(features, *rest):
        router, strength = real(features, *rest)
        if features.shape[1] == 9:
            known.append(set(np.round(features[:, -1] * N).astype(int)))
            predict = router.predict
            router.predict = lambda X: (judged.append(set(np.round(X[:, -1] * N).astype(int))), predict(X))[1]
        return router, strength

    monkeypatch.setattr(study, "tuned", noting)
    record_of(SAVED, POINT)
    assert len(known) >= study.SEEDS
    assert all(one == set(np.flatnonzero(made.judged)) for one in judged)
    assert all(one < set(np.flatnonzero(~made.judged)) for one in known)
    assert len({frozenset(one) for one in known}) == study.SEEDS  # each seed has its own draw, the same for all arms


def test_a_threshold_is_tuned_on_queries_kept_out(monkeypatch):
    tried = []
    real = study.tuned_threshold
    monkeypatch.setattr(
        study, "tuned_threshold", lambda *given, **more: tried.append(more["groups"]) or real(*given, **more)
    )
    made = study.Study(world())
    assert len(tried) >= study.SEEDS
    assert set(np.concatenate(tried)) <= set(made.seen.queries[made.learnt])


def test_the_interval_resamples_queries_not_their_wordings():
    """Forty queries in two wordings that agree are forty observations, not eighty."""
    made = study.Study(world(results=lambda world: np.repeat(world.results[::2], 2, axis=0)))
    luck = np.repeat(np.random.default_rng(3).normal(size=N // 4), 2)
    low, high = made.interval(lambda rows: float(luck[rows].mean()))
    assert high - low == pytest.approx(2 * 1.96 * luck.std() / np.sqrt(N // 4), rel=0.15)


def test_a_model_that_reads_the_question_pays_for_it(seen, monkeypatch):
    monkeypatch.setattr(study.Study, "_others", OTHERS)
    own = np.full(N, 100.0)
    seen(read=lambda world: {study.MINILM: (world.words, own), study.READS: (world.words, own)})
    record = record_of(SAVED, POINT)
    same = record.measured.median
    charged = same - 100 * 100 / world().tokens[N // 2 :, 2].mean()
    assert record.arms[study.MINILM] == pytest.approx(charged)
    assert record.arms[study.READS] < record.arms[study.PREFERENCES]
    assert record.arms["oracle"] >= record.arms["oracle, the hopeless to advanced"] >= 0
    assert {
        "label classifier",
        "pairwise",
        "table count",
        "five nearest neighbours",
        study.BY_COST,
        study.WORDS,
    } <= set(record.arms)


def test_the_line_of_chance_is_below_what_is_mixed():
    made = study.Study(world())
    results, costs = made.results.mean(0), made.tokens.mean(0)
    assert made.chord(costs[0]) == pytest.approx(results[0])
    assert made.chord(costs[2]) == pytest.approx(results[2])
    middle = made.chord((costs[0] + costs[2]) / 2)
    assert middle == pytest.approx((results[0] + results[2]) / 2)
    assert made.gained(made.arms()[study.CHANCE]) <= 1e-9
    assert made.gained(made.candidate) > 0.1


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
    assert databases["web"].run("SELECT status_code FROM responses WHERE name = 'not found'").rows == ((404,),)
    assert databases["measures"].run("SELECT COUNT(*) FROM patients").rows == ((442,),)
    assert not {view.database for view in VIEWS} & {view.database for view in JUDGED}
    for view in (*VIEWS, *JUDGED):
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


def test_what_is_judged_is_asked_in_other_words_about_other_databases(made):
    databases, schemas = made
    every = (*QUERIES, *NEW_QUERIES)
    known = questions(VIEWS, databases, schemas, "examples", seed=1, queries=every)
    learnt = questions(VIEWS, databases, schemas, "learnt", seed=0)
    judged = questions(JUDGED, databases, schemas, "judged", seed=11, each=2, queries=every)
    assert (len(known), len(learnt), len(judged)) == (64, 72, 128)
    parts = [{one.template for one in part} for part in (known, learnt, judged)]
    assert len(set.union(*parts)) == sum(map(len, parts)) == 64 + 72 + 64
    assert not {one.database for one in (*known, *learnt)} & {one.database for one in judged}
    new = {query.name for query in NEW_QUERIES}
    assert not {one.query for one in learnt} & new
    assert {one.query for one in judged} > new
    assert len({wording for query in every for wording in query.wordings}) == sum(
        len(query.wordings) for query in every
    )
    assert len({query.sql for query in every}) == len(every)
    for part in (learnt, judged):
        assert sorted({one.kind for one in part}) == [0, 1, 2]
    assert all(not one.gold.empty for one in (*known, *learnt, *judged))
    assert learnt == questions(VIEWS, databases, schemas, "learnt", seed=0)
    assert learnt != questions(VIEWS, databases, schemas, "learnt", seed=3)
    for one in known:
        abstracted(collecting._example(one, schemas, databases))
    assert len({(one.template, one.database, one.sql) for one in judged}) == len(judged)
    few = questions(VIEWS, databases, schemas, "learnt", seed=0, wordings=1, queries=QUERIES[:2])
    assert few == [one for one in learnt if one.template in {f"{query.name} 2" for query in QUERIES[:2]}]


class Words:
    """A model that counts words and has no opinion."""

    def score(self, question, candidates):
        return [0.0] * len(candidates), sum(len(sql.split()) for sql in candidates) if len(candidates) > 1 else 0


def test_all_tiers_and_rivals_run_on_all_questions(monkeypatch):
    monkeypatch.undo()  # the real collection
    before = set(Path(tempfile.gettempdir()).glob("assay-databases*"))
    seen = room.collected(**{**POINT, "zero_shot": 3}, scorer=Words())
    count = 6 + 6 + 2
    assert seen.judged.tolist() == [False] * 6 + [True] * 8
    assert seen.results.shape == seen.tokens.shape == seen.failed.shape == seen.retried.shape == (count, 3)
    assert set(np.unique(seen.results)) <= {0.0, 1.0}
    assert (np.diff(seen.tokens.mean(0)) > 0).all()
    assert seen.results[~seen.judged, -1].mean() >= 0.3
    assert len(set(seen.templates)) == count
    assert len(set(seen.queries)) == 8
    # what trying in turn reads: first what the first tier reads, and in all no more than all tiers, no less than the dearest
    assert (seen.retried >= 0).all()
    assert (seen.retried[:, 0] == seen.tokens[:, 0]).all()
    total = seen.retried.sum(1)
    assert (total >= seen.tokens.max(1)).all()
    assert total.sum() < seen.tokens.sum()
    results, tokens = seen.narrow
    assert results.shape == tokens.shape == (count, len(study.WIDTHS))
    assert (np.diff(np.hstack([tokens, seen.tokens[:, -1:]])) >= 0).all()
    assert seen.words.shape[1] == 256 + 2 + 1 + study.RETRIEVED
    assert seen.read == {}
    assert seen.details["tokens_really_read"] == 0
    assert set(Path(tempfile.gettempdir()).glob("assay-databases*")) == before


@pytest.fixture(scope="module")
def scorer(tmp_path_factory):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = write_tiny_llama(tmp_path_factory.mktemp("reads") / "tiny", layers=1)
    return ChannelScorer(
        AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder), head="-"
    )


def test_what_a_model_makes_of_a_question_is_read_behind_its_last_token(scorer):
    texts = ["count them", "count all of these and then some more", "join join join"]
    together, tokens = collecting.read_by(scorer, texts)
    alone = np.concatenate([collecting.read_by(scorer, [text])[0] for text in texts])
    assert together == pytest.approx(alone, abs=1e-4)  # the padding is not read
    assert np.linalg.norm(together, axis=1) == pytest.approx(1)
    assert tokens.tolist() == [len(scorer.tokenizer(text)["input_ids"]) + 1 for text in texts]


def test_tiers_are_timed_with_nothing_kept_and_leave_no_trace(scorer):
    scorer.known, scorer.read = {"kept": 1.0}, 7
    asked = []

    def answered(tier, one, place):
        asked.append((tier, dict(scorer.known)))
        scorer.known["new"] = 0.0
        return SimpleNamespace(seconds=2.0)

    found = collecting._timed(scorer, [("a", None), ("b", None)], answered)
    assert found == {"seconds_a_question_of_tiers": [2.0] * 3}
    assert [tier for tier, _ in asked] == [*TIERS, *TIERS]
    assert all(known == {} for _, known in asked)
    assert (scorer.known, scorer.read) == ({"kept": 1.0}, 7)


def test_a_cache_that_cannot_be_written_stops_nothing(scorer, tmp_path, monkeypatch):
    full = tmp_path / "no folder"
    full.write_text("", encoding="utf-8")
    monkeypatch.setattr(scorer, "memory", full / "scores.json")
    with pytest.raises(OSError, match="no folder"):
        scorer.save()
    collecting._keep(scorer)


def test_a_query_that_finds_nothing_is_asked_of_other_tables(made):
    databases, schemas = made
    silent = SimpleNamespace(
        run=lambda sql: (
            databases["science"].run(sql) if "GROUP" in sql or "IN (" in sql or "WHERE" not in sql else Executed("ok")
        )
    )
    with pytest.raises(ValueError, match="finds nothing in flowers"):
        questions(VIEWS[2:3], {"science": silent}, schemas, "examples", seed=0, queries=QUERIES[1:2])
    mixed = {"science": silent, "unicode": databases["unicode"]}
    found = questions([VIEWS[2], VIEWS[5]], mixed, schemas, "learnt", seed=0, each=2, queries=QUERIES[1:2])
    assert {one.database for one in found} == {"unicode"}
    assert len(found) == 3
