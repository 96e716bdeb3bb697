"""Does each experiment notice when its method is broken? With the reader that reads perfectly, and with accuracies made
up for the purpose.
"""

from dataclasses import replace

import numpy as np
import pytest
from tests.properties.sabotage import PAYS, record_of

from assay.evidence.types import Verdict
from assay.evidence.verdict import judge
from assay.experiments import experiments_of
from assay.experiments.reasoning import rag_inference_scaling as room
from assay.experiments.reasoning import rag_inference_scaling_runs as runs
from assay.methods.core.reasoning.budget import Spent
from assay.methods.core.reasoning.generator import Sample
from assay.methods.reasoning.rag_inference_scaling import Allocation, AllocationModel
from assay.workloads.documents import TASKS, documents

GAIN, FIT = "rag_inference_scaling/gain-over-rag", "rag_inference_scaling/allocation-fit"
POINT = {"reader": room.RULE, "learn": 6, "judged": 12}


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """Nothing seen by a broken method is kept, nothing is embedded, and no model is asked."""
    monkeypatch.setattr(room, "seen", room.seen.__wrapped__)
    monkeypatch.setattr(runs, "by_meaning", lambda: None)
    monkeypatch.setattr(runs, "kept", lambda: pytest.fail("a model was asked"))


def gained():
    record = record_of(GAIN, POINT)
    return judge(record).verdict, record


# ------------------------------------------------------------------------------------------- the real pipeline, by rule


@pytest.fixture(scope="module")
def honest():
    return room.seen.__wrapped__(**POINT)


def test_rounds_gain_over_standard_rag_where_the_reader_reads_perfectly(honest, monkeypatch):
    monkeypatch.setattr(room, "seen", lambda *_, **__: honest)
    verdict, record = gained()
    assert verdict in PAYS
    assert record.controls["deleted"] < record.measured.low
    assert record.controls["random"] < 0
    assert (
        record.details["right by task"]["grand"]["chosen"]
        > 2 * record.details["right by task"]["grand"]["standard RAG"]
    )
    assert record.details["right by task"]["base"]["standard RAG"] > 0.8
    curve = [row["in hindsight"] for row in record.details["right by budget"].values()]
    assert curve == sorted(curve)
    for row in record.details["right by budget"].values():
        assert row["in hindsight"] >= max(row["chosen"], row["standard RAG"])


def test_without_follow_ups_nothing_is_gained(monkeypatch):
    monkeypatch.setattr(runs, "follow_up", lambda question, answers: "")
    verdict, record = gained()
    assert verdict not in PAYS
    assert record.measured.high <= 0 < 50


def test_follow_ups_about_another_class_gain_nothing(monkeypatch):
    honest = runs.follow_up
    names = [each.name for each in documents()]

    def other(question, answers):
        said = honest(question, answers)
        return (
            said.replace(said.split()[-3], names[len(question) * 7 % len(names)])
            if said.startswith("Which class")
            else said
        )

    monkeypatch.setattr(runs, "follow_up", other)
    assert gained()[0] not in PAYS


def test_documents_by_chance_gain_nothing(monkeypatch):
    def by_chance(queries, k):
        chance = np.random.default_rng(len(queries[0]))
        return [chance.integers(0, len(documents()), k).tolist() for _ in queries]

    monkeypatch.setattr(runs, "found_by", lambda: by_chance)
    verdict, record = gained()
    assert verdict not in PAYS
    assert record.details["right"]["chosen"] < 0.1


def test_an_allocation_by_chance_gains_nothing(honest, monkeypatch):
    monkeypatch.setattr(room, "seen", lambda *_, **__: honest)
    real, chance = room.best_of, np.random.default_rng(0)

    def drawn(parts, allowed, **options):
        if list(allowed) != room.GRID:
            return real(parts, allowed, **options)
        return lambda task, budget: allowed[chance.integers(len(room.ONE_CALL))]

    monkeypatch.setattr(room, "best_of", drawn)
    assert gained()[0] not in PAYS


# ------------------------------------------------------------------------------------------------------- worlds made up

Q = 12


def world(accuracy, tasks=TASKS, bare=0.0):
    """What would be seen if each allocation were right as often as `accuracy(task, allocation)` says; a question's
    value is a share.
    """
    chance = np.random.default_rng(0)
    jitter = {task: chance.uniform(-0.02, 0.02, Q) for task in tasks}

    def of(task, grid, value):
        right = {each: np.clip(value(each) + jitter[task] - jitter[task].mean(), 0, 1) for each in grid}
        tokens = {each: np.full(Q, 15.0 + 18 * each.documents * (1 + each.shots) * each.iterations) for each in grid}
        return room.Seen(right, right, tokens, tokens, right)

    found = {}
    for task in tasks:
        made = of(task, room.GRID, lambda each, task=task: accuracy(task, each))
        found[task] = replace(
            made, bare=of(task, room.BARE, lambda _: bare), votes=of(task, [room.VOTE], lambda _: 0.1)
        )
    return {"learn": found, "judged": found}


