"""What a program does, as far as a caller can see: what it returns, raises, prints and changes, and which lines take its time.

Calls are recorded while a suite of tests runs in the sandbox; later any version of the program is given the same arguments there, and
what it did is described in plain values that are compared outside.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from assay.codebench.optimised import lines_of
from assay.errors import InputError
from assay.methods.core.programs import values
from assay.methods.core.programs.processes import Program, pytest_suite
from assay.methods.core.programs.values import decode
from assay.methods.core.programs.workers import Workers
from assay.methods.core.sandbox import Limits, Sandbox

RECORD = "assay_calls.json"
END = "assay: pytest came to its end"
"""What a process of pytest prints at last. Whoever writes a program to deceive may print it too."""
MOST_CALLS = 200
"""Different calls of one function that are recorded."""
RECORDER = """

def _assay_record():
    import atexit, functools, inspect, os, sys, time, types
    from _assay_values import encode
    here, module = os.path.dirname(os.path.abspath(__file__)), sys.modules[__name__]
    calls, inner, opaque, lines, depth = {}, {}, {}, {}, [0]
    last, mark = [0], [0.0]

    def local(frame, event, _):
        now = time.perf_counter()
        lines[last[0]] = lines.get(last[0], 0.0) + now - mark[0]
        back = frame.f_back
        ours = back is not None and back.f_code.co_filename == __file__
        last[0] = frame.f_lineno if event != "return" else back.f_lineno if ours else 0
        mark[0] = time.perf_counter()
        return local

    def trace(frame, event, _):
        return local(frame, event, _) if frame.f_code.co_filename == __file__ else None

    def recorded(name, function):
        signature = inspect.signature(function)

        def called(*args, **kwargs):
            outer = depth[0] == 0
            found = (calls if outer else inner).setdefault(name, {})
            if len(found) < (%d if outer else 20):
                try:
                    bound = signature.bind(*args, **kwargs)
                    text = encode([tuple(bound.args), dict(bound.kwargs)])
                    if len(text) < 300000:
                        found[text] = None
                    else:
                        opaque[name] = opaque.get(name, 0) + 1
                except (TypeError, ValueError, RecursionError):
                    opaque[name] = opaque.get(name, 0) + outer
            depth[0] += 1
            if outer and %d:
                last[0] = 0
                sys.settrace(trace)
            try:
                return function(*args, **kwargs)
            finally:
                depth[0] -= 1
                if outer and %d:
                    sys.settrace(None)

        if isinstance(function, types.FunctionType):
            return functools.wraps(function)(called)

        class Proxy:
            __call__ = staticmethod(called)
            __wrapped__ = function

            def __getattr__(self, name):
                return getattr(function, name)

        return Proxy()

    for name, value in list(vars(module).items()):
        plain = isinstance(value, types.FunctionType) and value.__code__.co_filename == __file__
        kept = callable(value) and isinstance(getattr(value, "__wrapped__", None), types.FunctionType)
        if name != "_assay_record" and (plain or kept) and not inspect.iscoroutinefunction(value):
            setattr(module, name, recorded(name, value))

    def tell():
        with open(os.path.join(here, "%s"), "wb") as file:
            told = {"calls": {k: list(v) for k, v in calls.items()}, "inner": {k: list(v) for k, v in inner.items()}}
            file.write(encode({**told, "opaque": opaque, "lines": lines}))

    atexit.register(tell)


_assay_record()
del _assay_record
"""
OBSERVER = """

