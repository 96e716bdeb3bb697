"""A program against the cases of a task: run in the sandbox, compared outside of it, each failure of a kind."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from assay import checks
from assay.methods.code.geojseval.comparing import OutType, compared
from assay.methods.core.programs.node import NodeWorkers
from assay.methods.core.programs.node_values import UNDEFINED
from assay.methods.core.programs.workers import Outcome, State
from assay.methods.core.sandbox import Limits, Sandbox

Error = Literal["syntax", "attribute or parameter", "output type", "wrong answer", "timeout", "network", "other"]
ERRORS: tuple[Error, ...] = (
    "syntax", "attribute or parameter", "output type", "wrong answer", "timeout", "network", "other",
)  # fmt: skip
LIMITS = Limits(wall_seconds=60, cpu_seconds=20, memory_mib=1024, output_bytes=4 * 2**20)
"""Of one case; our choice, where the paper waits 300 s."""
LOOKED = """
globalThis.__looked = async (expressions, ...given) => {
  const asked = typeof %(name)s === "undefined" ? module.exports.%(name)s : %(name)s;
  const result = await asked(...given);
  const seen = {};
  for (const each of expressions) seen[each] = new Function("result", "given", `return (${each});`)(result, given);
  return seen;
};
"""
"""What asks the returned object for its state: expressions with `result` in them, and `given`, the arguments."""
DISPATCHER = """
function dispatch(program, entry, given) {
  const named = `typeof ${entry} === "undefined" ? module.exports.${entry} : ${entry}`;
  const found = (0, eval)(`${program}\\n;${named}`);
  if (typeof found !== "function") throw new ReferenceError(`the program defines no function '${entry}'`);
  return found(...given);
}
"""
"""What a warm process runs: the program is an argument, so that it serves the next one too."""
_NETWORK = re.compile(r"ENOTFOUND|EAI_AGAIN|ECONNREFUSED|ENETUNREACH|getaddrinfo|fetch (?:failed|is not defined)")
_PARAMETER = ("TypeError", "ReferenceError", "RangeError", "Error")


class Case(Protocol):
    """What a case has: parameters by name, the expected answer and its type, whether it is an edge case (where failing may be right),
    and the expressions that ask the returned object for its state (none where the answer itself counts)."""

    @property
    def params(self) -> Mapping[str, Any]: ...
    @property
    def expected(self) -> Any: ...
    @property
    def out_type(self) -> OutType: ...
    @property
    def edge(self) -> bool: ...
    @property
    def looks(self) -> Sequence[str]: ...


class Runner(Protocol):
    """What runs programs: `Warm`, `OneProcess`, or `core.programs.node.NodeWorkers`."""

    def run(
        self, program: str, entry_point: str, cases: Sequence[Sequence[Any]], *, limits: Limits | None = None
    ) -> list[list[Outcome]]: ...


@dataclass(frozen=True)
class Result:
    """One case: whether it passed, the kind of error and the reason if not, and the processor time of the call where it returned."""

    passed: bool
    edge: bool
    error: Error | Literal[""] = ""
    why: str = ""
    seconds: float | None = None


@dataclass(frozen=True)
class Judged:
    """A program's results, case by case; with `stop` only up to the first that failed."""

    results: tuple[Result, ...]

    @property
    def passed(self) -> bool:
        """No case failed. A program that passes some of them has failed."""
        return all(result.passed for result in self.results)

    @property
    def status(self) -> Literal["passed", "partial", "failed"]:
        """How the program stands."""
        return "passed" if self.passed else "partial" if any(result.passed for result in self.results) else "failed"


def judged(
    runner: Runner,
    program: str,
    entry_point: str,
    parameters: Sequence[str],
    cases: Sequence[Case],
    *,
    stop: bool = False,
    limits: Limits = LIMITS,
) -> Judged:
    """Run a program's function on all cases and compare what it returns, outside of the sandbox.

    Arguments are put in the order of `parameters` by their names, not in that in which a case has them. `stop` ends at the first case that
    fails, for where only whether the program is right counts. How a run ends and what it returns are two things: an object that looks like
    an error is an answer. Raises ValueError for no cases, or a case whose parameters are others.
    """
    if not cases:
        raise ValueError("cases must be one or more, got none")
    results = []
    for case in cases:
        if set(case.params) != set(parameters):
            raise ValueError(f"cases must have the parameters {', '.join(parameters)}, got {', '.join(case.params)}")
        arguments: list[Any] = [case.params[name] for name in parameters]
        source, entry = program, entry_point
        if case.looks:
            source, entry = program + LOOKED % {"name": entry_point}, "__looked"
            arguments = [list(case.looks), *arguments]
        [[outcome]] = runner.run(source, entry, [arguments], limits=limits)
        results.append(result_of(case, outcome))
        if stop and not results[-1].passed:
            break
    return Judged(tuple(results))


