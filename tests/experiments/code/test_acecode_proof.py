"""What ACECode's two claims say where the reward is noise, left out, or a cheaper way does as well; and that what is judged is apart."""

import ast
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tests.properties.sabotage import PAYS, record_of, verdict_of

from assay.evidence.types import Verdict
from assay.evidence.verdict import judge
from assay.experiments import experiments_of
from assay.experiments.code import acecode as room
from assay.experiments.rates import Rate
from assay.methods.code.acecode import Executor, normalised
from assay.methods.core.programs.workers import Outcome
from assay.methods.core.sandbox import Limits
from assay.workloads.programs.task import bank

PASS, FASTER = "acecode/pass-at-1", "acecode/faster-share"
RECIPE = {**room.RECIPE, "tasks": 2, "judged": 60}
POINT = {"recipe": RECIPE}
HONEST = {
    room.BASE: (0.66, (0.2, 1.0, 1.0, 3.0)),
    room.AGAIN: (0.66, (1.0, 1.0, 0.2, 3.0)),
    room.ACE: (0.95, (0.2, 0.2, 0.2, 1.0)),
    room.GROUPS: (0.95, (0.2, 0.2, 0.2, 1.0)),
    room.REJECTION: (0.85, (0.2, 1.0, 0.2, 1.0)),
    room.CORRECT: (0.95, (1.0, 1.0, 0.2, 3.0)),
    room.SPEED: (0.5, (0.2, 0.2, 0.2, 0.2)),
    room.MANY: (0.9, (0.2, 0.2, 1.0, 1.0)),
    room.NOISE: (0.66, (3.0, 1.0, 1.0, 0.2)),
}
"""Of each arm the share that is right, and the costs of right samples, in turns."""


@pytest.fixture
def scripted(monkeypatch):
    """Sets what the arms reach; seeds differ by a sample or two of each task."""
    monkeypatch.setattr(room, "in_parallel", lambda function, runs: [function(*run) for run in runs])
    monkeypatch.setattr(room, "chosen", lambda *_: Rate(1e-3, (3e-4, 1e-3, 3e-3)))

    def script(**instead):
        arms = {**HONEST, **{getattr(room, name): value for name, value in instead.items()}}

        def outcomes(recipe, seed):
            seen = {"base": {"loss": 0.5, "floor": 5.0, "programs run": 9}}
            for arm, (right, costs) in arms.items():
                n = round(right * recipe["judged"]) - seed % 3
                of_task = [costs[i % len(costs)] if i < n else None for i in range(recipe["judged"])]
                reward = float(np.mean([-0.2 if cost is None else 0.75 + 0.1 * (cost < 1) for cost in of_task]))
                seen[arm] = {
                    "costs": {str(t): of_task for t in range(recipe["tasks"])},
                    "reward": reward,
                    "rounds": [{"kl": 0.1}],
                }
            return seen

        monkeypatch.setattr(room, "outcomes", outcomes)

    return script


def test_honest_both_hold(scripted):
    scripted()
    record = record_of(PASS, POINT)
    assert judge(record).verdict in PAYS
    assert record.measured.median == pytest.approx(100 * (57 - 40) / 60)
    assert record.controls["deleted"] == record.controls["random"] == 0
    assert record.free == pytest.approx(100 * (51 - 40) / 60)
    share = record_of(FASTER, POINT)
    assert judge(share).verdict in PAYS
    assert share.measured.low < 75 <= share.measured.median + 1 < share.measured.high + 2
    assert share.details["what is written"][room.BASE]["wrong"] == pytest.approx(1 - 39 / 60)
    assert share.details["general execution time (our reading)"][room.ACE][0] < 0.5
    assert share.details["efficiency among right code (our reading)"][room.SPEED] == [1.0] * 3
    assert share.controls["deleted"] == share.arms[room.CORRECT]


@pytest.mark.parametrize("claim", [PASS, FASTER])
@pytest.mark.parametrize("instead", ["BASE", "NOISE"])
def test_without_the_reward_or_with_noise_in_its_place_nothing_holds(scripted, claim, instead):
    broken = HONEST[getattr(room, instead)] if instead == "NOISE" else HONEST[room.AGAIN]
    scripted(ACE=broken)
    assert verdict_of(claim, POINT) in (Verdict.DOES_NOT_PAY, Verdict.REFUTED)


