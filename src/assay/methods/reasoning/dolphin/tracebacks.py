"""What a traceback says of the script: its own frames, in order, every cause, and how the code around them is
called."""

from __future__ import annotations

import ast
import itertools
import re
import sysconfig
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

_FRAME = re.compile(r'^  File "(?P<file>[^"]*)", line (?P<line>\d+)(?:, in (?P<function>.+))?$')
_HEAD = "Traceback (most recent call last):"
_GROUP = re.compile(r"^(?:  )+(?:[|+] |\+-[-+ \d]*$)")
"""What stands before the lines of an exception group, and between its members."""
_ERROR = re.compile(r"^(?P<kind>[^\W\d](?:\w|\.|<locals>)*)(?::(?: (?P<message>.*))?)?$")
_LIBRARY = ("/site-packages/", "/dist-packages/")


@dataclass(frozen=True)
class Frame:
    """A line of a traceback: the file, its line (from 1), the function ("<module>" outside of one), and the code as it
    was printed."""

    file: str
    line: int
    function: str
    code: str = ""


@dataclass(frozen=True)
class Failure:
    """An exception with its frames, the outermost first. A traceback with causes ("during handling of ...") has
    several."""

    kind: str
    message: str
    frames: tuple[Frame, ...]


def parse(text: str) -> list[Failure]:
    """The exceptions of a traceback as Python prints it, in its order: causes first, what ended the program last. Of an
    exception group the members that were raised come behind it.

    A message is its first line and what is indented below it. Other text around it is passed over; "" and text without
    a traceback give none.

    >>> parse('Traceback (most recent call last):\\n  File "a.py", line 3, in f\\n    x\\nNameError: name x')
    [Failure(kind='NameError', message='name x', frames=(Frame(file='a.py', line=3, function='f', code='x'),))]
    """
    found: list[Failure] = []
    frames: list[Frame] | None = None
    lines = lines_of(text)
    if any(line.endswith(f"+ Exception Group {_HEAD}") for line in lines):
        lines = [_GROUP.sub("", line) for line in lines]
    for n, line in enumerate(lines):
        place = _FRAME.match(line)
        if line.strip().removeprefix("Exception Group ") == _HEAD:
            frames = []
        elif place:  # without a head: that is how a syntax error of the script itself is printed
            frames = frames if frames is not None else []
            after = lines[n + 1] if n + 1 < len(lines) else ""
            code = after.strip() if after.startswith("    ") else ""
            frames.append(Frame(place["file"], int(place["line"]), place["function"] or "<module>", code))
        elif frames is not None and line and not line.startswith(" ") and (error := _ERROR.match(line)):
            below = itertools.takewhile(_continues, lines[n + 1 :])
            found.append(Failure(error["kind"], "\n".join([error["message"] or "", *below]), tuple(frames)))
            frames = None
    return found


def _continues(line: str) -> bool:
    """Whether a line behind an error belongs to its message."""
    return line.startswith((" ", "\t")) and not _FRAME.match(line)


def lines_of(text: str) -> list[str]:
    """Lines as Python counts them: form feeds and the separators of Unicode end none.

    >>> lines_of("a\\x0cb\\r\\nc")
    ['a\\x0cb', 'c']
    """
    return [line.rstrip("\r\n") for line in kept_lines(text)]


def kept_lines(text: str) -> list[str]:
    """The same with their ends."""
    return re.findall(r"[^\r\n]*(?:\r\n|\r|\n)|[^\r\n]+$", text)


def is_library(file: str) -> bool:
    """Whether a file is the standard library's, an installed package's, or no file ("<frozen runpy>", "<string>")."""
    paths = sysconfig.get_paths()
    roots = tuple(paths[name].rstrip("/") + "/" for name in ("stdlib", "platstdlib"))
    return file.startswith((*roots, "<")) or any(part in file for part in _LIBRARY)


def own_frames(
    failures: Sequence[Failure], source: str | None = None, *, library: Callable[[str], bool] = is_library
) -> list[Failure]:
    """The same failures with the script's own frames only, in order; a failure that has none stays, without frames.

    With the script's `source` frames are left out too whose code does not stand on their line of it: they are another
    file's.
    """
    lines = None if source is None else lines_of(source)

    def own(frame: Frame) -> bool:
        if library(frame.file) or lines is None:
            return not library(frame.file)
        return frame.line <= len(lines) and (not frame.code or lines[frame.line - 1].strip() == frame.code)

    return [Failure(one.kind, one.message, tuple(filter(own, one.frames))) for one in failures]


_PARSING = threading.Lock()  # Python 3.11 counts the depth of all threads together, and raises SystemError


