"""Contracts and stress inputs: what the two loops accept, what is mined without a model, and how a model's answers are read."""

from __future__ import annotations

import os
import random

import pytest
from coffe_here import run
from hypothesis import given, settings
from hypothesis import strategies as st

from assay.methods.code.coffe import (
    SEED,
    ByStrategy,
    ContractsByModel,
    Doubling,
    InputsByModel,
    ObservedContracts,
    StressInput,
    Unusable,
    accepting,
    as_function,
    asserts,
    candidates,
    evaluated,
    holds,
    mine,
    observed,
    parameters,
    passing,
    stress,
    stress_strategy,
    through,
    value_here,
    with_contract,
)
from assay.methods.core.programs.workers import Workers
from assay.methods.core.sandbox import Limits, protections

GROUPS = '''
def groups(text: str) -> int:
    """How many balanced groups stand side by side."""
    depth = found = 0
    for one in text:
        if one == " ":
            continue
        depth += 1 if one == "(" else -1
        found += depth == 0
    return found
'''
GROUPS_TEST = """
def check(candidate):
    assert candidate("() ((()))") == 2
    assert candidate("(()())") == 1
    assert candidate("() (()) ((()))") == 3
    assert candidate("") == 0
    assert candidate("()()()()") == 4
    assert candidate("(())(())") == 2
"""
SEARCH = """
def search(xs, wanted):
    low, high = 0, len(xs)
    while low < high:
        middle = (low + high) // 2
        if xs[middle] < wanted:
            low = middle + 1
        else:
            high = middle
    return low
"""
SEARCH_TEST = """
def check(candidate):
    assert candidate([1, 4, 6], 4) == 1
    assert candidate([-3, 2, 8, 9], 9) == 3
    assert candidate([2, 2, 5, 7, 9], 2) == 0
    assert candidate([0], 0) == 0
    assert candidate([1, 3, 5, 7, 9, 11], 11) == 5
"""
TABLE = [([[1, 2], [3, 4]], 2), ([[4, 3, 9], [1, 2, 8], [5, 6, 7]], 3), ([[2, 1], [4, 3]], 1), ([[3, 1], [2, 4]], 5)]


class Saying:
    """A miner that makes one prepared edit after another."""

    def __init__(self, *edits):
        self.edits = list(edits)
        self.seen = []

    def edit(self, code, examples):
        self.seen.append((code, examples))
        return self.edits.pop(0)(code) if self.edits else None


class Giving:
    """A generator that gives one prepared list of texts after another."""

    def __init__(self, *answers):
        self.answers = list(answers)
        self.seen = []

    def inputs(self, code, seeds, number):
        self.seen.append((code, list(seeds), number))
        given = self.answers.pop(0) if self.answers else []
        return [StressInput(text) for text in given]


def adding(*assertions):
    def edit(code):
        for text in assertions:
            code = with_contract(code, "groups", text)
        return code

    return edit


PASSES = passing(run, GROUPS_TEST, "groups")
SEEN = [("() ((()))",), ("(()())",), ("() (()) ((()))",), ("",), ("()()()()",), ("(())(())",)]
SEEDS = [observed(args) for args in SEEN]


# ------------------------------------------------------------------------------------------------------------------------- texts


def test_an_assert_goes_behind_the_docstring_and_earlier_asserts():
    text = with_contract(with_contract(GROUPS, "groups", "assert len(text) >= 0"), "groups", "assert text == text")
    lines = [line.strip() for line in text.splitlines()]
    assert lines[2:4] == ["assert len(text) >= 0", "assert text == text"]
    assert lines[1].startswith('"""How many')
    assert PASSES(text)


def test_the_function_that_stays_is_the_one_that_gets_the_assert():
    twice = "def f(a):\n    return 1\n\ndef f(b):\n    return 2"
    assert parameters(twice, "f") == ("b",)
    assert with_contract(twice, "f", "assert b").count("assert b") == 1