def of_the_model(task, each):
    """Accuracies of the model's own form, with informativeness as it comes out of them."""
    i = TASKS.index(task)
    logit = -1.2 + (0.12 + 0.05 * i) * np.log(each.documents + 0.01) + (0.08 + 0.04 * i) * np.log(each.shots + 0.01)
    return 1 / (1 + np.exp(-logit - 1.1 * np.log(each.iterations)))


def in_a_world(monkeypatch, claim, accuracy, **more):
    monkeypatch.setattr(room, "seen", lambda *_, **__: world(accuracy, **more))
    record = record_of(claim, POINT)
    return judge(record).verdict, record


def test_where_the_form_of_the_demonstrations_does_it_no_gain_is_shown(monkeypatch):
    def accuracy(task, each):
        return 0.8 if each.shots and each.documents else 0.3

    verdict, record = in_a_world(monkeypatch, GAIN, accuracy)
    assert verdict in PAYS
    assert record.arms["one call"] == pytest.approx(record.measured.median)
    verdict, record = in_a_world(monkeypatch, GAIN, accuracy, bare=0.8)
    assert verdict is Verdict.QUALITY_NOT_SHOWN
    assert record.controls["deleted"] == pytest.approx(record.measured.median)


def test_where_examples_alone_do_it_the_free_way_is_as_good(monkeypatch):
    verdict, record = in_a_world(monkeypatch, GAIN, lambda task, each: 0.8 if each.shots else 0.3)
    assert record.details["free"] == "examples only"
    assert record.free == pytest.approx(record.measured.median)
    verdict, _ = in_a_world(monkeypatch, GAIN, lambda task, each: 0.8 if each.shots and each.documents else 0.3)
    assert verdict in PAYS


def test_where_more_is_worse_it_is_refuted(monkeypatch):
    """Chosen on questions where it helps, judged on others where it harms."""
    good, bad = (
        world(lambda task, each: 0.4 + 0.3 * (each.iterations > 1)),
        world(lambda task, each: 0.4 - 0.3 * (each.iterations > 1)),
    )
    monkeypatch.setattr(room, "seen", lambda *_, **__: {"learn": good["learn"], "judged": bad["judged"]})
    record = record_of(GAIN, {**POINT, "reader": room.MODEL})
    assert judge(record).verdict is Verdict.REFUTED
    assert set(record.details["right by wording"]) == set(room.WORDINGS)


def test_a_model_that_holds_is_reproduced(monkeypatch):
    verdict, record = in_a_world(monkeypatch, FIT, of_the_model)
    assert verdict is Verdict.REPRODUCED
    assert record.measured.low > 0.9
    assert record.quality.candidate > 0.95 * record.quality.baseline
    assert record.quality.controls["deleted"] < 0.9 * record.quality.baseline
    assert record.arms["without informativeness"] < record.measured.low
    assert record.details["identified"]


def test_parameters_of_shuffled_accuracies_are_refuted(monkeypatch):
    real = AllocationModel.fit
    monkeypatch.setattr(
        AllocationModel, "fit", lambda self, X, y: real(self, X, np.random.default_rng(0).permutation(np.asarray(y)))
    )
    verdict, record = in_a_world(monkeypatch, FIT, of_the_model)
    assert verdict is Verdict.REFUTED
    assert record.measured.high < 0.4


def test_a_model_that_chooses_by_chance_does_not_pay(monkeypatch):
    chance = np.random.default_rng(0)
    monkeypatch.setattr(
        AllocationModel, "best", lambda self, lengths, limit, i: sorted(lengths)[chance.integers(len(lengths))]
    )
    verdict, record = in_a_world(monkeypatch, FIT, of_the_model)
    assert verdict not in PAYS
    assert record.quality.candidate < 0.9 * record.quality.baseline


def test_accuracies_of_another_form_are_refuted(monkeypatch):
    """Few documents are best, and many worse than none: no monotone model says so."""
    verdict, record = in_a_world(monkeypatch, FIT, lambda task, each: 0.9 if each.documents in (1, 2) else 0.1)
    assert verdict is Verdict.REFUTED
    assert record.measured.high < 0.677
    assert record.arms["the accuracies of the fit"] == pytest.approx(1)


def test_the_fit_sees_no_judged_question_and_no_larger_budget(monkeypatch):
    honest, other = world(of_the_model), world(lambda task, each: 0.1 + 0.05 * each.documents)
    mixed = {"learn": honest["learn"], "judged": other["judged"]}
    assert room.fitted(mixed, room.KNOWN).a_ == pytest.approx(room.fitted(honest, room.KNOWN).a_)
    far = {
        task: replace(
            own, right={each: v if own.tokens[each].mean() <= room.KNOWN else 0 * v for each, v in own.right.items()}
        )
        for task, own in honest["learn"].items()
    }
    assert room.fitted({"learn": far, "judged": far}, room.KNOWN).a_ == pytest.approx(
        room.fitted(honest, room.KNOWN).a_
    )
    assert room.best_of(mixed, room.GRID)("base", 2048) == room.best_of(honest, room.GRID)("base", 2048)


