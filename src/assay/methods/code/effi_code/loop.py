"""The self-optimisation loop: profile, ask for a revision, keep it only if it is right and costs less."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from assay import checks
from assay.methods.code.effi_code.profiling import Profile, ProfileError, Profiler
from assay.methods.core.programs.judging import judge, measure_all
from assay.methods.core.programs.workers import Outcome, Workers
from assay.methods.core.sandbox import Limits

ROUNDS = 5
"""Our reading of the released code's constant."""


@dataclass(frozen=True)
class Evaluated:
    """Whether a program is right, what it costs (infinite unless it is right), and the first reason why it is not."""

    right: bool
    cost: float
    why: str = ""

    def __post_init__(self) -> None:
        if self.right and not (self.cost >= 0 and math.isfinite(self.cost)):
            raise ValueError(f"cost of a right program must be a finite number of at least 0, got {self.cost}")
        if not self.right and self.cost != math.inf:
            raise ValueError(f"cost of a wrong program must be infinite: it has none, got {self.cost}")


Evaluate = Callable[[str], Evaluated]


@dataclass(frozen=True)
class Step:
    """One revision that was tried: in which round, its text, whether it was right, its cost, whether it was kept, and why not."""

    round: int
    program: str
    right: bool
    cost: float
    kept: bool
    why: str = ""


@dataclass(frozen=True)
class Request:
    """What a generator is asked: the task in words, the best program so far, its profile where there is one, and what was tried before."""

    task: str
    program: str
    profile: Profile | None
    tried: tuple[Step, ...] = ()


Generator = Callable[[Request], str | None]
"""From a request to a revised program; None where it has no further one, which ends the loop."""


@dataclass(frozen=True)
class Optimised:
    """What came of a program. `best` holds the best cost after 0, 1, ... rounds; `profiles` is how often one was taken."""

    initial: str
    program: str
    steps: tuple[Step, ...]
    best: tuple[float, ...]
    profiles: int

    @property
    def improved(self) -> bool:
        """Whether a revision was kept."""
        return any(step.kept for step in self.steps)

    @property
    def gain(self) -> float:
        """Share of the cost that was saved, by the costs that the loop saw: a choice among several, so measure anew to report it."""
        return 1 - self.best[-1] / self.best[0] if self.best[0] else 0.0


class SelfOptimize:
    """The paper's loop around a generator and a profiler.

    Every round the best program so far is profiled (once, until a better one is found), the generator is asked for one revision, and the
    revision is kept if it is right and costs less than (1 - `least_gain`) of the best. So the best cost never rises, and 0 rounds give
    the program that one began with. `profiler` None leaves the profile out; one that raises ProfileError gives none for that program.
    A revision that was tried before uses up its round and is not run again.

    Source: section 3 of arXiv 2410.10209 and the released code; `least_gain` is our choice, 0 the paper's. A meter with noise wants it
    above that noise: the cheapest of many equal programs looks cheaper than it is. NOT for programs without tests: what is kept is then
    fast, and may be anything.

    >>> costs = {"slow": 4.0, "fast": 1.0, "wrong": 0.5}
    >>> revisions = iter(["wrong", "fast"])
    >>> loop = SelfOptimize(lambda request: next(revisions, None), None, rounds=5)
    >>> found = loop("slow", lambda text: Evaluated(text != "wrong", costs[text] if text != "wrong" else math.inf))
    >>> found.program, found.best
    ('fast', (4.0, 4.0, 1.0))
    """

    def __init__(
        self, generator: Generator, profiler: Profiler | None, rounds: int = ROUNDS, *, least_gain: float = 0.0
    ) -> None:
        self.generator, self.profiler = generator, profiler
        self.rounds = checks.whole("rounds", rounds, low=0)
        self.least_gain = checks.number("least_gain", least_gain, low=0, below=1)

    def __call__(self, program: str, evaluate: Evaluate, *, task: str = "") -> Optimised:
        """Optimise one program. `evaluate` says whether a text is right and what it costs; it is called once for each new text.

        Raises ValueError for a program that is not right to begin with: there is nothing to keep then.
        """
        found = evaluate(program)
        if not found.right:
            raise ValueError(f"program must be right to begin with, but {found.why or 'it is wrong'}")
        initial, costs = program, [found.cost]
        steps: list[Step] = []
        profile, profiled, profiles = None, False, 0
        for number in range(1, self.rounds + 1):
            if not profiled and self.profiler is not None:
                profile, profiled, profiles = self._profile(program), True, profiles + 1
            revised = self.generator(Request(task, program, profile, tuple(steps)))
            if revised is None:
                break
            steps.append(
                self._tried(number, revised, evaluate, costs[-1], {initial, *(step.program for step in steps)})
            )
            costs.append(steps[-1].cost if steps[-1].kept else costs[-1])
            if steps[-1].kept:
                program, profiled = revised, False
        return Optimised(initial, program, tuple(steps), tuple(costs), profiles)

    def _profile(self, program: str) -> Profile | None:
        assert self.profiler is not None
        try:
            return self.profiler(program)
        except ProfileError:
            return None

    def _tried(self, number: int, revised: str, evaluate: Evaluate, best: float, before: set[str]) -> Step:
        if revised in before:
            return Step(number, revised, False, math.inf, False, "it was tried before")
        found = evaluate(revised)
        if not found.right:
            return Step(number, revised, False, math.inf, False, found.why or "it is wrong")
        kept = found.cost < (1 - self.least_gain) * best
        return Step(number, revised, True, found.cost, kept, "" if kept else "it costs no less")


