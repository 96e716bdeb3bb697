"""What the experiments on compute-optimal spending say if the policy is broken, its difficulty means nothing, or a rival is as good.

Most tests have questions whose accuracy under every strategy is known; the searches themselves are tried on written samples.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from tests.properties.sabotage import PAYS, record_of, verdict_of

from assay.evidence.record import changed
from assay.evidence.types import Verdict
from assay.evidence.verdict import judge
from assay.experiments import experiments_of
from assay.experiments.reasoning import compute_optimal_ttc as room
from assay.experiments.reasoning import compute_optimal_ttc_curves as curves
from assay.experiments.reasoning import compute_optimal_ttc_runs as runs
from assay.experiments.reasoning import compute_optimal_ttc_units as made
from assay.experiments.reasoning.samples import Drawn
from assay.methods.core.reasoning.budget import Budget, Spent
from assay.methods.core.reasoning.generator import Sample, Sampling
from assay.methods.reasoning.compute_optimal_ttc import Outcome
from assay.workloads.reasoning import Item, items, prompt

SAVED, SIZE = "compute_optimal_ttc/generations-saved", "compute_optimal_ttc/small-beats-large"
POINT = {"items": 1, "samples": 24, "learn": 1, "revised": 0, "n": 16, "bins": 5, "folds": 2, "pilot": 2}
MANY = 60
GIVES = {  # accuracy by strategy and budget: of easy questions, of hard ones
    "parallel": ((0.5, 0.1), (0.6, 0.12), (0.7, 0.14), (0.75, 0.16), (0.8, 0.2)),
    "beam of 2": (None, (0.3, 0.5), (0.3, 0.6), (0.3, 0.65), (0.3, 0.7)),
}


def behind(found: list[Outcome], pilot: int, tokens: float) -> list[Outcome]:
    """The same outcomes behind a pilot, which samples take among theirs."""

    def paid(one):
        joins = one.strategy == "parallel"
        more, used = (0.0, one.n) if joins else (tokens, one.n + pilot)
        return made.Counted(one.item, one.strategy, one.n, one.accuracy, one.tokens + more, float(used))

    return [paid(one) for one in found if one.n >= pilot]


def apart(found: list[Outcome], pilot: int, tokens: float) -> list[Outcome]:
    """The same outcomes behind a pilot that only tells the difficulty."""
    return [
        made.Counted(one.item, one.strategy, one.n, one.accuracy, one.tokens + tokens, one.n + pilot)
        for one in found
        if one.n >= pilot
    ]


def with_outcomes(one: made.Unit, found: list[Outcome]) -> made.Unit:
    return replace(one, outcomes=found, behind=behind(found, 2, 10.0), apart=apart(found, 2, 10.0))


def question(i: int, *, known: bool = True, pilot: int = 2) -> made.Unit:
    """Half of the questions are hard, where only the search helps; the pilot tells which, if it is `known`."""
    chance = np.random.default_rng(i)
    hard = int(i % 2)
    name = f"plain: q{i}"

    def of(strategy, points, kind=Outcome, **more):
        return [
            kind(name, strategy, n, float(np.clip(pair[hard] + chance.normal(0, 0.05), 0, 1)), 50.0 + 5 * n, **more)
            for n, pair in zip(runs.NS, points, strict=False)
            if pair is not None
        ]

    tells = (1 - hard if known else chance.random()) + chance.normal(0, 0.1)
    slow = [
        made.Counted(name, "early stop", k, right, 50.0 + 5 * used, used)
        for k, used, right in ((1, 1.0, 0.3), (2, 9.0, 0.45))
    ]
    sure = [replace(one, strategy=f"sure of at most {most}") for most in (made.FEW, 16) for one in slow]
    found = [one for strategy, points in GIVES.items() for one in of(strategy, points)]
    vote, read = of("majority", GIVES["parallel"]), 5.0 * pilot
    return made.Unit(
        name, f"q{i}", room.WORDINGS[i // 2 % 3], found, behind(found, pilot, read), apart(found, pilot, read), vote, slow, sure, tells,
        1.0 - hard, [(0.9, True), (0.1, False)],
    )  # fmt: skip


@pytest.fixture
def world(monkeypatch):
    """Questions in place of samples; returns a function that puts others there."""

    def put(units):
        monkeypatch.setattr(room.runs, "judged_sets", lambda *_: [("plain", u) for u in units])

    monkeypatch.setattr(room.runs, "learn_sets", lambda n: [])
    monkeypatch.setattr(room.runs, "fitted", lambda found, ledger: None)
    monkeypatch.setattr(room, "unit", lambda one, *_: one)
    monkeypatch.setattr(room, "resampled", lambda units, draws=100, seed=0: RESAMPLED(units, 100, seed))
    put([question(i) for i in range(MANY)])
    return put


RESAMPLED = room.resampled


def test_a_policy_that_knows_what_helps_whom_pays(world):
    record = record_of(SAVED, POINT)
    assert judge(record).verdict is Verdict.REPRODUCED
    assert record.measured.low > 3
    saved = record.details["in generations"]
    assert saved[room.UNCHARGED]["median"] > record.measured.median, "the pilot is charged"
    assert saved[room.FIXED]["median"] < 2
    assert {name.split(", ")[0] for name in record.details["the policy's table"]} == {f"bin {b} of 5" for b in range(5)}


def test_a_pilot_that_tells_nothing_changes_the_verdict(world):
    world([question(i, known=False) for i in range(MANY)])
    record = record_of(SAVED, POINT)
    assert judge(record).verdict not in PAYS
    assert record.measured.low < 1
    assert record.measured.median < 2.5


def test_a_random_choice_in_place_of_the_policys_changes_the_verdict(world, monkeypatch):
    def random_choice(log, difficulty, *, bins=5, folds=2, groups=None, seed=0):
        chance, by = np.random.default_rng(seed), {}
        for one in log:
            by.setdefault((one.item, one.n), []).append(one)
        return [own[chance.integers(len(own))] for own in by.values()]

    monkeypatch.setattr(room, "cross_validated", random_choice)
    assert verdict_of(SAVED, POINT) not in PAYS


def test_a_policy_turned_round_is_refuted(world, monkeypatch):
    """The worst strategy of each bin: certainly more generations than best-of-N needs."""
    choose = room.cross_validated

    def worst(log, difficulty, **settings):
        turned = choose([replace(one, accuracy=1 - one.accuracy) for one in log], difficulty, **settings)
        return [replace(one, accuracy=1 - one.accuracy) for one in turned]

    monkeypatch.setattr(room, "cross_validated", worst)
    assert verdict_of(SAVED, POINT) is Verdict.REFUTED


def test_a_dear_pilot_changes_the_verdict(world):
    assert verdict_of(SAVED, POINT) in PAYS
    world([question(i, pilot=14) for i in range(MANY)])
    assert verdict_of(SAVED, POINT) not in PAYS


def test_a_policy_that_changes_nothing_is_no_worse_than_its_baseline(world):
    """Its pilot's samples are among those that it chooses, so that a pilot alone refutes nothing."""
    world([with_outcomes(u, [o for o in u.outcomes if o.strategy == "parallel"]) for u in map(question, range(MANY))])
    record = record_of(SAVED, POINT)
    assert record.measured.median == record.measured.high == 1.0
    assert judge(record).verdict is Verdict.DOES_NOT_PAY


