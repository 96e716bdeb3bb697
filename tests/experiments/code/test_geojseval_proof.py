"""Do the verdicts change when what makes them is broken: the comparison, the cases, the realms?"""

import re
from types import SimpleNamespace

import pytest
from tests.properties.sabotage import PAYS, record_of, verdict_of

from assay.evidence.verdict import Verdict, judge
from assay.experiments.code import geojseval as room
from assay.experiments.code import geojseval_model as model
from assay.methods.code.geojseval import Answer, running
from assay.methods.core.programs.workers import Outcome
from assay.workloads import models
from assay.workloads.programs.geospatial.task import number, string, task

NOTICED = "geojseval/faults-noticed"
WARM = "geojseval/warm-speedup"
WEAK = "geojseval/model-weaknesses"
POINT = {"each": "all", "faults": "held out", "apart": False}


SAY = {"say": lambda *given: "".join(map(str, given))}


def ran(program, given):
    """Runs programs of one line, `return x ...;`, as Python does: enough for arithmetic."""
    body = re.search(r"return (.*);", program)
    if body is None or body[1] == "undefined":
        return Outcome("returned", None)
    try:
        return Outcome("returned", eval(body[1], {"__builtins__": {}}, SAY | {"x": given[0]}))  # noqa: S307
    except (SyntaxError, TypeError, NameError, ZeroDivisionError, IndexError) as error:
        return Outcome("raised", error=f"{type(error).__name__}: {error}")


class Python:
    """Stands for warm workers."""

    def __init__(self, *_, **__):
        pass

    def run(self, program, entry_point, cases, *, limits=None):
        return [[ran(program, case)] for case in cases]

    def close(self):
        pass


def toys(many=6):
    found = {}
    for n in range(1, many + 1):
        made = task(
            f"toy-{n}", "turf", "function f(x)", "Count.", f"return x[0] * {n + 3} - x[1] + {n};",
            *(number(a * (n + 3) - b + n, x=[a, b]) for a, b in ((0, 0), (2, 5), (-3, 7))),
            other_way=f"return {n} + x[0] * {n + 3} - x[1];",
        )  # fmt: skip
        said = task(
            f"said-{n}", "jsts", "function f(x)", "Say.", f"return say(x[0] + {n}, x[1]);",
            *(string(f"{a + n}{b}", x=[a, b]) for a, b in ((2, "km"), (5, "mi"))),
        )  # fmt: skip
        found |= {made.id: made, said.id: said}
    return found


@pytest.fixture
def bank(monkeypatch):
    monkeypatch.setattr(room, "tasks", toys)
    monkeypatch.setattr(room, "equals", dict)
    monkeypatch.setattr(room, "Warm", Python)
    monkeypatch.setattr(room, "node_modules", lambda: None)


def test_the_figure_is_the_share_noticed_less_the_share_refused(bank):
    record = record_of(NOTICED, POINT)
    assert record.measured.median == 1
    assert judge(record).verdict is Verdict.REPRODUCED
    assert record.details["right programs"] == 18
    assert record.details["missed"] == {}
    assert record.arms["the held-out half"] == 1
    assert record.controls["deleted"] < 0.9
    assert abs(record.controls["random"]) < 0.3
    assert 0.5 < record.controls["rival"] < 0.9  # of eighteen right programs twelve are references
    assert record.arms["texts and booleans compared with themselves"] < 0.9
    assert record.arms["the first case of each task alone"] < 1
    everything = record_of(NOTICED, {**POINT, "faults": "all"})
    assert everything.details["mutants"] > 1.5 * record.details["mutants"]


@pytest.mark.parametrize("answer", ["right", "wrong"])
def test_a_comparison_that_always_says_the_same_is_refuted(bank, monkeypatch, answer):
    monkeypatch.setattr(running, "compared", lambda *_: answer)
    record = record_of(NOTICED, POINT)
    assert record.measured.median < 0.9
    assert judge(record).verdict is Verdict.REFUTED


def test_texts_compared_with_themselves_are_refuted(bank, monkeypatch):
    right = running.compared
    monkeypatch.setattr(running, "compared", lambda kind, a, b: "right" if kind == "string" else right(kind, a, b))
    assert verdict_of(NOTICED, POINT) not in PAYS


def test_one_weak_case_a_task_is_refuted(bank, monkeypatch):
    weak = {
        name: SimpleNamespace(
            id=one.id, library=one.library, programs=one.programs, entry_point="f", parameters=("x",),
            cases=(number(one.cases[0].expected, **one.cases[0].params),) if "toy" in one.id else (string("44", x=[4, "4"]),),
        )
        for name, one in toys().items()
    }  # fmt: skip
    zero = {name: one for name, one in weak.items() if "toy" in one.id}
    for n, one in enumerate(zero.values(), 1):
        one.cases = (number(n, x=[0, 0]),)
    monkeypatch.setattr(room, "tasks", lambda: zero)
    assert verdict_of(NOTICED, POINT) is Verdict.REFUTED


def test_right_programs_that_are_refused_count_against_it(bank, monkeypatch):
    def broken():
        found = toys()
        kept = [one.programs["reference"].split("{")[1].split("}")[0] for one in found.values()]
        bodies = ["return x[0];" if n % 2 == 0 else body for n, body in enumerate(kept)]
        return {
            name: task(name.split("/")[1], one.library, one.header, "Count.", body, *one.cases)
            for (name, one), body in zip(found.items(), bodies, strict=True)
        }

    monkeypatch.setattr(room, "tasks", broken)
    record = record_of(NOTICED, POINT)
    assert record.details["refused"]
    assert judge(record).verdict is Verdict.REFUTED


