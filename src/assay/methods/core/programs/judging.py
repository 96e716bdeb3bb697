"""Right or wrong, and what it costs: answers are compared here, outside of the sandbox, and programs are measured in turns."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from assay import checks
from assay.methods.core.programs.workers import Outcome, Workers
from assay.methods.core.sandbox import Limits

Compare = Callable[[Any, Any], bool]


@dataclass(frozen=True)
class Judged:
    """Whether a program is right on all cases, and the first reason why not: a case, and what happened."""

    right: bool
    why: str = ""
    case: int | None = None


def judge(expected: Sequence[Any], outcomes: Sequence[Outcome], compare: Compare) -> Judged:
    """Compare what a program returned with what was expected, case by case.

    A comparator that cannot stand an answer (a number where a list is expected) has found it wrong.

    >>> judge([1, 2], [Outcome("returned", 1), Outcome("raised", error="KeyError: 3")], lambda a, b: a == b).why
    'case 1 raised: KeyError: 3'
    """
    if len(expected) != len(outcomes):
        raise ValueError(f"expected must be one for each of the {len(outcomes)} outcomes, got {len(expected)}")
    for number, (wanted, outcome) in enumerate(zip(expected, outcomes, strict=True)):
        if outcome.state != "returned":
            return Judged(False, f"case {number} {_ended(outcome)}", number)
        try:
            right = compare(wanted, outcome.value)
        except (TypeError, ValueError, IndexError, KeyError, AttributeError, OverflowError, RecursionError) as error:
            return Judged(False, f"case {number} cannot be compared: {type(error).__name__}: {error}", number)
        if not right:
            return Judged(
                False, f"case {number} gave {checks.shown(outcome.value)}, not {checks.shown(wanted)}", number
            )
    return Judged(True)


def _ended(outcome: Outcome) -> str:
    words = {"raised": "raised", "time": "ran out of time", "memory": "ran out of memory", "crashed": "crashed"}
    return f"{words.get(outcome.state, 'is void')}: {outcome.error}"


def observed_cases(workers: Workers, program: str, entry_point: str, test: str) -> list[tuple[Any, ...]]:
    """The arguments that a test, a program with `check(candidate)`, calls a right program with, in order.

    With these a sample is judged by its values, outside: a test that runs beside a sample can be changed by it. Raises ValueError where
    the right program does not pass.
    """
    recorder = (
        f"{program}\n\n{test}\n\n"
        "import copy, inspect\n"
        "def _observed(copy=copy, inspect=inspect):\n"
        f"    right, calls = {entry_point}, []\n"  # a test may put the candidate under its name
        "    def candidate(*arguments, **keywords):\n"
        "        if keywords:\n"
        "            bound = inspect.signature(right).bind(*arguments, **keywords)\n"
        "            arguments, keywords = bound.args, bound.kwargs\n"
        "        if keywords:\n"
        "            raise TypeError('a test must not need names of arguments')\n"
        "        calls.append(copy.deepcopy(arguments))\n"
        "        return right(*arguments)\n"
        "    check(candidate)\n"
        "    return calls\n"
    )
    [[outcome]] = workers.run(recorder, "_observed", [()])
    if outcome.state != "returned":
        raise ValueError(f"the right program must pass its own test, but {entry_point} {_ended(outcome)}")
    return [tuple(call) for call in outcome.value]


def measure_all(
    workers: Workers,
    entry_point: str,
    programs: Mapping[str, str],
    cases: Sequence[Sequence[Any]],
    *,
    repeats: int = 6,
    limits: Mapping[str, Limits] | Limits | None = None,
) -> dict[str, list[list[Outcome]]]:
    """All programs on all cases, in turns: A B C, C B A, ...; outcomes by program, case and repeat.

    So that a machine which becomes slower does so for all. A program that did not return on a case is not run on it again. `limits` may be
    one for all, or by program.
    """
    checks.whole("repeats", repeats, low=1)
    found: dict[str, list[list[Outcome]]] = {name: [[] for _ in cases] for name in programs}
    for repeat in range(repeats):
        for number, case in enumerate(cases):
            for name in list(programs) if repeat % 2 == 0 else list(programs)[::-1]:
                seen = found[name][number]
                if seen and seen[-1].state != "returned":
                    continue
                its = limits.get(name) if isinstance(limits, Mapping) else limits
                seen.append(workers.run(programs[name], entry_point, [case], limits=its)[0][0])
    return found
