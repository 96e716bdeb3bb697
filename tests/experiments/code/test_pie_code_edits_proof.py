"""Does the verdict on the best of eight change when optimisers, tests or humans do? And do both banks hold what they say?"""

from contextlib import contextmanager

import pytest
from tests.properties.sabotage import PAYS, record_of, verdict_of
from tests.tools import needs, needs_sandbox

from assay.evidence.types import Verdict
from assay.experiments.code import pie_code_edits as experiments
from assay.experiments.code import pie_code_edits_optimisers as optimisers
from assay.methods.code import pie_code_edits as room
from assay.methods.code.pie_code_edits import Pair, Submission
from assay.methods.core.programs.workers import Workers
from assay.methods.core.sandbox import Sandbox
from assay.workloads.programs.submissions import problems
from assay.workloads.programs.task import bank

CLAIM = "pie_code_edits/best-at-8"
POINT = {"programs": "cpp", "problems": 24, "k": 8, "sources": 1, "halves": 1}


def stub(number, *, human=2.0, gain=4.0, tests=True):
    """A problem whose programs say what they cost, "name cost": people come from 1000 to 1000 / human, rules to 1000 / gain."""
    name = f"problem{number}"

    def cost(program):
        words = program.split()
        if len(words) == 2 and words[0] == name and words[1].isdigit():
            return float(words[1])
        return None if tests else 1.0

    costs = [1000 + number, (1000 + number) // human, 900]
    handed = [
        Submission(f"{name}\n{int(c)}\n", name, "u" if n < 2 else "v", n, float(int(c))) for n, c in enumerate(costs)
    ]

    def rules(program):
        return [f"{name}\n{int(int(program.split()[1]) / gain)}\n"] if gain else []

    return experiments.Bench(handed, cost, cost, lambda program: cost(program) and 0.9 * cost(program), rules)


@pytest.fixture
def world(monkeypatch):
    """The experiment on twelve stubs, changed as a test likes."""

    def made(**changes):
        @contextmanager
        def benches(*_):
            yield {f"problem{n}": stub(n, **changes) for n in range(12)}

        monkeypatch.setattr(experiments, "benches", benches)

    return made


def test_optimisers_that_gain_more_than_people_pay_and_the_figures_are_those_of_the_stubs(world):
    world()
    record = record_of(CLAIM, POINT)
    assert verdict_of(CLAIM, POINT) in PAYS
    assert record.measured.median == pytest.approx(4, rel=0.01)
    assert record.baseline == pytest.approx(2, rel=0.01)
    assert record.free == pytest.approx(1 / 0.9)
    assert record.controls["deleted"] == 1
    assert record.controls["rival"] == 1  # another problem's program is no answer
    assert record.controls["random"] < 1.01
    assert record.details["problems of them"] == record.details["slow programs"] == 6
    assert record.details["by the other meter"]["best"] == pytest.approx(4, rel=0.01)


@pytest.mark.parametrize(
    ("change", "verdict"),
    [
        ({"gain": 0}, Verdict.REFUTED),  # the optimisers deleted
        ({"gain": 1.5}, Verdict.REFUTED),
        ({"human": 20}, Verdict.REFUTED),  # people who do it properly
        ({"tests": False}, Verdict.QUALITY_NOT_SHOWN),  # whatever random edits leave over passes
    ],
)
def test_optimisers_people_and_tests_decide(world, change, verdict):
    world(**change)
    assert verdict_of(CLAIM, POINT) is verdict


def test_random_edits_in_the_place_of_the_rules_refute(world, monkeypatch):
    world()
    honest = experiments.samples

    def broken(program, bench, nearest, k, seed):
        found = honest(program, bench, nearest, k, seed)
        return {**found, experiments.ALL: found[experiments.RANDOM]}

    monkeypatch.setattr(experiments, "samples", broken)
    assert verdict_of(CLAIM, POINT) is Verdict.REFUTED


def test_counting_wrong_programs_as_the_fastest_is_seen_by_the_controls(world, monkeypatch):
    world()
    monkeypatch.setattr(
        room, "speedup_best_at_k", lambda edits, k, **_: edits.source / min(cost or 1.0 for cost in edits.costs[:k])
    )
    assert verdict_of(CLAIM, POINT) is Verdict.QUALITY_NOT_SHOWN


def test_a_pair_of_the_own_problem_hands_out_the_answer_and_a_split_does_not(world):
    bench = stub(1)
    pairs = room.build_pairs(bench.submissions)
    other = [Pair(f"problem1\n{n}\n", "problem1\n100\n", "problem1", "v", float(n), 100.0) for n in (990,)]
    foreign = room.Index(room.build_pairs(stub(2).submissions))
    seen = experiments.row(pairs[0], bench, pairs, foreign, room.Index([*foreign.pairs, *other]), 8, 0)
    assert room.speedup_best_at_k(seen.edits[experiments.TARGETS], 8) == 1
    assert seen.leaked == pytest.approx(10.01)


# ---------------------------------------------------------------------------------------------------------------------- optimisers


def test_rules_give_different_programs_and_edits_of_a_pair_find_their_place():
    program = "#include <iostream>\nusing namespace std;\nint main() {\n    cout << 1 << endl;\n}\n"
    found = optimisers.by_rules(program)
    assert program not in found
    assert len(set(found)) == len(found) == 5
    assert "'\\n'" in found[0]
    assert "sync_with_stdio" in found[0]
    pair = Pair("a\n    cout << 1 << endl;\nb\n", 'a\n    puts("1");\nb\n', "p", "u", 2.0, 1.0)
    [changed] = optimisers.by_retrieval(program, [pair, Pair("x\n", "y\n", "p", "u", 2.0, 1.0)])
    assert changed == program.replace("cout << 1 << endl;", 'puts("1");')


def test_random_edits_repeat_by_seed_and_leave_includes_alone():
    program = "#include <cstdio>\nint main() {\n    int n = 5;\n    return n;\n}\n"
    found = optimisers.at_random(program, 8, "seed")
    assert found == optimisers.at_random(program, 8, "seed") != optimisers.at_random(program, 8, "other")
    assert len(found) == 8
    assert all("#include <cstdio>" in text for text in found)


def test_every_rule_changes_something_in_the_bank():
    texts = [one.program for problem in problems().values() for one in problem.submissions]
    for rule in (*optimisers.SAFE, *optimisers.BOLD):
        assert any(rule(text) != text for text in texts), rule.__name__


# --------------------------------------------------------------------------------------------------------------------- the banks


def test_the_bank_has_problems_with_authors_who_come_back():
    found = problems()
    assert 30 <= len(found) <= 40
    for problem in found.values():
        assert 3 <= len(problem.submissions) <= 5
        assert problem.title
        assert problem.stdin(0, 1) == problem.stdin(0, 1)
        assert len({problem.stdin(0, n) for n in range(8)}) > 1
        authors = [one.author for one in problem.submissions]
        assert max(map(authors.count, authors)) > 1
        texts = [one.program for one in problem.submissions]
        assert len({*texts, problem.wrong.program}) == len(texts) + 1
    with pytest.raises(ValueError, match="levels 0 and 1"):
        found["inversions"].stdin(2)


def test_a_problem_in_cpp_is_compiled_judged_and_measured_by_both_meters(monkeypatch):
    for tool in ("g++", "valgrind"):
        needs(tool)
    needs_sandbox()
    problem = problems()["stair_ways"]
    short = experiments.replace(
        problem, submissions=(problem.submissions[-1], problem.submissions[-1])
    )  # of C's library, which compiles fast
    monkeypatch.setattr(experiments, "FLAGS", ("-O1",))
    monkeypatch.setattr(experiments, "CASES", 2)
    monkeypatch.setattr(experiments, "REPEATS", 1)
    bench = experiments.cpp_bench(short, Sandbox(experiments.LIMITS), 0)
    assert [one.cost for one in bench.submissions] == [bench.cost(short.submissions[0].program)] * 2
    assert bench.submissions[0].cost > 0
    assert bench.cost(problem.wrong.program) is None
    assert room.build_pairs(bench.submissions) == []


def test_a_task_of_humaneval_is_measured_and_wrong_programs_have_no_cost(monkeypatch):
    needs_sandbox()
    task = bank()["HumanEval/34"]
    monkeypatch.setattr(experiments, "REPEATS", 1)
    with Workers("cpu_seconds") as seconds, Workers("operations") as operations:
        bench = experiments.python_bench(task, seconds, operations, 0)
        assert all(one.cost for one in bench.submissions)
        assert bench.submissions[-1].program == task.programs["expert"]
        assert [bench.cost(text) for text in task.wrong.values()] == [None] * len(task.wrong)
        assert bench.beside(task.programs["expert"]) > 0
        assert room.build_pairs(bench.submissions)


@pytest.mark.slow
def test_every_program_of_the_bank_is_what_it_says():
    for tool in ("g++", "valgrind"):
        needs(tool)
    sandbox, pairs = Sandbox(experiments.LIMITS), 0
    for problem in problems().values():
        bench = experiments.cpp_bench(problem, sandbox, 0)
        assert all(one.cost for one in bench.submissions), problem.id
        assert bench.cost(problem.wrong.program) is None, problem.id
        pairs += len(room.build_pairs(bench.submissions))
    assert pairs > 50