@pytest.mark.parametrize(
    "text",
    [
        "",
        "import os",
        "assert x; assert y",
        "x > 1",
        "assert",
        "assert x\nimport os",
        "\0",
        "(" * 9999,
        "assert " + "-" * 3000 + "x",
    ],
    ids=range(9),
)
def test_what_is_not_one_assert_is_unusable(text):
    with pytest.raises(Unusable):
        with_contract(GROUPS, "groups", text)


def test_a_missing_function_is_named():
    with pytest.raises(ValueError, match=r"define other\(\)"):
        with_contract(GROUPS, "other", "assert True")
    with pytest.raises(ValueError, match="must be Python"):
        parameters("def (", "f")


# --------------------------------------------------------------------------------------------------------------------- contracts


def test_every_accepted_contract_passes_all_tests_and_stays_in_the_code():
    miner = Saying(
        adding("assert set(text) <= set('() ')"),
        adding("assert len(text) > 3"),  # the tests have an empty text
        adding("assert text.count('(') == text.count(')')"),
    )
    found = mine(miner, GROUPS, PASSES, examples=SEEN)
    assert found.accepted == ("set(text) <= set('() ')", "text.count('(') == text.count(')')")
    assert found.refused == (("len(text) > 3", "a correctness test fails"),)
    assert found.calls == 4  # the last said that there is no more
    assert set(found.accepted) == set(asserts(found.code))
    assert PASSES(found.code)
    assert all(
        set(asserts(before)) <= set(asserts(after))
        for (before, _), (after, _) in zip(miner.seen, miner.seen[1:], strict=False)
    )


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (lambda code: GROUPS, "an earlier contract is gone"),
        (lambda code: code.replace("<=", "<"), "an earlier contract is gone"),
        (lambda code: code + "\n# checked", "nothing was added"),
        (lambda code: adding("assert not text or text.index('x')")(code), "a correctness test fails"),
        (
            lambda code: adding("assert text")(code).replace("return found", "return found + 1"),
            "a correctness test fails",
        ),
    ],
)
def test_an_edit_that_loses_or_breaks_something_is_refused(edit, reason):
    found = mine(Saying(adding("assert set(text) <= set('() ')"), edit), GROUPS, PASSES)
    assert found.accepted == ("set(text) <= set('() ')",)
    assert [why for _, why in found.refused] == [reason]


def test_an_assert_that_changes_its_arguments_is_refused():
    program = "def total(xs):\n    return sum(xs)"
    passes = passing(run, "def check(candidate):\n    assert candidate([1, 2]) == 3", "total")
    found = mine(Saying(lambda code: with_contract(code, "total", "assert xs.pop() > 0")), program, passes)
    assert found.accepted == ()


def test_the_budgets_are_four_contracts_and_twenty_calls():
    many = [adding(f"assert len(text) < {n}") for n in range(100, 140)]
    assert len(mine(Saying(*many), GROUPS, PASSES).accepted) == 4
    refused = mine(Saying(*[adding("assert False")] * 40), GROUPS, PASSES)
    assert (refused.calls, refused.accepted, refused.code) == (20, (), GROUPS)


def test_a_writer_sees_three_examples_and_a_program_must_pass_first():
    miner = Saying()
    mine(miner, GROUPS, PASSES, examples=SEEN)
    assert miner.seen[0][1] == SEEN[:3]
    with pytest.raises(ValueError, match="must pass"):
        mine(miner, GROUPS.replace("-1", "-2"), PASSES)


# ------------------------------------------------------------------------------------------------------------------- mined contracts

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-50, 50) | st.floats(-5, 5) | st.text("ab() 019", max_size=6),
    lambda inner: (
        st.lists(inner, max_size=4) | st.tuples(inner, inner) | st.dictionaries(st.text("ab", max_size=2), inner)
    ),
    max_leaves=8,
)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(VALUES, VALUES), min_size=1, max_size=8))
def test_every_candidate_holds_on_every_input_it_came_from(inputs):
    for one in candidates(inputs, ["first", "second"]):
        assert all(holds(one.text, ["first", "second"], args) for args in inputs), one


def texts(inputs, *names):
    return [one.text for one in candidates(inputs, names)]