def tree_of(source: str) -> ast.Module | None:
    """The syntax tree; None where there is none: no Python, a NUL, nested too deeply."""
    try:
        with _PARSING:
            return ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


@dataclass(frozen=True)
class Part:
    """A function of the script (or its top level, "<module>"): where it stands, its signature, what it calls of the
    script, who calls it."""

    name: str
    first: int
    last: int
    signature: str
    calls: tuple[str, ...]
    called_at: tuple[tuple[str, int], ...]


def local_structure(source: str, failures: Sequence[Failure]) -> list[Part]:
    """The parts of a script around the frames of its failures, innermost first: each frame's function, and what it
    calls and who calls it.

    Shapes are not in it: the paper's model is asked for them, and the syntax tree does not know. A script that cannot
    be parsed gives no part.
    Pass `own_frames` of this source: a frame is looked up by its line alone, and passed over behind the last one.

    >>> script = "def f(a, b):\\n    return g(a)\\n\\ndef g(x):\\n    return y\\n\\nf(1, 2)\\n"
    >>> trace = Failure("NameError", "y", (Frame("m.py", 7, "<module>"), Frame("m.py", 2, "f"), Frame("m.py", 5, "g")))
    >>> [(part.name, part.called_at) for part in local_structure(script, [trace])]
    [('g', (('f', 2),)), ('f', (('<module>', 7),)), ('<module>', ())]
    """
    tree = tree_of(source)
    if tree is None:
        return []
    parts = parts_of(tree, len(lines_of(source)))
    wanted: list[str] = []
    for failure in reversed(failures):
        for frame in reversed(failure.frames):
            inside = [part for part in parts.values() if part.first <= frame.line <= part.last]
            wanted += [min(inside, key=lambda part: part.last - part.first).name] if inside else []
    around = [
        name for near in list(wanted) for name in (*parts[near].calls, *(who for who, _ in parts[near].called_at))
    ]
    return [parts[name] for name in dict.fromkeys((*wanted, *around))]


def parts_of(tree: ast.Module, lines: int) -> dict[str, Part]:
    """Every function and method of a module by its name ("Class.method"; one of a name that is there already, such as a
    setter, "Class.method, line 7"), and the module itself."""
    spans: dict[str, ast.FunctionDef | ast.AsyncFunctionDef] = {}

    def walk(node: ast.AST, above: str) -> None:
        for child in ast.iter_child_nodes(node):
            if not isinstance(child, ast.stmt | ast.excepthandler | ast.match_case):
                continue  # no function stands in an expression, which may be nested more deeply than Python recurses
            name = above
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                name = f"{above}.{child.name}" if above else child.name
                spans[name if name not in spans else f"{name}, line {child.lineno}"] = child
            elif isinstance(child, ast.ClassDef):
                name = f"{above}.{child.name}" if above else child.name
            walk(child, name)

    walk(tree, "")
    by_last: dict[str, list[str]] = {}
    for name in spans:
        last = name.partition(",")[0].rpartition(".")[2]
        by_last.setdefault(name.split(".")[-2] if last == "__init__" and "." in name else last, []).append(name)
    calls: dict[str, list[tuple[str, int]]] = {name: [] for name in (*spans, "<module>")}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        around = [name for name, own in spans.items() if own.lineno <= node.lineno <= (own.end_lineno or own.lineno)]
        inside = max(around, key=lambda name: spans[name].lineno, default="<module>")
        calls[inside] += [(name, node.lineno) for name in by_last.get(called, ())]
    made = {
        name: Part(
            name,
            own.lineno,
            own.end_lineno or own.lineno,
            f"{own.name}({ast.unparse(own.args)})",
            tuple(dict.fromkeys(called for called, _ in calls[name] if called != name)),
            tuple(
                (who, line) for who, found in calls.items() for called, line in found if called == name and who != name
            ),
        )
        for name, own in spans.items()
    }
    top = tuple(dict.fromkeys(called for called, _ in calls["<module>"]))
    return {**made, "<module>": Part("<module>", 1, max(lines, 1), "<module>", top, ())}


def told(failures: Sequence[Failure], parts: Sequence[Part]) -> str:
    """Failures and parts in words, for a model that repairs. A frame of a recursion is told once."""
    lines = []
    for one in failures:
        frames = dict.fromkeys(f"  line {f.line}, in {f.function}: {f.code}" for f in one.frames)
        lines += [f"{one.kind}: {one.message}", *frames]
    for part in parts:
        lines.append(f"{part.signature}, lines {part.first} to {part.last}")
        if part.calls:
            lines.append(f"  calls {', '.join(part.calls)}")
        lines += [f"  called by {who}, line {line}" for who, line in part.called_at]
    return "\n".join(lines)
