"""Programs are run here for their reward: in the sandbox, judged outside, beside their reference, each distinct one once."""

from __future__ import annotations

import ast
import re
import statistics
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from assay import checks
from assay.methods.code.acecode.reward import Executed, Reward
from assay.methods.core.programs.judging import judge, measure_all
from assay.methods.core.programs.workers import Outcome, Workers

TIME_OUT = 5.0
"""A program that costs more than this many times the reference is one that was stopped. Our choice."""
LEAST_SECONDS = 0.05
"""No program is stopped before this: starting a process is noisy. Its cost is held against `TIME_OUT` all the same, so that this decides
nothing. Our choice."""
REPEATS = 3
FENCED = re.compile(r"^[ \t]*```[^\n`]*\n(.*?)(?:^[ \t]*```[ \t]*$|\Z)", re.DOTALL | re.MULTILINE)
"""A fence stands on a line of its own: what a program says or a text quotes within a line is none."""


@dataclass(frozen=True)
class Problem:
    """A function to write: a reference solution, which is right by definition, and inputs.

    `tests` are arguments for being right, `timed` those for being fast, large enough for the meter (they are tests too). They are for
    the reward: whoever evaluates a trained model takes others. `compare(expected, got)` judges.
    """

    name: str
    entry_point: str
    reference: str
    tests: Sequence[Sequence[Any]]
    timed: Sequence[Sequence[Any]]
    compare: Callable[[Any, Any], bool] = lambda expected, got: type(expected) is type(got) and expected == got

    def __post_init__(self) -> None:
        if not self.timed:
            raise ValueError(f"timed of {self.name!r} must hold at least one input")


def program_in(completion: str | Sequence[Mapping[str, str]]) -> str:
    """The program in what a model wrote: that of the last fenced block where there is one, otherwise all of it.

    A chat is a list of messages, of which the last one's content counts.

    >>> program_in([{"role": "assistant", "content": "Here:\\n```python\\nx = 1\\n```\\nDone."}])
    'x = 1\\n'
    """
    if not isinstance(completion, str):
        if not completion or not isinstance(completion[-1], Mapping) or "content" not in completion[-1]:
            raise TypeError(f"a completion must be a text or a list of messages, got {checks.shown(completion)}")
        completion = completion[-1]["content"] or ""
        if not isinstance(completion, str):
            raise TypeError(f"the content of a message must be a text, got {checks.shown(completion)}")
    blocks = FENCED.findall(completion)
    return blocks[-1] if blocks else completion