def _assay_observed(calls, _assay_all=globals()):
    import contextlib, hashlib, io, types
    seen, unknown = {}, [0]

    def told(value, depth=0):
        kind = type(value)
        if kind in (int, bool, str, type(None), bytes):
            return [kind.__name__, value]
        if kind in (float, complex):
            return [kind.__name__, repr(value)]
        if depth > 60:
            unknown[0] += 1
            return ["deep"]
        if kind is not tuple:
            if id(value) in seen:
                return ["again", seen[id(value)][0]]
            seen[id(value)] = (len(seen), value)
        if isinstance(value, (list, tuple)) or kind.__name__ in ("deque", "dict_keys", "dict_values"):
            items = list(value)
            kinds = set(map(type, items))
            if len(kinds) == 1 and kinds <= {int, str, bool}:
                return [kind.__name__, kinds.pop().__name__, items]
            return [kind.__name__, [told(one, depth + 1) for one in items]]
        if isinstance(value, (set, frozenset)):
            return [kind.__name__, sorted((told(one, depth + 1) for one in value), key=repr)]
        if isinstance(value, dict) or kind.__name__ == "dict_items":
            pairs = list(value.items() if isinstance(value, dict) else value)
            return [kind.__name__, [[told(key, depth + 1), told(item, depth + 1)] for key, item in pairs]]
        for base in (str, bytes, int, float, complex):
            if isinstance(value, base):
                return [kind.__name__, base.__repr__(value), told(getattr(value, "__dict__", {}), depth + 1)]
        if isinstance(value, (bytearray, memoryview)):
            return [kind.__name__, bytes(value)]
        if hasattr(value, "__next__"):
            return [kind.__name__, "iterator"]
        if callable(getattr(value, "tolist", None)):
            return [kind.__name__, str(getattr(value, "dtype", "")), told(value.tolist(), depth + 1)]
        if isinstance(value, (types.FunctionType, types.BuiltinFunctionType, types.MethodType, type, types.ModuleType)):
            unknown[0] += 1
            return [kind.__name__]
        if hasattr(value, "__dict__"):
            return [kind.__name__, told(vars(value), depth + 1)]
        unknown[0] += 1
        return [kind.__name__]

    def short(text):
        return text if len(text) < 2000 else hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()

    def one(name, args, kwargs):
        out, items = io.StringIO(), []
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
            try:
                value = _assay_all[name](*args, **kwargs)
                ended = "returned"
                if hasattr(value, "__next__"):
                    for item in value:
                        items.append(item)
                        if len(items) >= 100000:
                            break
            except BaseException as error:
                value, ended = None, type(error).__name__
        seen.clear()
        unknown[0] = 0
        described = short(repr(told([value, items, list(args), kwargs])))
        return ["unknown" if unknown[0] else ended, described, short(out.getvalue())]

    found = [one(*call) for call in calls]
    names = {}
    for name, value in list(_assay_all.items()):
        if not name.startswith(("_assay", "__")) and not callable(value) and not isinstance(value, types.ModuleType):
            seen.clear()
            names[name] = short(repr(told(value)))
    return [found, names]
"""
COSTER = """

def _assay_cost(calls):
    kept = [one for one in globals().values() if type(one).__name__ == "_lru_cache_wrapper"]
    for args, kwargs in calls:
        for one in kept:  # each call is costed as if it were the only one
            one.cache_clear()
        value = {name}(*args, **kwargs)
        if hasattr(value, "__next__"):
            for _ in value:
                pass