def test_where_nothing_is_ever_right_nothing_is_refuted(world):
    def never(one):
        lost = {name: [replace(o, accuracy=0.0) for o in getattr(one, name)] for name in
                ("outcomes", "behind", "apart", "majority", "stopping", "sure")}  # fmt: skip
        return replace(one, **lost)

    world([never(question(i)) for i in range(MANY)])
    record = record_of(SAVED, POINT)
    assert (record.measured.low, record.measured.high) == (1.0, 1.0)
    assert judge(record).verdict is Verdict.DOES_NOT_PAY


def test_tokens_alone_can_refute(world):
    """A strategy that spends few generations and very many tokens."""

    def dear(one):
        return with_outcomes(
            one, [replace(o, tokens=o.tokens * (30 if o.strategy == "beam of 2" else 1)) for o in one.outcomes]
        )

    world([dear(question(i)) for i in range(MANY)])
    record = record_of(SAVED, POINT)
    assert record.measured.low > 3
    assert judge(record).verdict is Verdict.REFUTED


@pytest.mark.parametrize("which", ["stopping", "sure"])
def test_a_free_rival_that_is_as_good_changes_the_verdict(world, which):
    """A vote that stops when samples agree, or when the verifier is sure: the gate without any difficulty."""

    def quick(one):
        found = [replace(o, accuracy=0.5, used=2.5) if o.n == 2 else o for o in getattr(one, which)]
        return replace(one, **{which: found})

    world([quick(question(i)) for i in range(MANY)])
    record = record_of(SAVED, POINT)
    assert record.free > 4
    assert (record.controls["rival"] == record.free) == (which == "sure")
    assert judge(record).verdict not in PAYS