def test_a_rival_that_does_as_well_takes_the_gain(scripted):
    scripted(REJECTION=HONEST[room.ACE])
    assert verdict_of(PASS, POINT) is not Verdict.REPRODUCED
    scripted(REJECTION=(0.99, (0.1, 0.1, 0.1, 0.1)))
    assert verdict_of(PASS, POINT) is Verdict.DOES_NOT_PAY
    assert verdict_of(FASTER, POINT) is Verdict.DOES_NOT_PAY


def test_becoming_wrong_refutes_the_one_and_wrong_programs_are_never_faster(scripted):
    scripted(ACE=(0.4, (0.1, 0.1, 0.1, 0.1)))
    assert verdict_of(PASS, POINT) is Verdict.REFUTED
    scripted(ACE=(0.05, (0.01,)))
    assert verdict_of(FASTER, POINT) is Verdict.REFUTED


def test_a_reward_for_correctness_alone_is_not_faster(scripted):
    scripted(ACE=HONEST[room.CORRECT])
    assert verdict_of(PASS, POINT) in PAYS
    assert verdict_of(FASTER, POINT) is Verdict.DOES_NOT_PAY
    scripted(CORRECT=HONEST[room.ACE])
    assert verdict_of(FASTER, POINT) is Verdict.QUALITY_NOT_SHOWN


def test_beating_a_rival_that_learnt_nothing_decides_nothing(scripted):
    scripted(REJECTION=HONEST[room.BASE])
    assert verdict_of(PASS, POINT) is Verdict.UNDECIDED


def test_both_claims_are_tried_and_named_for_what_they_are():
    found = {one.claim: one for one in experiments_of("acecode")}
    assert set(found) == {PASS, FASTER}
    assert all("known programs" in one.measured_here for one in found.values())


# ------------------------------------------------------------------------------------------------------------------ the setting


@pytest.fixture(scope="module")
def tasks():
    return list(bank().values())[: room.RECIPE["tasks"]]


def test_inputs_of_rewards_and_of_judgements_are_apart(tasks):
    for seed in (0, room.SEARCH_SEED):
        for rewarded, judged in zip(*room.problems(Machine(), tasks, room.RECIPE, seed), strict=True):
            ours, theirs = ({repr(one) for one in (*each.tests, *each.timed)} for each in (rewarded, judged))
            assert not ours & theirs
            assert len(ours) == room.RECIPE["tests"] + 1
            assert len(theirs) >= 4
            assert rewarded.reference == judged.reference


def test_each_wrong_program_is_told_by_the_inputs_kept():
    task = toy(0)
    late, never = "cost = 1\ngives = lambda n: n in (7, 9)", "cost = 1"
    drawn = [(n,) for n in range(1, 12)]
    kept = [n for (n,) in room.telling(Machine(), task, 4, drawn, [task.wrong["one"], late])]
    assert kept == [1, 2, 3, 7]
    assert [n for (n,) in room.telling(Machine(), task, 4, drawn, [never, late])] == [1, 2, 7, 3]
    assert [n for (n,) in room.telling(Machine(), task, 4, drawn, [])] == [1, 2, 3, 4]


def test_the_language_says_the_programs_it_was_made_of(tasks):
    language = room.Language(tasks, room.RECIPE)
    rows = language.rows()
    assert len(rows) in range(54, 61)  # six a task, fewer where fewer are short
    assert len({tuple(row) for row in rows}) == len(rows)
    at = 0
    for task in tasks:
        right, wrong = room.known_programs(task, room.RECIPE)
        known = [*right, *wrong]
        assert len(wrong) == room.WRONG
        assert known[0] == task.programs["expert"] or len(room.lines_of(task.programs["expert"])) > room.RECIPE["lines"]
        assert task.programs["canonical"] not in known
        for text in known:
            told = language.text(rows[at][1:-1])
            assert ast.dump(ast.parse(told)) == ast.dump(ast.parse(text))
            at += 1
    assert max(map(len, rows)) <= language.longest
    assert normalised(language.text([1])) is None  # a task's own token is no program


