"""An attempt: a candidate is built, must answer as the reference does, and only then is timed against it."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import cached_property
from typing import Literal

from assay.methods.code.llm_library_optimization.backends import (
    Answer,
    Backend,
    BuildError,
    Program,
    RunError,
    processor,
)
from assay.methods.code.llm_library_optimization.case import Args, Candidate, Case, Input, patch_between, same
from assay.methods.code.llm_library_optimization.timing import (
    PROTOCOL,
    Compared,
    Energy,
    Measurement,
    Rules,
    energy,
    in_turns,
    quiet,
)

State = Literal["does not build", "wrong", "faster", "slower", "no change"]
"""What came of an attempt. Only "faster" is accepted; the first two have no times."""


@dataclass(frozen=True)
class Gate:
    """Whether a candidate answers as the reference does, on how many inputs that was seen, and the first difference with its kind."""

    passed: bool
    checked: int
    why: str = ""
    kind: str = ""
    sanitizers: str = ""


@dataclass(frozen=True)
class Attempt:
    """A candidate and what came of it, with all that its figures depend on: the digests of case and candidate, and the environment.

    `changed` is what it changed in its parent, as a unified diff. `slower_on` are kinds of inputs that it is slower on, if it was timed.
    """

    case: str
    case_digest: str
    candidate: Candidate
    environment: Mapping[str, str]
    state: State
    gate: Gate
    compared: Compared | None = None
    energy: Mapping[str, Energy] = field(default_factory=dict)
    changed: str = ""
    at: str = ""

    @property
    def accepted(self) -> bool:
        """Right, and faster by more than the least gain on the kind that decides."""
        return self.state == "faster"


class Bench:
    """Takes attempts at a case on a backend. `attempts` are all of them, failures included; a `Ledger` keeps them in a file.

    The reference is built, and its answers are taken, when they are first needed. Raises BuildError then if it does not build, and
    ValueError where sanitizers find fault with it, or it has no answer: it meets a limit, crashes, or returns no plain value in the
    sandbox.

    >>> from assay.methods.code.llm_library_optimization import PythonHere
    >>> loop = Candidate("a loop", "def f(n): return sum(range(n))")
    >>> bench = Bench(Case("sums", "f(n) is 0 + 1 + ... + (n - 1)", loop, (Input("100", "any", (100,)),), "any"), PythonHere("f"))
    >>> bench.gate(Candidate("a formula", "def f(n): return n * (n - 1) // 2")).passed
    True
    >>> bench.gate(Candidate("a slip", "def f(n): return n * (n + 1) // 2")).why
    'on 100: it gave 5050, not 4950'
    """

    def __init__(self, case: Case, backend: Backend, rules: Rules = PROTOCOL) -> None:
        self.case, self.backend, self.rules = case, backend, rules
        self.attempts: list[Attempt] = []

    @cached_property
    def inputs(self) -> tuple[Input, ...]:
        """All inputs of the gate: the recorded ones, then those drawn at random."""
        return (*self.case.inputs, *self.case.drawn())

    @cached_property
    def reference(self) -> Program:
        """The reference, built."""
        return self.backend.build(self.case.reference)

    @cached_property
    def wanted(self) -> list[Answer]:
        """What the reference answers."""
        if fault := self.reference.faults([self.case.arguments(one) for one in self.inputs]):
            raise ValueError(f"the reference of {self.case.name!r} is at fault itself: {fault}")
        found = self.reference.answers([self.case.arguments(one) for one in self.inputs])
        for one, answer in zip(self.inputs, found, strict=True):
            if answer.broke:
                raise ValueError(f"the reference of {self.case.name!r} must answer on {one.name}, but: {answer.error}")
        return found

    @cached_property
    def environment(self) -> dict[str, str]:
        """What the figures depend on beside the program."""
        return {"system": platform.platform(), "processor": processor(), **self.backend.facts()}

    def attempt(self, candidate: Candidate) -> Attempt:
        """Build, compare, and, if it is right, time. Raises ValueError for a model's candidate on a backend that does not protect."""
        if candidate.origin == "model" and not self.backend.protected:
            raise ValueError("origin must be human or tool here: a model's programs run in the sandbox only")
        about = Attempt(
            self.case.name, self.case.digest, candidate, self.environment, "does not build", Gate(False, 0),
            changed=self._changed(candidate), at=datetime.now(UTC).isoformat(timespec="seconds"),
        )  # fmt: skip
        wanted = self.wanted  # before anything is tried: a reference that does not work is no candidate's fault
        try:
            program = self.backend.build(candidate)
            gate = self._gate(program, wanted)
        except BuildError as error:  # for the sanitizers it is built another time
            return self._kept(replace(about, gate=Gate(False, 0, str(error))))
        if not gate.passed:
            return self._kept(replace(about, state="wrong", gate=gate))
        try:
            compared, used = self._timed(program)
        except RunError as error:
            return self._kept(replace(about, state="wrong", gate=replace(gate, passed=False, why=str(error))))
        return self._kept(replace(about, state=compared.found, gate=gate, compared=compared, energy=used))

    def _changed(self, candidate: Candidate) -> str:
        known = {self.case.reference.digest: self.case.reference}
        known |= {one.candidate.digest: one.candidate for one in self.attempts}
        if candidate.parent and candidate.parent not in known:
            raise ValueError(f"parent must be the digest of a candidate that was tried, got {candidate.parent!r}")
        return patch_between(known[candidate.parent or self.case.reference.digest], candidate)

    def _kept(self, attempt: Attempt) -> Attempt:
        self.attempts.append(attempt)
        return attempt

    def gate(self, candidate: Candidate) -> Gate:
        """The gate alone. Raises BuildError for a candidate that does not build."""
        return self._gate(self.backend.build(candidate), self.wanted)

    def _gate(self, program: Program, wanted: list[Answer]) -> Gate:
        got = program.answers([self.case.arguments(one) for one in self.inputs])
        for number, (one, expected, found) in enumerate(zip(self.inputs, wanted, got, strict=True)):
            if why := _difference(expected, found, self.case.tolerance):
                return Gate(False, number + 1, f"on {one.name}: {why}", one.kind)
        fault = program.faults([self.case.arguments(one) for one in self.inputs])
        return Gate(not fault, len(self.inputs), fault, "", self.backend.sanitizers)

    def _timed(self, program: Program) -> tuple[Compared, dict[str, Energy]]:
        found: list[Measurement] = []
        used: dict[str, Energy] = {}
        with quiet():
            for one in self.case.inputs:
                mine, its = self.case.arguments(one), self.case.arguments(one)
                calls, reference, candidate = in_turns(
                    lambda n, args=mine: self._reference_seconds(args, n),  # type: ignore[misc]
                    lambda n, args=its: program.seconds(args, n),  # type: ignore[misc]
                    self.rules,
                )
                found.append(Measurement(one.name, one.kind, calls, tuple(reference), tuple(candidate)))
                if one.kind == self.case.decides and not used:
                    used = {
                        "reference": energy(lambda n, args=mine: self._reference_seconds(args, n), calls, self.rules),  # type: ignore[misc]
                        "candidate": energy(lambda n, args=its: program.seconds(args, n), calls, self.rules),  # type: ignore[misc]
                    }
        return Compared(tuple(found), self.case.decides, self.rules), used

    def _reference_seconds(self, args: Args, calls: int) -> float:
        try:
            return self.reference.seconds(args, calls)
        except RunError as error:  # no candidate's fault
            raise ValueError(f"the reference of {self.case.name!r} cannot be timed: {error}") from None


def _difference(wanted: Answer, got: Answer, tolerance: float | None) -> str:
    """How an answer differs from what was wanted; "" if it does not. Errors are compared by type and text."""
    from assay.checks import shown

    if got.broke or wanted.error != got.error:
        return f"{got.error or 'it returned'}, not {wanted.error or shown(wanted.value)}"
    if not same(wanted.value, got.value, tolerance):
        return f"it gave {shown(got.value)}, not {shown(wanted.value)}"
    if wanted.left != got.left:
        return "it leaves its arguments otherwise than the reference does"
    return ""