# ---------------------------------------------------------------------------------------------------- right or wrong, and the cost


class Bench:
    """Says whether programs are right and what they cost, in the sandbox; each text is run once and remembered.

    `tests` are pairs of positional arguments and the right answer, `costly` further ones whose cost is taken: the sum over them of the
    median of `repeats` runs, in the unit of the workers' meter. A program is right if `compare(expected, got)` holds for all of both.
    `evaluations` counts the different texts that were judged. Raises ValueError for no tests and no costly calls.
    """

    def __init__(
        self,
        workers: Workers,
        entry_point: str,
        tests: Sequence[tuple[Sequence[Any], Any]],
        costly: Sequence[tuple[Sequence[Any], Any]],
        compare: Callable[[Any, Any], bool],
        *,
        repeats: int = 3,
        limits: Limits | None = None,
    ) -> None:
        for name, given in (("tests", tests), ("costly", costly)):
            if not given:
                raise ValueError(f"{name} must hold one call or more, got none")
        self.workers, self.entry_point, self.compare, self.limits = workers, entry_point, compare, limits
        self.tests, self.costly = list(tests), list(costly)
        self.repeats = checks.whole("repeats", repeats, low=1)
        self.evaluations = 0
        self._known: dict[str, Evaluated] = {}

    def __call__(self, program: str) -> Evaluated:
        """Judge and measure one program; a wrong one is not measured."""
        if program not in self._known:
            self.evaluations += 1
            self._known[program] = self._of(program)
        return self._known[program]

    def _of(self, program: str) -> Evaluated:
        if why := self.why_wrong(program):
            return Evaluated(False, math.inf, why)
        return self.measured({"": program}, self.repeats)[""]

    def why_wrong(self, program: str) -> str:
        """Why a program is wrong on the tests, "" for a right one. It is run no further than the first that shows it."""
        for arguments, expected in self.tests:
            found = judge([expected], self._run(program, arguments), self.compare)
            if not found.right:
                return found.why
        return ""

    def _run(self, program: str, arguments: Sequence[Any]) -> list[Outcome]:
        return self.workers.run(program, self.entry_point, [arguments], limits=self.limits)[0]

    def measured(self, programs: Mapping[str, str], repeats: int) -> dict[str, Evaluated]:
        """Several programs on the costly calls, in turns, so that a machine which becomes slower does so for all of them."""
        calls = [arguments for arguments, _ in self.costly]
        seen = measure_all(self.workers, self.entry_point, programs, calls, repeats=repeats, limits=self.limits)
        return {name: self._cost(outcomes) for name, outcomes in seen.items()}

    def _cost(self, outcomes: Sequence[Sequence[Outcome]]) -> Evaluated:
        costs = []
        for of_call, (_, expected) in zip(outcomes, self.costly, strict=True):
            found = judge([expected] * len(of_call), of_call, self.compare)
            if not found.right:
                return Evaluated(False, math.inf, found.why)
            costs.append(statistics.median(float(one.cost or 0.0) for one in of_call))
        return Evaluated(True, math.fsum(costs))
