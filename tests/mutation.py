"""Do the tests notice when the code is wrong? `make mutants`, or `python tests/mutation.py --help`.

Small faults are put one at a time into a copy of the source tree, and the tests of the faulty module run there. A fault that no test
notices is a survivor: either a test is missing, or the fault changes nothing that anybody could see. Those that change nothing
are listed, each with its reason, in `tests/mutation_equivalents.toml`, and are not tried.

Which tests run: those of the module's package (`tests/tuner` for `src/assay/tuner/search.py`) that are not marked slow, sweep or
gpu, until the first fails. Those most likely to fail come first: `test_<module>.py`, then the files that name the module, then the
others. For a file outside of PACKAGES (with --only) the others are left out.

The places are drawn by a seed: a mutant's rank is a hash of the seed and its name, so that an edit moves only the mutants it
touches. Every result is in the journal as soon as it is known; run again, the script tries only what it has not tried on exactly
these sources and tests. One process runs at a time.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import copy
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PACKAGES = ("measure", "evidence", "tuner")
SEED, COUNT = 20, 60
TEST_SECONDS = 60  # that one test may take under a fault; a healthy one takes a few
NOT_COPIED = (".*", "__pycache__", "out", "build", "dist", "*.egg-info")


# -------------------------------------------------------------------------------------------------------------- mutants


@dataclass(frozen=True)
class Mutant:
    """One fault: in `file` (below src/assay), in the function or class `place`, the code `was` becomes `now`."""

    file: str
    line: int
    place: str
    was: str
    now: str
    nth: int  # of the same change in the same place, from 1
    spot: int  # the syntax node: mutants of one spot exclude each other
    number: int  # among all of the file

    @property
    def name(self) -> str:
        """What identifies it as long as that code stands, wherever it moves."""
        again = f" #{self.nth}" if self.nth > 1 else ""
        return f"{self.file} {self.place}: {self.was} -> {self.now}{again}"


def mutants(source: str, file: str) -> list[Mutant]:
    """Every fault of one module, in the order of its code."""
    found: list[Mutant] = []
    seen: Counter[tuple[str, str, str]] = Counter()
    for spot, node, changed, parents in _faults(ast.parse(source)):
        parent = parents[node]
        shown = parent if isinstance(node, ast.Constant | ast.Name) else node
        was = _one_line(shown)
        with _replaced(node, changed, parent):
            now = _one_line(changed if shown is node else shown)
        place = _place(node, parents)
        seen[place, was, now] += 1
        line = next(at.lineno for at in (node, parent, parents.get(parent)) if hasattr(at, "lineno"))
        found.append(Mutant(file, line, place, was, now, seen[place, was, now], spot, len(found)))
    return found


def faulty(source: str, mutant: Mutant) -> str:
    """The module with the fault in it."""
    tree = ast.parse(source)
    for number, (_, node, changed, parents) in enumerate(_faults(tree)):
        if number == mutant.number:
            with _replaced(node, changed, parents[node]):
                return ast.unparse(tree)
    raise ValueError(f"no such mutant: {mutant.name}")


def _faults(tree: ast.Module) -> Iterator[tuple[int, ast.AST, ast.AST, dict[ast.AST, ast.AST]]]:
    """(number of the node, the node, what it becomes, the parents of all nodes)."""
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    for spot, node in enumerate(_real_code(tree)):
        for changed in _changes(node, parents[node]):
            yield spot, node, changed, parents


def _real_code(tree: ast.Module) -> list[ast.AST]:
    """The nodes where a fault may be: no types, decorators, protocols, messages of errors, and nothing that only mypy sees or
    that makes a module a script."""
    nodes: list[ast.AST] = []

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.ClassDef) and any(_called(base, "Protocol") for base in node.bases):
            return
        if isinstance(node, ast.If) and re.search(r"\bTYPE_CHECKING\b|\b__name__\b", ast.unparse(node.test)):
            return
        if isinstance(node, ast.Subscript) and _called(node.value, "Literal"):
            return
        if isinstance(node, ast.Raise | ast.Import | ast.ImportFrom):
            return
        if isinstance(node, ast.keyword) and node.arg == "strict":  # of zip: an assertion
            return
        nodes.append(node)
        for field, value in ast.iter_fields(node):
            if field in ("annotation", "returns", "decorator_list", "bases", "format_spec"):
                continue
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    visit(child)

    for statement in tree.body:
        visit(statement)
    return nodes


ORDER: dict[type, tuple[type, ...]] = {
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
}
ARITHMETIC: dict[type, type] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.Pow: ast.Mult,
    ast.BitOr: ast.BitAnd,
    ast.BitAnd: ast.BitOr,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
}
CALLS = {"min": "max", "max": "min", "any": "all", "all": "any"}


def _changes(node: ast.AST, parent: ast.AST) -> Iterator[ast.AST]:
    """What the node may become by one fault."""

    def made(**fields: Any) -> Any:
        changed = copy.copy(node)
        for name, value in fields.items():
            setattr(changed, name, value)
        return changed

    if isinstance(node, ast.Compare):
        for i, operator in enumerate(node.ops):
            for other in ORDER[type(operator)]:
                yield made(ops=[*node.ops[:i], other(), *node.ops[i + 1 :]])
    elif isinstance(node, ast.BinOp | ast.AugAssign) and type(node.op) in ARITHMETIC and not _of_text(node):
        yield made(op=ARITHMETIC[type(node.op)]())
    elif isinstance(node, ast.BoolOp):
        yield made(op=ast.Or() if isinstance(node.op, ast.And) else ast.And())
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub):
        yield node.operand
    elif isinstance(node, ast.Constant):
        yield from (made(value=value) for value in _values(node.value))
    elif isinstance(node, ast.Name) and node.id in CALLS and isinstance(parent, ast.Call) and parent.func is node:
        yield made(id=CALLS[node.id])
    elif isinstance(node, ast.Slice):
        if node.lower is not None:
            yield made(lower=None)
        if node.upper is not None:
            yield made(upper=None)
    elif isinstance(node, ast.Return) and node.value is not None and ast.unparse(node.value) != "None":
        yield made(value=None)
    elif isinstance(node, ast.Break):
        yield ast.Continue()
    elif isinstance(node, ast.Continue):
        yield ast.Break()
    if _is_condition(node, parent) and not isinstance(node, ast.Compare | ast.BoolOp | ast.UnaryOp):
        yield ast.UnaryOp(ast.Not(), node)


def _values(value: object) -> list[Any]:
    """Other numbers and truth values; text stays."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int | float):
        return [1] if value == 0 else [value + 1, value * 2] if value != 1 else [2, 0]
    return []


