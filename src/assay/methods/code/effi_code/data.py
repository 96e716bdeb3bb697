"""From tasks with programs to training data: what is left out and why, no task of an evaluation among it, and chat lines for trainers."""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from assay import checks
from assay.methods.code.effi_code.loop import Evaluate, Optimised
from assay.methods.core.programs.workers import Workers

LEAST_GAIN = 0.1
"""Share of the cost that a data point must have saved; our choice, the paper's threshold is not known."""
ALIKE = 0.5
"""Share of the shorter prompt's word triples that may be in another one; our choice."""
Reason = Literal["no tests", "risky operations", "non-deterministic", "nothing right", "gain too small"]
MODULES = (
    "asyncio.subprocess", "builtins", "code", "codeop", "ctypes", "fcntl", "ftplib", "http", "importlib", "multiprocessing", "os",
    "pathlib", "pickle", "pty", "resource", "runpy", "shelve", "shutil", "signal", "smtplib", "socket", "sqlite3", "ssl", "subprocess",
    "sys", "tempfile", "threading", "urllib", "webbrowser",
)  # fmt: skip
CALLS = ("__import__", "breakpoint", "compile", "eval", "exec", "globals", "input", "open", "vars")
"""What a function that computes an answer has no reason to import or to call; our choice."""
REACHING = (
    "__bases__", "__builtins__", "__class__", "__closure__", "__code__", "__dict__", "__getattribute__", "__globals__", "__import__",
    "__loader__", "__mro__", "__reduce__", "__reduce_ex__", "__spec__", "__subclasses__",
)  # fmt: skip
"""Attributes from which everything else can be reached."""


@dataclass(frozen=True)
class Source:
    """A task to make data of: its words, the function's name, candidate programs (of one model or of many), and pairs of arguments and the
    right answer."""

    id: str
    prompt: str
    entry_point: str
    programs: Sequence[str]
    tests: Sequence[tuple[Sequence[Any], Any]]


@dataclass(frozen=True)
class Item:
    """A data point: the task, the cheapest right program found, and the one it began with, with their costs."""

    id: str
    prompt: str
    entry_point: str
    program: str
    cost: float
    initial: str
    initial_cost: float


@dataclass(frozen=True)
class Curated:
    """The data points, and why every other task is none of them."""

    items: tuple[Item, ...]
    dropped: Mapping[str, Reason]


def risky(program: str) -> list[str]:
    """What in a program reaches outside of computing an answer: imports, calls and attributes, by name.

    A filter of data, by syntax, which a program can get round: it keeps bad habits out of what is learnt, and is no protection against
    what is run. That is the sandbox. Raises ValueError for what does not parse.

    >>> risky("import os.path\\ndef f(name):\\n    return open(name).read()")
    ['import os.path', 'open()']
    """
    try:
        tree = ast.parse(program)
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError(f"program must be Python: {error}") from None
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [f"import {alias.name}" for alias in node.names if _is_risky(alias.name)]
        elif isinstance(node, ast.ImportFrom) and (node.level or _is_risky(node.module or "")):
            found.append(f"from {'.' * node.level}{node.module or ''} import")
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in CALLS:
            found.append(f"{node.func.id}()")
        elif isinstance(node, ast.Attribute) and node.attr in REACHING:
            found.append(f".{node.attr}")
    return sorted(set(found))


def _is_risky(module: str) -> bool:
    parts = module.split(".")
    return any(".".join(parts[:n]) in MODULES for n in range(1, len(parts) + 1))


def deterministic(
    workers: Workers,
    program: str,
    entry_point: str,
    calls: Sequence[Sequence[Any]],
    compare: Callable[[Any, Any], bool],
    *,
    repeats: int = 3,
) -> bool:
    """Whether fresh processes give the same answers. What depends on the seed of hashes is not seen: it is the same in all of them.

    Raises ValueError for fewer than two repeats. A program that raises the same way every time is deterministic too.
    """
    checks.whole("repeats", repeats, low=2)
    for call in calls:
        [first, *others] = [workers.run(program, entry_point, [call])[0][0] for _ in range(repeats)]
        for other in others:
            if other.state != first.state or first.state == "returned" and not compare(first.value, other.value):
                return False
    return True


def curate(
    sources: Iterable[Source],
    optimise: Callable[[Source, str], Optimised],
    evaluate: Callable[[Source], Evaluate],
    is_deterministic: Callable[[Source, str], bool],
    *,
    least_gain: float = LEAST_GAIN,
    start: Literal["first", "cheapest"] = "first",
) -> Curated:
    """The data procedure: of each task a data point, or the reason why it gives none, checked in this order.

    no tests; risky operations in all programs; answers that differ from run to run; no program right; after optimising, risky operations
    again, or less than `least_gain` of the cost saved. `start` says which right program is optimised: the first, or the cheapest, as the
    paper's later version takes the best of many models' candidates; what is saved counts from the dearest right one then.
    `optimise(source, program)` is usually a `SelfOptimize`, `evaluate(source)` a `Bench`. Raises ValueError for two tasks of one id.

    A kept program is right on all tests and costs no more than the one it began with, by the same bench.
    """
    checks.number("least_gain", least_gain, low=0, below=1)
    checks.choice("start", start, ("first", "cheapest"))
    items: list[Item] = []
    dropped: dict[str, Reason] = {}
    for source in sources:
        if source.id in dropped or any(item.id == source.id for item in items):
            raise ValueError(f"sources must have an id each, got {source.id!r} twice")
        made = _item(source, optimise, evaluate, is_deterministic, least_gain, start)
        if isinstance(made, Item):
            items.append(made)
        else:
            dropped[source.id] = made
    return Curated(tuple(items), dropped)


