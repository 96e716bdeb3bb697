"""Does the verdict on the time saved change when the loop is broken: its tests, its measurement, its profile, its rules?"""

import ast
from functools import partial
from types import SimpleNamespace

import pytest
from tests.properties.sabotage import PAYS, record_of, verdict_of

from assay.evidence.verdict import Verdict, judge
from assay.experiments import experiments_of
from assay.experiments.code import effi_code as room
from assay.methods.code.effi_code import LineCost, Profile, generators, loop
from assay.methods.core.programs.estimates import interval
from assay.methods.core.programs.workers import Outcome

CLAIM = "effi_code/execution-time"
POINT = {**room.SETTINGS, "rounds": 1, "repeats": 2}
"""One round: where a program has several places, which one comes first is then all that counts."""


def cost_of(program, size):
    """A program is a row of letters. A small "h", the hot place, that becomes "H" makes it five times faster, another letter hardly, and
    "W" is wrong, and cheap."""
    slow = 5.0 if "h" in program else 1.0
    return (
        0.001
        * size
        * slow
        * (1 + 0.001 * sum(letter.islower() for letter in program))
        * (0.1 if "W" in program else 1.0)
    )


def edits(program, *, rules=(), observed=None):
    """A letter becomes large: each on its own line."""
    return [
        SimpleNamespace(line=n, end_line=n, program=program[: n - 1] + letter.upper() + program[n:])
        for n, letter in enumerate(program, 1)
        if letter.islower() and letter != "x"
    ]


class Machine:
    """Stands for workers: what a program costs and answers follows from its letters."""

    sandbox = None
    ran: list = []

    def __init__(self, meter, limits=None):
        self.meter = SimpleNamespace(name=meter, unit="s")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def run(self, program, entry_point, cases, *, repeats=1, limits=None, keywords=None):
        return [[self.once(program, *case)] for case in cases]

    def once(self, program, size, number, seed):
        Machine.ran.append(program)
        if "W" in program:
            return Outcome("returned", "wrong", cost=cost_of(program, size))
        return Outcome("returned", size, cost=cost_of(program, size))


def profiler(*_, **__):
    """All time is in the hot place, where there is one."""
    return lambda program: Profile(
        tuple(LineCost(n, 1, 1.0 if letter == "h" else 0.01) for n, letter in enumerate(program, 1))
    )


def toy(number, *programs):
    return SimpleNamespace(
        id=f"Toy/{number}",
        entry_point="f",
        programs={"expert": "X", **{f"program {n}": text for n, text in enumerate(programs)}},
        compare=lambda expected, got: expected == got,
        arguments=lambda level, case, seed=0: ((1, 10, 100, 1000)[level], case, seed),
    )


def all_of(*programs):
    return lambda: {f"Toy/{n}": toy(n, *programs) for n in range(9)}


@pytest.fixture(autouse=True)
def toys(monkeypatch):
    """Nine tasks of two programs: one with a hot place that comes last of five, one that no rule applies to."""
    monkeypatch.setattr(room, "Workers", Machine)
    monkeypatch.setattr(room, "LineProfiler", profiler)
    monkeypatch.setattr(room, "bank", all_of("aaaaah", "xxx"))
    monkeypatch.setattr(room, "interval", partial(interval, draws=100))
    monkeypatch.setattr(room, "memory_curve", lambda *_, **__: SimpleNamespace(state="raised"))
    for module in (room.rewriting, generators.rewriting):
        monkeypatch.setattr(module, "edits", edits)
        monkeypatch.setattr(module, "rewrite", lambda program, observed=None: program)  # all at once does not help here


def test_the_figure_is_the_geometric_mean_with_programs_that_no_rule_applies_to():
    record = record_of(CLAIM, POINT)
    ratio = cost_of("aaaaaH", 1) / cost_of("aaaaah", 1)
    assert record.measured.median == pytest.approx(100 * (1 - ratio**0.5))
    assert (record.measured.low, record.measured.high) == pytest.approx((record.measured.median,) * 2)
    assert record.controls["deleted"] == pytest.approx(0)
    assert record.controls["rival"] == pytest.approx(0)  # the first place in the program: within the noise, not kept
    assert record.controls["random"] < record.measured.median - 10
    assert record.free == 0
    details = record.details
    assert (details["tasks (or files)"], details["programs"], details["of them, no rule applies to"]) == (9, 18, 9)
    assert details["where a rule applies"]["geometric mean"] == pytest.approx(ratio)
    low = details["of the other's time saved by the profile, paired by task, %"]["in order, 1 candidates"][1]
    assert low == pytest.approx(record.measured.median)