def _of_text(node: ast.BinOp | ast.AugAssign) -> bool:
    """Whether an operand is plainly text or a list: other arithmetic on it fails at once, which says nothing of the tests."""
    kinds = (ast.JoinedStr, ast.List, ast.ListComp, ast.Tuple, ast.Dict, ast.DictComp)
    operands = [node.left, node.right] if isinstance(node, ast.BinOp) else [node.value]
    return any(isinstance(n, kinds) or (isinstance(n, ast.Constant) and isinstance(n.value, str)) for n in operands)


def _is_condition(node: ast.AST, parent: ast.AST) -> bool:
    if isinstance(parent, ast.comprehension):
        return node in parent.ifs
    return isinstance(parent, ast.If | ast.While | ast.IfExp) and parent.test is node


def _called(node: ast.AST, name: str) -> bool:
    return ast.unparse(node).split("[")[0].split(".")[-1] == name


def _place(node: ast.AST, parents: dict[ast.AST, ast.AST]) -> str:
    """The dotted name of the functions and classes around the node."""
    names: list[str] = []
    at: ast.AST | None = node
    while at is not None:
        if isinstance(at, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.insert(0, at.name)
        at = parents.get(at)
    return ".".join(names) or "(module)"


def _one_line(node: ast.AST) -> str:
    """The code of a node; of a statement that holds others, its first line."""
    text = ast.unparse(node)
    return text.splitlines()[0] if isinstance(node, ast.stmt | ast.ExceptHandler) else " ".join(text.split())


@contextlib.contextmanager
def _replaced(node: ast.AST, other: ast.AST, parent: ast.AST) -> Iterator[None]:
    """The tree with `other` in the place of `node`, for as long as the block runs."""
    for field, value in ast.iter_fields(parent):
        if value is node:
            setattr(parent, field, other)
            yield
            setattr(parent, field, node)
            return
        if isinstance(value, list) and any(item is node for item in value):
            at = next(i for i, item in enumerate(value) if item is node)
            value[at] = other
            yield
            value[at] = node
            return
    raise AssertionError("a node is not where its parent says")


# -------------------------------------------------------------------------------------------------------------- choosing


def draw(found: Iterable[Mutant], count: int, seed: int) -> list[Mutant]:
    """`count` of the mutants, at most one a spot, in the order of the source; the same for the same seed and source."""
    ranked = sorted(found, key=lambda mutant: hashlib.sha256(f"{seed} {mutant.name}".encode()).digest())
    chosen: dict[tuple[str, int], Mutant] = {}
    for mutant in ranked:
        if len(chosen) == count:
            break
        chosen.setdefault((mutant.file, mutant.spot), mutant)
    return sorted(chosen.values(), key=lambda mutant: (mutant.file, mutant.spot))


def of_files(root: Path, files: Iterable[str]) -> list[Mutant]:
    """Every mutant of some files below src/assay."""
    return [
        mutant
        for file in files
        for mutant in mutants((root / "src" / "assay" / file).read_text(encoding="utf-8"), file)
    ]


def files_of(root: Path, packages: Iterable[str]) -> list[str]:
    """The modules of packages, below src/assay; migrations of the database and other folders are not among them."""
    source = root / "src" / "assay"
    return [
        path.relative_to(source).as_posix() for package in packages for path in sorted((source / package).glob("*.py"))
    ]


def wanted(root: Path, only: Iterable[str]) -> list[Mutant]:
    """All mutants at places written PATH or PATH:LINE, with or without src/assay/ before the path. ValueError where there is none."""
    found: list[Mutant] = []
    for place in only:
        path, _, line = place.partition(":")
        file = path.removeprefix("src/assay/")
        if not (root / "src" / "assay" / file).is_file():
            raise ValueError(f"--only: there is no file src/assay/{file}")
        here = [mutant for mutant in of_files(root, [file]) if not line or mutant.line == int(line)]
        if not here:
            raise ValueError(f"--only: nothing to change at {place}")
        found += here
    return found


def equivalents(file: Path) -> dict[str, str]:
    """Name of the mutant -> why no test can tell it from the code."""
    if not file.exists():
        return {}
    entries = tomllib.loads(file.read_text(encoding="utf-8")).get("equivalent", [])
    return {entry["mutant"]: entry["why"] for entry in entries}


def suite_of(root: Path, file: str) -> list[str]:
    """The test files to run for a module, the likeliest to fail first."""
    module = Path(file)
    folder = root / "tests" / module.parent
    dotted = ".".join(("assay", *module.parent.parts))
    names = re.compile(rf"{dotted}\.{module.stem}\b|from {dotted} import [^\n]*\b{module.stem}\b")

    def rank(path: Path) -> int:
        if path.stem == f"test_{module.stem}":
            return 0
        return 1 if names.search(path.read_text(encoding="utf-8")) else 2

    ranked = sorted((rank(path), path.relative_to(root).as_posix()) for path in folder.glob("test_*.py"))
    return [path for order, path in ranked if order < 2 or module.parts[0] in PACKAGES]


# -------------------------------------------------------------------------------------------------------------- running


@dataclass(frozen=True)
class Result:
    """What became of a mutant: "killed", "timeout" (it hung, which is noticed as well), "survived" or "equivalent"."""

    name: str
    line: int
    status: str
    seconds: float = 0.0
    by: str = ""  # the test that failed first, or why it is equivalent


class Copy:
    """A copy of the tree in which modules are made faulty."""

    def __init__(self, root: Path, folder: Path) -> None:
        self.root = folder / "tree"
        shutil.copytree(root, self.root, ignore=shutil.ignore_patterns(*NOT_COPIED))
        self.environment = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(self.root / "src"), str(self.root)]),
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, "-c", "import assay; print(assay.__file__)"]
        done = subprocess.run(command, cwd=self.root, env=self.environment, capture_output=True, text=True)
        if not done.stdout.startswith(str(self.root)):
            raise RuntimeError(f"the copy is not what is imported: {done.stdout}{done.stderr}")

    @contextlib.contextmanager
    def holding(self, file: str, source: str) -> Iterator[None]:
        """Another text in a module for as long as the block runs. Compiled files of it are removed: they may look fresh."""
        path = self.root / "src" / "assay" / file
        before = path.read_text(encoding="utf-8")

        def write(text: str) -> None:
            path.write_text(text, encoding="utf-8")
            for compiled in (path.parent / "__pycache__").glob(f"{path.stem}.*"):
                compiled.unlink()

        write(source)
        try:
            yield
        finally:
            write(before)

    def test(self, files: list[str], seconds: float) -> tuple[int | None, str]:
        """pytest's exit status (None: stopped after so many seconds) and what it printed; always the same examples."""
        options = ["-q", "-x", "--tb=line", "-p", "no:cacheprovider", f"--timeout={TEST_SECONDS}"]
        options += ["-m", "not slow and not sweep and not gpu"]
        if any("hypothesis" in (self.root / file).read_text(encoding="utf-8") for file in files):
            options.append("--hypothesis-seed=0")
            shutil.rmtree(self.root / ".hypothesis", ignore_errors=True)
        with tempfile.TemporaryFile("w+") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "pytest", *options, *files],
                cwd=self.root,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                status: int | None = process.wait(seconds)
            except subprocess.TimeoutExpired:
                status = None
            finally:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            output.seek(0)
            return status, output.read()