def test_mutants_that_are_as_right_are_left_out_and_told(bank, monkeypatch):
    name = "turf/toy-1"
    equal = next(one.why for one in room.mutants(toys()[name].programs["reference"]) if one.held_out)
    monkeypatch.setattr(room, "equals", lambda: {name: {equal: "a reason"}})
    assert record_of(NOTICED, POINT).details["as right as their program"] == 1


# ------------------------------------------------------------------------------------------------------------------- isolation


class Kept(Python):
    """Stands for runners: `leaky` ones remember what came before, and answer with how much that was."""

    leaky = False

    def __init__(self, *_, **__):
        self.seen = 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def run(self, program, entry_point, cases, *, limits=None):
        self.seen += type(self).leaky
        return [[Outcome("returned", [entry_point, case, self.seen])] for case in cases]


class Leaky(Kept):
    leaky = True


@pytest.fixture
def machines(monkeypatch):
    monkeypatch.setattr(room, "node_modules", lambda: None)
    monkeypatch.setattr(room, "OneProcess", Kept)
    monkeypatch.setattr(room, "Warm", Kept)

    def one_realm(library, jobs, *, anew):
        return [("returned", [entry, given, n * (not anew or n > 3)]) for n, (_, entry, given) in enumerate(jobs)]

    monkeypatch.setattr(room, "in_one_realm", one_realm)


def test_warm_processes_pay_where_nothing_leaks(machines):
    record = record_of(WARM, {"library": "turf", "programs": 2})
    assert record.quality.candidate == 1
    assert record.quality.controls["deleted"] < 0.99
    assert record.details["cases that end alike"] == 1
    assert judge(record).verdict in PAYS


def test_warm_processes_that_leak_do_not_pay(machines, monkeypatch):
    monkeypatch.setattr(room, "Warm", Leaky)
    assert verdict_of(WARM, {"library": "turf", "programs": 2}) is Verdict.DOES_NOT_PAY


def test_programs_that_leave_nothing_behind_show_nothing(machines, monkeypatch):
    clean = lambda library, jobs, *, anew: [("returned", [e, g, 0]) for _, e, g in jobs]  # noqa: E731
    monkeypatch.setattr(room, "in_one_realm", clean)
    assert verdict_of(WARM, {"library": "turf", "programs": 2}) is Verdict.QUALITY_NOT_SHOWN


def test_ends_are_compared_whatever_json_makes_of_numbers():
    assert room.same_ends([("returned", [1, {"a": 0.1 + 0.2}])], [("returned", [1.0, {"a": 0.3}])]) == 1
    assert room.same_ends([("returned", 1), ("raised", "x")], [("returned", True), ("raised", "y")]) == 0


# ------------------------------------------------------------------------------------------------------------------ the weakness

MODEL = {"models": ["stub"], "every": 1, "plain": 20, "rounds": 5, "tokens": 8}


def answering(monkeypatch, *, maps, plain):
    """A model that solves that many of the tasks of each kind, in its third round."""
    spatial = [one for one in toys().values() if one.library == "turf"]
    simple = [one for one in toys(9).values() if one.library == "jsts"]
    monkeypatch.setattr(room, "tasks", lambda: {one.id: one for one in spatial})
    monkeypatch.setattr(room, "plain_tasks", lambda: {one.id: one for one in simple})
    can = {one.id for one in [*spatial[:maps], *simple[:plain]]}

    def draw(model, tokenizer, chosen, *, rounds, **_):
        made = {}
        for one in chosen:
            right = Answer("", one.programs["reference"], 9, 1.0)
            wrong = Answer("", f"{one.header} {{ return 0; }}", 5, 1.0)
            made[one.id] = [right if n == 2 and one.id in can else wrong for n in range(rounds)]
        return made

    monkeypatch.setattr(model, "draw", draw)
    monkeypatch.setattr(models, "load_model", lambda name: SimpleNamespace(model=None, tokenizer=None))


def test_a_model_that_is_weak_with_maps_proves_nothing_of_eighteen(bank, monkeypatch):
    answering(monkeypatch, maps=1, plain=8)
    record = record_of(WEAK, MODEL)
    assert record.measured.median == 1
    assert judge(record).verdict is Verdict.UNDECIDED
    told = record.details["models"]["stub"]
    assert told["solved"] == {"maps": pytest.approx(1 / 6), "plain": pytest.approx(8 / 9)}
    assert told["maps"]["first"] == {"1": 0, "3": pytest.approx(1 / 6), "5": pytest.approx(1 / 6)}
    assert told["maps"]["unbiased"]["1"] == pytest.approx(1 / 30)
    assert told["maps"]["cv"] > 0


@pytest.mark.parametrize(
    ("maps", "plain", "verdict"),
    [
        (6, 9, Verdict.REFUTED),
        (6, 3, Verdict.REFUTED),
        (0, 0, Verdict.UNDECIDED),
        (2, 3, Verdict.UNDECIDED),  # a third of both, of so few that chance may have done it
        (1, 1, Verdict.UNDECIDED),
    ],
)
def test_a_model_that_is_surely_as_good_with_maps_refutes_it(bank, monkeypatch, maps, plain, verdict):
    answering(monkeypatch, maps=maps, plain=plain)
    record = record_of(WEAK, MODEL)
    assert record.measured.median == 0
    assert judge(record).verdict is verdict