def test_a_gain_that_is_the_gates_stands_beside_one_whose_pilot_is_not_used_again(world):
    """Where the pilot's own samples are right because they were kept, the policy without them gains nothing."""

    def gated(one):
        kept = [replace(o, accuracy=0.9) if o.strategy == "parallel" and o.n == 2 else o for o in one.behind]
        plain = [o for o in one.outcomes if o.strategy == "parallel"]
        return replace(with_outcomes(one, plain), behind=[o for o in kept if o.strategy == "parallel"])

    world([gated(question(i)) for i in range(MANY)])
    record = record_of(SAVED, POINT)
    assert record.measured.low > 4
    assert record.arms[room.APART] < 1


def test_one_strategy_that_is_best_for_all_is_not_the_policys_gain(world):
    """The search helps everybody: without difficulty the same is saved."""

    def helped(one):
        best = [replace(o, accuracy=0.7 if o.strategy == "beam of 2" else o.accuracy) for o in one.outcomes]
        return with_outcomes(one, best)

    world([helped(question(i)) for i in range(MANY)])
    record = record_of(SAVED, POINT)
    assert record.measured.low > 2
    assert judge(record).verdict not in PAYS


def test_an_oracle_that_is_not_charged_stands_in_the_record_only(world):
    found = [replace(question(i, known=False), oracle=1.0 - i % 2) for i in range(MANY)]
    world(found)
    record = record_of(SAVED, POINT)
    assert record.arms[room.ORACLE] > 4 > record.measured.high


# ----------------------------------------------------------------------------------------------------------- the figure itself


def level(costs, right):
    columns = np.array(costs, dtype=float)[:, None].repeat(3, 1)
    return curves.Curve(columns, 2 * columns, np.array(right, dtype=float)[:, None].repeat(3, 1))


def test_savings_are_taken_where_both_are_right_as_often():
    weights = np.full(3, 1 / 3)
    base = level([1, 2, 4, 8], [0.2, 0.4, 0.5, 0.6])

    def best(other, what="generations"):
        return curves.saving(base, other, weights, what, reached=1.0)

    assert best(base) == curves.saving(base, base, weights) == pytest.approx(1)
    assert best(level([2, 4, 8, 16], [0.2, 0.4, 0.5, 0.6])) == pytest.approx(0.5)
    assert best(level([1, 2], [0.2, 0.6]), "tokens") == pytest.approx(4)
    assert best(level([1, 8], [0.2, 0.3])) == pytest.approx(1.5 / 8), "it never gets as far"
    assert best(level([3], [0.9])) == pytest.approx(8 / 3)
    assert best(level([1, 4], [0.05, 0.1])) == pytest.approx(1 / 4), "not even as far as one sample"
    dips = level([1, 2, 4], [0.2, 0.1, 0.4])
    assert curves.fewest(dips.generations.mean(1), dips.right.mean(1), 0.3) == pytest.approx(3)
    assert curves.fewest(np.array([1.0]), np.array([0.1]), 0.3) == float("inf")