def test_it_finds_sorted_lists_and_bounds_between_arguments():
    chance = random.Random(0)
    lists = [sorted(chance.sample(range(100), n)) for n in (1, 3, 4, 6, 7)]
    found = texts([(xs, len(xs) - 1) for xs in lists], "xs", "at")
    assert "sorted(xs) == list(xs)" in found
    assert "at < len(xs)" in found
    mixed = [chance.sample(range(100), n) for n in (1, 3, 4, 6, 7)]
    assert not any("sorted" in text for text in texts([(xs,) for xs in mixed], "xs"))


def test_it_finds_balanced_brackets_and_their_alphabet():
    found = texts(SEEN, "text")
    assert "set(text) <= set(' ()')" in found
    assert any("count('(')" in text for text in found)


def test_it_finds_square_tables_of_all_numbers_up_to_their_cells():
    found = texts(TABLE, "grid", "k")
    assert "all(len(grid) == len(v_) for v_ in grid)" in found
    assert any("range(1, sum(map(len, grid)) + 1)" in text for text in found)


def test_it_finds_words_lengths_and_membership():
    words = ["one two", "two", "two one one", "", "one", "two two"]
    assert any(text.startswith("set(words.split()) <=") for text in texts([(w,) for w in words], "words"))
    twins = [([n] * n, "x" * n, n) for n in (1, 2, 3, 5)]
    found = texts(twins, "xs", "text", "n")
    assert {"len(text) == len(xs)", "n == len(xs)", "n in xs"} <= {*found, "len(text) == len(xs)"}


def test_a_few_observations_prove_no_sign_and_sizes_are_never_bounded_from_above():
    assert texts([(3,), (8,)], "n") == ["type(n) is int"]
    assert "n >= 1" in texts([(n,) for n in (3, 8, 5, 1, 9)], "n")
    assert "n >= 0" in texts([(n,) for n in (3, 8, 5, 0, 9)], "n")
    for text in texts([([n] * n,) for n in (1, 2, 3, 4, 5, 6)], "xs"):
        assert holds(text, ["xs"], ([1] * 5000,)), text


def test_none_among_the_inputs_is_allowed_for():
    found = texts([(None,), ("ab",), ("ba",), ("abab",), ("b",)], "text")
    assert all(holds(text, ["text"], (None,)) for text in found)
    assert any("alphabet" for text in found if "set(text)" in text)


def test_mined_contracts_are_accepted_by_the_loop_and_refuse_what_is_invalid():
    found = mine(ObservedContracts(GROUPS, "groups", SEEN), GROUPS, PASSES, examples=SEEN)
    assert 1 <= len(found.accepted) <= 4
    assert PASSES(found.code)
    good, bad = run(found.code, "groups", [("(())" * 500,), ("))((",)])
    assert (good.state, bad.state) == ("returned", "raised")


def test_the_first_contract_is_the_one_that_rejects_the_most_probes():
    probes = [(")(",)] * 5 + [("ab",)]
    miner = ObservedContracts(GROUPS, "groups", SEEN, probes=probes)
    first = miner.edit(GROUPS, [])
    assert "count('(')" in next(iter(asserts(first)))
    second = miner.edit(first, [])
    assert "set(text) <= set(' ()')" in asserts(second)
    assert miner.edit(second, []) is None  # nothing is left to reject


def test_what_no_probe_breaks_is_not_asked_for():
    assert ObservedContracts(GROUPS, "groups", SEEN, probes=[("()",)]).edit(GROUPS, []) is None


# ----------------------------------------------------------------------------------------------------------------- stress inputs


def test_every_accepted_input_keeps_all_contracts():
    contracts = mine(ObservedContracts(GROUPS, "groups", SEEN), GROUPS, PASSES)
    found = stress(Doubling(SEEN, scale=400), contracts.code, SEEDS, accepting(run, contracts.code, "groups"))
    assert len(found.inputs) == 5
    for one in found.inputs:
        args = value_here(one)
        assert all(holds(text, ["text"], args) for text in contracts.accepted)
        assert len(args[0]) >= 100  # it is a stress input
    assert sum(found.refused.values()) > 0  # and others were proposed that do not keep them


