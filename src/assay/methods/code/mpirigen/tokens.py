"""C source as tokens, laid out again one statement a line, and the calls in it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

Kind = Literal["name", "number", "string", "mark", "directive"]
CALL = re.compile(r"MPI_[A-Z]\w*[a-z]\w*")
"""A function's name; constants are written in capitals alone."""
_TOKEN = re.compile(
    r"""
    (?P<space>(?:\s|\\\n)+|/\*.*?\*/|//(?:\\\n|[^\n])*)
    |(?P<string>(?:u8|[uUL])?"(?:\\.|[^"\\\n])*"|[uUL]?'(?:\\.|[^'\\\n])*')
    |(?P<number>\.?\d(?:[eEpP][+-]|[\w.])*)
    |(?P<name>[A-Za-z_$]\w*)
    |(?P<mark><<=|>>=|\.\.\.|->|::|\+\+|--|<<|>>|[<>=!+\-*/%&|^]=|&&|\|\||\#\#|[^\s\w"'])
    """,
    re.VERBOSE | re.DOTALL,
)
_STRING = r""" "(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*' """.strip()
_DIRECTIVE = re.compile(rf"[ \t]*#(?:\\\n|{_STRING}|/\*.*?\*/|[^\n])*", re.DOTALL)
_GAPS = re.compile(rf"({_STRING})|(?:/\*.*?\*/|//.*|\s)+", re.DOTALL)
_HEADERS = ("if", "for", "while", "switch")
_OPERATORS = "( [ { , ; = == != < > <= >= + - * / % & | ^ && || ! ~ ? : += -= *= /= %= &= |= ^= << >> return"
_BEFORE_UNARY = frozenset(_OPERATORS.split())
_OPENS, _CLOSES = frozenset("([{"), frozenset(")]}")


@dataclass(frozen=True)
class Token:
    """A word of the program; a directive of the preprocessor is one, with its lines joined and its comments left out."""

    kind: Kind
    text: str


@dataclass(frozen=True)
class Call:
    """A call of a function of MPI, its arguments as text."""

    function: str
    arguments: tuple[str, ...]


def tokens(program: str) -> list[Token]:
    """The tokens of C source; comments and white space are left out. Raises ValueError for a string or comment that does not end.

    >>> [token.text for token in tokens("x = f(1); // here")]
    ['x', '=', 'f', '(', '1', ')', ';']
    """
    found: list[Token] = []
    at, fresh = 0, True  # at the beginning of a line
    program = program.replace("\r\n", "\n")
    while at < len(program):
        if fresh and (directive := _DIRECTIVE.match(program, at)):
            found.append(Token("directive", _bare(directive.group())))
            at = directive.end()
            continue
        match = _TOKEN.match(program, at)
        if match is None or match.group() == "/" and program[at : at + 2] == "/*":
            raise ValueError(
                f"program must be C source, got {program[at : at + 40]!r} on line {program.count(chr(10), 0, at) + 1}"
            )
        text, kind = match.group(), match.lastgroup
        at = match.end()
        if kind == "space":
            fresh = fresh or not text.startswith("/") and "\n" in text.replace("\\\n", "")
            continue
        fresh = False
        found.append(Token(kind, text))  # type: ignore[arg-type]
    return found


def _bare(directive: str) -> str:
    """A directive on one line, without comments: what stands in strings stays."""
    return _GAPS.sub(lambda gap: gap.group(1) or " ", directive.replace("\\\n", " ")).strip()


@lru_cache(maxsize=2**16)
def line_tokens(line: str) -> tuple[Token, ...]:
    """The tokens of a line, kept: the same lines are looked at again and again."""
    return tuple(tokens(line))


@lru_cache(maxsize=2**14)
def _apart(one: str, other: str) -> bool:
    """Whether two tokens stay two when nothing stands between them."""
    try:
        return [token.text for token in tokens(f"; {one}{other}")[1:]] == [one, other]
    except ValueError:
        return False


def joined(words: Sequence[Token]) -> str:
    """Tokens as text, spaced as people do; read again, they are the same tokens."""
    text, previous, unary = "", "", False
    for number, token in enumerate(words):
        word = token.text
        tight = (
            not previous
            or unary
            or previous in ("(", "[", "!", "~", ".", "->", "::")
            or word in (")", "]", ",", ";", ".", "->", "::")
            or word in ("++", "--")
            and words[number - 1].kind == "name"
            or word in ("(", "[")
            and (words[number - 1].kind == "name" and previous not in (*_HEADERS, "return") or previous in (")", "]"))
        )
        text += word if tight and (not previous or _apart(previous, word)) else f" {word}"
        unary = word in ("&", "*", "-", "+", "!", "~", "++", "--") and (not previous or previous in _BEFORE_UNARY)
        previous = word
    return text