def test_a_hair_of_accuracy_where_curves_are_flat_decides_nothing():
    """Two curves that differ in the third digit: at the very best one would need four times as many generations."""
    weights = np.full(3, 1 / 3)
    flat = level([1, 2, 4, 16], [0.2, 0.28, 0.3, 0.301])
    other = level([1, 2, 4, 16], [0.2, 0.28, 0.3015, 0.3015])
    assert curves.saving(flat, other, weights, reached=1.0) > 4
    assert curves.saving(flat, other, weights) == pytest.approx(1, abs=0.1)
    assert curves.saving(flat, level([2, 4, 8, 32], [0.2, 0.28, 0.3, 0.301]), weights) == pytest.approx(0.5)


def test_the_interval_resamples_questions_with_all_their_wordings():
    units = [replace(question(i), question=f"q{i // 3}") for i in range(30)]
    for weights in RESAMPLED(units, 20):
        assert weights.sum() == pytest.approx(1)
        assert all(len(set(weights[k : k + 3])) == 1 for k in range(0, 30, 3))


def test_stopping_early():
    assert made.stopped(["1", "2", "2", "1", "1"], 3) == ("1", 5)
    assert made.stopped(["", "2", "", "2"], 2) == ("2", 4)
    assert made.stopped(["", ""], 1) == ("", 2)
    assert made.stopped(["1", "2"], 5) == ("1", 2)
    assert made.stopped(["1", "2", "1"], 0.9, [0.3, 0.9, 0.8]) == ("2", 2), "the verifier is sure of it"
    assert made.stopped(["1", "2", "1"], 1.0, [0.3, 0.9, 0.8]) == ("1", 3), "both together"
    assert made.stopped(["1", "2", "1"], 9.0, [0.3, 0.9, 0.4]) == ("2", 3), "weighed where none is sure"


# --------------------------------------------------------------------------------------------------- searches on written samples

QUESTION = Item("sum", 2, "12 + 34", "46", ("46",))
TEXTS = [" 46"] * 5 + [" 41"] * 9 + [" 57"] * 6 + [" no idea"] * 2 + [" 46", " 57"]


def drawn(texts=TEXTS, item=QUESTION) -> Drawn:
    def sample(text, first):
        tokens = tuple(range(len(text) + 1 if text[1:].isdigit() else 3))
        sure = -0.1 if "46" in text else -1.0
        return Sample(text, tokens, (sure,) * len(tokens), "stop", Spent(20 if first else 0, len(tokens), 0, 1), "\n")

    return Drawn(item, prompt(item), [sample(text, not i) for i, text in enumerate(texts)])


class Sure:
    """Worth more the surer the model was of the last step."""

    def score(self, traces):
        return [[float(np.exp(s.mean_logprob)) for s in trace.samples] for trace in traces], Spent()


def test_a_search_sees_what_the_samples_say_as_often_as_they_say_it():
    one = drawn()
    writer = runs.Replay({one.prompt: one.samples})
    (whole,) = writer([one.prompt], Sampling(0.8, max_new_tokens=8), n=24)
    assert [s.text for s in whole] == TEXTS
    assert [s.spent.prompt for s in whole] == [20] + [0] * 23
    (later,) = writer([one.prompt], Sampling(0.8, max_new_tokens=8), n=2, first=3)
    assert [s.spent.prompt for s in later] == [20, 0]
    (digits,) = writer([one.prompt + " "], Sampling(0.8, max_new_tokens=1), n=3000)
    assert Counter(s.text for s in digits[:24]) == {"4": 15, "5": 7, "no idea": 2}, (
        "none is drawn again before all were"
    )
    shares = Counter(s.text for s in digits)
    assert shares["4"] / 3000 == pytest.approx(15 / 24, abs=0.03)
    assert shares["5"] / 3000 == pytest.approx(7 / 24, abs=0.03)
    assert {s.ended for s in digits if s.text in "45"} == {"length"}
    (rest,) = writer([one.prompt + " 4"], Sampling(0.8, max_new_tokens=8), n=50)
    assert {s.text for s in rest} == {"6", "1"}
    assert {s.spent.completion for s in rest} == {2}
    ((likeliest,),) = writer([one.prompt + " 4"], Sampling(0.0, max_new_tokens=1), n=1)
    assert likeliest.text == "1"
    with pytest.raises(LookupError, match="no sample begins"):
        writer([one.prompt + " 9"], Sampling(0.8), n=1)


