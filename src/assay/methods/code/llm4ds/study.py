"""A controlled experiment on programs: who tried which task, what came of it, and where that is kept.

experiment = Experiment(tasks, ["gpt", "claude"])
experiment.record(outcomes)
print(experiment.report(p0=[0.5, 0.6, 0.7]).text())
read("outcomes.jsonl").report(p0=[0.5])
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from assay import checks
from assay.errors import InputError
from assay.methods.code.llm4ds.outcomes import Outcome
from assay.methods.code.llm4ds.report import Report, made

METRICS = ("success", "seconds", "similarity")


class Experiment:
    """Tasks crossed with models: every model tries every task.

    `tasks` has each task's level of every factor: {"t1": {"kind": "analytical", "level": "easy"}}. `models` are names, or names with the
    version and the date of what was asked, which a report asks for. `factors` are those that questions are asked about, all by
    default; `metrics` what was measured (`METRICS`). Raises ValueError for no tasks or models, and a task that lacks a factor.

    >>> experiment = Experiment({f"t{i}": {"level": "easy" if i % 2 else "hard"} for i in range(40)}, ["one", "other"])
    >>> experiment.record(Outcome(f"t{i}", "one", i % 5 < 4) for i in range(40))
    >>> experiment.record(Outcome(f"t{i}", "other", i % 5 < 2) for i in range(40))
    >>> print(experiment.report(p0=[0.5]).statements("success")[0])
    one: 32 of 40 tasks, 80.0 % (95 % interval 65.2 to 89.5 %), is significantly above 50 %: p < 0.001, adjusted < 0.001.
    """

    def __init__(
        self,
        tasks: Mapping[str, Mapping[str, str]],
        models: Sequence[str] | Mapping[str, str],
        factors: Sequence[str] | None = None,
        metrics: Sequence[str] = METRICS,
    ) -> None:
        if not tasks or not models:
            raise ValueError(f"tasks and models must hold at least one each, got {len(tasks)} and {len(models)}")
        for name, given in (("models", models), ("factors", factors)):
            if isinstance(given, str):
                raise TypeError(f"{name} must be a list of names, got {given!r}")
        if not isinstance(models, Mapping) and len(set(models)) != len(models):
            raise ValueError(f"models must have different names, got {checks.shown(list(models))}")
        self.tasks = {task: dict(own) for task, own in tasks.items()}
        self.models = dict(models) if isinstance(models, Mapping) else dict.fromkeys(models, "")
        self.factors = tuple(next(iter(self.tasks.values())) if factors is None else factors)
        for task, own in self.tasks.items():
            if missing := [factor for factor in self.factors if factor not in own]:
                raise ValueError(f"tasks must have a level of every factor, got none of {missing[0]!r} for {task!r}")
        self.metrics = tuple(checks.choice("metrics", metric, METRICS) for metric in metrics)
        self._outcomes: dict[tuple[str, str, int], Outcome] = {}

    def record(self, outcomes: Iterable[Outcome]) -> None:
        """Add what came out, all of it or nothing. Raises ValueError for a task or model that is not of the experiment, and an attempt
        recorded before."""
        new: dict[tuple[str, str, int], Outcome] = {}
        for outcome in outcomes:
            if outcome.task not in self.tasks or outcome.model not in self.models:
                raise ValueError(f"outcomes must be of the experiment's tasks and models, got {checks.shown(outcome)}")
            key = outcome.model, outcome.task, outcome.attempt
            if key in self._outcomes or key in new:
                raise ValueError(f"outcomes must have every attempt once, got {key} twice")
            new[key] = outcome
        self._outcomes |= new

    @property
    def outcomes(self) -> tuple[Outcome, ...]:
        """All outcomes, by model, task and attempt."""
        return tuple(self._outcomes[key] for key in sorted(self._outcomes))

    def table(self) -> list[dict[str, Any]]:
        """A tidy table: a row for each attempt, a column for each factor and metric."""
        return [
            {"task": one.task, "model": one.model, "attempt": one.attempt}
            | {factor: self.tasks[one.task][factor] for factor in self.factors}
            | {"pass": one.passed, "seconds": one.seconds, "similarity": one.similarity}
            for one in self.outcomes
        ]

    def write(self, path: Path | str) -> None:
        """The outcomes as JSON lines: task, model, attempt, pass, seconds, similarity, factors."""
        lines = [
            json.dumps(
                {"task": one.task, "model": one.model, "attempt": one.attempt, "pass": one.passed}
                | {name: value for name in ("seconds", "similarity") if (value := getattr(one, name)) is not None}
                | {"factors": self.tasks[one.task]}
            )
            for one in self.outcomes
        ]
        Path(path).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")

    def report(
        self, p0: Sequence[float], *, alpha: float = 0.05, margin: float = 0.05, delta: float = 0.1, seed: int = 0
    ) -> Report:
        """The questions answered, with tests, effect sizes, intervals and plain statements.

        `p0` are the success rates that each model is tested against. They are conventions, so that there is no default. `margin` is
        the difference of rates up to which two models count as equal, `delta` the difference that the power analysis asks about.
        Raises ValueError where a model tried no task, or no task was tried by all.
        """
        if not len(p0):
            raise ValueError("p0 must hold at least one success rate to test against, got none")
        rates = [checks.number("p0", rate, above=0, below=1) for rate in p0]
        checks.number("alpha", alpha, above=0, below=1)
        checks.number("margin", margin, above=0, below=1)
        checks.number("delta", delta, above=0, below=1)
        return made(self, rates, alpha, margin, delta, checks.whole("seed", seed, low=0))


def read(path: Path | str) -> Experiment:
    """An experiment from JSON lines with task, model, attempt (1), pass, seconds, similarity and factors, all but three of them optional.

    Raises InputError for a line that is none of these, and tasks whose factors differ between lines.

    >>> read("missing.jsonl")
    Traceback (most recent call last):
        ...
    assay.errors.InputError: outcomes missing.jsonl: there is no such file
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"outcomes {path}: there is no such file")
    found: list[Outcome] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.strip():
            found.append(_outcome(line, f"{path}, line {number}"))
    if not found:
        raise InputError(f"outcomes {path}: the file holds none")
    tasks: dict[str, dict[str, str]] = {}
    for one in found:
        if tasks.setdefault(one.task, dict(one.factors)) != dict(one.factors):
            raise InputError(f"outcomes {path}: the factors of task {one.task!r} differ between lines")
    try:
        experiment = Experiment(tasks, list(dict.fromkeys(one.model for one in found)))
        experiment.record(found)
    except ValueError as error:
        raise InputError(f"outcomes {path}: {error}") from None
    return experiment


def _outcome(line: str, where: str) -> Outcome:
    try:
        row = json.loads(line)
        factors = row.get("factors") or {}
        return Outcome(
            row["task"],
            row["model"],
            row["pass"],
            row.get("attempt", 1),
            row.get("seconds"),
            row.get("similarity"),
            {str(name): str(level) for name, level in factors.items()},
        )
    except KeyError as error:
        raise InputError(f"outcomes {where}: {error} is missing") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(f"outcomes {where}: {error}") from None
