"""Samples are judged, measured in turns with the references, and kept: one run, whatever it is scored by."""

import json
from dataclasses import replace

import pytest

from assay.methods.core.programs import runs as room
from assay.methods.core.programs.runs import Costs, Run, Settings, run_all, run_task
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


def test_every_repeat_is_judged():
    seen = [Outcome("returned", 7, cost=2.0), Outcome("returned", None, cost=1.0)]
    assert room._did(seen, 7, TASK) == "wrong"
    assert room._did(seen[:1] * 2, 7, TASK) == [2.0, 2.0]
    assert TASK.compare is same


def test_settings_are_checked():
    with pytest.raises(ValueError, match="repeats"):
        Settings(repeats=0)
    with pytest.raises(ValueError, match="seconds"):
        Settings(seconds=0)
    assert Costs([[[1.0], "time"]]).failed == "time"
    assert not Run("x", [""]).measured