def test_samples_are_taken_apart_without_loss():
    for sample in drawn().samples:
        parts = runs.pieces(sample)
        assert "".join(p.text for p in parts) == sample.text
        assert tuple(t for p in parts for t in p.tokens) == sample.tokens
        assert sum(len(p.logprobs) for p in parts) == len(sample.logprobs)
        assert all(len(p.text) == 1 for p in parts[:-1])


def test_the_verifier_sees_how_long_the_numbers_of_the_question_are():
    """Not those of the examples in front of it."""
    for wording in room.WORDINGS:
        for level, longest in ((1, 1), (2, 2)):
            (item,) = items("sum", level=level, n=1, part="judged")
            trace = runs.of_sample(prompt(item, wording), drawn().samples[0])
            assert runs.features(trace, 0)[4:6] == [longest - 2, longest]


def test_searches_give_answers_of_the_samples_and_a_verifier_guides_them():
    one = drawn()
    found = runs.searched(one, Sure(), 24, 16)
    assert {(run.strategy, run.n) for run in found} == {
        (s.name, n) for s, numbers in runs.SEARCHES for n in numbers if n <= 16
    }
    assert {a for run in found for a in run.attempts.answers} <= {"46", "41", "57", ""}
    chosen = Counter(run.attempts.choose() for run in found if run.n == 16)
    assert chosen["46"] >= 2, "the verifier likes it, few samples say it"
    assert all(run.tokens > 20 for run in found)
    assert len(next(r for r in found if "lookahead" in r.strategy and r.n == 16).attempts.answers) == 8
    fewer = runs.searched(one, Sure(), 24, 4)
    assert {run.n for run in fewer} == {2, 4}


def test_a_units_pilot_is_apart_from_what_is_spent():
    texts = [" 41"] * 22 + [" 46"] * 2
    found = room.unit(drawn(texts), "plain", Sure(), 2, 16)
    assert found.oracle == 0.0
    assert found.predicted > 0.8
    assert {o.accuracy for o in [*found.outcomes, *found.majority, *found.stopping, *found.sure]} == {0.0}
    assert {(o.strategy, o.n) for o in found.sure} == {
        (f"sure of at most {most}", n) for most in (made.FEW, 16) for n in range(1, len(made.SURE) + 1)
    }
    assert all(o.used <= int(o.strategy.split()[-1]) for o in found.sure)
    again = [(o.used, o.tokens, o.accuracy) for o in found.apart if o.strategy == "parallel" and o.n == 4]
    assert again == [(6, 20 + 4 * 6, 0.0)], "fresh samples behind the pilot"
    paid = [(o.tokens, o.used) for o in found.behind if o.strategy == "beam of 2" and o.n == 4]
    assert paid == [(o.tokens + 8.0, 6) for o in found.outcomes if o.strategy == "beam of 2" and o.n == 4]
    joined = {o.n: o for o in found.behind if o.strategy == "parallel"}
    assert {n: (o.used, o.tokens) for n, o in joined.items()} == {n: (n, 20 + 4 * n) for n in (2, 4, 8, 16)}
    assert joined[2].accuracy == 1.0, "the pilot's own samples are all there is"
    assert joined[16].accuracy == 0.0, "of sixteen the pilot's are two"
    assert sorted({o.n for o in found.outcomes if o.strategy == "parallel"}) == [1, 2, 4, 8, 16]
    one = next(o for o in found.outcomes if o.strategy == "parallel" and o.n == 4)
    assert one.tokens == 20 + 4 * 4


