"""What each rule does where it applies, where it must not, and that nothing else of a program changes."""

import ast
import contextlib
import copy
import io
import random
import sys
from functools import cache
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from assay.methods.core.programs.rewriting import RULES, edits, rewrite
from assay.workloads.programs.task import bank, cells

EXAMPLES = cells((Path(__file__).parent / "rewriting_examples.txt").read_text(encoding="utf-8"))
MODULES = ("bisect", "heapq", "textwrap", "shlex", "fnmatch", "colorsys", "string", "csv", "gettext")


def edited(program, rule):
    return [edit for edit in edits(program) if edit.rule == rule]


@pytest.mark.parametrize("rule", RULES)
def test_a_rule_makes_of_its_example_what_an_expert_would(rule):
    before, _, after = EXAMPLES[rule].partition("# becomes\n")
    found = edited(before.rstrip() + "\n", rule)
    assert [edit.program for edit in found] == [after.rstrip() + "\n"]
    assert found[0].why
    assert 1 <= found[0].line <= found[0].end_line <= len(before.splitlines())


@pytest.mark.parametrize("name", [name for name in EXAMPLES if name.startswith("none: ")])
def test_a_rule_leaves_what_it_cannot_know(name):
    rule = name.removeprefix("none: ").split(",")[0]
    assert rule in RULES
    assert not edited(EXAMPLES[name], rule)


def test_what_is_not_edited_stays_as_it_was_written():
    program = (
        '"""Words."""\n# first\nfrom __future__ import annotations\n\n\ndef f(xs: list[int],   ys: list[int]):  # odd blanks\n'
        "\tout = 0\n\tfor x in xs:  # each\n\t\tif x in ys:  # there\n\t\t\tout += 1\n\treturn (out)\n"
    )
    (edit,) = edited(program, "list-membership")
    kept = [line for line in edit.program.splitlines() if "ys_set" not in line]
    assert kept == [line for line in program.splitlines() if "x in ys:" not in line]
    assert "\t\tif x in ys_set:  # there" in edit.program
    (counted,) = edited(program.replace("x in ys", "xs.count(x) > 1"), "count-in-loop")
    assert counted.program.splitlines()[3] == "from collections import Counter"
    windows = program.replace("\n", "\r\n")
    assert edited(windows, "list-membership")[0].program.count("\r\n") == windows.count("\r\n") + 1


def test_rewrite_asks_once_for_each_program():
    program = "def f(xs: list[int]):\n    return set(list(xs)), sorted(list(xs)), len(list(xs))\n"
    assert rewrite(program) == "def f(xs: list[int]):\n    return set(xs), sorted(xs), len(xs)\n"
    asked = []
    assert rewrite(program, accept=lambda edit: bool(asked.append(edit.program))) == program
    assert len(asked) == len(set(asked)) == 3
    assert rewrite(program, rules=["range-len"]) == program


def test_observed_arguments_stand_in_for_annotations():
    program = "def f(xs, ys=()):\n    return [x for x in xs if x in ys]\n"
    assert not edits(program)
    assert [edit.rule for edit in edits(program, observed={"f": [([1], [2]), ([], [3])]})] == ["list-membership"]
    assert not edits(program, observed={"f": [([[1]], [[2]])]})  # lists cannot be hashed


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="program must be Python"):
        edits("def (")
    with pytest.raises(ValueError, match="program must be Python"):
        edits("return 1")
    with pytest.raises(ValueError, match="rules must be one of"):
        edits("", rules=["faster"])
    assert edits("") == []
    assert edits("def f(xs: list[int]):\n    return eval('xs'), list(sorted(xs))\n") == []


@cache
def programs():
    """Every right program of the bank with its task."""
    return [(task, name) for task in bank().values() for name in task.programs]


def outcome(program, entry, args):
    scope = {"__name__": "program"}
    exec(compile(program, "<program>", "exec"), scope)
    args, out = copy.deepcopy(args), io.StringIO()
    with contextlib.redirect_stdout(out):
        try:
            value = repr(scope[entry](*args))
        except Exception as error:  # noqa: BLE001 - whatever a program raises is its behaviour
            value = type(error)
    return value, repr(args), out.getvalue()


@settings(max_examples=40, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_edits_of_the_bank_give_the_same_answers(data):
    task, name = data.draw(st.sampled_from(programs()))
    cases = [task.arguments(0, number, data.draw(st.integers(0, 99))) for number in range(4)]
    program = task.programs[name]
    found = edits(program, observed={task.entry_point: cases})
    if found:
        wanted = [outcome(program, task.entry_point, args) for args in cases]
    for edit in found:
        assert [outcome(edit.program, task.entry_point, args) for args in cases] == wanted, edit


@pytest.mark.slow
def test_all_edits_of_the_whole_bank_give_the_same_answers():
    for task, name in programs():
        program, cases = task.programs[name], [task.arguments(0, number) for number in range(12)]
        wanted = [outcome(program, task.entry_point, args) for args in cases]
        for seen in (None, {task.entry_point: cases}):
            versions = [edit.program for edit in edits(program, observed=seen)] + [rewrite(program, observed=seen)]
            for version in versions:
                assert [outcome(version, task.entry_point, args) for args in cases] == wanted, version


@pytest.mark.parametrize("module", MODULES)
def test_edits_of_the_standard_library_parse(module):
    source = Path(sys.modules.get(module, __import__(module)).__file__).read_text(encoding="utf-8")
    for edit in edits(source):
        ast.parse(edit.program)
        assert edit.rule in RULES
        assert edit.program != source


def test_counting_by_a_set_beside_a_list_is_right_for_any_numbers():
    program = EXAMPLES["growing-membership"].partition("# becomes\n")[0]
    new = edited(program, "growing-membership")[0].program
    chance = random.Random(0)
    for _ in range(50):
        args = ([chance.randint(-3, 3) for _ in range(chance.randint(0, 12))],)
        assert outcome(program, "f", args) == outcome(new, "f", args)
