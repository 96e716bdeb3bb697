"""EvalPerf: does its experiment notice when inputs do not grow, when clusters do not part, and when tests are large enough anyway?

On a machine that is made up: a program is a text of a factor and an exponent, and costs factor * size ** exponent seconds.
"""

import random
from dataclasses import replace

import pytest
from tests.properties.sabotage import PAYS, record_of

from assay.evidence.types import Verdict
from assay.evidence.verdict import judge
from assay.experiments import experiments_of
from assay.experiments.code import evalperf as room
from assay.methods.code.evalperf import clustering, curate, inputs
from assay.methods.core.programs.workers import METERS, Outcome
from assay.workloads.programs.task import Task

CLAIM = "evalperf/tasks"
POINT = {**room.POINTS["small"][0], "most": 100}
GENERATOR = "def generate(size, rng):\n    return (range(size),)\n"


class Machine:
    """In place of `Workers`."""

    noise = 0.01

    def __init__(self, meter, *, limits):
        self.limits, self.rng, self.meter = limits, random.Random(0), METERS[meter]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def run(self, program, entry_point, cases, *, repeats=1):
        factor, exponent = map(float, program.split())
        ((text,),) = cases
        cost = factor * len(text) ** exponent
        if cost > self.limits.cpu_seconds:
            return [[Outcome("time")]]
        return [[Outcome("returned", cost=cost * (1 + self.noise * self.rng.random())) for _ in range(repeats)]]


def made_up(number: int, name: str, *, slower: bool = False) -> Task:
    """A task whose work needs larger inputs the higher its number; one in six has no differences to show."""
    factor = 1e-5 / 4**number
    programs = {"canonical": f"{factor} 1.0", "expert": f"{factor} 0.55"}
    programs |= {f"variant {n}": f"{factor} {1.0 - n / 14}" for n in range(1, 7)}
    if number % 6 == 5:
        programs = dict.fromkeys(programs, f"{factor} 1.0")
    if slower:
        programs["slow variant"] = f"{factor} 1.4"
    return Task(name, "f", "", programs, generator=GENERATOR, contract="def contract(x): pass\n")


@pytest.fixture(autouse=True)
def made_up_bank(monkeypatch):
    held = {name: made_up(n, name) for name, n in ((f"{n} {again}", n) for n in range(6) for again in "ab")}
    monkeypatch.setattr(room, "bank", lambda: held)
    monkeypatch.setattr(room, "Workers", Machine)
    monkeypatch.setattr(room, "observed_cases", lambda *_: [("a" * n,) for n in (3, 7, 5)])
    return held


def verdict():
    return judge(record_of(CLAIM, POINT)).verdict


def test_with_the_pipeline_as_it_is_the_direction_holds():
    record = record_of(CLAIM, POINT)
    assert judge(record).verdict is Verdict.DIRECTION_HOLDS
    assert (record.measured.median, record.baseline) == (10, 0)
    assert 0 < record.free < record.measured.low < record.measured.median < record.measured.high
    assert 0 < record.controls["random"] < record.measured.low
    assert record.arms[room.SAME] == 0
    assert record.details["why_not"]["sampled"] == {"clusters": 2}
    assert record.details["why_not"]["tests of the package"]["cost"] >= 10
    assert record.details["dps"]["expert"] == 100
    assert 0 < record.details["dps"]["canonical"] < 30


def test_inputs_that_do_not_grow_refute_it(monkeypatch):
    monkeypatch.setattr(room, "Stops", lambda: inputs.Stops(last_power=2))
    assert verdict() is Verdict.REFUTED


def test_a_random_scale_in_place_of_the_last_is_no_method(monkeypatch):
    real = inputs.sample_input

    def anywhere(*args):
        found = real(*args)
        scale = random.Random(len(found.args[0])).choice([found.scale, *found.smaller()])
        return replace(found, args=found.synthesise(scale), scale=scale)

    monkeypatch.setattr(inputs, "sample_input", anywhere)
    assert verdict() not in PAYS


def test_clusters_that_never_part_refute_it(monkeypatch):
    monkeypatch.setattr(room, "bank", lambda: {str(n): made_up(n, str(n)) for n in range(2)})
    monkeypatch.setattr(clustering, "clusters", lambda costs, **_: [tuple(range(len(costs)))])
    assert verdict() is Verdict.REFUTED