def test_honest_it_pays():
    assert verdict_of(CLAIM, POINT) in PAYS


def test_with_the_profile_of_other_lines_it_does_not(monkeypatch):
    """The method deleted from within: a profile that says nothing, and one that points elsewhere."""
    monkeypatch.setattr(room, "LineProfiler", lambda *_, **__: lambda program: Profile((LineCost(2, 1, 1.0),)))
    record = record_of(CLAIM, POINT)
    assert record.measured.median == pytest.approx(0)
    assert judge(record).verdict not in PAYS


def test_a_random_line_in_its_place_shows_nothing(monkeypatch):
    real = room.Rules
    monkeypatch.setattr(
        room, "Rules", lambda order, seed=0, **more: real("random", seed if order == "random" else 99, **more)
    )
    record = record_of(CLAIM, POINT)
    assert judge(record).verdict not in PAYS


def test_where_the_order_does_not_matter_the_profile_is_not_credited(monkeypatch):
    """With as many rounds as places any choice finds the hot one: the verdict says that a random one does as well."""
    record = record_of(CLAIM, {**POINT, "rounds": 6})
    assert record.controls["random"] == pytest.approx(record.measured.median, abs=0.5)
    assert judge(record).verdict is Verdict.QUALITY_NOT_SHOWN


def test_all_edits_at_once_as_the_rival_properly_done(monkeypatch):
    monkeypatch.setattr(room.rewriting, "rewrite", lambda program, observed: program.upper())
    record = record_of(CLAIM, POINT)
    assert record.free >= record.measured.high
    assert judge(record).verdict is Verdict.DOES_NOT_PAY


def test_rules_that_help_nowhere_refute_it(monkeypatch):
    monkeypatch.setattr(room, "bank", all_of("aaaaa", "xxx"))
    record = record_of(CLAIM, POINT)
    assert judge(record).verdict is Verdict.REFUTED


def test_rules_that_apply_nowhere_are_told_as_such(monkeypatch):
    monkeypatch.setattr(room, "bank", all_of("xxx"))
    record = record_of(CLAIM, POINT)
    assert record.measured.median == 0
    assert record.details["of them, no rule applies to"] == 9
    assert judge(record).verdict is Verdict.REFUTED


def test_a_wrong_revision_is_not_kept_though_it_costs_a_tenth(monkeypatch):
    monkeypatch.setattr(room, "bank", all_of("aaaaw", "xxx"))
    monkeypatch.setattr(room, "LineProfiler", lambda *_, **__: lambda program: Profile((LineCost(5, 1, 1.0),)))
    record = record_of(CLAIM, POINT)
    assert record.measured.median == pytest.approx(0)
    assert judge(record).verdict not in PAYS


def test_without_tests_wrong_programs_are_no_gain_either(monkeypatch):
    """What is kept is judged again, on other inputs: a program that is wrong there is in no figure, and told."""
    monkeypatch.setattr(room, "bank", all_of("aaaaw", "xxx"))
    monkeypatch.setattr(room, "LineProfiler", lambda *_, **__: lambda program: Profile((LineCost(5, 1, 1.0),)))
    real = room.bench_of

    def bench_of(workers, task, level, cases, repeats, seed, limits):
        bench = real(workers, task, level, cases, repeats, seed, limits)
        if seed == room.LOOP:  # no tests: everything is right
            bench.compare = lambda expected, got: True
        return bench

    monkeypatch.setattr(room, "bench_of", bench_of)
    record = record_of(CLAIM, POINT)
    assert len(record.details["left out"]) == 9
    assert all(why.startswith("after: case 0 gave 'wrong'") for why in record.details["left out"].values())
    assert record.details["of them, not right or cut before or after, in no figure"] == 9


def test_a_gain_on_the_loops_own_inputs_alone_is_none(monkeypatch):
    """What the loop measured is not what is reported: programs are measured again on inputs of another seed."""
    real = Machine.once

    def once(self, program, size, number, seed):
        return real(self, program if seed == room.LOOP else program.replace("H", "h"), size, number, seed)

    monkeypatch.setattr(Machine, "once", once)
    record = record_of(CLAIM, POINT)
    assert record.measured.median == pytest.approx(0, abs=0.1)
    assert judge(record).verdict not in PAYS