"""


@dataclass(frozen=True)
class Call:
    """One call of a function: its arguments, plain values."""

    function: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Recorded:
    """What a suite of tests calls. `inner` are calls that the program makes itself, `opaque` counts calls with arguments that are no plain
    values, `seconds` is where the time went, by line."""

    calls: tuple[Call, ...]
    inner: tuple[Call, ...]
    opaque: Mapping[str, int]
    seconds: Mapping[int, float]


@dataclass(frozen=True)
class Suite:
    """A file of tests, and the name by which it imports the program. `plugins` of pytest are loaded only where the tests need them."""

    tests: Path
    name: str
    plugins: bool = False

    def of(self, source: str, more: Mapping[str, bytes] | None = None) -> Program:
        """The tests beside a version of the program."""
        whole = tests_alone(self.tests, {self.name: source.encode(), **(more or {})})
        if self.plugins:
            return whole
        *start, last = whole.command
        return replace(
            whole, command=(*start, f"import os; os.environ['PYTEST_DISABLE_PLUGIN_AUTOLOAD'] = '1'; {last}")
        )


def tests_alone(tests: Path, files: Mapping[str, bytes]) -> Program:
    """A file of tests with these files beside it, and nothing else of its folder, which may be large."""
    given = tests.read_bytes()
    with TemporaryDirectory() as folder:
        Path(folder, tests.name).write_bytes(given)
        whole = pytest_suite(Path(folder), [tests.name])
    return replace(whole, files={tests.name: given, **files})


def told_end(suite: Program) -> Program:
    """A suite whose process says on stdout that it came to its end: a program may end it from within, and with 0 like one that passes."""
    *start, last = suite.command
    return replace(suite, command=(*start, f"import atexit; atexit.register(print, {END!r}); {last}"))


def unfinished(printed: str) -> str:
    """What is wrong with a suite of `told_end` that ended with 0 and printed this: "" where it came to its end."""
    return "" if END in printed else "the program ended the process in the middle of them"


def fails(sandbox: Sandbox, suite: Suite, source: str, limits: Limits) -> str:
    """Why the tests do not pass on a version, "" where they do."""
    program = told_end(suite.of(source))
    ran = sandbox.run(program.command, files=program.files, limits=limits)
    printed = ran.text.replace(END, "").strip()
    if ran.ok:
        return unfinished(ran.text)
    return (printed or ran.stderr.decode("utf-8", "replace").strip() or f"ended by {ran.ended}")[-1500:]


def record(sandbox: Sandbox, suite: Suite, source: str, limits: Limits) -> Recorded:
    """The calls that the tests make. Raises InputError where they cannot be recorded."""
    text = Path(values.__file__).read_bytes()
    for profiled in (1, 0):
        recorder = RECORDER % (MOST_CALLS, profiled, profiled, RECORD)
        program = suite.of(source.rstrip("\n") + "\n" + recorder, {"_assay_values.py": text})
        ran = sandbox.run(
            program.command, files=program.files, collect=(RECORD,), limits=replace(limits, files_mib=128)
        )
        if (told := ran.files.get(RECORD)) is not None:
            found = decode(told)
            return Recorded(_calls(found["calls"]), _calls(found["inner"]), found["opaque"], found["lines"])
    raise InputError(f"{suite.tests}: its calls could not be recorded: {ran.text.strip()[-300:] or ran.ended}")


def _calls(found: Mapping[str, Sequence[bytes]]) -> tuple[Call, ...]:
    calls = []
    for name, texts in found.items():
        for text in texts:
            args, kwargs = decode(text)
            calls.append(Call(name, tuple(args), kwargs))
    return tuple(calls)


class Observer:
    """Runs versions of a program on calls, in fresh processes of the sandbox."""

    def __init__(self, sandbox: Sandbox, limits: Limits) -> None:
        self.limits = limits
        self.workers = Workers("cpu_seconds", limits=limits, sandbox=sandbox)

    def close(self) -> None:
        self.workers.close()

    def does(self, source: str, calls: Sequence[Call]) -> tuple[list[list[str]], dict[str, str]] | None:
        """What a version does on calls, one after another in one process, and its global variables at the end: texts to be compared, or
        what they hash to. None where it meets a limit, or tells something else."""
        given = [(call.function, call.args, dict(call.kwargs)) for call in calls]
        [[outcome]] = self.workers.run(source.rstrip("\n") + "\n" + OBSERVER, "_assay_observed", [(given,)])
        return (outcome.value[0], outcome.value[1]) if _is_told(outcome.value, len(calls)) else None


def _is_told(value: Any, calls: int) -> bool:
    """Whether a value is what the observer says: a program beside it could have put something else in its place."""
    if not isinstance(value, list) or len(value) != 2 or not isinstance(value[1], dict):
        return False
    return isinstance(value[0], list) and len(value[0]) == calls and all(isinstance(one, list) for one in value[0])


def alike(
    wanted: tuple[list[list[str]], dict[str, str]], found: tuple[list[list[str]], dict[str, str]] | None
) -> int | None:
    """The first call on which a version did something else, -1 for the variables at the end; None where there is none. It may have global
    variables more."""
    if found is None:
        return 0
    for n, (one, other) in enumerate(zip(wanted[0], found[0], strict=True)):
        if one != other:
            return n
    return None if all(found[1].get(name) == text for name, text in wanted[1].items()) else -1


def hottest(source: str, seconds: Mapping[int, float]) -> Counter[str]:
    """Seconds by the text of a line, so that they are found again where edits have moved it."""
    lines = lines_of(source)
    found: Counter[str] = Counter()
    for number, spent in seconds.items():
        if 0 < number <= len(lines):
            found[lines[number - 1].strip()] += spent  # type: ignore[assignment]
    return found