def layout(program: str) -> list[str]:
    """The program as lines of one statement, one brace, one header (`if (...)`) or one directive; the same tokens in the same order.

    What a person laid out in another way comes out the same, so that a line means a place. Raises ValueError as `tokens` does.

    >>> layout("int main(void) { int n = 3; if (n) return 1; }")
    ['int main(void)', '{', 'int n = 3;', 'if (n)', 'return 1;', '}']
    """
    lines: list[str] = []
    line: list[Token] = []
    depth, valued = 0, False  # depth in brackets, and in braces that hold values: those after `=` or `return`

    def end() -> None:
        nonlocal valued
        valued = False
        if line:
            lines.append(joined(line))
            line.clear()

    words = tokens(program)
    for at, token in enumerate(words):
        word = token.text
        following = words[at + 1].text if at + 1 < len(words) else ""
        if token.kind == "directive":
            end()
            lines.append(word)
        elif token.kind == "mark" and (word in ("(", "[") or word == "{" and (depth or valued)):
            depth += 1
            line.append(token)
        elif token.kind == "mark" and word in _CLOSES and depth:
            depth -= 1
            line.append(token)
            if not depth and word == ")" and _is_header(line) and following != ";":
                end()
        elif word in ("{", "}") and token.kind == "mark":
            end()
            lines.append(word)
        elif word == ";" and not depth:
            if not line and lines and lines[-1] == "}":
                lines[-1] = "};"
            else:
                line.append(token)
                end()
        else:
            line.append(token)
            if depth:
                continue
            valued = valued or word in ("=", "return")
            label = word == ":" and line[0].text in ("case", "default")
            if label or len(line) == 1 and (word == "do" or word == "else" and following != "if"):
                end()
    end()
    return lines


def _is_header(line: Sequence[Token]) -> bool:
    first = line[1].text if len(line) > 1 and line[0].text == "else" else line[0].text
    return first in _HEADERS


def indented(lines: Sequence[str]) -> str:
    """Lines as a program to read: two spaces for each block, and for the statement under a header without braces."""
    found, depth, under = [], 0, 0
    for line in lines:
        depth -= line in ("}", "};")
        level = 0 if line.startswith("#") else max(depth, 0) + (under if line != "{" else 0)
        found.append("  " * level + line)
        depth += line == "{"
        opens = line.startswith((*(f"{name} (" for name in _HEADERS), "else")) or line == "do"
        under = under + 1 if opens and not line.endswith(";") else 0
    return "\n".join(found) + "\n"


@lru_cache(maxsize=2**16)
def calls(line: str) -> tuple[Call, ...]:
    """The calls of MPI in a line, in the order of their names; those that a macro is defined as too.

    >>> calls('printf("MPI_Init()"); MPI_Send(&a[i, j], f(1, 2), MPI_INT);')
    (Call(function='MPI_Send', arguments=('&a[i, j]', 'f(1, 2)', 'MPI_INT')),)
    """
    words = _words(line)
    found = []
    for at, token in enumerate(words[:-1]):
        if token.kind == "name" and CALL.fullmatch(token.text) and words[at + 1].text == "(":
            found.append(Call(token.text, _arguments(words[at + 1 :])))
    return tuple(found)


def _words(line: str) -> list[Token]:
    """The tokens of a line, and of what a macro is defined as."""
    found = []
    for token in line_tokens(line):
        if token.kind != "directive":
            found.append(token)
        elif (body := token.text.removeprefix("#").lstrip()).startswith("define"):
            found += tokens(body)
    return found


def _arguments(words: Sequence[Token]) -> tuple[str, ...]:
    """What stands in the parentheses that the words begin with, cut at the commas that no other brackets hold."""
    depth = 0
    part: list[Token] = []
    found: list[str] = []
    for token in words:
        word = token.text if token.kind == "mark" else ""
        depth += word in _OPENS and bool(word)
        depth -= word in _CLOSES and bool(word)
        if not depth:
            break
        if depth == 1 and word == ",":
            found.append(joined(part))
            part = []
        elif depth > 1 or word != "(":
            part.append(token)
    return (*found, joined(part)) if found or part else ()
