"""A language model that is asked for a faster function where rules find nothing more, and what of its answers goes into the program.

    model = model_of("http://127.0.0.1:8000/v1")  # or a folder, which is loaded at the first question
    for program in proposals(model, source, "match", profile, calls, refused, samples=4, until=until):
        ...

A question holds one function. Of an answer the body of that function is taken, with the imports that it needs, and nothing else. What
reaches for the interpreter around it is refused by its words; that list is never whole, so that answers are judged by `outside` besides.
"""

from __future__ import annotations

import ast
import hashlib
import http.client
import json
import re
import textwrap
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from assay.codebench.behaviour import Call
from assay.codebench.optimised import Asked
from assay.errors import AssayError, InputError
from assay.methods.code.effi_code import LineCost, LineProfiler, Profile, ProfileError, extracted
from assay.methods.core.programs.rewriting.source import BUILTINS, DYNAMIC, Source
from assay.methods.core.programs.rewriting.text import Change
from assay.methods.core.programs.worker import FRAMES, WARM
from assay.methods.core.programs.workers import Workers
from assay.methods.core.sandbox import Limits

MODEL = "model"
"""What stands in the place of a rule's name."""
NEW_TOKENS = 1024
TEMPERATURE, TOP_P = 0.8, 0.95
"""Of all draws but the first. Our choice."""
SERVER_SECONDS = 300.0
SHOWN_CALLS, LONGEST_CALL = 3, 300
NO_FUNCTION, TRIED = "hold no function that can be put in", "were tried before"
FAILURES = {
    "no code": "there was no program in the answer",
    "syntax": "the answer is not Python",
    "no entry point": "the answer does not define the function",
}
DOORS = frozenset(
    (*DYNAMIC, *FRAMES, "f_back", "f_globals", "f_locals", "getattr", "setattr", "delattr", "open", "sys", "os", "gc", "inspect")
    + ("builtins", "bltns", "ctypes", "importlib", "attrgetter", "methodcaller", "singledispatch", "Formatter")
    + ("get_type_hints", "ForwardRef")
)  # fmt: skip
"""Words by which a program reaches what runs it. Those that begin with an underscore are added."""


@dataclass(frozen=True)
class Reply:
    """What a model says. `tokens` are those of the question and the answer; None where nobody counts them."""

    text: str
    tokens: int | None = None
    fingerprint: str = ""


Complete = Callable[[str, int, float], Reply]
"""From a question, the number of a draw, and the seconds that it may take. Draw 0 is the likeliest answer, the others are sampled."""


class Model:
    """A model to be asked; `asked` is what asking took, the first question with loading it.

    >>> model = Model("parrot", lambda question, draw, seconds: Reply(question, 2))
    >>> model("hello", 0, 1.0), model.asked.questions, model.asked.tokens
    ('hello', 1, 2)
    """

    def __init__(self, name: str, complete: Complete) -> None:
        self.complete, self.asked = complete, Asked(name)

    def __call__(self, question: str, draw: int, seconds: float) -> str:
        """The answer. Raises what `complete` raises."""
        asked, began = self.asked, time.monotonic()
        asked.questions += 1
        try:
            reply = self.complete(question, draw, seconds)
        except BaseException:
            asked.tokens = None  # it may have written many
            raise
        finally:
            asked.seconds += time.monotonic() - began
        asked.fingerprint = reply.fingerprint
        asked.tokens = None if asked.tokens is None or reply.tokens is None else asked.tokens + reply.tokens
        return reply.text


# --------------------------------------------------------------------------------------------------------------- where models are


def model_of(source: str, key: str = "") -> Model:
    """The model of a server's address, which ends with /v1, or whatever `workloads.models` loads: a folder first of all.

    A server is asked for its first model, a folder is looked at, and neither is loaded yet. Raises InputError where there is none, or a
    folder has no safetensors or asks for code; MissingError where a package is missing.
    """
    if source.startswith(("http://", "https://")):
        return _served(source, key)
    if Path(source).is_dir():
        from assay.workloads.files import check_folder

        check_folder(Path(source))
        return Model(Path(source).resolve().name, _Loaded(source))
    from assay.workloads.models import find_model

    find_model(source)
    return Model(source, _Loaded(source))