def try_mutant(tree: Copy, mutant: Mutant, seconds: float) -> Result:
    """Run the mutant's tests against it."""
    start = time.perf_counter()
    source = (tree.root / "src" / "assay" / mutant.file).read_text(encoding="utf-8")
    with tree.holding(mutant.file, faulty(source, mutant)):
        status, output = tree.test(suite_of(tree.root, mutant.file), seconds)
    spent = round(time.perf_counter() - start, 1)
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", output, re.MULTILINE)
    by = failed.group(1) if failed else ""
    if status is None or "from pytest-timeout" in output:
        return Result(mutant.name, mutant.line, "timeout", spent, by)
    return Result(mutant.name, mutant.line, "survived" if status in (0, 5) else "killed", spent, by)


def healthy_seconds(tree: Copy, files: Iterable[str]) -> dict[str, float]:
    """How long the tests of each folder take without a fault, its modules being written as mutants are, but for the fault.

    Raises RuntimeError where they fail: then a failure under a fault would say nothing.
    """
    folders: dict[str, list[str]] = {}
    for file in files:
        folders.setdefault(str(Path(file).parent), []).append(file)
    taken = {}
    for folder, modules in folders.items():
        tests = list(dict.fromkeys(test for module in modules for test in suite_of(tree.root, module)))
        if not tests:
            raise RuntimeError(f"no test is there for {', '.join(modules)}")
        start = time.perf_counter()
        with contextlib.ExitStack() as stack:
            for module in modules:
                source = (tree.root / "src" / "assay" / module).read_text(encoding="utf-8")
                stack.enter_context(tree.holding(module, ast.unparse(ast.parse(source))))
            status, output = tree.test(tests, 3600)
        if status != 0:
            raise RuntimeError(f"the tests of {folder} fail without any fault:\n{output[-3000:]}")
        taken[folder] = time.perf_counter() - start
    return taken