def test_the_verifier_is_fitted_to_what_becomes_of_a_beginning_and_all_of_it_is_charged():
    learnt = [
        drawn(item=item, texts=[f" {item.answer}"] * 9 + [" 7"] * 7)
        for item in items("sum", level=2, n=6, part="learn")
    ]
    learnt = [
        replace(
            one, samples=[replace(s, logprobs=(-0.1 if s.text != " 7" else -2.0,) * len(s.tokens)) for s in one.samples]
        )
        for one in learnt
    ]
    ledger = Budget()
    verifier = runs.fitted(learnt, ledger)
    one = learnt[0]
    scores = runs.samples_run(one, verifier).scores
    assert min(scores[:9]) > max(scores[9:])
    assert ledger.spent().calls > 6 * 16 * 2
    assert ledger.spent("solve").calls == 0


def test_prompts_of_revisions_show_the_last_attempts_in_the_questions_own_form():
    for kind in ("sum", "steps"):
        (item,) = items(kind, level=1, n=1, part="judged")
        for wording in room.WORDINGS:
            plain = prompt(item, wording)
            asked = runs.again(item, wording)(plain, [" 12", " 13"])
            own = asked.rpartition("Check.")[2].strip()
            assert plain.endswith(own)
            assert asked.count("Check.") == 4 + 2
            assert asked.index(" 12") < asked.rindex(" 13")
            head = plain.partition("Input:")[0] if wording == "task" else ""
            assert asked.startswith(head)
            assert asked.count("Add") == plain.count("Add")


def test_revisions_are_held_against_as_many_samples(monkeypatch):
    one = drawn([" 41"] * 24)

    class Better:
        """Every second attempt is right."""

        def __call__(self, prompts, sampling, *, n=1, first=0, seed=0):
            (asked,) = prompts
            text = " 46" if "Check." in asked else " 41"
            return [[Sample(text, (1, 2, 3, 4), (-0.5,) * 4, "stop", Spent(99, 4, 0, 1)) for _ in range(n)]]

    monkeypatch.setattr(room, "generator", lambda *_: Better())
    monkeypatch.setattr(room.runs, "judged_sets", lambda *_: [("plain", one)])
    found = room._revisions(Sure(), 1)
    assert found["wrong that become right"] == 1.0
    assert found["accuracy"]["samples, weighted"] == {"2": 0.0, "4": 0.0, "8": 0.0}
    assert found["tokens of eight"]["chains"] > found["tokens of eight"]["samples"]
    monkeypatch.setattr(Better, "__call__", lambda *_, n=1, **__: [one.samples[:n]])
    assert room._revisions(Sure(), 1)["wrong that become right"] == 0.0


# --------------------------------------------------------------------------------------------------------------- the exchange


def test_the_size_at_equal_operations_is_computed_and_shows_no_quality(monkeypatch):
    point = {"n": 256, "ratio": 0.16, "items": 1}
    monkeypatch.setattr(room.runs, "judged_sets", lambda *_: [(w, drawn()) for w in room.WORDINGS])
    record = record_of(SIZE, point)
    assert judge(record).verdict is Verdict.COMPUTED
    assert record.measured.median == pytest.approx(13.91, abs=0.01)
    assert judge(changed(record, computed="")).verdict is Verdict.QUALITY_NOT_SHOWN
    assert record.details["the small model is right"]["plain"]["one answer"] == pytest.approx(6 / 24)
    monkeypatch.setattr(room, "matched_size", lambda n, ratio: 1 / n)
    broken = record_of(SIZE, point)
    assert judge(changed(broken, computed="")).verdict is Verdict.REFUTED


def test_the_deciding_points_keep_the_papers_bins_and_folds():
    found = {one.claim: one for one in experiments_of("compute_optimal_ttc")}
    assert set(found) == {SAVED, SIZE}
    for scale in ("small", "full"):
        point = found[SAVED].decides[scale]
        assert (point["bins"], point["folds"]) == (5, 2)
        assert point["items"] >= 48
