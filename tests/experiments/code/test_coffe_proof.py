"""What COFFE's experiment says where its method is broken: contracts that say nothing, a world where nothing is inefficient."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
from tests.properties.sabotage import PAYS, record_of, verdict_of

from assay.evidence.types import Verdict
from assay.evidence.verdict import judge
from assay.experiments.code import coffe as room
from assay.experiments.code import coffe_inputs
from assay.experiments.code.coffe_inputs import (
    AGAIN,
    ARMS,
    CANONICAL,
    CONTRACTS,
    DEAREST,
    DELETED,
    DOUBLED,
    RANDOM,
    TESTS,
    WORST,
    Seen,
    agreement,
    inputs_of,
    is_valid,
    not_strict,
    seen_of,
    separation,
    valid_share,
)
from assay.methods.code.coffe import Contracts
from assay.methods.core.programs.judging import observed_cases
from assay.methods.core.programs.workers import Workers
from assay.methods.core.sandbox import protections
from assay.workloads.programs.task import Task

CLAIM = "coffe/efficient-at-1"
POINT = room.POINTS["smoke"][0]
ALL = (*ARMS, DEAREST, TESTS, WORST)


def task_seen(
    number: int, *, slower: int = 6, faster: int = 2, wrong: int = 2, valid: dict[str, float] | None = None
) -> Seen:
    """A task of `slower` and `faster` right programs than the canonical one, and wrong ones; shares of valid inputs by arm."""
    shares = {CONTRACTS: 1.0, DELETED: 0.5, RANDOM: 0.4, DOUBLED: 0.7, **(valid or {})}
    costs = {
        CANONICAL: 1.0,
        **{f"slow {n}": 2.0 + n for n in range(slower)},
        **{f"fast {n}": 0.5 for n in range(faster)},
    }
    scale = {CONTRACTS: 1.0, DELETED: 1.0, RANDOM: 0.5, DOUBLED: 0.7, DEAREST: 1.1, TESTS: -0.1, WORST: 1.2}
    measured = {**costs, AGAIN: 1.1 if number % 2 else 0.9}
    by_arm = {arm: {name: [0.01 * cost ** scale[arm]] * 3 for name, cost in measured.items()} for arm in ALL}
    return Seen(
        f"task {number}",
        ("len(xs) > 0",),
        {arm: [n < round(share * 20) for n in range(20)] for arm, share in shares.items()},
        {arm: [shares.get(arm, 1.0)] * 3 for arm in ALL},
        dict.fromkeys(ARMS, 30),
        by_arm,
        frozenset(costs),
        (*costs, *(f"wrong: {n}" for n in range(wrong))),
        (40, 2, 20, 3),
        dict.fromkeys(ALL, 0.02),
        True,
    )  # fmt: skip


@pytest.fixture
def world(monkeypatch):
    def install(*tasks):
        monkeypatch.setattr(room, "seen", lambda tasks_, **settings: list(tasks))

    monkeypatch.setattr(room, "seen", lambda tasks, **settings: [task_seen(n) for n in range(8)])
    return install


# ------------------------------------------------------------------------------------------------------------------- verdicts


def test_the_claim_holds_where_solutions_that_pass_are_slower_than_the_best_known(world):
    record = record_of(CLAIM, POINT)
    assert judge(record).verdict is Verdict.DIRECTION_HOLDS
    assert record.measured.median == 1
    assert 0.5 < record.measured.low < 0.8  # eight tasks
    assert record.free == 0  # on the tests the best known ones cost more
    assert record.arms["the reference the solution itself"] == 0.5
    assert record.arms["the reference a right program at random"] == pytest.approx(0.25)
    others = record.details["programs_of_the_bank_against_humaneval_solutions"]
    assert others["pass_at_k"] == pytest.approx({"1": 0.8, "3": 1.0})
    assert others["efficient_at_k"]["1"] == pytest.approx(0.2)


def test_it_is_refuted_where_they_are_the_best_known(world):
    world(*[task_seen(n, faster=0) for n in range(12)])
    assert verdict_of(CLAIM, POINT) is Verdict.REFUTED


def test_it_pays_nothing_where_the_tests_of_humaneval_say_the_same(world):
    found = [task_seen(n) for n in range(12)]
    world(*[replace(one, costs={**one.costs, TESTS: one.costs[CONTRACTS]}) for one in found])
    assert verdict_of(CLAIM, POINT) not in PAYS


def test_contracts_that_let_invalid_inputs_through_show_nothing(world):
    world(*[task_seen(n, valid={CONTRACTS: 0.5}) for n in range(8)])
    assert verdict_of(CLAIM, POINT) not in PAYS


def test_inputs_that_are_valid_without_contracts_show_nothing_either(world):
    world(*[task_seen(n, valid={DELETED: 1.0}) for n in range(8)])
    assert verdict_of(CLAIM, POINT) is Verdict.QUALITY_NOT_SHOWN


# --------------------------------------------------------------------------------------------------------------------- figures


def test_the_figure_is_one_less_efficient_over_passed():
    found = [task_seen(0, slower=3, faster=1, wrong=4)]
    assert room.below(room.bank_problems(found)) == pytest.approx(0.75)
    assert room.below(room.problems(found)) == 1
    assert room.below(room.problems([task_seen(0, faster=0)])) == 0


def test_a_tie_with_the_best_is_below_by_the_strict_rule_only():
    one = task_seen(0, slower=1, faster=0)
    tied = replace(one, costs={**one.costs, CONTRACTS: {CANONICAL: [0.01], "slow 0": [0.01]}})
    assert room.below(room.problems([tied])) == 1
    assert room.below(room.problems([tied]), tolerance=1.01) == 0


def test_the_reference_is_chosen_by_other_inputs_than_those_that_judge():
    """Of two that cost the same the cheaper by the same runs would be the luckier one."""
    one = task_seen(0, slower=0, faster=2)
    lucky = {**one.costs[CONTRACTS], "fast 0": [0.012], "fast 1": [0.008], CANONICAL: [0.01]}
    judged = replace(one, costs={**one.costs, CONTRACTS: lucky})
    (first,) = room.problems([judged])
    assert (first.best, first.samples) == ([0.012], [[0.01]])
    assert room.below([first]) == 0
    assert room.problems([judged], chosen_on=CONTRACTS)[0].best == [0.008]
    assert room.problems([judged], without=("fast 0",))[0].best == [0.008]
    (worst,) = room.problems([replace(judged, costs={**judged.costs, WORST: {**lucky, "fast 1": [0.9]}})], WORST)
    assert worst.best == [0.9]
    assert room.problems([judged], without=("fast 0", "fast 1")) == []
    assert room.against_all([judged]) == 0.5


def test_the_solution_run_again_says_what_chance_does():
    again = room.against_itself([task_seen(n) for n in range(4)])
    assert [row.best[0] for row in again] == pytest.approx([0.009, 0.011, 0.009, 0.011])
    assert room.below(again) == 0.5
    assert room.below(again, tolerance=room.CLEARLY) == 0
    assert all(AGAIN not in room.others(task_seen(n), CONTRACTS) for n in range(2))


def test_separation_is_the_geometric_mean_over_pairs_that_truly_differ():
    one = task_seen(0, slower=1, faster=0)
    assert separation([one], WORST).ratio == pytest.approx(2**1.2)
    assert separation([one], TESTS).ratio == pytest.approx(2**-0.1)
    turned = replace(one, costs={**one.costs, CONTRACTS: {CANONICAL: [0.02], "slow 0": [0.01]}})
    assert separation([turned], CONTRACTS).ratio == pytest.approx(0.5)
    assert separation([turned], CONTRACTS).wrong_order == 1
    assert separation([task_seen(0, slower=0, faster=3)], CONTRACTS).pairs == 3  # equals are no pair


def test_who_was_cut_counts_as_the_dearest_that_ended():
    one = task_seen(0, slower=1, faster=0)
    cut = replace(one, costs={**one.costs, CONTRACTS: {CANONICAL: [0.1, 0.5], "slow 0": [float("inf")] * 2}})
    assert separation([cut], CONTRACTS).ratio == pytest.approx(1.0 / 0.6)
    assert room.problems([cut]) == []  # nobody is left to be compared with


def test_a_task_without_inputs_counts_as_none_valid_and_is_in_no_figure():
    none = replace(
        task_seen(0),
        valid={**task_seen(0).valid, CONTRACTS: []},
        costs={**task_seen(0).costs, CONTRACTS: {CANONICAL: []}},
    )
    assert valid_share([none, task_seen(1)], CONTRACTS) == 0.5
    assert len(room.problems([none, task_seen(1)])) == 1


def test_errors_of_mined_contracts_are_counted_both_ways():
    assert list(not_strict([task_seen(0)]).values()) == pytest.approx([2 / 3, 0.05, 0.15])
    assert agreement([task_seen(0)], RANDOM) == pytest.approx(0.4)


# ----------------------------------------------------------------------------------------------------------------- the real thing

GROUPS = """
def groups(text):
    found, depth, last = [], 0, 0
    for at, one in enumerate(text):
        depth += 1 if one == "(" else -1
        if depth == 0:
            found.append(text[last:at + 1])
            last = at + 1
    return found