def test_programs_that_are_cut_are_left_out_and_told(monkeypatch):
    real = Machine.once

    def once(self, program, size, number, seed):
        late = "h" in program and size == 100
        return Outcome("time", error="too long") if late else real(self, program, size, number, seed)

    monkeypatch.setattr(Machine, "once", once)
    record = record_of(CLAIM, POINT)
    assert len(record.details["left out"]) == 9
    assert record.measured.median == 0


def test_every_arm_runs_no_more_candidates_than_it_has_rounds():
    Machine.ran.clear()
    one = toy(0, "aaaaah")
    workers = Machine("cpu_seconds")
    bench = room.bench_of(workers, one, 2, 1, 1, room.LOOP, None)
    for rounds in (1, 2):
        arms, by_profile = room.arms_of("aaaaah", bench, profiler(), {}, rounds, 2)
        assert {len(arms[arm]) for arm in ("profile", "in order")} == {rounds + 1}
        assert len(arms["random 0"]) == rounds + 1 + by_profile.profiles
        assert len(by_profile.steps) == rounds


def test_files_hold_programs_of_different_tasks_that_do_not_disturb_each_other(monkeypatch):
    """Made of the bank itself: every name means in the file what it meant in its program."""
    monkeypatch.undo()
    tasks = [task for number, task in enumerate(room.bank().values()) if number < 6]
    monkeypatch.setattr(room.rewriting, "edits", lambda text, observed: [] if "insort" in text else ["one"])
    files = room.files_of(tasks, 3)
    assert len(files) > 5
    for file in files:
        text = file.programs["all"]
        assert len({task.id for task in file.tasks}) == 3
        assert "insort" not in text
        functions = [node.name for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)]
        assert len(functions) == len(set(functions))
        assert [task.entry_point in functions for task in file.tasks] == [True] * 3
        held = {}
        exec(text, held)  # the bank is the project's own
        calls = file.arguments(0, 0, 0)
        expected = tuple(
            of_task(task, task.programs["canonical"])(*call) for task, call in zip(file.tasks, calls, strict=True)
        )
        assert file.compare(expected, held["joined"](*file.arguments(0, 0, 0)))
        assert not file.compare(expected, held["joined"](*file.arguments(0, 0, 0))[:2])
    assert set(room.observed_of(files[0])) == {task.entry_point for task in files[0].tasks}


def of_task(task, program):
    held = {}
    exec(program, held)
    return held[task.entry_point]


def test_a_file_is_asked_as_a_task_is_and_answered_by_all_of_its_experts(monkeypatch):
    pair = room.File("file 0", (toy(0), toy(1)), {"all": ""})
    calls = [pair.arguments(level, 3, 7) for level in (0, 2)]
    assert calls[1] == ((100, 3, 7), (100, 3, 7))
    Machine.ran.clear()
    assert room.answers_of(Machine("cpu_seconds"), pair, calls, None) == [(1, 1), (100, 100)]
    assert set(Machine.ran) == {"X"}
    monkeypatch.setattr(room, "files_of", lambda tasks, size: list(all_of("aaaaah")().values())[:size])
    record = record_of(CLAIM, {**POINT, "of": "files"})
    assert record.details["tasks (or files)"] == record.details["programs"] == room.SIZE
    assert record.measured.median > 70


def test_where_nothing_was_solved_there_is_no_figure(monkeypatch):
    monkeypatch.setattr(room, "bank", all_of("aW"))
    with pytest.raises(ValueError, match="before: case 0 gave 'wrong'"):
        experiments_of("effi_code")[0].run(**POINT)


def test_a_name_may_be_bound_twice_only_by_the_same_import():
    bound = room.names_of("import math\nfrom heapq import heappop as pop\nN, M = 1, 2\nclass A: pass\ndef f(): x = 1\n")
    assert bound == {"math": "math", "pop": "heapq.heappop", "N": "", "M": "", "A": "", "f": ""}
    assert not room._clash(bound, room.names_of("import math"), "math")
    assert room._clash(bound, room.names_of("from x import math"), "math")
    assert room._clash(bound, room.names_of("N = 1"), "N")


def test_the_point_that_decides_has_the_papers_rounds_and_the_stand_in_is_named():
    (found,) = experiments_of("effi_code")
    for scale in ("small", "full"):
        assert found.decides[scale]["rounds"] == loop.ROUNDS == 5
        assert found.decides[scale]["order"] == "profile"
        assert (found.decides[scale]["tasks"], found.decides[scale]["of"]) == (0, "programs")
    assert "no model is tuned" in found.measured_here
    assert set(found.departures) == {"generator", "programs", "statistic"}