def test_an_input_is_its_text_and_its_seed():
    one = StressInput("([random.random() for _ in range(5)], random.choice('abc'))")
    here = value_here(one)
    assert evaluated(run, [one, one]) == [here, here]
    assert value_here(StressInput(one.text, seed=SEED + 1)) != here
    a, b = Doubling(SEEN, seed=3), Doubling(SEEN, seed=3)
    assert [a.inputs("", SEEDS), a.inputs("", SEEDS)] == [b.inputs("", SEEDS), b.inputs("", SEEDS)]


def test_a_stress_input_costs_no_less_than_the_median_correctness_test():
    def cost(args):
        return float(len(args[0]))

    median = sorted(map(cost, SEEN))[len(SEEN) // 2]
    accepts = accepting(run, GROUPS, "groups", cost=cost, least=median)
    found = stress(Giving(["('()',)", "('()' * 50,)", "('(())' * 2,)"]), GROUPS, SEEDS, accepts)
    assert [value_here(one) for one in found.inputs] == [("()" * 50,), ("(())(())",)]
    assert found.refused == {"too cheap": 1}


def test_the_budget_is_three_calls_for_each_input_and_ten_inputs_a_call():
    generator = Giving()
    found = stress(generator, GROUPS, SEEDS, lambda inputs: ["no"] * len(inputs), wanted=4)
    assert (found.calls, found.inputs, found.proposed) == (12, (), 0)
    many = Giving([f"('()' * {n},)" for n in range(20, 60)])
    found = stress(many, GROUPS, SEEDS, lambda inputs: ["no"] * len(inputs), wanted=1)
    assert (found.proposed, found.refused) == (10, {"no": 10})
    assert all(len(seeds) == 5 and number == 10 for _, seeds, number in generator.seen)


def test_accepted_inputs_join_the_pool_and_what_was_seen_is_passed_over():
    text = "('()' * 77,)"
    generator = Giving([text, text, repr(SEEN[0])], [text], ["('()' * 78,)"])
    found = stress(generator, GROUPS, SEEDS[:1], accepting(run, GROUPS, "groups"), wanted=2)
    assert [one.text for one in found.inputs] == [text, "('()' * 78,)"]
    assert found.proposed == 2
    assert StressInput(text) in generator.seen[1][1]


def test_reasons_are_told_apart():
    code = with_contract(GROUPS, "groups", "assert set(text) <= set('() ')")
    accepts = accepting(run, code, "groups")
    assert accepts([StressInput(t) for t in ("('(',)", "('x',)", "(1 / 0,)", "()", "(")]) == [
        "",
        "a contract or the program refused it",
        "the text has no value",
        "a contract or the program refused it",
        "the text has no value",
    ]
    assert accepts([]) == []


@pytest.mark.skipif(
    not protections().full and not os.environ.get("ASSAY_TEST_ALL"), reason="bubblewrap is not installed"
)
def test_in_a_real_sandbox_inputs_evaluate_to_the_same_and_a_limit_is_a_reason():
    proposals = Doubling(SEEN, scale=50).proposals(4)
    code = with_contract(GROUPS, "groups", "assert set(text) <= set('() ')")
    endless = StressInput("(' ' * (10 ** 8),)")
    limits = Limits(cpu_seconds=1, wall_seconds=20, memory_mib=200)
    with Workers(limits=limits, packages=False) as workers:
        sandboxed = through(workers)
        assert evaluated(sandboxed, proposals) == [value_here(one) for one in proposals]
        assert passing(sandboxed, GROUPS_TEST, "groups")(code)
        told = accepting(sandboxed, code, "groups")([StressInput("('()',)"), StressInput("('x',)"), endless])
    assert told[:2] == ["", "a contract or the program refused it"]
    assert told[2] in ("memory", "time", "the text has no value", "crashed")


# --------------------------------------------------------------------------------------------------------------------- doubling


def test_sizes_double_and_stay_within_the_scale():
    generator = Doubling([([3, 1, 2],)], scale=1000, manners=["repeated"])
    sizes = [len(value_here(generator.inputs("", [], 1)[0])[0]) for _ in range(7)]
    assert sizes == [768, 384, 192, 96, 48, 24, 768]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([16, 200, 3000]))
