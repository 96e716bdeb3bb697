"""From a model's response to a program with the function that was asked for."""

from __future__ import annotations

import re
from dataclasses import dataclass

from assay import checks

_FENCE = re.compile(
    r"^[ \t]*(?:```|~~~)[\w+-]*[ \t]*\r?\n(.*?)(?:^[ \t]*(?:```|~~~)|\Z)", flags=re.MULTILINE | re.DOTALL
)
_IMPORT = re.compile(r"^[ \t]*import\b(?:[^;\n{]*\{[^}]*\})?[^;\n]*(?:;\n?|\n|\Z)", flags=re.MULTILINE)
_EXPORT = re.compile(
    r"^([ \t]*)export[ \t]+(?:default[ \t]+)?(?=(?:async\b|function\b|const\b|let\b|var\b|class\b))", flags=re.MULTILINE
)
_EXPORTED = re.compile(r"^[ \t]*export\b.*$", flags=re.MULTILINE)


@dataclass(frozen=True)
class Answer:
    """A response as it came, the program that was made of it, and what it took: tokens and wall seconds, None where nobody counted."""

    raw: str
    code: str
    tokens: int | None = None
    seconds: float | None = None

    @property
    def lines(self) -> int:
        """Lines of the program that are not blank."""
        return sum(bool(line.strip()) for line in self.code.splitlines())


def defines(program: str, name: str) -> bool:
    """Whether a text defines a function of that name: declared, bound to a name (arrow functions too), or exported as a property.

    >>> defines("const area = async (ring) => 0;", "area"), defines("function areas() {}", "area")
    (True, False)
    """
    named = re.escape(name)
    patterns = (
        rf"\bfunction\s*\*?\s*{named}\s*\(",
        rf"\b(?:const|let|var)\s+{named}\s*=",
        rf"\bexports\.{named}\s*=",
    )
    return any(re.search(pattern, program) for pattern in patterns)


def cleaned(response: str, name: str, header: str = "") -> str:
    """The program of a response: its first block of code that defines `name`, else its longest block, else all of it.

    `header` is the beginning that was given to the model, up to the opening brace: it is put before a text that goes on from there. Lines
    of `import` and words `export` are left out, for libraries are there as globals, and programs are scripts (our choice). What the program
    is worth the tests say: there are no other repairs.

    >>> cleaned("Sure:\\n```js\\nexport const f = (x) => x;\\n```\\nDone.", "f")
    'const f = (x) => x;\\n'
    >>> cleaned("  return x;\\n}", "f", "function f(x) {")
    'function f(x) {\\n  return x;\\n}'
    """
    for what, text in (("response", response), ("name", name), ("header", header)):
        if not isinstance(text, str):
            raise TypeError(f"{what} must be a text, got {checks.shown(text)}")
    blocks = [found[1] for found in _FENCE.finditer(response)]
    program = next((block for block in blocks if defines(block, name)), max(blocks, key=len, default=response))
    if header and not defines(program, name):
        program = f"{header}\n{program}"
    program = _IMPORT.sub("", program)
    return _EXPORTED.sub("", _EXPORT.sub(r"\1", program))


def completed(continuation: str, header: str) -> str:
    """The function of a model that only goes on writing, as base models do: up to the brace that closes it, or to its end.

    Braces in texts and comments do not count. `header` ends with the opening brace.

    >>> completed(" return {a: '}'}; }\\nfunction next() {", "function f() {")
    "function f() { return {a: '}'}; }\\n"
    """
    if not header.endswith("{"):
        raise ValueError(f"header must end with an opening brace, got {checks.shown(header)}")
    depth = 1
    for token in re.finditer(
        r"//[^\n]*|/\*.*?(?:\*/|\Z)|\"(?:\\.|[^\"\\\n])*\"|'(?:\\.|[^'\\\n])*'|`(?:\\.|[^`\\])*`|[{}]",
        continuation,
        flags=re.DOTALL,
    ):
        depth += {"{": 1, "}": -1}.get(token[0], 0)
        if not depth:
            return f"{header}{continuation[: token.end()]}\n"
    return f"{header}{continuation}\n"
