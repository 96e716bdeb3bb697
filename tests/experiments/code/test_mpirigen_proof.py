"""Do the experiments notice when the method is broken? Programs are assay's own, answers are made up."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import torch
from tests.properties.sabotage import PAYS, record_of, verdict_of

from assay.evidence.types import Verdict
from assay.evidence.verdict import judge
from assay.experiments import experiments_of
from assay.experiments.code import mpirigen as experiments
from assay.experiments.code import mpirigen_model as model
from assay.experiments.code import mpirigen_programs as programs
from assay.experiments.rates import Rate
from assay.methods.code import mpirigen as room
from assay.methods.code.mpirigen import Item
from assay.workloads.programs import mpi

PLACES, ARGUMENTS = "mpirigen/location-accuracy", "mpirigen/argument-accuracy"
RELEASED = {"corpus": "released", "calls": None, "tolerance": 2}
TRAINED = {"corpus": "debian", "calls": None, "tolerance": 2}
OWN = [room.take_out(text) for text in mpi.own().values()]
LEARNED, JUDGED = OWN[::2], OWN[1::2]


def make_parts(monkeypatch, answers):
    """The authors' programs and answers: half of assay's own, and these; no model is trained."""
    experiments.judged.cache_clear()
    made = programs.Parts(LEARNED, JUDGED, [room.write(items) for items in answers], {})
    monkeypatch.setattr(programs, "parts", lambda corpus: made)
    monkeypatch.setattr(experiments, "DRAWS", 100)
    monkeypatch.setattr(experiments, "as_released", lambda calls: {})


def make_models(monkeypatch, whole, so_far):
    """Models that answer so under every seed."""
    make_parts(monkeypatch, [[] for _ in JUDGED])
    known = {one.code: one for one in OWN}

    def answering(make, seed):
        return SimpleNamespace(answer=lambda code, form: make(known[tuple(code)], seed))

    def models(learned, size, seeds):
        made = {"whole program": whole, "left to right": so_far}
        return {form: [(answering(make, seed), 1000) for seed in seeds] for form, make in made.items()}

    monkeypatch.setattr(model, "models", models)
    monkeypatch.setattr(experiments, "on_ranks", lambda makers: "stubbed")
    monkeypatch.setattr(experiments, "chosen", lambda name, arm: Rate(2e-3, (1e-3, 2e-3, 4e-3)))


@pytest.fixture(autouse=True)
def _fresh():
    yield
    experiments.judged.cache_clear()


def nearly_right(one, seed=0):
    """The truth but for the last call before MPI_Finalize in every third program."""
    items = list(one.items)
    return items if len(one.code) % 3 else [*items[:-2], items[-1]]


def test_answers_that_are_nearly_right_reproduce_both_claims(monkeypatch):
    make_parts(monkeypatch, map(nearly_right, JUDGED))
    for claim in (PLACES, ARGUMENTS):
        record = record_of(claim, RELEASED)
        assert judge(record).verdict is Verdict.REPRODUCED, judge(record)
        assert record.controls["deleted"] < record.measured.low
    record = record_of(PLACES, RELEASED)
    assert record.controls["deleted"] == 0
    assert record.arms["eight calls after every line"] > record.free  # recall alone rewards it, and the row shows it
    assert record.details["scores by arm"]["eight calls after every line"]["precision"] < 0.05


def dealt(one, seed=0):
    """The answer to another program."""
    return nearly_right(JUDGED[(JUDGED.index(one) + 5) % len(JUDGED)])


def at_random(one, seed=0):
    rng = random.Random(f"{one.code}{seed}")
    return room.numbered_items([(rng.randint(0, len(one.code)), item.text) for item in one.items])


def by_template(one, seed=0):
    return room.Template(LEARNED)(one.code)


def by_nearest(one, seed=0):
    return room.Nearest(LEARNED)(one.code)


def of_other_functions(one, seed=0):
    """Every call under another's name."""
    return [Item(item.line, item.index, item.text.replace("MPI_", "MPI_X")) for item in one.items]


def nothing(one, seed=0):
    return []


@pytest.mark.parametrize("broken", [dealt, at_random, by_template, by_nearest, of_other_functions, nothing])
def test_the_verdict_on_places_changes_when_answers_are_broken(monkeypatch, broken):
    make_parts(monkeypatch, map(broken, JUDGED))
    assert verdict_of(PLACES, RELEASED) not in PAYS


def with_usual_arguments(one, seed=0):
    usual = room.usual_arguments(LEARNED)
    found = []
    for item in one.items:
        for call in item.calls:
            filled = usual(call.function, len(call.arguments), one.code)
            found.append(Item(item.line, item.index, f"{call.function}({', '.join(filled)});"))
    return found


def with_turned_arguments(one, seed=0):
    return [
        Item(item.line, item.index, f"{call.function}({', '.join([*call.arguments[1:], *call.arguments[:1]])});")
        for item in one.items
        for call in item.calls
    ]


@pytest.mark.parametrize("broken", [with_usual_arguments, with_turned_arguments, nothing])
def test_the_verdict_on_arguments_changes_when_they_are_broken(monkeypatch, broken):
    make_parts(monkeypatch, map(broken, JUDGED))
    assert verdict_of(ARGUMENTS, RELEASED) not in PAYS


def test_places_without_a_published_baseline_decide_nothing(monkeypatch):
    make_parts(monkeypatch, map(nearly_right, JUDGED))
    assert verdict_of(PLACES, {**RELEASED, "tolerance": 1}) is Verdict.UNDECIDED


