"""Rules that make Python programs faster without changing what they mean: pure work on syntax trees, which runs nothing.

    for edit in edits(program):
        print(edit.line, edit.rule, edit.why)

A rule applies only where, as far as the syntax shows, the program gives the same values, raises the same types of exceptions and
changes the same things. Syntax does not show everything: annotations are believed, and operators of classes are taken to change nothing.
Whoever uses an edit tests it, and measures whether it pays. What an edit does not touch stays as it was written.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from assay import checks
from assay.methods.core.programs.rewriting import on_containers, on_expressions, on_functions, on_loops, on_membership
from assay.methods.core.programs.rewriting.text import Change
from assay.methods.core.programs.rewriting.view import Rule, View

_RULES: dict[str, Rule] = {
    "list-membership": on_membership.list_membership,
    "growing-membership": on_membership.growing_membership,
    "constant-membership": on_expressions.constant_membership,
    "copied-membership": on_expressions.keys_membership,
    "count-in-loop": on_membership.count_in_loop,
    "nested-join": on_membership.nested_join,
    "string-concatenation": on_containers.string_concatenation,
    "list-concatenation": on_containers.list_concatenation,
    "pop-front": on_containers.pop_front,
    "append-loop": on_containers.append_loop,
    "sort-in-loop": on_loops.sort_in_loop,
    "invariant-call": on_loops.invariant_call,
    "prefix-fold": on_loops.prefix_fold,
    "range-len": on_loops.range_len,
    "early-exit": on_loops.early_exit,
    "global-in-loop": on_loops.global_in_loop,
    "recursion-without-memo": on_functions.recursion_without_memo,
    "first-of-sorted": on_expressions.first_of_sorted,
    "double-copy": on_expressions.double_copy,
    "list-argument": on_expressions.list_argument,
    "generator-argument": on_expressions.generator_argument,
    "count-of-equals": on_expressions.count_of_equals,
    "copied-iterable": on_expressions.copied_iterable,
}
RULES: tuple[str, ...] = tuple(_RULES)
"""The names of all rules."""
MOST = 200
"""Edits that `rewrite` makes at most."""


@dataclass(frozen=True)
class Edit:
    """One place where a rule applies: its lines (from 1, an import at the head aside), the whole program after it, and a reason."""

    rule: str
    line: int
    end_line: int
    program: str
    why: str


Observed = Mapping[str, Sequence[Sequence[Any]]]
"""Positional arguments that functions were called with, by the names of the functions."""


def edits(program: str, *, rules: Sequence[str] = RULES, observed: Observed | None = None) -> list[Edit]:
    """Every place where one of `rules` applies, each alone, in the order of lines.

    With `observed` the parameters of functions at the top level are taken to be what they were seen to be, where nothing else says so.

    Raises ValueError for a text that is no Python, and for a rule that is none of `RULES`. Programs that look at names while they run
    (`eval`, `globals()`, `from x import *`) have no edits.

    >>> [(one.rule, one.line) for one in edits("def f(xs: list[int]):\\n    return min(sorted(xs))")]
    [('double-copy', 2)]
    """
    for rule in rules:
        checks.choice("rules", rule, RULES)
    view = View(program, observed)
    if view.source.dynamic:
        return []
    found = []
    for name in dict.fromkeys(rules):
        for change in _RULES[name](view):
            edit = _edit(view, name, change)
            if edit is not None:
                found.append(edit)
    return sorted(found, key=lambda one: (one.line, one.end_line, RULES.index(one.rule)))


def rewrite(
    program: str,
    *,
    rules: Sequence[str] = RULES,
    accept: Callable[[Edit], bool] | None = None,
    observed: Observed | None = None,
) -> str:
    """The program after one edit after another, until no rule applies or none is accepted.

    `accept` is asked once for each different program that an edit gives; without it all are taken.

    >>> rewrite("def f(xs: list[int]):\\n    return sum(list(sorted(xs)))")
    'def f(xs: list[int]):\\n    return sum(xs)'
    """
    refused = {program}
    for _ in range(MOST):
        for edit in edits(program, rules=rules, observed=observed):
            if edit.program in refused:
                continue
            refused.add(edit.program)  # asked once
            if accept is None or accept(edit):
                program = edit.program
                break
        else:
            return program
    return program


def _edit(view: View, rule: str, change: Change) -> Edit | None:
    """None for what would not parse, and in f-strings: braces mean something else there, `=` shows the text, and places are not sure."""
    strings = [(view.source.start(node), view.source.end(node)) for node in view.source.strings]
    if any(start < at < end for at, _, _ in change.replacements for start, end in strings):
        return None
    after = view.source.applied(change)
    try:
        ast.parse(after)
    except SyntaxError:
        return None
    spans = [view.source.line_of(start) for start, _, _ in change.replacements]
    ends = [view.source.line_of(max(end - 1, start)) for start, end, _ in change.replacements]
    return None if after == view.source.program else Edit(rule, min(spans), max(ends), after, change.why)
