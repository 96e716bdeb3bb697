"""Make a program cheaper without changing what it does, as far as its tests and inputs that nobody chose can tell.

    found = optimise(Path("mine.py"), Path("test_mine.py"))
    print(found.diff)

Candidates are edits of `methods.core.programs.rewriting`, those of the hottest lines first, the bank's expert programs for functions
that resemble one of its tasks, and, where those find nothing more and a model is given, what it proposes. Each must do what the program did
on the calls that the tests make and on inputs made of those, and be cheaper beyond noise; they are accepted one after another. Half of the
made inputs are kept back: only they decide, at the end, whether the result is handed over and by how much it is cheaper.

A program that a model had a hand in is judged and costed by `outside` before anything that shares an interpreter with it is believed.
"""

from __future__ import annotations

import ast
import io
import statistics
import time
import tokenize
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from assay import checks
from assay.codebench import by_model, retrieval
from assay.codebench.behaviour import COSTER, Call, Observer, Recorded, Suite, alike, fails, hottest, record
from assay.codebench.costs import EXACT, PAIRS, _ratio, _sandbox
from assay.codebench.optimised import Class, Optimised, Step, lines_of
from assay.codebench.outside import Outside
from assay.codebench.variations import grown, shape, size, text, varied
from assay.errors import InputError
from assay.measure.stats import Interval
from assay.methods.core.programs.rewriting import edits
from assay.methods.core.programs.workers import METERS, Workers
from assay.methods.core.sandbox import Limits, Sandbox

VARIED = 80
"""Inputs made of those of the tests by small changes; half of them are kept back."""
DOUBLINGS = (2, 4, 6, 8, 10, 12)
DEAREST = 3
"""Sizes of grown inputs that are kept of each function: the largest ones."""
ENOUGH_SECONDS = 0.2
"""An input this dear is the largest of its function."""
SCREEN = 6
"""Pairs by which a candidate is accepted; with fewer none can show a difference."""
LITTLE = frozenset(
    (
        "append-loop",
        "range-len",
        "generator-argument",
        "global-in-loop",
        "constant-membership",
        "double-copy",
        "copied-iterable",
    )
)
"""Rules that save a constant factor: tried last, for what they make may no longer look like what the others look for."""
MORE = 1.01
"""What a candidate must seem to gain after two pairs to be given the rest."""
PLUGINS = (
    "fixture '",
    "unrecognized arguments",
    "not natively supported",
    "unknown hook",
    "Unknown pytest.mark",
    "not found in `markers`",
)
"""What pytest says where a plugin is missing, which it looks for in all packages: that takes seconds each time."""
Say = Callable[[str], None]
Proposal = tuple[str, int, str, str]
"""A rule, a line, the program, and why."""


def optimise(
    file: Path,
    tests: Path,
    *,
    meter: str = "cpu_seconds",
    minutes: float = 5.0,
    limits: Limits | None = None,
    seed: int = 0,
    model: by_model.Model | None = None,
    samples: int = 4,
    say: Say = lambda _: None,
) -> Optimised:
    """Search for a cheaper program that does the same; see the module. A `model` is asked for `samples` proposals a round, until a round
    brings nothing.

    `tests` is a file of pytest that imports `file` by its name. What must stay the same: what is returned (types, order, and which objects
    are one), arguments and global variables afterwards, what is printed, and the type of an exception. Raises InputError where the tests
    do not pass on the program as it is, call none of its functions with plain values, or the program answers differently each time;
    MissingError without a sandbox.
    When NOT to use it: for functions whose arguments are no plain values (objects, arrays), or that tests reach through classes only.
    """
    if meter not in METERS or meter == "instructions":
        raise InputError(f"--meter must be one of cpu_seconds, operations, peak_bytes, got {meter!r}")
    if model is not None and meter != "cpu_seconds":
        raise InputError(
            f"--meter must be cpu_seconds with --model, got {meter!r}: by others a model's program could choose its own figures"
        )
    checks.number("minutes", minutes, above=0)
    checks.whole("samples", samples, low=1)
    source = _read(file)
    if not tests.is_file():
        raise InputError(f"--tests must be a file of tests for pytest, got {tests}")
    if tests.name == file.name:
        raise InputError(f"--tests must have another name than FILE, by which it imports FILE, got {tests}")
    search = _Search(
        file,
        tests,
        source,
        meter,
        limits or Limits(cpu_seconds=10, wall_seconds=50, memory_mib=1024, output_bytes=64 * 2**20),
        model,
        samples,
    )
    try:
        return search.run(time.monotonic() + 60 * minutes, seed, say)
    finally:
        search.close()