# ---------------------------------------------------------------------------------------------------------------- parts


def test_the_rule_reads_what_stands_in_the_prompt_and_nothing_else():
    by = runs.reader_of(room.RULE, "grand")
    asked = runs.questions("grand", n=8)
    for allocation in (Allocation(8), Allocation(4, 3, 2)):
        for each, found in zip(asked, runs.answered(by, asked, allocation), strict=True):
            assert (found.text == each.answer) == (set(each.gold) <= set(found.documents))
    assert all(not one.text for one in runs.answered(by, asked, Allocation(0, 3)))


def test_a_majority_is_charged_for_all_its_samples_and_speaks_for_itself():
    class Says:
        name = "says"

        def __call__(self, prompts, sampling, *, n=1, first=0, seed=0):
            assert sampling.temperature > 0
            said = ["Foo.", "It is a.Bar and no other", "Bar", ""] * (n // 4)
            return [
                [
                    Sample(text, (0,) * 3, (), "stop", Spent(100 if not k else 0, 3, calls=1))
                    for k, text in enumerate(said)
                ]
                for _ in prompts
            ]

    by = replace(runs.reader_of(room.RULE, "base"), generator=Says())
    for one in runs.voted(by, runs.questions("base", n=2), runs.VOTE):
        assert one.text == "It is a.Bar and no other"  # judged as any sentence is
        assert one.tokens == 100 + 3 * runs.VOTES


def test_a_sample_votes_for_a_name_that_the_question_does_not_give():
    asked = "Which class does Flag inherit from?"
    said = {" Enum": "Enum", " Enum is what Flag inherits from.": "Enum", " Flag": "", "": "", " none": "none"}
    assert {text: runs.vote_of(asked, text) for text in said} == said


class InOneWording:
    """Knows all answers, and gives them where it is asked in the words of the task."""

    name = "in one wording"

    def __init__(self):
        self.asked = []
        tasks = [(task, part, n) for task in ("base", "grand") for part, n in (("learn", 6), ("judged", 6))]
        self.known = {
            each.question: each.answer for task, part, n in tasks for each in runs.questions(task, n=n, part=part)
        }

    def __call__(self, prompts, sampling, *, n=1, first=0, seed=0):
        self.asked += prompts
        found = []
        for prompt in prompts:
            question = next(each for each in self.known if f"{each}\n" in prompt.rsplit("\n\n", 1)[-1])
            said = self.known[question] if prompt.endswith("Output:") else "nothing"
            found.append([Sample(f" {said}", (0,), (), "stop", Spent(len(prompt.split()), 1, calls=1))] * n)
        return found


def test_every_question_is_asked_in_one_wording_and_keeps_its_place(monkeypatch):
    model = InOneWording()
    monkeypatch.setattr(runs, "kept", lambda: model)
    monkeypatch.setattr(runs, "GRID", [Allocation(0), Allocation(1), Allocation(0, 1)])
    monkeypatch.setattr(runs, "BARE", [])
    seen = room.seen(room.MODEL, 6, 6)
    for part in seen.values():
        for own in part.values():
            for each in own.right.values():
                assert each.tolist() == [0, 0, 1] * 2
            assert own.votes.right[runs.VOTE].tolist() == [0, 0, 1] * 2
    told = room.by_wording(seen, {"one": lambda task, budget: Allocation(1)}, 2048)
    assert told == {"plain": {"one": 0}, "question": {"one": 0}, "task": {"one": 1}}
    for mark in ("- ", "Fact: "):
        assert any(f"\n{mark}" in f"\n{prompt}" for prompt in model.asked)
    places = runs.in_wordings(room.MODEL, {"learn": 7, "judged": 5})
    assert sorted(place for own in places.values() for place in own) == [
        *(("judged", i) for i in range(5)), *(("learn", i) for i in range(7)),
    ]  # fmt: skip
    assert [len(own) for own in places.values()] == [5, 4, 3]
    assert list(runs.in_wordings(room.RULE, {"judged": 5})) == ["question"]


def test_half_a_question_keeps_the_ratio_finite():
    assert room.gain(np.zeros(10), np.zeros(10)) == 0
    assert room.gain(np.ones(10), np.zeros(10)) == pytest.approx(2000)
    low, high = room.gain_interval(np.repeat([1.0, 0.0], 12), np.tile([1.0, 0.0], 12), [12, 12])
    assert low < 0 < high


def test_the_deciding_points_are_the_models_and_equal_in_all_wordings():
    assert all(size % len(room.WORDINGS) == 0 for sizes in room.SIZES.values() for size in sizes.values())
    found = experiments_of("rag_inference_scaling")
    assert {one.claim for one in found} == {GAIN, FIT}
    for one in found:
        assert one.decides["small"]["reader"] == one.decides["full"]["reader"] == room.MODEL
        assert set(one.departures) >= set(one.paper)