def normalised(program: str) -> str | None:
    """The program without comments and layout, under which its reward is kept; None where it does not compile, or is nothing at all.

    >>> normalised("def f(n): # twice\\n  return(2*n)"), normalised("def f("), normalised("return 2")
    ('def f(n):\\n    return 2 * n', None, None)
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(program)
            compile(tree, "<program>", "exec", dont_inherit=True)
        return ast.unparse(tree) if tree.body else None
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


class Executor:
    """Runs programs of problems by name; `executor.run("sum", completion)` is an `Executed`.

    `workers` should be its own, and not shared with what else runs: times of one run at a time are worth most. Every distinct program is
    run once, on the tests until it fails, then on the timed inputs beside the reference in turns, `repeats` times (once where a test was
    failed), medians summed.
    Rewards depend on the ratio of the two only. `asked` counts requests, `ran` the distinct programs behind them.
    A cost of more than `time_out` references is a failure, whatever the meter: of the timed inputs together, and of any one input against
    the reference on all of them. Raises ValueError for problems of one name, and, when a problem is first asked for, for a reference that
    does not return everywhere or costs nothing.
    """

    def __init__(
        self, workers: Workers, problems: Sequence[Problem], *, repeats: int = REPEATS, time_out: float = TIME_OUT
    ) -> None:
        self.workers, self.repeats = workers, checks.whole("repeats", repeats, low=1)
        self.time_out = checks.number("time_out", time_out, low=1)
        self.problems = {problem.name: problem for problem in problems}
        if len(self.problems) != len(problems):
            raise ValueError("problems must have different names")
        self.asked = 0
        self._wanted: dict[str, tuple[list[Any], list[Any], float]] = {}
        self._known: dict[tuple[str, str], Executed] = {}

    @property
    def ran(self) -> int:
        """How many distinct programs were run."""
        return len(self._known)

    def run(self, name: str, completion: str | Sequence[Mapping[str, str]]) -> Executed:
        """What came of the program in a completion. Raises ValueError for an unknown problem."""
        checks.choice("name", name, list(self.problems))
        self.asked += 1
        program = program_in(completion)
        key = normalised(program)
        if key is None:
            return Executed("no program", why="no program, or a syntax error")
        if (name, key) not in self._known:
            self._known[name, key] = self._run(self.problems[name], program)
        return self._known[name, key]

    def _reference(self, problem: Problem) -> tuple[list[Any], list[Any], float]:
        """The answers of the reference on tests and timed inputs, and its cost on all of them."""
        if problem.name not in self._wanted:
            cases = [*problem.tests, *problem.timed]
            seen = [one for (one,) in self.workers.run(problem.reference, problem.entry_point, cases)]
            if bad := [one for one in seen if one.state != "returned"]:
                raise ValueError(
                    f"the reference of {problem.name!r} must return, it ended by {bad[0].state}: {bad[0].error}"
                )
            values, costs = [one.value for one in seen], [float(one.cost or 0) for one in seen]
            if not sum(costs[len(problem.tests) :]) > 0:
                raise ValueError(
                    f"the reference of {problem.name!r} costs nothing on its timed inputs: take larger ones"
                )
            self._wanted[problem.name] = values[: len(problem.tests)], values[len(problem.tests) :], sum(costs)
        return self._wanted[problem.name]

    def _run(self, problem: Problem, program: str) -> Executed:
        answers, timed, whole = self._reference(problem)
        limits = self.workers.limits
        if self.workers.meter.unit == "s":
            seconds = max(self.time_out * whole, LEAST_SECONDS)
            limits = replace(limits, cpu_seconds=seconds, wall_seconds=max(limits.wall_seconds, 4 * seconds))
        passed = 0
        for arguments, wanted in zip(problem.tests, answers, strict=True):
            [[outcome]] = self.workers.run(program, problem.entry_point, [arguments], limits=limits)
            if outcome.state != "returned":
                return Executed("failed", why=f"{outcome.state}: {outcome.error}")
            if float(outcome.cost or 0) > self.time_out * whole:
                return Executed("failed", why="time: on one input more than the reference on all")
            passed += judge([wanted], [outcome], problem.compare).right
        both = {"reference": problem.reference, "program": program}
        repeats = self.repeats if passed == len(answers) else 1  # of a wrong one only an ablation asks for the time
        seen = measure_all(
            self.workers, problem.entry_point, both, problem.timed, repeats=repeats,
            limits={"reference": self.workers.limits, "program": limits},
        )  # fmt: skip
        costs = {name: [_median(outcomes) for outcomes in cases] for name, cases in seen.items()}
        if None in costs["reference"]:
            raise ValueError(f"the reference of {problem.name!r} must return each time")
        if None in costs["program"]:
            last = next(one for case in seen["program"] for one in case if one.state != "returned")
            return Executed("failed", why=f"{last.state}: {last.error}")
        for outcomes, wanted in zip(seen["program"], timed, strict=True):
            passed += judge([wanted] * len(outcomes), outcomes, problem.compare).right
        spent = sum(cost or 0.0 for cost in costs["program"])
        ratio = sum(cost or 0.0 for cost in costs["reference"]) / spent if spent else float("inf")
        if ratio * self.time_out < 1:
            return Executed("failed", why=f"time: {1 / ratio:.3g} times the reference")
        share = passed / (len(answers) + len(timed))
        return Executed("right" if share == 1 else "wrong", share, ratio)


def _median(outcomes: Sequence[Outcome]) -> float | None:
    if any(outcome.state != "returned" for outcome in outcomes):
        return None
    return statistics.median(float(outcome.cost or 0.0) for outcome in outcomes)


def reward_function(
    executor: Executor, reward: Reward | None = None, *, column: str = "task"
) -> Callable[..., list[float]]:
    """A function that trl's GRPOTrainer takes among its `reward_funcs`: `f(completions=..., **columns) -> list[float]`.

    `column` of the data set names each row's problem. Completions are texts or chats; what else the trainer passes (prompts, token ids,
    its state) is not looked at. Raises ValueError where the column is missing or of another length.
    """
    scored = reward or Reward()

    def execution_reward(completions: Sequence[Any], **columns: Any) -> list[float]:
        if column not in columns:
            raise ValueError(f"the data set must have a column {column!r}, got {', '.join(sorted(columns)) or 'none'}")
        names = columns[column]
        if len(names) != len(completions):
            raise ValueError(f"{column} must be one for each of the {len(completions)} completions, got {len(names)}")
        return [scored(executor.run(name, text)) for name, text in zip(names, completions, strict=True)]

    return execution_reward


def best_of(executor: Executor, name: str, completions: Sequence[Any], reward: Reward | None = None) -> int:
    """Which of N completions has the largest reward, the first of equal ones: what can be had at inference without training."""
    if not completions:
        raise ValueError("completions must be one or more, got none")
    scored = reward or Reward()
    rewards = [scored(executor.run(name, text)) for text in completions]
    return rewards.index(max(rewards))