def result_of(case: Case, outcome: Outcome) -> Result:
    """Whether the outcome of a run is what the case expects.

    Where an error is expected the run has to raise one with exactly that message; its type does not count.
    """
    if case.out_type == "error_message":
        if outcome.state == "raised":
            message = outcome.error.partition(": ")[2]
            if compared("error_message", case.expected, message) == "right":
                return Result(True, case.edge)
            return Result(False, case.edge, "wrong answer", f"raised {outcome.error}")
        if outcome.state == "returned":
            return Result(False, case.edge, "wrong answer", f"returned {checks.shown(outcome.value)}", outcome.cost)
    if outcome.state != "returned":
        return Result(False, case.edge, error_of(outcome), f"{outcome.state}: {outcome.error}")
    finding = compared(case.out_type, case.expected, outcome.value)
    if finding == "right":
        return Result(True, case.edge, seconds=outcome.cost)
    error: Error = "output type" if finding == "type" else "wrong answer"
    why = f"gave {checks.shown(outcome.value)}, not {checks.shown(case.expected)}"
    return Result(False, case.edge, error, why, outcome.cost)


def error_of(outcome: Outcome) -> Error:
    """The kind of error of a run that did not return.

    What a library raises is nearly always about its arguments: a plain Error counts with TypeError, ReferenceError and RangeError (our
    choice). A module that is not there is "other", and so are a crash and a limit of memory.

    >>> error_of(Outcome("raised", error="TypeError: turf.foo is not a function"))
    'attribute or parameter'
    """
    if outcome.state == "time":
        return "timeout"
    if outcome.state != "raised":
        return "other"
    name, _, message = outcome.error.partition(": ")
    if name == "SyntaxError":
        return "syntax"
    if _NETWORK.search(outcome.error):
        return "network"
    if re.search(r"not (?:a )?plain(?: value)?$", message):
        return "output type"
    if message.startswith("Cannot find module") or name not in _PARAMETER:
        return "other"
    return "attribute or parameter"


class OneProcess:
    """Runs every case in a Node of its own, started for it in the sandbox, as the published runner does: the rival of warm workers.

    `modules` are looked up in `node_modules` and loaded before the program. It has `NodeWorkers.run`'s form, with values as JSON has them
    (undefined is told apart) and no cost. Raises FileNotFoundError where Node is not installed. Not for measuring what a call costs.
    """

    def __init__(
        self, *, modules: Sequence[str] = (), node_modules: Path | None = None, limits: Limits = LIMITS
    ) -> None:
        if (node := shutil.which("node")) is None:
            raise FileNotFoundError("node is not installed (Debian: apt install nodejs)")
        self._node = Path(node).resolve()
        readable = [self._node.parent, *([node_modules] if node_modules else [])]
        self._sandbox = Sandbox(limits, readable=[path for path in readable if not path.is_relative_to("/usr")])
        self._runner = (Path(__file__).parent / "one_process.js").read_bytes()
        self._given = {"folder": str(node_modules) if node_modules else None, "modules": list(modules)}

    def run(
        self, program: str, entry_point: str, cases: Sequence[Sequence[Any]], *, limits: Limits | None = None
    ) -> list[list[Outcome]]:
        """The outcome of each case; lists of one, as `NodeWorkers.run` has them."""
        return [[self._once(program, entry_point, case, limits)] for case in cases]

    def _once(self, program: str, entry_point: str, case: Sequence[Any], limits: Limits | None) -> Outcome:
        job = {**self._given, "program": program, "entry": entry_point, "arguments": list(case)}
        ran = self._sandbox.run(
            [str(self._node), "runner.js", "job.json"],
            files={"runner.js": self._runner, "job.json": json.dumps(job)},
            limits=limits,
        )
        if ran.ended in ("wall time", "cpu time", "memory"):
            return Outcome("memory" if ran.ended == "memory" else "time", error=ran.ended)
        try:
            # the last line: what a program prints comes before, and whatever it printed is no answer
            told = json.loads(ran.stdout.rpartition(b"\n")[2])
            state: State = "returned" if told["state"] == "returned" else "raised"
            return Outcome(state, told.get("value", UNDEFINED), error=told.get("error", ""))
        except (ValueError, KeyError, TypeError, RecursionError):
            return Outcome("crashed", error=f"ended by {ran.ended}: {ran.stderr.decode('utf-8', 'replace')[-200:]}")


class Warm:
    """Runs cases in Nodes that are started and have read the libraries already, each case in a realm of its own (`core.programs.node`).

    One process serves all programs, one after the other: what a program changes in its realm (globals, prototypes, the library itself) ends
    with its case, and a process in which Node itself was changed is replaced. That keeps programs apart that do not mean to meet. A realm
    is no border, though: for programs that were written to deceive say `apart=True`, which gives each program a process of its own.

        with Warm(["assay-globals/turf.js"], node_modules()) as warm:
            judged(warm, program, "area", ["polygon"], cases)

    Raises as `NodeWorkers` does.
    """

    def __init__(
        self,
        modules: Sequence[str] = (),
        node_modules: Path | None = None,
        *,
        apart: bool = False,
        limits: Limits = LIMITS,
    ) -> None:
        self.apart = checks.flag("apart", apart)
        self._workers = NodeWorkers(modules=modules, node_modules=node_modules, limits=limits, keep=1)

    def __enter__(self) -> Warm:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End its processes."""
        self._workers.close()

    def run(
        self, program: str, entry_point: str, cases: Sequence[Sequence[Any]], *, limits: Limits | None = None
    ) -> list[list[Outcome]]:
        """The outcome of each case; lists of one, as `NodeWorkers.run` has them."""
        if self.apart:
            return self._workers.run(program, entry_point, cases, limits=limits)
        calls = [[program, entry_point, list(case)] for case in cases]
        return self._workers.run(DISPATCHER, "dispatch", calls, limits=limits)