def test_every_text_evaluates_to_arguments_of_the_observed_types(seed, scale):
    inputs = [
        ([1, -2], "a b", 3, 0.5, [[1, 2], [3, 4]], {"k": [1]}, (1, "x"), None, True, [], ["ab", ""]),
        ([7], "", 0, -1.5, [[5]], {}, (2, "y"), "z", False, [], ["c"]),
    ]
    for one in Doubling(inputs, scale=scale, seed=seed).proposals(4):
        args = value_here(one)
        assert [type(value) for value in args[:7]] == [list, str, int, float, list, dict, tuple]
        assert len(args[0]) <= 2 * scale
        assert all(type(row) is list for row in args[4])
        assert all(type(word) is str for word in args[10])


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(VALUES, VALUES), min_size=1, max_size=4), st.integers(0, 99))
def test_whatever_was_observed_is_grown_into_something_that_evaluates(inputs, seed):
    for one in Doubling(inputs, scale=16, seed=seed).proposals(4):
        assert len(value_here(one)) == 2
        assert value_here(one) == value_here(one)


@pytest.mark.parametrize(
    ("manner", "holds_of"),
    [
        ("repeated", lambda xs: xs[:3] == xs[3:6] == [3, 1, 2]),
        ("sorted", lambda xs: xs == sorted(xs)),
        ("reversed", lambda xs: xs == sorted(xs, reverse=True)),
        ("alike", lambda xs: set(xs) == {3}),
        ("shuffled", lambda xs: sorted(xs) == list(range(1, len(xs) + 1))),
        ("random", lambda xs: set(xs) <= {1, 2, 3}),
        ("wide", lambda xs: max(xs) > 3),
    ],
)
def test_a_manner_fills_as_it_says(manner, holds_of):
    (args,) = [value_here(Doubling([([3, 1, 2],)]).grown(([3, 1, 2],), doublings=5, manner=manner))]
    assert len(args[0]) == 96
    assert holds_of(args[0])


def test_tables_stay_square_where_they_were():
    generator = Doubling(TABLE, scale=200, manners=["shuffled", "random"])
    for one in generator.proposals(10):
        grid = value_here(one)[0]
        assert all(len(row) == len(grid) for row in grid)


def test_a_strategy_is_filtered_by_the_contracts_and_its_draws_are_inputs():
    strategy = stress_strategy(SEEN, scale=64, keeps=lambda args: args[0].count("(") == args[0].count(")"))
    generator = ByStrategy(strategy, seed=1)
    drawn = generator.inputs("", [], 5)
    assert drawn
    assert all(value_here(one)[0].count("(") == value_here(one)[0].count(")") for one in drawn)
    assert ByStrategy(strategy, seed=1).inputs("", [], 5) == drawn
    found = stress(ByStrategy(strategy), GROUPS, SEEDS, accepting(run, GROUPS, "groups"), wanted=2)
    assert len(found.inputs) == 2


def test_a_strategy_whose_filter_lets_nothing_through_costs_calls_and_no_more():
    def nothing(args):
        return False

    never = ByStrategy(st.just(SEEN[0]).filter(nothing))
    found = stress(never, GROUPS, SEEDS, accepting(run, GROUPS, "groups"), wanted=1, calls=2)
    assert (found.inputs, found.calls, found.refused) == ((), 2, {"no input in the answer": 2})


# ------------------------------------------------------------------------------------------------------------------------ by a model


def test_a_model_writes_contracts_and_a_bad_answer_costs_a_call():
    answers = iter(
        [
            "I think so.",
            "```python\nassert set(text) <= set('() ')\n```",
            "assert len(text) % 2 == 0  # pairs",
            "```\nimport os\n```",
        ]
    )
    asked = []

    def chat(prompt):
        asked.append(prompt)
        return next(answers, "assert True")

    found = mine(ContractsByModel(chat, "Count groups.", "groups"), GROUPS, PASSES, examples=SEEN, target=3)
    assert found.accepted[0] == "set(text) <= set('() ')"
    assert len(found.refused) == 3  # two are no assert, one fails on "() ((()))"
    assert "Count groups." in asked[0]
    assert repr(SEEN[2]) in asked[0]
    assert repr(SEEN[3]) not in asked[0]
    assert "set(text) <= set('() ')" in asked[2]  # the contracts so far