class Machine:
    """Stands for workers: programs are `cost = c` and `gives = v`, and nothing else."""

    def __init__(self, *_):
        self.meter, self.limits = SimpleNamespace(unit="s", name="cpu_seconds"), Limits()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def run(self, program, entry_point, cases, *, repeats=1, limits=None, keywords=None):
        held = {"gives": 0, "cost": None}
        try:
            exec(program, {}, held)
        except NameError as error:
            return [[Outcome("raised", error=str(error))] for _ in cases]
        if held["cost"] is None:
            return [[Outcome("raised", error="no cost")] for _ in cases]
        gives = held["gives"] if callable(held["gives"]) else lambda n: held["gives"]
        return [[Outcome("returned", (gives(n), n), cost=held["cost"] * n)] for (n,) in cases]


def toy(number):
    """A task with programs of two lines; mixtures of them are right and fast too."""
    return SimpleNamespace(
        id=f"Toy/{number}",
        entry_point="f",
        programs={
            "canonical": f"cost = 0.1\nt{number} = 0", "expert": f"cost = 0.01\nt{number} = 1", "even": f"cost = 0.1\nt{number} = 2",
            "slow": f"cost = 0.3\nt{number} = 3", "slower": f"cost = 0.4\nt{number} = 4",
        },
        wrong={"one": f"cost = 0.01\ngives = 1\nt{number} = 5", "two": f"cost = 0.1\ngives = 2\nt{number} = 6"},
        compare=lambda expected, got: expected == got,
        arguments=lambda level, case, seed=0: (1 + 1000 * level + case + 7 * seed,),
    )  # fmt: skip


TRAINED = {
    **room.RECIPE, "tasks": 3, "width": 16, "heads": 2, "base_steps": 120, "batch": 18, "rounds": 24, "samples": 8, "judged": 32,
    "repeats": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def trained():
    """A run of the experiment for real, but for the machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    patch = pytest.MonkeyPatch()
    patch.setattr(room, "Workers", Machine)
    patch.setattr(room, "bank", lambda: {f"Toy/{n}": toy(n) for n in range(3)})
    patch.setattr(room, "rate_of", lambda arm: 1e-2 if arm == room.BASE else 3e-3)
    yield room.outcomes(TRAINED, 0)
    patch.undo()
    torch.set_num_threads(threads)


@pytest.mark.slow
def test_trained_for_real_the_reward_decides_what_is_written(trained):
    passed = {arm: room.pass_at_1(trained[arm]["costs"]) for arm in HONEST}
    share = {arm: room.faster(trained, arm) for arm in HONEST}
    assert 0.4 < passed[room.BASE] < 0.85
    for arm in (room.ACE, room.GROUPS, room.REJECTION, room.MANY):
        assert passed[arm] > 0.9, arm
        assert share[arm] > 60, arm
    assert passed[room.CORRECT] > 0.9
    assert share[room.CORRECT] < share[room.ACE] - 20
    assert passed[room.SPEED] < passed[room.ACE] - 0.2
    assert passed[room.NOISE] < 0.85
    assert share[room.NOISE] < 50


@pytest.mark.slow
def test_all_arms_have_as_many_executions(trained):
    asked = {arm: trained[arm]["executions"] for arm in HONEST if "executions" in trained[arm]}
    assert set(asked.values()) == {3 * TRAINED["rounds"] * TRAINED["samples"]}
    assert set(asked) == set(HONEST) - {room.BASE, room.AGAIN}


def test_slow_is_not_wrong_when_judged_and_a_time_out_when_rewarded():
    rewarded, judged = room.problems(Machine(), [toy(0)], TRAINED, 0)
    slow = "cost = 0.9"
    assert Executor(Machine(), rewarded, repeats=1).run("Toy/0", slow).ended == "failed"
    assert Executor(Machine(), judged, repeats=1, time_out=room.PATIENCE).run("Toy/0", slow).ended == "right"
