import pytest

from assay.methods.core.programs.judging import judge, measure_all, observed_cases
from assay.methods.core.programs.workers import Outcome, Workers
from assay.methods.core.sandbox import Limits
from assay.workloads.programs.compare import same


def test_the_first_reason_is_told():
    assert judge([1, 2], [Outcome("returned", 1), Outcome("returned", 2)], same).right
    wrong = judge([1, 2, 3], [Outcome("returned", 1), Outcome("returned", 5), Outcome("time")], same)
    assert (wrong.right, wrong.case) == (False, 1)
    assert "gave 5, not 2" in wrong.why
    assert "ran out of time" in judge([1], [Outcome("time", error="1 s")], same).why
    odd = judge([[1]], [Outcome("returned", 3)], lambda a, b: len(a) == len(b))
    assert "cannot be compared" in odd.why
    with pytest.raises(ValueError, match="for each of the 1 outcomes"):
        judge([], [Outcome("returned", 1)], same)


def test_cases_are_read_off_a_test_before_the_program_changes_them():
    program = "def f(x, n=0):\n    x.sort()\n    return x"
    test = "def check(candidate):\n    assert candidate([2, 1]) == [1, 2]\n    for n in range(2):\n        candidate([n], n)\n"
    with Workers() as workers:
        assert observed_cases(workers, program, "f", test) == [([2, 1],), ([0], 0), ([1], 1)]
        swaps = "def check(candidate):\n    globals()['f'] = candidate\n    assert f(n=1, x=[3]) == [3]\n"  # as MBPP's tests do
        assert observed_cases(workers, program, "f", swaps) == [([3], 1)]
        with pytest.raises(ValueError, match="must pass its own test"):
            observed_cases(workers, "def f(x): return 0", "f", test)


def test_programs_are_measured_in_turns(monkeypatch):
    order = []

    class Turns:
        def run(self, program, entry, cases, *, limits=None, **_):
            order.append((program, cases[0][0], limits))
            return [[Outcome("returned" if program != "b" or cases[0][0] else "time", cost=1.0)]]

    found = measure_all(
        Turns(), "f", {"x": "a", "y": "b", "z": "c"}, [(0,), (1,)], repeats=3, limits={"y": Limits(cpu_seconds=1)}
    )
    first = [entry[0] for entry in order[:6]]
    assert first == ["a", "b", "c", "a", "b", "c"]
    assert [entry[0] for entry in order[6:11]] == ["c", "a", "c", "b", "a"]
    assert [len(case) for case in found["y"]] == [1, 3]  # what failed is not run again
    assert {limits for program, _, limits in order if program == "b"} == {Limits(cpu_seconds=1)}
    assert {limits for program, _, limits in order if program == "a"} == {None}