def digest(root: Path) -> str:
    """A hash of the sources and tests: results of others do not count."""
    found = hashlib.sha256()
    for path in sorted([*(root / "src").rglob("*"), *(root / "tests").rglob("*"), root / "pyproject.toml"]):
        # what is equivalent is read afresh, and neither it nor this script is part of what is tested
        if (
            path.is_file()
            and "__pycache__" not in path.parts
            and not path.name.startswith(("mutation", "test_mutation"))
        ):
            found.update(f"{path.relative_to(root)}\n".encode() + path.read_bytes())
    return found.hexdigest()


def run(
    root: Path, chosen: list[Mutant], known: dict[str, str], journal: Path, say: Callable[[str], None] = print
) -> list[Result]:
    """Try the mutants one after the other, but for those that are equivalent or in the journal; the results in their order."""
    state = digest(root)
    done: dict[str, Result] = {}
    if journal.exists():
        for line in journal.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(
                ValueError, KeyError, TypeError
            ):  # a line that was being written when the run was killed
                entry = json.loads(line)
                if entry.pop("tree") == state:
                    done[entry["name"]] = Result(**entry)
    for mutant in chosen:
        if mutant.name in known:
            done[mutant.name] = Result(mutant.name, mutant.line, "equivalent", by=known[mutant.name])
    waiting = [mutant for mutant in chosen if mutant.name not in done]
    say(f"{len(chosen)} mutants, {len(waiting)} to try")
    if waiting:
        journal.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="assay-mutants-") as folder:
            os.chmod(folder, 0o755)  # a test gives up root's rights and reads the tree still
            tree = Copy(root, Path(folder))
            say("the tests without any fault:")
            healthy = healthy_seconds(tree, dict.fromkeys(mutant.file for mutant in waiting))
            for where, seconds in healthy.items():
                say(f"  {where}: {seconds:.0f} s")
            for number, mutant in enumerate(waiting, 1):
                limit = 60 + 4 * healthy[str(Path(mutant.file).parent)]
                result = done[mutant.name] = try_mutant(tree, mutant, limit)
                with journal.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(asdict(result) | {"tree": state}) + "\n")
                say(f"[{number}/{len(waiting)}] {_row(result)}")
    return [done[mutant.name] for mutant in chosen]