def _item(
    source: Source,
    optimise: Callable[[Source, str], Optimised],
    evaluate: Callable[[Source], Evaluate],
    is_deterministic: Callable[[Source, str], bool],
    least_gain: float,
    start: str,
) -> Item | Reason:
    if not source.tests:
        return "no tests"
    parsed = [program for program in source.programs if _parses(program)]
    tame = [program for program in parsed if not risky(program)]
    if parsed and not tame:
        return "risky operations"
    steady = [program for program in tame if is_deterministic(source, program)]
    if tame and not steady:
        return "non-deterministic"
    bench = evaluate(source)
    costs = {program: found.cost for program in steady if (found := bench(program)).right}
    if not costs:
        return "nothing right"
    chosen = next(iter(costs)) if start == "first" else min(costs, key=lambda program: costs[program])
    program = optimise(source, chosen).program
    found = bench(program)
    if not found.right or found.cost > costs[chosen]:  # whoever optimised did it by another bench
        program, found = chosen, bench(chosen)
    if risky(program):
        return "risky operations"
    initial = chosen if start == "first" else max(costs, key=lambda one: costs[one])
    if not found.cost < (1 - least_gain) * costs[initial]:
        return "gain too small"
    return Item(source.id, source.prompt, source.entry_point, program, found.cost, initial, costs[initial])


def _parses(program: str) -> bool:
    try:
        ast.parse(program)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True


# ---------------------------------------------------------------------------------------------------------- apart from evaluation


def similarity(one: str, other: str) -> float:
    """How much of the shorter text's triples of words is in the other text, 0 to 1; where one has fewer than three words, of its words or
    pairs.

    >>> similarity("Return the sum of a list.", "Please return the sum of a list of numbers"), similarity("a b c d", "b a d c")
    (1.0, 0.0)
    """
    size = min(3, len(_words(one)), len(_words(other)))
    if not size:
        return 0.0
    first, second = _runs(one, size), _runs(other, size)
    return len(first & second) / min(len(first), len(second))


@lru_cache(maxsize=4096)
def _words(text: str) -> tuple[str, ...]:
    return tuple(re.findall(r"\w+", text.lower()))


@lru_cache(maxsize=4096)
def _runs(text: str, size: int) -> frozenset[tuple[str, ...]]:
    words = _words(text)
    return frozenset(tuple(words[n : n + size]) for n in range(len(words) - size + 1))


@dataclass(frozen=True)
class Split:
    """The data points that are no task of the evaluation, and the ids of the others with the reason."""

    items: tuple[Item, ...]
    left_out: Mapping[str, str]


def apart_from(items: Iterable[Item], evaluation: Mapping[str, tuple[str, str]], *, alike: float = ALIKE) -> Split:
    """Leave out what is, or may be, a task of the evaluation: one with its entry point, or a prompt of at least `alike` similarity.

    `evaluation` is by id a task's prompt and its entry point. A common entry point ("solve") leaves out everything of that name: rather too
    much than too little. Raises ValueError for no evaluation, since nothing could then be in it.
    """
    checks.number("alike", alike, above=0, high=1)
    if not evaluation:
        raise ValueError("evaluation must hold one task or more, got none")
    names = {entry: task for task, (_, entry) in evaluation.items()}
    kept, left_out = [], {}
    for item in items:
        if item.entry_point in names:
            left_out[item.id] = f"its entry point is that of {names[item.entry_point]}"
            continue
        nearness = {task: similarity(item.prompt, prompt) for task, (prompt, _) in evaluation.items()}
        nearest = max(nearness, key=lambda task: nearness[task])
        if nearness[nearest] >= alike:
            left_out[item.id] = f"its prompt is like that of {nearest}"
        else:
            kept.append(item)
    return Split(tuple(kept), left_out)


# ------------------------------------------------------------------------------------------------------------------ for trainers


def chat(item: Item) -> dict[str, list[dict[str, str]]]:
    """A data point as trainers read it: {"messages": [the user's task, the assistant's program in a fenced block]}.

    >>> made = chat(Item("t", "Add one.", "f", "def f(n): return n + 1", 1.0, "", 2.0))
    >>> [message["role"] for message in made["messages"]]
    ['user', 'assistant']
    """
    asked = f"{item.prompt.strip()}\n\nWrite a Python function `{item.entry_point}`."
    return {
        "messages": [
            {"role": "user", "content": asked},
            {"role": "assistant", "content": f"```python\n{item.program.strip()}\n```"},
        ]
    }


def write_chat(path: Path | str, items: Sequence[Item]) -> None:
    """Write a line of JSON a data point, whole or not at all. trl takes the file as it is, LLaMA-Factory as `formatting: sharegpt` with
    the tags of OpenAI's messages. Raises ValueError for no items and for a cost that is not finite: no wrong program is data."""
    from assay.paths import atomic_file

    if not items:
        raise ValueError("items must be one or more, got none")
    for item in items:
        if not (math.isfinite(item.cost) and item.cost <= item.initial_cost):
            raise ValueError(
                f"items must be right and cost no more than they began with, got {item.cost} for {item.id!r}"
            )
    with atomic_file(Path(path)) as target, open(target, "w", encoding="utf-8") as file:
        for item in items:
            file.write(json.dumps(chat(item), ensure_ascii=False) + "\n")
