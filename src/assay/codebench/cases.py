"""Inputs for a program, from JSON lines: arguments of a function, or text for stdin."""

from __future__ import annotations

import ast
import json
import marshal
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from assay.errors import InputError
from assay.methods.core.programs.workers import Workers
from assay.methods.core.sandbox import Limits
from assay.workloads.programs.compare import Compare, named
from assay.workloads.programs.task import UNKNOWN

KEYS = ("args", "kwargs", "python", "stdin", "expected", "compare")
MOST_BYTES = 2**30


@dataclass(frozen=True)
class Input:
    """One case: `args` and `kwargs` of a call, or `stdin` of a whole program; `expected` is `UNKNOWN` where nobody said."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    stdin: str | None = None
    expected: Any = UNKNOWN
    compare: str = "same"

    @property
    def same(self) -> Compare:
        """How an answer is compared: by a name of `workloads.programs.compare`."""
        return named(self.compare)


def read_cases(path: Path) -> list[Input]:
    """Cases from JSON lines, each an object:

    - `{"args": [...], "kwargs": {...}, "expected": ...}` calls the function; JSON has lists only, where a tuple counts too;
    - `{"python": "([1] * 10**5, 0.5)", "expected": ...}` has the tuple of arguments as a Python expression, evaluated in the sandbox;
    - `{"stdin": "...", "expected": "..."}` runs the whole program.

    `compare` names how answers are compared (same, close, sequence, unordered, figure). Raises InputError naming the line.
    """
    found: list[Input] = []
    try:
        if path.stat().st_size > MOST_BYTES:
            raise InputError(f"{path} must be at most {MOST_BYTES >> 20} MiB: write large inputs as expressions")
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    for number, text in enumerate(lines, 1):
        if text.strip():
            found.append(_case(text, f"{path}, line {number}"))
    if not found:
        raise InputError(f"{path} must hold at least one case, a JSON object a line")
    if len({case.stdin is None for case in found}) > 1:
        raise InputError(f"{path} must hold calls or inputs of whole programs, not both")
    return found


def _case(text: str, where: str) -> Input:
    try:
        line = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not JSON: {error}") from None
    if not isinstance(line, dict) or set(line) - set(KEYS):
        raise InputError(f"{where}: must be an object with {', '.join(KEYS)}, got {text[:80]!r}")
    if sum(key in line for key in ("args", "python", "stdin")) != 1:
        raise InputError(f"{where}: must have one of args, python and stdin")
    expected = line.get("expected", UNKNOWN)
    compare = line.get("compare", "sequence" if "stdin" not in line else "same")
    try:
        named(compare)
    except (ValueError, TypeError) as error:
        raise InputError(f"{where}: {error}") from None
    kwargs = line.get("kwargs", {})
    if not isinstance(kwargs, dict):
        raise InputError(f"{where}: kwargs must be an object, got {kwargs!r}")
    if "stdin" in line:
        if not isinstance(line["stdin"], str) or (expected is not UNKNOWN and not isinstance(expected, str)) or kwargs:
            raise InputError(f"{where}: stdin and expected must be texts, without kwargs")
        return Input(stdin=line["stdin"], expected=expected, compare=compare)
    if "python" in line:
        return Input(_evaluated(line["python"], where), kwargs, None, expected, compare)
    if not isinstance(line["args"], list):
        raise InputError(f"{where}: args must be a list, got {line['args']!r}")
    return Input(tuple(line["args"]), kwargs, None, expected, compare)


def _evaluated(expression: Any, where: str) -> tuple[Any, ...]:
    try:
        ast.parse(expression, mode="eval")
    except (SyntaxError, TypeError, ValueError, RecursionError, MemoryError) as error:
        raise InputError(f"{where}: python must be an expression: {error}") from None
    limits = Limits(wall_seconds=60, cpu_seconds=20, memory_mib=2048, output_bytes=64 * 2**20)
    with Workers(limits=limits) as workers:
        [[outcome]] = workers.run(f"def arguments():\n    return ({expression}\n)\n", "arguments", [()])
    if outcome.state != "returned":
        raise InputError(f"{where}: the expression {outcome.error}")
    found = outcome.value
    if not isinstance(found, tuple):
        raise InputError(f"{where}: python must give a tuple of arguments: for one, write a comma behind it")
    marshal.dumps(found)
    return found


def entry_point_of(program: str, name: str | None, where: str) -> str:
    """The function to call: `name`, or the only public one that the program defines at its top level.

    Raises InputError where there are several or none, and for a name that stands nowhere in the program.
    """
    try:
        tree = ast.parse(program)
    except (SyntaxError, ValueError, RecursionError) as error:
        raise InputError(f"{where} is not Python: {error}") from None
    defined = [node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    public = [found for found in defined if not found.startswith("_")]
    if name is not None:
        bound = {getattr(node, key, None) for node in ast.walk(tree) for key in ("name", "asname", "id")}
        if not {name, "*"} & bound:
            listed = ", ".join(public) or "none"
            raise InputError(f"--entry must name a function of {where}, got {name!r}; it defines {listed}")
        return name
    if len(public) != 1:
        raise InputError(f"--entry must name the function of {where} to call: {', '.join(public) or 'it defines none'}")
    return public[0]