def _row(result: Result) -> str:
    file, _, change = result.name.partition(" ")
    return f"{result.status:10} {result.seconds:6.1f} s  {file}:{result.line}  {change}" + (
        f"  [{result.by}]" if result.by else ""
    )


def report(results: list[Result]) -> dict[str, Any]:
    """The counts, the share that was noticed, and every result, ready for JSON."""
    counts = Counter(result.status for result in results)
    real = len(results) - counts["equivalent"]
    noticed = counts["killed"] + counts["timeout"]
    return {
        "counts": {status: counts[status] for status in ("killed", "timeout", "survived", "equivalent")},
        "noticed": noticed / real if real else None,
        "mutants": [asdict(result) for result in results],
    }


def table(results: list[Result]) -> str:
    """The results, survivors last, and the counts."""
    order = ("equivalent", "killed", "timeout", "survived")
    found = report(results)
    lines = [_row(result) for result in sorted(results, key=lambda result: order.index(result.status))]
    lines.append(", ".join(f"{count} {status}" for status, count in found["counts"].items()))
    if found["noticed"] is not None:
        lines.append(f"noticed: {100 * found['noticed']:.0f} % of those that are not equivalent")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Put small faults into a copy of the source and see whether tests notice."
    )
    parser.add_argument("--count", type=int, default=COUNT, help=f"how many places are drawn (default {COUNT})")
    parser.add_argument("--seed", type=int, default=SEED, help=f"of the draw (default {SEED})")
    parser.add_argument("--package", action="append", choices=PACKAGES, help="draw from this one only; may be repeated")
    parser.add_argument(
        "--only", action="append", metavar="PATH[:LINE]", help="all faults there, instead of a draw; may be repeated"
    )
    parser.add_argument("--skip", action="append", default=[], metavar="PATH", help="draw nothing from that file")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "out" / "mutants", help="folder of journal.jsonl and report.json"
    )
    parser.add_argument("--list", action="store_true", help="name the mutants and stop")
    options = parser.parse_args(arguments)
    skipped = {path.removeprefix("src/assay/") for path in options.skip}
    try:
        if options.only:
            chosen = wanted(ROOT, options.only)
        else:
            files = [file for file in files_of(ROOT, options.package or PACKAGES) if file not in skipped]
            chosen = draw(of_files(ROOT, files), options.count, options.seed)
        if options.list:
            print("\n".join(f"{mutant.line:4}  {mutant.name}" for mutant in chosen))
            return 0
        known = equivalents(ROOT / "tests" / "mutation_equivalents.toml")
        results = run(ROOT, chosen, known, options.out / "journal.jsonl", lambda text: print(text, flush=True))
    except (ValueError, RuntimeError) as error:
        print(error, file=sys.stderr)
        return 2
    print("\n" + table(results))
    options.out.mkdir(parents=True, exist_ok=True)
    document = report(results) | {"seed": None if options.only else options.seed}
    (options.out / "report.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return 1 if any(result.status == "survived" for result in results) else 0


if __name__ == "__main__":
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(143)
    )  # so that the tests it runs end with it, as they do on Ctrl-C
    sys.exit(main())
