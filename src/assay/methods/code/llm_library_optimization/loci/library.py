"""Two places in Python's own library that assay spends time in: the text of a syntax tree, and indented JSON.

Both were found by profiling. Hashing all sources (`assay.evidence.hashes`), which the pages of verdicts wait for, spends its time in
parsing, which is C, then in `ast.dump`, a third of the whole. What writes `--json` is the encoder in Python: the one in C is passed
over where text is indented.
The changes are diffs of our own text that add lines only. They are applied to a copy of the installed module's text: nothing that
is installed changes.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

from assay.methods.code.llm_library_optimization.backends import PythonHere
from assay.methods.code.llm_library_optimization.case import Args, Candidate, Case, Input
from assay.methods.code.llm_library_optimization.loci import text
from assay.methods.code.llm_library_optimization.patches import applied, source_of

NAMES = ("alpha", "beta", "gamma", "delta")


def patched(module: str, diff: str, name: str) -> tuple[Candidate, Candidate]:
    """A module's text as installed, and with a change. Raises PatchError where the change was made for another version of it."""
    shipped = Candidate("as shipped", source_of(module))
    return shipped, Candidate(name, applied(shipped.source, text(diff)), "tool", shipped.digest)


# --------------------------------------------------------------------------------------------------------------- syntax trees


def _parsed(args: Args) -> Args:
    import ast

    return (ast.parse(args[0]),)


def _expression(rng: random.Random, depth: int) -> str:
    if depth == 0:
        return rng.choice(("1", "2.5", "'a\\n'", "b'\\x00'", "None", "True", "...", "1j", *NAMES))
    left, right = (_expression(rng, depth - 1 - rng.randrange(min(depth, 2))) for _ in range(2))
    name = rng.choice(NAMES)
    return rng.choice((
        f"({left} + {right})", f"({left} if {right} else {left})", f"[{left}, *{name}]", "[]", f"{{{left}: {right}, **{name}}}", "{}",
        f"{name}({left}, *{name}, key={right})", f"{name}.part[{left}:{right}]", f"(lambda x, *y, z={left}: {right})",
        f"[{left} for {name} in {right} if {left}]", f"f'{{{name}!r:>{{{name}}}}} and {{{name}}}'", f"(x := {left})", f"(not {right})",
    ))  # fmt: skip


def _program(rng: random.Random) -> Args:
    """A program that does nothing sensible, with most kinds of nodes."""
    lines = []
    for number in range(rng.randint(0, 6)):
        value, name = _expression(rng, rng.randint(0, 3)), rng.choice(NAMES)
        lines.append(
            rng.choice((
                f"{name} = {value}", f"{name}: int", f"del {name}", f"assert {value}, 'no'", f"import {name} as x, {name}",
                f"from . import {name}", f"class C{number}(object):\n    {name} = {value}\n    pass",
                f"def f{number}(a, /, b: int = 1, *c, d, **e) -> None:\n    '''Text.'''\n    return {value}",
                f"try:\n    {value}\nexcept E as x:\n    raise\nfinally:\n    pass",
                f"for {name} in {value}:\n    break\nelse:\n    pass", f"with {value} as {name}:\n    pass",
                f"match {value}:\n    case [1, *_]:\n        pass\n    case {{'k': v, **r}} if v:\n        pass",
                f"match {value}:\n    case None | C(x=1) as {name}:\n        pass",
                f"async def g{number}():\n    await {name}\n    yield {value}", f"global {name}",
            ))
        )  # fmt: skip
    return ("\n".join(lines) + "\n",)


def trees(sources: Mapping[str, str], *, draws: int = 200) -> tuple[Case, Candidate]:
    """`ast.dump` on programs, and its change. Raises PatchError where this Python's `ast` is another."""
    shipped, candidate = patched("ast", "library/ast_dump.diff", "one list of parts, what a class is looked up once")
    inputs = [Input(name, "a module's source", (source,)) for name, source in sources.items()]
    inputs += [Input("nothing", "tiny", ("",)), Input("one name", "tiny", ("x",))]
    contract = "dump(tree) is the text of a syntax tree on one line, with the names of fields and without attributes."
    case = Case(
        "ast.dump", contract, shipped, tuple(inputs), "a module's source", random=_program, draws=draws, prepare=_parsed
    )
    return case, candidate


def trees_backend() -> PythonHere:
    """Where it runs."""
    return PythonHere("dump")


# -------------------------------------------------------------------------------------------------------------- indented JSON


class Word(str):
    """A text that is no plain `str`."""


class Opaque:
    """Something that JSON has no word for."""

    def __str__(self) -> str:
        return "opaque"


def _value(rng: random.Random, depth: int) -> Any:
    if depth == 0 or rng.random() < 0.3:
        return rng.choice((
            None, True, False, 0, -7, 10**25, 1.5, -0.0, 1e300, float("nan"), "", "plain", 'q"\\/\n\t\x00', "é€😀\ud800", [], {}, (),
        ))  # fmt: skip
    if rng.random() < 0.5:
        return [_value(rng, depth - 1) for _ in range(rng.randint(0, 4))]
    keys = rng.sample(["a", "b", "", "\n", 1, 2.5, None, True, (1, 2)], rng.randint(0, 4))
    return {key: _value(rng, depth - 1) for key in keys}


def _document(rng: random.Random) -> Args:
    """A value, and how it is to be written."""
    how = {
        "indent": rng.choice((0, 1, 2, "\t")), "sort_keys": rng.random() < 0.2, "skipkeys": rng.random() < 0.5,
        "ensure_ascii": rng.random() < 0.5, "allow_nan": rng.random() < 0.5, "check_circular": rng.random() < 0.8,
    }  # fmt: skip
    return _value(rng, 4), how, rng.choice(("", "word", "opaque", "circle"))


def _special(args: Args) -> Args:
    """With what is no plain value put into it."""
    value, how, what = args
    if what == "word":
        value = {Word("k"): [Word("v"), value]}
    elif what == "opaque":
        value = [value, Opaque(), {"in": Opaque()}]
    elif what == "circle" and how.get("check_circular", True):
        value = [value]
        value.append({"itself": value})
    return value, how


def documents(values: Mapping[str, Any], *, draws: int = 300) -> tuple[Case, Candidate]:
    """`json.dumps` with an indent on documents, as assay writes them, and its change. Raises PatchError where `json` is another here."""
    shipped, candidate = patched("json.encoder", "library/json_indent.diff", "one list of parts instead of generators")
    as_written = {"indent": 2, "default": True, "allow_nan": False}
    inputs = [Input(name, "a document", (value, as_written, "")) for name, value in values.items()]
    inputs += [Input("a number", "tiny", (1, as_written, "")), Input("nothing", "tiny", ({}, as_written, ""))]
    contract = "encode(value, how) is json.dumps(value, **how) with an indent; the same exceptions are raised for the same values."
    case = Case(
        "json.dumps with an indent", contract, shipped, tuple(inputs), "a document",
        random=_document, draws=draws, prepare=_special,
    )  # fmt: skip
    return case, candidate


def _encoder(module: Any) -> Any:
    def encode(value: Any, how: dict[str, Any]) -> str:
        given = {**how, "default": str} if how.get("default") else how
        return str(module.JSONEncoder(**given).encode(value))

    return encode


def documents_backend() -> PythonHere:
    """Where it runs."""
    return PythonHere(_encoder, package="json")