def _served(url: str, key: str) -> Model:
    from assay.methods.code.llm_library_optimization.chat import Endpoint, Message

    try:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        request = urllib.request.Request(f"{url.rstrip('/')}/models", headers=headers)
        with urllib.request.urlopen(request, timeout=10) as answer:
            listed = json.loads(answer.read(2**20))["data"]
        if listed == []:
            raise ValueError("the list is empty: a server may still be loading its model")
        name = str(listed[0]["id"])
    except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError, RecursionError) as error:
        why = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise InputError(f"--model: {url}/models lists no model ({why}): give the address that ends with /v1") from None

    def complete(question: str, draw: int, seconds: float) -> Reply:
        server = Endpoint(url, name, key, TEMPERATURE if draw else 0.0, min(seconds, SERVER_SECONDS))
        return Reply(server([Message("user", question)]))

    return Model(name, complete)


class _Loaded:
    """A model on this machine's processors, by the `generate` of transformers."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.model: Any = None
        self.tokenizer: Any = None
        self.fingerprint = ""

    def __call__(self, question: str, draw: int, seconds: float) -> Reply:
        until = time.monotonic() + seconds
        if self.model is None:
            self._load()
        left = until - time.monotonic()
        if left <= 0:
            raise TimeoutError("timed out while it was loaded")
        try:
            return self._answer(question, draw, left)
        except AssayError:
            raise
        except Exception as error:  # templates and settings are the model's author's, and fail as they like
            raise InputError(f"it does not answer: {type(error).__name__}: {error}") from error

    def _load(self) -> None:
        from transformers import GenerationConfig

        from assay.workloads.models import load_model

        loaded = load_model(self.source)
        model: Any = loaded.model
        ends = model.generation_config.eos_token_id
        ends = loaded.tokenizer.eos_token_id if ends is None else ends
        # how it samples is said below, and not by its files; of one row no place is padded
        model.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=loaded.tokenizer.pad_token_id or 0)
        self.model, self.tokenizer, self.fingerprint = model, loaded.tokenizer, _fingerprint(loaded.folder)

    def _answer(self, question: str, draw: int, seconds: float) -> Reply:
        import torch

        from assay.workloads.context import context_length

        chat = bool(self.tokenizer.chat_template)
        text = question
        if chat:
            turn = [{"role": "user", "content": question}]
            text = self.tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        given = self.tokenizer(text, return_tensors="pt", add_special_tokens=not chat)["input_ids"]
        context = context_length(self.model) or 2048
        room = min(NEW_TOKENS, context - given.shape[1])
        if room < 1:
            raise InputError(f"the question has {given.shape[1]} tokens, and the model's context holds {context}")
        sampled = (
            {"do_sample": True, "temperature": TEMPERATURE, "top_p": TOP_P, "top_k": 0}
            if draw
            else {"do_sample": False}
        )
        with torch.inference_mode(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(draw)
            made = self.model.generate(
                given, attention_mask=torch.ones_like(given), max_new_tokens=room, max_time=seconds, **sampled
            )
        answer = self.tokenizer.decode(made[0, given.shape[1] :], skip_special_tokens=True)
        return Reply(answer, int(made.shape[1]), self.fingerprint)


def _fingerprint(folder: Path) -> str:
    """A hash of the files that a model is loaded from."""
    from assay.workloads.files import weight_files

    found = hashlib.sha256()
    for name in ("config.json", "tokenizer.json", *sorted(weight_files(folder))):
        if (folder / name).is_file():
            with open(folder / name, "rb") as file:
                found.update(f"{name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return found.hexdigest()[:12]


# ------------------------------------------------------------------------------------------------------------------- what is asked


def profiled(program: str, groups: Mapping[str, Sequence[Call]], workers: Workers, limits: Limits) -> Profile:
    """The lines of a program by the time in them, on one call of each function that is costed: of its smallest dear inputs."""
    rows: dict[int, LineCost] = {}
    short = replace(limits, cpu_seconds=min(1.0, limits.cpu_seconds), wall_seconds=2.0)  # thirty times that is allowed
    for name in dict.fromkeys(calls[0].function for calls in groups.values()):
        own = [calls for calls in groups.values() if calls[0].function == name]
        call = own[min(1, len(own) - 1)][0]
        if call.kwargs:
            continue
        try:
            found = LineProfiler(workers, name, [call.args], limits=short)(program)
        except ProfileError:
            continue
        for row in found.lines:
            known = rows.get(row.line, LineCost(row.line, 0, 0.0))
            rows[row.line] = LineCost(row.line, known.hits + row.hits, known.seconds + row.seconds)
    return Profile(tuple(row for _, row in sorted(rows.items())))


def hottest(program: str, profile: Profile) -> ast.FunctionDef | None:
    """The function of the top level in which most of the time goes by; None where the program has none."""
    found = [node for node in ast.parse(program).body if isinstance(node, ast.FunctionDef)]
    times = Counter(node.name for node in found)
    once = [node for node in found if times[node.name] == 1]
    return max(once, key=lambda node: profile.seconds_of(node.lineno, node.end_lineno or 0), default=None)


def question(program: str, function: str, profile: Profile, calls: Sequence[Call], refused: str = "") -> str:
    """What a model is asked: the function alone, where its time goes, some calls of it, and why the last proposal was refused."""
    source = Source(program)
    node = _function(source, function)
    assert node is not None
    text, first = source.text(node), source.line_of(source.start(node))
    last = node.end_lineno or first
    rows = [replace(row, line=row.line - first + 1) for row in profile.lines if first <= row.line <= last]
    shown = [said for call in calls if len(said := _written(call)) <= LONGEST_CALL][:SHOWN_CALLS]
    parts = [
        "Make this Python function faster. For every call it must do what it does now: the same answers of the same types in the same "
        "order, the same changes of its arguments, the same exceptions, and nothing else printed.",
        f"```python\n{text}\n```",
        f"Where its time goes, line by line:\n```\n{Profile(tuple(rows)).report(text)}\n```" if rows else "",
        "Some calls of it:\n```python\n" + "\n".join(shown) + "\n```" if shown else "",
        f"Your last proposal was refused: {refused}." if refused else "",
        f"Answer with the whole function {function} in one ```python block. Its first line stays as it is, what helps it is defined inside "
        f"of it, and imports stand before it, of these modules only: {', '.join(WARM)}.",
    ]
    return "\n\n".join(part for part in parts if part)


def _written(call: Call) -> str:
    named = [f"{name}={value!r}" for name, value in call.kwargs.items()]
    return f"{call.function}({', '.join([*map(repr, call.args), *named])})"


def proposals(
    model: Model,
    program: str,
    function: str,
    profile: Profile,
    calls: Sequence[Call],
    refused: list[tuple[str, str]],
    *,
    samples: int,
    until: float,
    say: Callable[[str], None] = lambda _: None,
) -> Iterator[str]:
    """Programs with what a model makes of a function, up to `samples` of them until the monotonic clock is at `until`.

    `refused` holds what was refused, in a word and in full: whoever takes a proposal adds to it, and the next question tells the last one.
    An answer that cannot be put in is added here. A model that fails is not asked again, and `model.asked.trouble` says why.
    """
    for draw in range(samples):
        left = until - time.monotonic()
        if left <= 0 or model.asked.trouble:
            return
        say(f"asking {model.asked.name} for {function}, {draw + 1} of {samples}")
        asked = question(program, function, profile, calls, refused[-1][1] if draw else "")
        try:
            reply = model(asked, draw, left / 2)  # what it says takes time to judge
        except (AssayError, OSError, ValueError) as error:
            late = f" (half of the {left:.3g} s that were left)" if isinstance(error, TimeoutError) else ""
            model.asked.trouble = f"not asked again: {' '.join(str(error).split())[:300]}{late}"
            return
        try:
            found = put_in(program, function, reply)
        except (ValueError, RecursionError) as error:
            refused.append((NO_FUNCTION, str(error)))
            continue
        known = len(refused)
        yield found
        if len(refused) == known:
            refused.append((TRIED, "it is a program that was tried before"))


# ----------------------------------------------------------------------------------------------------------------- what is taken


def put_in(program: str, function: str, reply: str) -> str:
    """The program with the body that a reply has for a function. Decorators, arguments, docstring and all else stay as they are.

    Raises ValueError, which says why, for a reply that holds no such function, changes its arguments, reaches for the interpreter, or
    imports what is neither the program's nor one of the standard library's plain modules.

    >>> print(put_in("def f(n):\\n    return sum(range(n))", "f", "def f(n):\\n    return n * (n - 1) // 2"))
    def f(n):
        return n * (n - 1) // 2
    """
    found = extracted(reply, function)
    if found.failure:
        raise ValueError(FAILURES[found.failure])
    mine, theirs = Source(program), Source(found.program)
    old, new = _function(mine, function), _function(theirs, function)
    if old is None or new is None:
        raise ValueError(f"the answer must define {function} as a plain function")
    if _head(old) != _head(new):
        raise ValueError("decorators, arguments and defaults must stay as they are")
    words = _words(theirs.text(new))
    imports = _imports(mine, old, theirs, new, words)
    lines = mine.newline.join(imports)
    _refuse(old, new, (words | _words(lines)) - _words(mine.text(old)))
    return Source(mine.applied(Change((_body(mine, old, theirs, new),), "", lines))).program


def _words(text: str) -> frozenset[str]:
    """Every word that a text uses as a name of anything, those of patterns included."""
    source = Source(text)
    patterns = (one for one in ast.walk(source.tree) if isinstance(one, ast.MatchClass))
    return source.identifiers | {name for one in patterns for name in one.kwd_attrs}


def _function(source: Source, name: str) -> ast.FunctionDef | None:
    found = [node for node in source.tree.body if isinstance(node, ast.FunctionDef) and node.name == name]
    return found[-1] if found else None


def _head(node: ast.FunctionDef) -> list[Any]:
    """What the first lines of a function mean, without annotations."""
    held = node.args
    names = [[one.arg for one in part] for part in (held.posonlyargs, held.args, held.kwonlyargs)]
    rest = [one and one.arg for one in (held.vararg, held.kwarg)]
    values = [one and ast.dump(one) for one in (*held.defaults, *held.kw_defaults, *node.decorator_list)]
    return [names, rest, values]


def _refuse(old: ast.FunctionDef, new: ast.FunctionDef, words: frozenset[str]) -> None:
    if bad := sorted(word for word in words if word in DOORS or (word[:1] == "_" and word != "_")):
        raise ValueError(f"it uses {bad[0]}, by which a program may reach what runs it")
    if bad := sorted(_globals(new) - _globals(old)):
        raise ValueError(f"it gives the global name {bad[0]} another meaning")
    if bad := sorted(_set(new) - _set(old)):
        raise ValueError(f"it sets the attribute {bad[0]}")


def _globals(node: ast.FunctionDef) -> set[str]:
    return {name for one in ast.walk(node) if isinstance(one, ast.Global) for name in one.names}


def _set(node: ast.FunctionDef) -> set[str]:
    found = (one for one in ast.walk(node) if isinstance(one, ast.Attribute))
    return {one.attr for one in found if not isinstance(one.ctx, ast.Load)}


def _imports(
    mine: Source, old: ast.FunctionDef, theirs: Source, new: ast.FunctionDef, words: frozenset[str]
) -> list[str]:
    """The lines that a function needs at the head of the program."""
    there = _imported(mine.tree.body)
    needed = [one for one in _imported(theirs.tree.body) if one.name in words and one not in there]
    plain = {*WARM, *(one.package for one in there)}
    for one in [*needed, *_imported(ast.walk(new))]:
        if one.package not in plain:
            raise ValueError(
                f"it says {one.line}: of modules only {', '.join(WARM)} and those that the program imports"
            )
    rest = Source(mine.applied(Change((mine.replaced(old, "pass"),), ""))).identifiers
    if bad := sorted(one.name for one in needed if one.name in rest or one.name in BUILTINS):
        raise ValueError(f"it imports {bad[0]}, a name that means something else in the program")
    return list(dict.fromkeys(one.line for one in needed))


@dataclass(frozen=True)
class _Import:
    """A name that is imported, in a line of its own, and the package that it is of."""

    name: str
    line: str
    package: str


def _imported(nodes: Iterable[ast.AST]) -> list[_Import]:
    found = []
    for node in nodes:
        if isinstance(node, ast.Import):
            for alias in node.names:
                package = alias.name.partition(".")[0]
                found.append(_Import(alias.asname or package, ast.unparse(ast.Import([alias])), package))
        elif isinstance(node, ast.ImportFrom):
            package = "" if node.level else (node.module or "").partition(".")[0]
            for alias in node.names:
                line = ast.unparse(ast.ImportFrom(node.module, [alias], node.level))
                found.append(_Import(alias.asname or alias.name, line, package))
    return found


def _body(mine: Source, old: ast.FunctionDef, theirs: Source, new: ast.FunctionDef) -> tuple[int, int, str]:
    """Where the body of a function stands behind its docstring, and what comes there, indented as it is."""
    first, given = _first(old), _first(new)
    start, end = mine.start(first), mine.end(old)
    if comment := re.match(rb"[ \t]*#[^\r\n]*", mine.data[end:]):
        end += comment.end()
    before = _before(mine, start)
    indent = "    " if before.strip() else before
    at = theirs.start(given)
    if _before(theirs, at) == indent:
        text = theirs.data[at : theirs.end(new)].decode()
    else:
        rest = ast.Module(new.body[new.body.index(given) :], [])
        text = textwrap.indent(ast.unparse(rest), indent).removeprefix(indent)
    text = text.replace("\r\n", "\n").replace("\n", mine.newline)
    return start, end, f"{mine.newline}{indent}{text}" if before.strip() else text


def _first(node: ast.FunctionDef) -> ast.stmt:
    """The first statement behind the docstring."""
    return node.body[1] if ast.get_docstring(node, clean=False) is not None and node.body[1:] else node.body[0]


def _before(source: Source, at: int) -> str:
    """What stands before a byte in its line."""
    return source.data[source.starts[source.line_of(at) - 1] : at].decode()