def _read(file: Path) -> str:
    if file.suffix != ".py" or not file.is_file():
        raise InputError(f"FILE must be a Python file, got {file}")
    try:
        data = file.read_bytes()
        encoding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
        source = data.decode(encoding)
        ast.parse(source)
    except (OSError, UnicodeDecodeError, SyntaxError, ValueError, RecursionError) as error:
        raise InputError(f"{file} is not Python that can be read: {error}") from None
    if encoding != "utf-8":
        raise InputError(f"{file} must be UTF-8 without a byte order mark, it is {encoding}: save it as that first")
    return source


@dataclass(frozen=True)
class _Batch:
    """Calls that are made one after another in one process, and what the program did on them. Of a name: they are costed together."""

    name: str
    calls: tuple[Call, ...]
    does: Any

    @property
    def costing(self) -> list[Call]:
        """Those that return: one that raises costs nothing."""
        return [call for call, (ended, *_) in zip(self.calls, self.does[0], strict=True) if ended == "returned"]


class _Search:
    def __init__(
        self,
        file: Path,
        tests: Path,
        source: str,
        meter: str,
        limits: Limits,
        model: by_model.Model | None = None,
        samples: int = 1,
    ) -> None:
        self.file, self.tests, self.source, self.meter, self.limits = file, tests, source, meter, limits
        self.model, self.samples = model, samples
        self.suite = Suite(tests, file.name)
        self.sandbox: Sandbox = _sandbox(limits)
        self.suite_limits = replace(limits, cpu_seconds=600, wall_seconds=600, memory_mib=max(limits.memory_mib, 4096))
        self.observer = Observer(self.sandbox, limits)
        self.costs = Workers(meter, limits=limits, sandbox=self.sandbox)
        self.outside = Outside(source, self.costs, limits)
        self.apart = False
        """Whether what is judged and costed now is a stranger's program in part."""
        self.by_rules: tuple[str, tuple[Step, ...]] | None = None
        """What there was before the first step of a model."""
        self.refused: list[tuple[str, str]] = []
        """What candidates failed, in words that are counted, and all that is known of it."""
        self.candidates = 0

    def close(self) -> None:
        self.observer.close()
        self.costs.close()

    def run(self, until: float, seed: int, say: Say) -> Optimised:
        say("the tests pass?")
        why = fails(self.sandbox, self.suite, self.source, self.suite_limits)
        if any(word in why for word in PLUGINS):
            self.suite = replace(self.suite, plugins=True)
            why = fails(self.sandbox, self.suite, self.source, self.suite_limits)
        if why:
            alone = any(
                word in why for word in ("ModuleNotFoundError", "ImportError", "FileNotFoundError", "fixture '")
            )
            there = f" (in the sandbox there are {self.file.name} and {self.tests.name} alone: no other file of yours)"
            hint = there if alone else ""
            raise InputError(f"{self.tests} must pass on {self.file} as it is: {_first_failure(why)}{hint}")
        say("recording what the tests call")
        seen = record(self.sandbox, self.suite, self.source, self.suite_limits)
        if not seen.calls:
            hidden = f" ({', '.join(seen.opaque)} were called with other values)" if seen.opaque else ""
            raise InputError(
                f"{self.tests} must call functions of {self.file.name} with plain values (numbers, texts, lists, dicts){hidden}"
            )
        asked = self._known("", seen.calls)
        known = sum(len(batch.calls) for batch in asked)
        if known * 2 < len(seen.calls):
            raise InputError(
                f"{self.file} cannot be compared: on {len(seen.calls) - known} of {len(seen.calls)} calls of the tests it does something "
                "else each time, takes too long, or returns what is no plain value"
            )
        left_out = Counter(call.function for call in seen.calls) + Counter(seen.opaque)
        left_out -= Counter(call.function for batch in asked for call in batch.calls)
        made = varied(seen.calls, VARIED, seed)
        names = list(dict.fromkeys(call.function for call in seen.calls))
        searched = self._small(made[::2], names)
        say("looking for inputs that are dear")
        dear, kept_dear = self._dear([*seen.calls, *made], seen.calls, names, (time.monotonic() + until) / 2, say)
        told = Optimised(
            str(self.file),
            self.meter,
            self.source,
            self.source,
            functions={name: _shapes(seen.calls, name) for name in names},
            left_out=dict(left_out),
            model=self.model.asked if self.model is not None else None,
        )
        program, steps = self._greedy(seen, [*asked, *searched, *dear], _costing([*searched, *dear]), until, say)
        if not steps:
            early = " in the time there was: give more --minutes" if time.monotonic() > until else ""
            return self._nothing(told, f"nothing found that is cheaper beyond noise{early}")
        say("deciding by what was kept back")
        kept = [*self._small(made[1::2], names), *kept_dear]
        tested = {
            "calls of the tests": known,
            "made inputs": _count([*searched, *dear]),
            "kept back": _count(kept),
        }
        found = self._handed_over(told, program, steps, kept, tested, say)
        if not found.found and self.by_rules is not None and self.model is not None:
            self.model.asked.trouble = f"what it wrote was left out: {found.why}"
            self.apart = False
            found = self._handed_over(told, *self.by_rules, kept, tested, say)
        return found

    def _handed_over(
        self,
        told: Optimised,
        program: str,
        steps: Sequence[Step],
        kept: Sequence[_Batch],
        tested: Mapping[str, int],
        say: Say,
    ) -> Optimised:
        """The result, if what was kept back speaks for it."""
        if wrong := self._differs(program, kept):
            return self._nothing(
                told, f"nothing handed over: what was found did something else on an input that was kept back, {wrong}"
            )
        if fails(self.sandbox, self.suite, program, self.suite_limits):
            return self._nothing(told, "nothing handed over: the tests do not pass on what was found")
        ratio, classes = self._decided(program, _costing(kept), say)
        if ratio.low <= 1:
            return self._nothing(
                replace(told, classes=classes), "nothing found that is cheaper beyond noise on what was kept back"
            )
        return replace(
            told,
            program=program,
            steps=tuple(steps),
            ratio=ratio,
            classes=classes,
            tested=tested,
            candidates=self.candidates,
            refused=self._counted(),
        )

    def _nothing(self, told: Optimised, why: str) -> Optimised:
        return replace(told, why=why, candidates=self.candidates, refused=self._counted())

    def _counted(self) -> dict[str, int]:
        return dict(Counter(what for what, _ in self.refused))

    # ----------------------------------------------------------------------------------------------------------------- inputs

    def _known(self, name: str, calls: Sequence[Call]) -> list[_Batch]:
        """What the program does on calls, in batches; those on which that is not known, or not the same twice, are left out."""
        if not calls:
            return []
        does = self.observer.does(self.source, calls)
        if does is None and len(calls) > 1:
            half = len(calls) // 2
            return self._known(name, calls[:half]) + self._known(name, calls[half:])
        again = self.observer.does(self.source, calls) if does is not None else None
        if does is None or again is None:
            return []
        sure = [one == other and one[0] != "unknown" for one, other in zip(does[0], again[0], strict=True)]
        if all(sure):
            return [
                _Batch(
                    name,
                    tuple(calls),
                    (does[0], {key: text for key, text in does[1].items() if again[1].get(key) == text}),
                )
            ]
        return self._known(name, [call for call, is_sure in zip(calls, sure, strict=True) if is_sure])

    def _small(self, calls: Sequence[Call], names: Sequence[str]) -> list[_Batch]:
        found: list[_Batch] = []
        for name in names:
            found += self._known(f"{name}, as in the tests", [call for call in calls if call.function == name])
        return found

    def _dear(
        self, used: Sequence[Call], calls: Sequence[Call], names: Sequence[str], until: float, say: Say
    ) -> tuple[list[_Batch], list[_Batch]]:
        """Grown inputs of each function, for the search and to be kept back, none of them in `used` or in both: as large as a fifth of a
        second allows."""
        both: tuple[list[_Batch], list[_Batch]] = ([], [])
        seen = set(map(text, used))
        for name in names:
            own = [call for call in calls if call.function == name]
            found: tuple[list[_Batch], list[_Batch]] = ([], [])
            for doublings in DOUBLINGS:
                if time.monotonic() > until:
                    break
                say(f"inputs of {name}: {2**doublings:,} times as large")
                costs: list[float] = []
                for which in (0, 1):
                    made = {text(call): call for call in grown(own, doublings, 6, seed=which).get(name, [])}
                    fresh = [key for key in made if key not in seen][:2]
                    seen.update(fresh)
                    new = [(made[key], self._seconds(made[key])) for key in fresh]
                    costs += [cost if cost is not None else 2 * ENOUGH_SECONDS for _, cost in new]
                    held = [call for call, cost in new if cost is not None]
                    known = self._known(f"{name}, {_sizes(held)}", held)
                    found[which].extend(known)
                    if held and not known:  # what it returns is too much to be looked at
                        costs.append(2 * ENOUGH_SECONDS)
                if costs and max(costs) > ENOUGH_SECONDS:
                    break
            for which in (0, 1):
                both[which].extend(found[which][-DEAREST:])
        return both

    def _seconds(self, call: Call) -> float | None:
        """Processor seconds of a call of the program; None where it meets a limit or raises."""
        workers = self.observer.workers
        limits = replace(self.limits, cpu_seconds=min(2.0, self.limits.cpu_seconds), wall_seconds=20)
        [[outcome]] = workers.run(
            self.source + COSTER.format(name=call.function),
            "_assay_cost",
            [([(call.args, dict(call.kwargs))],)],
            limits=limits,
        )
        return outcome.cost

    # ----------------------------------------------------------------------------------------------------------------- search

    def _greedy(
        self, seen: Recorded, batches: Sequence[_Batch], costing: Mapping[str, list[Call]], until: float, say: Say
    ) -> tuple[str, list[Step]]:
        program = self.source
        steps: list[Step] = []
        heat = hottest(self.source, seen.seconds)
        observed: dict[str, list[tuple[Any, ...]]] = {}
        for call in (*seen.calls, *seen.inner):
            if not call.kwargs:
                observed.setdefault(call.function, []).append(call.args)
        tried = {program}
        again = True
        while again and time.monotonic() < until:
            again = False
            rules = self._proposals(program, heat, observed, first=not steps)
            for rule, line, candidate, why in chain(rules, self._asked(program, seen, costing, until, say)):
                if candidate in tried or time.monotonic() > until:
                    continue
                tried.add(candidate)
                self.candidates += 1
                say(f"line {line}: {rule}")
                strange = any(step.by_model for step in steps)
                self.apart = strange or rule == by_model.MODEL
                ratio = self._gained(program, candidate, batches, costing)
                if ratio is None:
                    continue
                if self.apart and steps and not strange:
                    self.by_rules = program, tuple(steps)
                program, again = candidate, True
                steps.append(Step(rule, line, why, ratio, rule == by_model.MODEL))
                break
        self.apart = any(step.by_model for step in steps)
        return program, steps

    def _gained(
        self, program: str, candidate: str, batches: Sequence[_Batch], costing: Mapping[str, list[Call]]
    ) -> Interval | None:
        """How much cheaper a candidate is; None, and the reason in `refused`, where it is not or does something else."""
        if wrong := self._differs(candidate, batches):
            self.refused.append(("does something else", wrong))
            return None
        ratio = self._ratio(program, candidate, costing)
        if ratio is None or ratio.low <= 1:
            self.refused.append(("not cheaper beyond noise", "it is not faster, beyond what differs from run to run"))
            return None
        if why := fails(self.sandbox, self.suite, candidate, self.suite_limits):
            self.refused.append(("the tests fail", f"the tests fail: {_first_failure(why)}"))
            return None
        return ratio

    def _proposals(
        self, program: str, heat: Counter[str], observed: Mapping[str, list[tuple[Any, ...]]], *, first: bool
    ) -> list[Proposal]:
        lines = lines_of(program)
        found = []
        for edit in edits(program, observed=observed):
            warmth = max((heat[line.strip()] for line in lines[edit.line - 1 : edit.end_line]), default=0.0)
            found.append((warmth, (edit.rule, edit.line, edit.program, edit.why)))
        found.sort(key=lambda one: (one[1][0] in LITTLE, -one[0]))
        proposals = [one for _, one in found]
        if first:
            for name in observed:
                at = next((n for n, line in enumerate(lines, 1) if line.startswith(f"def {name}(")), 1)
                proposals += [
                    ("known-faster-program", at, text, why) for text, why in retrieval.candidates(program, name)
                ]
        return proposals

    def _asked(
        self, program: str, seen: Recorded, costing: Mapping[str, list[Call]], until: float, say: Say
    ) -> Iterator[Proposal]:
        """What the model makes of the hottest function, one after another: each is judged before the next is asked for."""
        if self.model is None or not costing:
            return
        if blind := self.outside.blind(costing):
            self.model.asked.trouble = (
                f"not asked: what {blind} returns is no plain value, which cannot be judged outside of the sandbox"
            )
            return
        profile = by_model.profiled(program, costing, self.costs, self.limits)
        node = by_model.hottest(program, profile)
        if node is None:
            return
        calls = [call for call in (*seen.calls, *seen.inner) if call.function == node.name]
        proposed = by_model.proposals(
            self.model, program, node.name, profile, calls, self.refused, samples=self.samples, until=until, say=say
        )
        for candidate in proposed:
            yield by_model.MODEL, node.lineno, candidate, f"the model {self.model.asked.name!r} wrote {node.name}"

    def _differs(self, program: str, batches: Sequence[_Batch]) -> str:
        """The first call on which a version does something else, judged outside first where it is a stranger's."""
        if self.apart:
            for call in (call for batch in batches for call in batch.calls):
                if wrong := self.outside.wrong(program, call):
                    return wrong
        return self._wrong(program, batches)

    def _wrong(self, program: str, batches: Sequence[_Batch]) -> str:
        """The same by what the observer sees."""
        for batch in batches:
            at = alike(batch.does, self.observer.does(program, batch.calls))
            if at is not None:
                call = batch.calls[max(at, 0)]
                return f"{call.function}{checks.shown(call.args)}" if at >= 0 else "a global variable at the end"
        return ""

    # ------------------------------------------------------------------------------------------------------------------ costs

    def _pair(
        self, programs: Sequence[str], groups: Mapping[str, list[Call]], turned: bool
    ) -> list[tuple[float, float]] | None:
        """Costs of two programs on each class of inputs, one after the other; None where one of them could not be run."""
        found = []
        for calls in groups.values():
            costs = [0.0, 0.0]
            for which in (1, 0) if turned else (0, 1):
                cost = self._cost(programs[which], calls)
                if cost is None:
                    return None
                costs[which] = cost
            found.append((costs[0], costs[1]))
        return found

    def _cost(self, program: str, calls: Sequence[Call]) -> float | None:
        if self.apart:
            return self.outside.cost(program, calls)
        text = program + COSTER.format(name=calls[0].function)
        [[outcome]] = self.costs.run(text, "_assay_cost", [([(call.args, dict(call.kwargs)) for call in calls],)])
        return None if outcome.cost is None else float(outcome.cost)

    def _ratio(self, before: str, after: str, groups: Mapping[str, list[Call]]) -> Interval | None:
        totals: list[tuple[float, float]] = []
        for pair in range(SCREEN):
            found = self._pair((before, after), groups, bool(pair % 2))
            if found is None:
                return None
            totals.append((sum(a for a, _ in found), sum(b for _, b in found)))
            if min(totals[-1]) <= 0:
                return None
            if pair == 1 and statistics.median(a / b for a, b in totals) < MORE:
                return None
            if pair == 1 and self.meter in EXACT:
                break
        return _ratio(totals, exact=self.meter in EXACT)

    def _decided(self, program: str, groups: Mapping[str, list[Call]], say: Say) -> tuple[Interval, tuple[Class, ...]]:
        rows: list[list[tuple[float, float]]] = []
        for pair in range(2 if self.meter in EXACT else PAIRS):
            say(f"pair {pair + 1}")
            found = self._pair((self.source, program), groups, bool(pair % 2))
            if found is None:
                return Interval(1.0, 0.0, float("inf"), 0), ()
            rows.append(found)
        totals = [(sum(a for a, _ in row), sum(b for _, b in row)) for row in rows]
        exact = self.meter in EXACT
        classes = []
        for n, (name, calls) in enumerate(groups.items()):
            pairs = [row[n] for row in rows]
            if min(min(pair) for pair in pairs) > 0:
                before, after = (statistics.median(pair[which] for pair in pairs) for which in (0, 1))
                classes.append(Class(name, len(calls), before, after, _ratio(pairs, exact=exact)))
        if not totals or min(min(pair) for pair in totals) <= 0:
            return Interval(1.0, 0.0, float("inf"), 0), tuple(classes)
        return _ratio(totals, exact=exact), tuple(classes)