"""
COUNTING = """
def groups(text):
    found, last = [], 0
    for at in range(len(text)):
        part = text[last:at + 1]
        if part.count("(") == part.count(")"):
            found.append(part)
            last = at + 1
    return found
"""
STACK = """
def groups(text):
    opened, found = [], []
    for at, one in enumerate(text):
        if one == "(":
            opened.append(at)
        else:
            first = opened.pop()
            if not opened:
                found.append(text[first:at + 1])
    return found
"""
SPLIT = "def groups(text):\n    return text.replace(')(', ') (').split()\n"
TASK = Task(
    "own/groups",
    "groups",
    programs={CANONICAL: GROUPS, "counting": COUNTING, "stack": STACK},
    wrong={"split": SPLIT},
    sizes=(6, 40, 80, 160),
    generator="def generate(size, rng):\n    n = rng.randint(1, size)\n    return ('(' * n + ')' * n + '()' * rng.randint(0, size),)\n",
    contract="def contract(text):\n    depth = 0\n    for one in text:\n        depth += 1 if one == '(' else -1\n"
    "        assert depth >= 0\n    assert depth == 0\n",
    test="def check(candidate):\n"
    + "".join(
        f"    assert candidate({text!r}) == {parts!r}\n"
        for text, parts in (
            ("()", ["()"]), ("(())()", ["(())", "()"]), ("()()()", ["()", "()", "()"]), ("((()))", ["((()))"]), ("(()())", ["(()())"]),
        )
    ),
)  # fmt: skip
SETTINGS = {"scale": 64, "seconds": 2.0, "repeats": 3, "level": 2, "meter": "operations", "wanted": 2, "rated": 6}


@pytest.mark.skipif(
    not protections().full and not os.environ.get("ASSAY_TEST_ALL"), reason="bubblewrap is not installed"
)
def test_on_a_real_task_contracts_keep_inputs_valid_and_without_them_right_programs_fail(monkeypatch):
    honest = seen_of(TASK, **SETTINGS)
    assert honest.right == {CANONICAL, "counting", "stack"}
    assert any("count('(')" in text for text in honest.contracts)
    assert all(honest.valid[CONTRACTS])
    assert not all(honest.valid[RANDOM])
    assert agreement([honest], CONTRACTS) == agreement([honest], WORST) == 1
    assert honest.costs[CONTRACTS][AGAIN] == honest.costs[CONTRACTS][CANONICAL]  # operations do not vary
    assert agreement([honest], RANDOM) < 1
    monkeypatch.setattr(coffe_inputs, "ARMS", {arm: ARMS[arm] for arm in (CONTRACTS, DELETED)})
    monkeypatch.setattr(coffe_inputs, "mine", lambda miner, program, *_, **__: Contracts(program, (), (), 0))
    with Workers(packages=False) as workers:
        seen = observed_cases(workers, GROUPS, "groups", TASK.test)
        broken = inputs_of(TASK, workers, seen, scale=64, wanted=6)
    assert broken.inputs[CONTRACTS] == broken.inputs[DELETED]
    assert not all(is_valid(TASK, args) for args in broken.inputs[CONTRACTS])
