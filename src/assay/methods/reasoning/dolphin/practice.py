"""Running a script that an idea became, and repairing it when it raises: at most five times, each time by what its
traceback shows."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from assay import checks
from assay.methods.core.sandbox import Sandbox
from assay.methods.reasoning.dolphin.tracebacks import Failure, Part, local_structure, own_frames, parse, told

ROUNDS = 5


@dataclass(frozen=True)
class Outcome:
    """How a script ran: its metric, or None with what it wrote on stderr (a traceback, or why it was ended).

    Raises ValueError for a metric that is not finite: a run that diverged has none.
    """

    metric: float | None
    error: str = ""
    seconds: float = 0.0

    def __post_init__(self) -> None:
        if self.metric is not None:
            object.__setattr__(self, "metric", checks.number("metric", self.metric))

    @property
    def ok(self) -> bool:
        """Whether it gave a metric."""
        return self.metric is not None


Runner = Callable[[str, int], Outcome]
"""Runs a script's source under a seed."""


@dataclass(frozen=True)
class Attempt:
    """A source that raised, and its failures with the script's own frames only."""

    source: str
    failures: tuple[Failure, ...]


@dataclass(frozen=True)
class Request:
    """What a repairer is given: all that was run for this idea, in order, and which repair is asked for (from 1).
    `structure=False` keeps the code around the frames from it."""

    attempts: tuple[Attempt, ...]
    structure: bool = True
    round: int = 1

    @property
    def last(self) -> Attempt:
        """What raised just now."""
        return self.attempts[-1]

    @property
    def parts(self) -> list[Part]:
        """The parts of the script around the frames, innermost first."""
        return local_structure(self.last.source, self.last.failures) if self.structure else []

    @property
    def text(self) -> str:
        """Failures and parts in words."""
        return told(self.last.failures, self.parts)


Repairer = Callable[[Request], str | None]
"""The repaired source, or None for "I do not know"."""


@dataclass(frozen=True)
class Practice:
    """All that was run for one idea, in order, and under which seed."""

    sources: tuple[str, ...]
    outcomes: tuple[Outcome, ...]
    seed: int = 0

    @property
    def source(self) -> str:
        """What ran last."""
        return self.sources[-1]

    @property
    def last(self) -> Outcome:
        """How that went."""
        return self.outcomes[-1]

    @property
    def repairs(self) -> int:
        """Runs beyond the first."""
        return len(self.sources) - 1


def practise(
    source: str,
    run: Runner,
    repair: Repairer | None = None,
    *,
    rounds: int = ROUNDS,
    structure: bool = True,
    seed: int = 0,
) -> Practice:
    """Run a script; where it raises, ask for a repair and run again, `rounds` times at most. A script that succeeds
    asks for none.

    A repair that changes nothing, or gives what was run before, is a round lost, and not run again. It ends early where
    the repairer gives None. With `structure=False` the repairer gets the traceback's frames alone. Raises ValueError
    for rounds below 0.
    """
    rounds = checks.whole("rounds", rounds, low=0)
    sources, outcomes, attempts = [source], [run(source, seed)], list[Attempt]()
    for asked in range(1, rounds + 1 if repair is not None else 1):
        if outcomes[-1].ok:
            break
        assert repair is not None
        if len(attempts) < len(sources):
            attempts.append(Attempt(sources[-1], tuple(own_frames(parse(outcomes[-1].error), sources[-1]))))
        mended = repair(Request(tuple(attempts), structure, asked))
        if mended is None:
            break
        if mended not in sources:
            sources.append(mended)
            outcomes.append(run(mended, seed))
    return Practice(tuple(sources), tuple(outcomes), seed)


def in_sandbox(sandbox: Sandbox, *, files: Mapping[str, bytes | str] | None = None, metric: str = "metric") -> Runner:
    """A runner: the source is `run.py`, started with `--seed N`, and prints a JSON object with `metric` as its last
    line.

    `files` lie beside it. A metric that is no finite number is a failure, and so is a limit of the sandbox; what ended
    it stands in `error`.

    When NOT to use it: for a metric that the script could make up. Have it write predictions, and score them in a
    runner of your own.
    """
    command = [_python(), "-I", "-B", "run.py", "--seed"]

    def run(source: str, seed: int) -> Outcome:
        written = source.encode("utf-8", "surrogatepass")  # what is no text is the script's failure, not ours
        ran = sandbox.run([*command, str(seed)], files={**(files or {}), "run.py": written})
        if not ran.ok:
            why = "" if ran.ended in ("exit", "signal") else f"\nended by its limit of {ran.ended}"
            return Outcome(None, ran.stderr.decode("utf-8", "replace") + why, ran.seconds)
        lines = ran.text.strip().splitlines()
        try:
            value = json.loads(lines[-1])[metric] if lines else None
            return Outcome(checks.number(metric, value), "", ran.seconds)
        except (ValueError, TypeError, KeyError, RecursionError):
            return Outcome(None, f"the last line of stdout must be a JSON object with a finite {metric!r}", ran.seconds)

    return run


def _python() -> str:
    import sys

    return sys.executable