def _first_failure(said: str) -> str:
    """The line of pytest's report that says what failed."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    told = [line for line in lines if line.startswith(("FAILED", "ERROR", "E  "))]
    reasons = [line[1:].strip() for line in told if line.startswith("E  ")]
    last = (told or lines or ["no tests ran"])[-1]
    return f"{last}: {reasons[-1]}" if reasons and last.startswith(("FAILED", "ERROR")) and " - " not in last else last


def _costing(batches: Sequence[_Batch]) -> dict[str, list[Call]]:
    """Calls that are costed together, by the names of their batches."""
    found: dict[str, list[Call]] = {}
    for batch in batches:
        if batch.costing:
            found.setdefault(batch.name, []).extend(batch.costing)
    return found


def _count(batches: Sequence[_Batch]) -> int:
    return sum(len(batch.calls) for batch in batches)


def _sizes(calls: Sequence[Call]) -> str:
    """How large arguments are, in words."""
    held = max((sum(map(size, call.args)) for call in calls), default=0)
    if held:
        return f"about {held:,} elements"
    return f"numbers to {max((abs(one) for call in calls for one in call.args if isinstance(one, (int, float))), default=0):,.6g}"


def _shapes(calls: Sequence[Call], name: str) -> str:
    columns: dict[int, set[str]] = {}
    for call in calls:
        if call.function == name:
            for n, value in enumerate(call.args):
                columns.setdefault(n, set()).add(shape(value))
    return ", ".join(" or ".join(sorted(column)) for _, column in sorted(columns.items()))
