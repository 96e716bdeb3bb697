"""Programs of strangers: every call in a process of its own, judged by what comes out of the sandbox and by nothing else.

The observer and the coster of `behaviour` run in the module of the program that they look at, which a program could use: it could be right
where it is looked at and quick where it is costed. Here the run that is judged is the run that is costed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from assay import checks
from assay.codebench.behaviour import Call
from assay.codebench.variations import text
from assay.methods.core.programs.workers import Outcome, Workers
from assay.methods.core.sandbox import Limits

ANSWER = """

def _assay_answer(*args, **kwargs):
    return [{name}(*args, **kwargs), args, kwargs]
"""
"""What it returns and what its arguments hold afterwards; no name is looked up but the function's own."""
SLOWER, SECONDS = 5.0, 1.0
"""A call that takes longer than so many times what it took before, and this beside, is not waited for."""


class Outside:
    """Judges versions of a program against the program as it was, `original`, which is believed."""

    def __init__(self, original: str, workers: Workers, limits: Limits) -> None:
        self.original, self.workers, self.limits = original, workers, limits
        self._known: dict[str, Outcome] = {}

    def blind(self, groups: Mapping[str, Sequence[Call]]) -> str:
        """A function that answers with what is no plain value, which cannot be compared here; "" where there is none."""
        calls = (call for group in groups.values() for call in group)
        return next((call.function for call in calls if self._wanted(call).state != "returned"), "")

    def wrong(self, program: str, call: Call) -> str:
        """How a version answers a call otherwise, "" where it does not: another value, other arguments afterwards, another exception."""
        return self._judged(program, call)[1]

    def cost(self, program: str, calls: Sequence[Call]) -> float | None:
        """What calls cost together; None where one of them is answered otherwise."""
        found = 0.0
        for call in calls:
            outcome, wrong = self._judged(program, call)
            if wrong or outcome.cost is None:
                return None
            found += outcome.cost
        return found

    def _judged(self, program: str, call: Call) -> tuple[Outcome, str]:
        wanted = self._wanted(call)
        most = min(self.limits.cpu_seconds, SECONDS + SLOWER * (wanted.cost or 0.0))
        got = self._run(program, call, replace(self.limits, cpu_seconds=most))
        return got, _difference(call, wanted, got)

    def _wanted(self, call: Call) -> Outcome:
        key = text(call)
        if key not in self._known:
            self._known[key] = self._run(self.original, call, self.limits)
        return self._known[key]

    def _run(self, program: str, call: Call, limits: Limits) -> Outcome:
        whole = program.rstrip("\n") + "\n" + ANSWER.format(name=call.function)
        [[outcome]] = self.workers.run(whole, "_assay_answer", [call.args], keywords=[dict(call.kwargs)], limits=limits)
        return outcome


def _difference(call: Call, wanted: Outcome, got: Outcome) -> str:
    asked = f"{call.function}{checks.shown(call.args)}"
    if got.state != "returned":
        alike = got.state == wanted.state and got.error.partition(":")[0] == wanted.error.partition(":")[0]
        return "" if alike else f"{asked} ended by {got.state}: {got.error[:200]}"
    if wanted.state != "returned":
        return f"{asked} returned, where it ended by {wanted.error[:200]}"
    if exactly(wanted.value, got.value):
        return ""
    if not isinstance(got.value, list) or len(got.value) != 3:
        return f"{asked} answered with something that is no answer"
    if not exactly(wanted.value[0], got.value[0]):
        return f"{asked} returned {checks.shown(got.value[0])}, where it returned {checks.shown(wanted.value[0])}"
    return f"{asked} left its arguments as {checks.shown(got.value[1])}, where it left {checks.shown(wanted.value[1])}"


def exactly(one: Any, other: Any) -> bool:
    """Whether two plain values are the same in type, value and order; NaN is NaN, and 0.0 is not -0.0.

    >>> exactly([1, {2}], [1, {2}]), exactly(1, True), exactly({1: 2, 3: 4}, {3: 4, 1: 2})
    (True, False, False)
    """
    if type(one) is not type(other):
        return False
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(exactly, one, other))
    if isinstance(one, dict):
        return exactly(list(one.items()), list(other.items()))
    if isinstance(one, (set, frozenset)):
        return exactly(sorted(one, key=repr), sorted(other, key=repr))
    return repr(one) == repr(other) if isinstance(one, (float, complex)) else bool(one == other)