def test_a_model_writes_inputs_as_expressions():
    answers = iter(["no", '{"input1": "(\'()\' * 999,)", "input2": 7, "input3": "(("}', "[1]", '{"a": ""}'])
    generator = InputsByModel(lambda prompt: next(answers))
    found = stress(generator, GROUPS, SEEDS, accepting(run, GROUPS, "groups"), wanted=2, calls=4)
    assert [one.text for one in found.inputs] == ["('()' * 999,)"]
    assert found.refused == {"no input in the answer": 3}


def test_the_file_level_edits_a_program_and_generates_stdin():
    program = "n = int(input())\nprint(sum(range(n)))"
    passes = lambda text: [one.value for one in run(as_function(text), "main", [("4",), ("0",)])] == ["6\n", "0\n"]  # noqa: E731
    edits = iter(
        [
            "```python\nn = int(input())\nassert n >= 0\nprint(sum(range(n)))\n```",
            "n = int(input())\nassert n >= 0\nassert n > 0\nprint(sum(range(n)))",
            "n = int(",
            "n = int(input())\nassert n < 10 ** 6\nprint(sum(range(n)))",
        ]
    )
    found = mine(ContractsByModel(lambda _: next(edits), "Sum.", level="file"), program, passes, calls=4)
    assert found.accepted == ("n >= 0",)
    assert [why for _, why in found.refused][0] == "a correctness test fails"
    assert [why for _, why in found.refused][2] == "an earlier contract is gone"
    answers = iter(
        [
            "def other(): return 1",
            "import random\ndef generate_input():\n    return str(random.randint(50, 99))",
            "def generate_input(): return '-1'",
        ]
    )
    generator = InputsByModel(lambda _: next(answers), level="file")
    code = as_function(found.code)
    found = stress(generator, code, [observed(("4",))], accepting(run, code, "main"), wanted=2, calls=3, shown=10)
    (one,) = found.inputs
    assert evaluated(run, [one]) == evaluated(run, [one])
    assert 50 <= int(evaluated(run, [one])[0][0]) <= 99
    assert found.refused == {"no input in the answer": 1, "a contract or the program refused it": 1}


def test_a_program_of_the_file_level_may_use_buffers_and_exit():
    texts = (
        "import sys\nsys.stdout.write(sys.stdin.readline().upper())\nsys.exit()",
        "import sys\nsys.stdout.buffer.write(sys.stdin.buffer.readline().upper())\nexit(0)",
        "print(input().upper())",
    )
    for text in texts:
        (ended,) = run(as_function(text), "main", [("a\u00e9\nb\n",)])
        assert (ended.state, ended.value.strip()) == ("returned", "AÉ" if "buffer" not in text else "Aé")
    with pytest.raises(SystemExit):
        run(as_function("import sys\nsys.exit(3)"), "main", [("",)])


# -------------------------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mine(Saying(), GROUPS, PASSES, target=0), "target must be"),
        (lambda: stress(Giving(), GROUPS, [], lambda _: []), "seeds must hold"),
        (lambda: stress(Giving(), GROUPS, SEEDS, lambda _: [], wanted=0), "wanted must be"),
        (lambda: Doubling([]), "observed_inputs must hold"),
        (lambda: Doubling(SEEN, scale=0), "scale must be"),
        (lambda: Doubling(SEEN, manners=["quadrupled"]), "manners must be one of"),
        (lambda: candidates([], ["x"]), "inputs must hold"),
        (lambda: candidates([(1, 2)], ["x"]), "1 arguments"),
        (lambda: ContractsByModel(str, "x"), "entry_point must name"),
        (lambda: InputsByModel(str, level="line"), "level must be one of"),
        (lambda: value_here(StressInput("x = 1", form="program")), "must be an expression"),
    ],
)
def test_what_is_wrong_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
