"""Samples are judged, measured in turns with the references, and kept: one run, whatever it is scored by."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest

from assay.methods.core.programs import runs as room
from assay.methods.core.programs.runs import Costs, NoReference, Run, Settings, case_of, measured, run_all, run_task
from assay.methods.core.programs.workers import Outcome, Workers
from assay.workloads.programs.compare import close, same
from assay.workloads.programs.task import Task

TASK = Task(
    "Own/1",
    "total",
    "def total(n):\n",
    {
        "canonical": "def total(n):\n    return sum(range(n))\n",
        "expert": "def total(n):\n    return n * (n - 1) // 2\n",
        "loop": "def total(n):\n    t = 0\n    for i in range(n):\n        t += i\n    return t\n",
    },
    {},
    (4, 50, 100, 2000),
    "def generate(size, rng):\n    return (size + rng.randrange(3),)\n",
    "",
    "def check(candidate):\n    assert candidate(0) == 0\n    assert candidate(5) == 10\n",
)
FAST, SLOW = TASK.programs["expert"], TASK.programs["loop"]
SAMPLES = [
    SLOW,
    "def total(n):\n    return n\n",
    FAST,
    SLOW,
    "def total(n):\n    while n > 1000: pass\n    return n * (n - 1) // 2\n",
    "def total(n):\n    return n * (n - 1) // 2 if n < 90 else 7\n",
]
SETTINGS = Settings("operations", cases=2, seconds=0.5)


@pytest.fixture(scope="module")
def found():
    with Workers("operations", limits=SETTINGS.limits) as workers:
        return run_task(TASK, SAMPLES, workers, SETTINGS)


def test_samples_are_judged_and_keep_their_order(found):
    assert found.right == [True, False, True, True, True, True]
    assert "case 1 gave 5, not 10" in found.why[1]
    assert found.samples[1] is None


def test_samples_and_references_are_measured_alike(found):
    assert set(found.references) == {"expert", "loop"}
    assert found.samples[2] == found.references["expert"]
    assert found.samples[0] == found.samples[3] == found.references["loop"]
    small, large = found.samples[0].levels[0][0][0], found.samples[0].levels[2][0][0]
    assert large > 10 * small
    assert [len(level) for level in found.samples[0].levels] == [2, 2, 2]


def test_a_program_that_fails_on_a_level_is_not_run_beyond_it(found):
    stuck, lying = found.samples[4], found.samples[5]
    assert stuck.failed == "time"
    assert [len(stuck.levels), stuck.levels[2]] == [3, ["time", "time"]]
    assert lying.failed == "wrong"
    assert len(lying.levels) == 2  # level 2, of 100, is where it lies
    assert not found.samples[0].failed


def test_a_task_without_inputs_is_judged_only():
    plain = replace(TASK, sizes=(), generator="")
    with Workers("operations", limits=SETTINGS.limits) as workers:
        found = run_task(plain, SAMPLES[:3], workers, SETTINGS)
        assert (found.right, found.measured, found.samples) == ([True, False, True], False, [])
        with pytest.raises(ValueError, match="no canonical program"):
            run_task(replace(TASK, programs={}), SAMPLES, workers, SETTINGS)
        with pytest.raises(ValueError, match="neither a test nor inputs"):
            run_task(replace(plain, test=""), SAMPLES, workers, SETTINGS)
        listed = run_task(replace(plain, test="", inputs=((1,), (3,))), SAMPLES[:3], workers, SETTINGS)
        assert listed.why == ["", "case 0 gave 1, not 0", ""]


def test_what_was_run_is_not_run_again(tmp_path, monkeypatch, found):
    calls = []
    monkeypatch.setattr(room, "run_task", lambda task, programs, workers, settings: (calls.append(task.id), found)[1])
    journal = tmp_path / "runs.jsonl"
    tasks, samples = {TASK.id: TASK, "Own/2": replace(TASK, id="Own/2")}, {TASK.id: SAMPLES}
    assert run_all(samples, tasks, SETTINGS, journal=journal) == [found]
    assert run_all(samples, tasks, SETTINGS, journal=journal) == [found]
    assert calls == ["Own/1"]
    with open(journal, "a") as file:
        file.write('{"key": "torn')  # a writer was killed here
    run_all({TASK.id: SAMPLES, "Own/2": SAMPLES}, tasks, SETTINGS, journal=journal)
    assert calls == ["Own/1", "Own/2"]
    assert len(run_all({TASK.id: SAMPLES, "Own/2": SAMPLES}, tasks, SETTINGS, journal=journal)) == 2
    assert len(calls) == 2
    for changed in (
        {"samples": {TASK.id: SAMPLES[:2]}},
        {"settings": replace(SETTINGS, seed=1)},
        {"machine": "another"},
        {"tasks": {TASK.id: replace(TASK, generator=TASK.generator + "\n")}},
        {"tasks": {TASK.id: replace(TASK, compare=close())}},
    ):
        given = {"samples": samples, "tasks": tasks, "settings": SETTINGS, "machine": ""} | changed
        before = len(calls)
        run_all(given["samples"], given["tasks"], given["settings"], journal=journal, machine=given["machine"])
        assert len(calls) == before + 1, changed
    assert all(json.loads(line)["key"] for line in journal.read_text().splitlines() if "torn" not in line)


def test_a_case_is_what_its_first_failure_was():
    fine, other = Outcome("returned", 7, cost=2.0), Outcome("returned", None, cost=1.0)
    late = Outcome("time")
    assert case_of([fine, fine], 7, same) == [2.0, 2.0]
    assert case_of([fine, other], 7, same) == "wrong"
    assert case_of([fine, late], 7, same) == "time"
    assert case_of([other, late], 7, same) == "wrong"
    assert case_of([Outcome("raised", error="OverflowError: too large")], 7, same) == "overflow"
    assert case_of([Outcome("raised", error="KeyError: 3")], 7, same) == "raised"
    assert case_of([Outcome("returned", 7, cost=0.0)], 7, same) == [0.0]


def test_a_task_that_does_not_answer_ends_nothing_and_is_tried_again(tmp_path, monkeypatch, found):
    def tried(task, *_):
        calls.append(task.id)
        if task.id == "Own/1":
            raise NoReference("Own/1: its own reference does not finish")
        return found

    calls = []
    monkeypatch.setattr(room, "run_task", tried)
    tasks = {TASK.id: TASK, "Own/2": replace(TASK, id="Own/2")}
    for _ in range(2):
        first, second = run_all(dict.fromkeys(tasks, SAMPLES), tasks, SETTINGS, journal=tmp_path / "runs.jsonl")
        assert (first.unjudged, first.why, second) == ("Own/1: its own reference does not finish", [], found)
    assert calls == ["Own/1", "Own/2", "Own/1"]


def test_what_cannot_be_done_is_told_before_anything_is_run(tmp_path, monkeypatch):
    monkeypatch.setattr(room, "run_task", lambda *_: pytest.fail("it was run"))
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be written: Not a directory|cannot be read: Not a directory"):
        run_all({TASK.id: SAMPLES}, {TASK.id: TASK}, SETTINGS, journal=tmp_path / "file" / "runs.jsonl")
    empty = replace(TASK, id="Own/2", test="", sizes=())
    with pytest.raises(ValueError, match="Own/2 has neither a test nor inputs"):
        run_all({TASK.id: SAMPLES, "Own/2": SAMPLES}, {TASK.id: TASK, "Own/2": empty}, SETTINGS)


class Machine:
    """Stands for workers: a program is what it does, size by size, and says what limits it had."""

    def __init__(self, **programs):
        self.programs, self.ran = programs, []
        self.meter = SimpleNamespace(name="cpu_seconds", unit="s")

    def run(self, program, entry_point, cases, *, limits=None, **_):
        self.ran += [(program, case[0], limits) for case in cases]
        did = [self.programs[program](case[0]) for case in cases]
        return [[one if isinstance(one, Outcome) else Outcome("returned", 7, cost=one)] for one in did]


def test_programs_are_run_in_turns_level_by_level_until_they_fail():
    machine = Machine(a=float, b=lambda n: Outcome("memory") if n == 2 else float(n))
    found = measured(
        machine, "f", {"a": "a", "b": "b"}, [[(1,)], [(2,), (3,)], [(4,)]], same, trusted="a", repeats=[1, 2, 1]
    )
    assert found["a"].finished == [[[1.0]], [[2.0] * 2, [3.0] * 2], [[4.0]]]
    assert found["b"].levels == [[[1.0]], ["memory", [3.0, 3.0]]]
    assert [(name, n) for name, n, _ in machine.ran] == [
        *(("a", 1), ("b", 1), ("a", 2), ("b", 2), ("a", 3), ("b", 3), ("a", 2), ("b", 3), ("a", 3), ("a", 4))
    ]
    with pytest.raises(NoReference, match="ended by memory"):
        measured(machine, "f", {"b": "b"}, [[(2,)]], same, trusted="b", repeats=[1])
    with pytest.raises(NoReference, match="ended by memory"):
        found["b"].finished  # noqa: B018


def test_a_reference_that_answers_otherwise_each_time_is_none():
    answers = iter(range(9))
    machine = Machine(a=lambda n: Outcome("returned", next(answers), cost=1.0))
    with pytest.raises(NoReference, match="another answer at every run"):
        measured(machine, "f", {"a": "a"}, [[(1,)]], same, trusted="a", repeats=[2])


def test_no_sample_is_ended_before_the_time_outs_of_scores():
    """A reference that takes most of what is allowed: twice as much must be seen, or it would be called too dear."""
    task = replace(TASK, programs={"expert": "e"}, test="", generator="def generate(size, rng):\n    return (size,)\n")
    for dearest, enough in ((4.0, 10.0), (0.1, 5.0)):
        machine = Machine(e=lambda n, most=dearest: most * n / 2000, s=lambda n: 1e-3)
        run_task(task, ["s"], machine, Settings(cases=1))
        given = {limits for name, _, limits in machine.ran if name == "s" and limits is not None}
        assert [limits.cpu_seconds for limits in given] == [pytest.approx(enough)], dearest


def test_settings_are_checked():
    with pytest.raises(ValueError, match="repeats"):
        Settings(repeats=0)
    with pytest.raises(ValueError, match="seconds"):
        Settings(seconds=0)
    assert Costs([[[1.0], "time"]]).failed == "time"
    assert not Run("x", [""]).measured