# ---------------------------------------------------------------------------------------------------------------- the trained models


def half(one, seed=0):
    """Half of the calls, others under other seeds."""
    return [item for at, item in enumerate(one.items) if at in (0, len(one.items) - 1) or (at + seed) % 2]


def test_a_model_that_learned_holds_against_the_same_from_left_to_right(monkeypatch):
    make_models(monkeypatch, nearly_right, half)
    record = record_of(PLACES, TRAINED)
    assert judge(record).verdict in PAYS, judge(record)
    assert all(each > 0 for each in record.details["whole program less left to right, by seed"])
    assert set(record.trained) == {"whole program", "left to right"}
    assert record.details["own programs on two ranks"] == "stubbed"


def frame(one, seed=0):
    return experiments.frame(one.code)


def by_chance(one, seed=0):
    return room.at_random(LEARNED, seed=seed)(one.code)


@pytest.mark.parametrize("broken", [nothing, frame, by_chance])
def test_a_model_that_learned_nothing_shows_nothing(monkeypatch, broken):
    make_models(monkeypatch, broken, half)
    assert verdict_of(PLACES, TRAINED) not in PAYS


def test_a_format_that_is_no_better_does_not_pay(monkeypatch):
    make_models(monkeypatch, half, half)
    assert verdict_of(PLACES, TRAINED) not in PAYS


# --------------------------------------------------------------------------------------------------------------- the small model


def test_what_is_seen_from_left_to_right_does_not_depend_on_what_follows():
    one = JUDGED[1]
    whole, shorter = model.Program(one.code), model.Program([*one.code[:9], "other();", "}"])

    def seen(program, place, form):
        return program.features(place, ["MPI_Init"], 0, form).tolist()

    for place in range(1, 10):
        assert seen(whole, place, "left to right") == seen(shorter, place, "left to right")
    assert seen(whole, 9, "whole program") != seen(shorter, 9, "whole program")


@pytest.mark.parametrize("form", model.FORMS)
def test_what_is_answered_is_what_the_features_say(form):
    """Place by place, by all numbers of what is seen there: `answers` looks at the code once."""
    made, code = model.Model(LEARNED), JUDGED[0].code
    torch.nn.init.normal_(made.weights.weight, generator=torch.Generator().manual_seed(3))
    looked, leans = model.Program(code), (0.0, 40.0)
    for lean, answer in zip(leans, made.answers(code, form, leans), strict=True):
        put: list[str] = []
        for place in range(1, len(code) + 1):
            there = [item.calls[0].function for item in answer if item.line == place]
            for here, function in enumerate([*there, ""][: model.AT_A_PLACE]):
                scores = made.weights.weight.detach()[looked.features(place, put, here, form)].sum(0)
                scores[model.NONE] -= lean
                assert made.functions[int(scores.argmax())] == function
                put += [function] if function else []
        assert len(put) == len(answer)
    assert made.answer([], form) == []


def test_both_forms_learn_from_as_many_examples():
    """One for each call that is known, and one for each place."""
    made = model.Model(LEARNED)
    assert len(made.functions) <= model.FUNCTIONS + 1
    many = {form: made.examples(LEARNED, form) for form in model.FORMS}
    assert [wanted for _, wanted in many["whole program"]] == [wanted for _, wanted in many["left to right"]]
    calls = sum(call.function in made.functions for one in LEARNED for _, call in one.calls)
    assert len(many["whole program"]) == calls + sum(len(one.code) for one in LEARNED)


@pytest.mark.slow
def test_a_model_learns_the_programs_it_is_shown():
    few, made = OWN[:2], model.Model(OWN[:2])
    made.train(few, "whole program", model.Size(epochs=12, batch=8), 0, 0.1)
    answers = [made.answer(one.code, "whole program") for one in few]
    rows = [room.score(one.calls, room.placed(items), tolerance=0) for one, items in zip(few, answers, strict=True)]
    assert sum(row.f1 for row in rows) > 0.9 * len(rows)
    made.lean = 9.0  # nats: where a call is at all likely, there is one
    assert len(made.answer(few[0].code, "whole program")) > len(answers[0])


def test_near_copies_stay_together():
    renamed = [
        room.Stripped(
            tuple(room.renamed(line, {"rank": "me", "size": "many"}) for line in one.code),
            tuple(Item(i.line, i.index, room.renamed(i.text, {"rank": "me", "size": "many"})) for i in one.items),
        )
        for one in OWN
    ]
    first, second = programs.split([*OWN, *renamed], 0.5, seed=4)
    assert len(first) + len(second) == 2 * len(OWN)
    for one, copy in zip(OWN, renamed, strict=True):
        assert (one in first) == (copy in first)
    assert programs.round_trips(list(mpi.own().values())) == "26 of 26"


def test_what_fits_is_a_program_of_c_with_a_beginning_and_an_end():
    assert all(programs.fits(text) for text in mpi.own().values())
    assert not programs.fits("int main(void) { MPI_Init(0, 0); }")
    assert not programs.fits("int f(void) { MPI_Init(0, 0); MPI_Finalize(); }")
    assert not programs.fits(mpi.own()["hello"] + "/* open")
    assert not programs.fits(mpi.own()["hello"] + "int x;" * 2048)


def test_what_was_declared():
    found = experiments_of("mpirigen")
    assert {one.claim for one in found} == {PLACES, ARGUMENTS}
    for one in found:
        assert one.decides["small"] == experiments.PAPER
        assert one.measured_here
        assert not one.computed