def test_costs_that_vary_are_told(monkeypatch):
    monkeypatch.setattr(room, "bank", lambda: {str(n): made_up(n, str(n)) for n in range(2)})
    calm = record_of(CLAIM, POINT).details["variation_percent"]
    monkeypatch.setattr(Machine, "noise", 0.5)
    wild = record_of(CLAIM, POINT).details["variation_percent"]
    assert max(calm.values()) < 1
    assert min(wild.values()) > 2


def test_tests_that_are_large_enough_refute_it(monkeypatch):
    monkeypatch.setattr(room, "observed_cases", lambda *_: [("a" * n,) for n in (5, 2**22)])
    monkeypatch.setattr(
        room, "bank", lambda: {name: made_up(n, name) for name, n in zip("abcd", (5, 5, 5, 4), strict=True)}
    )
    assert verdict() not in PAYS


def test_one_scale_that_is_right_for_all_tasks_is_as_good(monkeypatch):
    monkeypatch.setattr(room, "bank", lambda: {str(n): made_up(5 * (n == 3), str(n)) for n in range(4)})
    record = record_of(CLAIM, POINT)
    assert record.free == record.measured.median == 3
    assert judge(record).verdict not in PAYS


def test_the_one_scale_is_chosen_on_the_other_tasks():
    fine, bad = (room.OnInput(room.Suitability(reason, 8)) for reason in ("", "cost"))

    def task(*scales):
        return room.Seen({}, {2**n: fine if 2**n in scales else bad for n in range(1, 5)}, "", None)

    assert room.one_scale([task(2, 4), task(4), task(4, 8)]) == [1, 1, 1]
    assert room.one_scale([task(2), task(4), task(4)]) == [0, 0.5, 0.5]  # two scales are equals without the second
    assert room.one_scale([task(2)]) == [0]
    assert room.at_random(task(2, 4)) == 0.5
    assert room.at_random(room.Seen({}, {}, "", None)) == 0


def test_all_tasks_that_pass_are_no_certainty(monkeypatch):
    monkeypatch.setattr(room, "bank", lambda: {str(n): made_up(n, str(n)) for n in range(5)})
    record = record_of(CLAIM, POINT)
    assert record.measured.median == record.measured.high == 5
    assert 2.8 < record.measured.low < 2.9  # Wilson's


def test_a_meter_whose_noise_makes_clusters_is_told_by_one_program_in_place_of_all(monkeypatch):
    monkeypatch.setattr(Machine, "noise", 30)
    monkeypatch.setattr(room, "bank", lambda: {str(n): made_up(5, str(n)) for n in range(3)})
    record = record_of(CLAIM, POINT)
    assert record.arms[room.SAME] > 0


def test_the_released_procedure_loses_tasks_with_a_program_slower_than_the_canonical_one(monkeypatch):
    monkeypatch.setattr(room, "bank", lambda: {str(n): made_up(n % 2, str(n), slower=n < 2) for n in range(4)})
    record = record_of(CLAIM, POINT)
    assert record.measured.median == 4
    assert record.arms[room.LAST] == 2
    assert record.details["why_not"][room.LAST] == {"input": 2}
    monkeypatch.setattr(room, "curate", lambda *args, **rest: curate(*args, **rest, keep="last"))
    assert record_of(CLAIM, POINT).measured.median == 2


def test_the_contract_is_asked(monkeypatch, made_up_bank):
    strict = {
        name: Task(
            task.id, "f", "", task.programs, generator=GENERATOR, contract="def contract(x): assert len(x) < 5\n"
        )
        for name, task in made_up_bank.items()
    }
    monkeypatch.setattr(room, "bank", lambda: strict)
    record = record_of(CLAIM, POINT)
    assert set(record.details["sampled"].values()) == {"scale 4 of 4, contract"}
    assert judge(record).verdict is Verdict.REFUTED


def test_points_and_the_tasks_that_a_point_takes():
    (found,) = experiments_of("evalperf")
    assert found.claim == CLAIM
    assert found.decides["full"]["meter"] == found.paper["meter"] == "instructions"
    names = [made_up(n, str(n)) for n in range(10)]
    assert room.spread(names, 3) == [names[0], names[3], names[6]]
    assert room.spread(names, 50) == names
