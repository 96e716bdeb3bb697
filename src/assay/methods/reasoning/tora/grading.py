r"""Whether an answer is the reference: numbers exactly, tuples and intervals part by part, formulas by their values.

Formulas are read by a parser of our own and compared at points drawn at random, in exact fractions as far as they go. So a text that a
model wrote is never evaluated as a program, nothing can hang, and no other package is needed. The released code hands it to sympy.
"""

from __future__ import annotations

import ast
import math
import random
import re
from fractions import Fraction

from assay import checks
from assay.methods.core.reasoning.answers import LONGEST, number

Value = Fraction | float
POINTS = 8
CLOSE = 1e-9  # of formulas that hold a root or pi, relative
_OPEN, _SHUT = "([", ")]"
_THOUSANDS = re.compile(r"[-+]?\d{1,3}(,\d{3})+(\.\d+)?")
_LARGEST = 10_000  # bits of a number that is exact
_CONSTANTS = {"pi": math.pi}
_FUNCTIONS = {"sqrt": math.sqrt, "sin": math.sin, "cos": math.cos, "tan": math.tan, "log": math.log, "exp": math.exp}


def grade(answer: str, reference: str, *, percent: bool = False, tolerance: float = 0.0) -> bool:
    r"""Whether `answer` says the same as `reference`.

    Numbers are equal where they are exactly, or within `tolerance` of the reference, relative. Tuples and intervals need equal parts and
    brackets, in the same order. Formulas are equal where they have the same values. Everything else is compared as text. No answer, "",
    is never right. As released it is `percent=True, tolerance=1e-4`: then a hundredth and a hundred times the reference count as right
    too, and brackets are not looked at there; here both are off, since they make scores larger.

    When NOT to use it: for sets whose order does not matter, for matrices, and for formulas with functions other than
    sqrt, sin, cos, tan, log and exp.

    >>> grade("0.5", r"\frac12"), grade("(1, 2)", "(2, 1)"), grade("[0,1)", "(0,1)"), grade("2(x+1)", "2x + 2")
    (True, False, False, True)
    >>> grade("50%", "0.5"), grade("50%", "0.5", percent=True)
    (False, True)
    """
    for name, text in (("answer", answer), ("reference", reference)):
        if not isinstance(text, str):
            raise TypeError(f"{name} must be text, got {checks.shown(text)}")
    percent, tolerance = checks.flag("percent", percent), checks.number("tolerance", tolerance, low=0)
    return _same(plain(answer), plain(reference), percent, tolerance)


def plain(text: str) -> str:
    r"""An answer without LaTeX, units that stand in \text, and signs of money and per cent.

    >>> plain(r"\dfrac{1}{2}\text{ cm}"), plain(r"\left( 1, \sqrt2 \right)"), plain(r"3\cdot x^{2}"), plain("x = 5.00")
    ('(1)/(2)', '(1,sqrt(2))', '3*x**(2)', '5.00')
    """
    text = text.strip().strip("$").strip()
    for old, new in (
        ("\\left", ""), ("\\right", ""), ("\\!", ""), ("\\,", ""), ("\\ ", ""), ("\\$", ""), ("$", ""), ("\\%", "%"), ("^\\circ", ""),
        ("^{\\circ}", ""), ("\\dfrac", "\\frac"), ("\\tfrac", "\\frac"), ("\\cdot", "*"), ("\\times", "*"), ("\\pi", "pi"),
        ("\\{", "{"), ("\\}", "}"), ("\\infty", "infinity"),
    ):  # fmt: skip
        text = text.replace(old, new)
    text = re.sub(r"\\(?:text|mbox|mathrm)\{[^{}]*\}", "", text) if re.search(r"\d", text) else _unwrapped(text)
    text = re.sub(r"\\frac\s*(\d)\s*(\d)", r"(\1)/(\2)", text)
    text = re.sub(r"\\sqrt\s*([0-9a-z])", r"sqrt(\1)", text)
    for _ in range(10):  # from the inside outwards
        text = re.sub(r"\\frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r"(\1)/(\2)", text)
        text = re.sub(r"\\sqrt\s*\{([^{}]*)\}", r"sqrt(\1)", text)
        text = re.sub(r"\^\s*\{([^{}]*)\}", r"**(\1)", text)
    text = re.sub(r"\s+", " ", text.replace("^", "**")).strip().rstrip(".").strip()
    if re.fullmatch(r"[a-zA-Z]\s*=[^=]*", text):
        text = text.partition("=")[2].strip()
    if not re.search(r"[0-9()\[\]*/+]", text):
        return text.lower()
    return re.sub(r"\s*([-+*/,()\[\]])\s*", r"\1", text).rstrip("%")


def _unwrapped(text: str) -> str:
    return re.sub(r"\\(?:text|mbox|mathrm)\{([^{}]*)\}", r"\1", text)


def _same(answer: str, reference: str, percent: bool, tolerance: float) -> bool:
    if not answer or not reference:
        return False
    ours, theirs = _number(answer), _number(reference)
    if ours is not None and theirs is not None:
        wanted = [theirs, theirs / 100, theirs * 100] if percent else [theirs]
        return any(abs(ours - one) <= Fraction(tolerance) * abs(one) for one in wanted)
    if (a := _parts(answer)) is not None and (b := _parts(reference)) is not None:
        return (
            len(a[1]) == len(b[1])
            and a[0] == b[0]
            and all(_same(x, y, percent, tolerance) for x, y in zip(a[1], b[1], strict=True))
        )
    return answer.lower() == reference.lower() or _same_values(answer, reference)


def _number(text: str) -> Fraction | None:
    """The value of a number, also in brackets and as a fraction of two in brackets."""
    found = re.fullmatch(r"(-?)\(([^()]+)\)/\(([^()]+)\)", text)
    if found:
        above, below = _single(found[2]), _single(found[3])
        return None if above is None or not below else (-1 if found[1] else 1) * above / below
    return _single(text.rstrip("%"))


def _single(text: str) -> Fraction | None:
    """The value of a number, whose commas part thousands: with another comma it is two."""
    return None if "," in text and not _THOUSANDS.fullmatch(text) else number(text)


def _parts(text: str) -> tuple[str, list[str]] | None:
    """The brackets and the parts of a tuple or an interval; None for what is none."""
    if len(text) < 2 or text[0] not in _OPEN or text[-1] not in _SHUT:
        return None
    depth, parts, start = 0, [], 1
    for at, letter in enumerate(text):
        depth += (letter in _OPEN) - (letter in _SHUT)
        if depth == 0 and at + 1 < len(text):
            return None  # the first bracket closes before the end
        if (letter == "," and depth == 1) or at + 1 == len(text):
            parts.append(text[start:at].strip())
            start = at + 1
    return (text[0] + text[-1], parts) if len(parts) > 1 else None


def _same_values(answer: str, reference: str) -> bool:
    """Whether two formulas have the same values at the points where both have one."""
    trees = [_parsed(text) for text in sorted((answer, reference))]  # the same points whichever stands first
    if trees[0] is None or trees[1] is None:
        return False
    names = [sorted({node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}) for tree in trees if tree]
    unknown = sorted({name for own in names for name in own} - set(_CONSTANTS) - set(_FUNCTIONS))
    chance, compared = random.Random(0), 0
    for _ in range(POINTS):
        at = {name: Fraction(chance.randint(1, 997), chance.randint(1, 97)) for name in unknown}
        a, b = _value(trees[0], at), _value(trees[1], at)
        if a is None or b is None:
            continue
        exact = isinstance(a, Fraction) and isinstance(b, Fraction)
        if a != b if exact else not math.isclose(float(a), float(b), rel_tol=CLOSE, abs_tol=CLOSE):
            return False
        compared += 1
    return compared > 0


def _parsed(text: str) -> ast.expr | None:
    """A formula as a tree; 2x and 2(x + 1) are products."""
    if len(text) > LONGEST or re.search(r"[^0-9a-zA-Z.+\-*/() ]", text):
        return None
    known = "|".join([*_FUNCTIONS, *_CONSTANTS])
    words = re.findall(rf"{known}|[a-zA-Z]|\d+(?:\.\d+)?|\*\*|[-+*/()]", text)
    if "".join(words) != text.replace(" ", ""):
        return None
    spelt = ""
    for before, word in zip(["", *words], words, strict=False):
        product = (re.fullmatch(r"[\w.]+|\)", before) and re.match(r"[\w(]", word)) and before not in _FUNCTIONS
        spelt += "*" + word if product else word
    try:
        return ast.parse(spelt, mode="eval").body
    except (SyntaxError, RecursionError, MemoryError):
        return None


def _value(node: ast.expr | None, at: dict[str, Fraction]) -> Value | None:
    """The value of a formula; None where it has none, or one that is too large."""
    try:
        value = _evaluated(node, at)
        return value if isinstance(value, Fraction) or math.isfinite(value) else None
    except (ZeroDivisionError, OverflowError, ValueError):
        return None


def _evaluated(node: ast.expr | None, at: dict[str, Fraction]) -> Value:
    match node:
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
            return Fraction(str(value))
        case ast.Name(id=name):
            return at[name] if name in at else _CONSTANTS[name] if name in _CONSTANTS else _refuse(name)
        case ast.UnaryOp(op=ast.USub(), operand=inner):
            return -_evaluated(inner, at)
        case ast.UnaryOp(op=ast.UAdd(), operand=inner):
            return _evaluated(inner, at)
        case ast.Call(func=ast.Name(id=name), args=[inner], keywords=[]) if name in _FUNCTIONS:
            return _FUNCTIONS[name](float(_evaluated(inner, at)))
        case ast.BinOp(left=left, op=op, right=right):
            return _combined(_evaluated(left, at), op, _evaluated(right, at))
        case _:
            return _refuse("this")


def _refuse(what: str) -> Value:
    raise ValueError(f"{what} has no value in a formula")


def _combined(a: Value, op: ast.operator, b: Value) -> Value:
    both = isinstance(a, Fraction) and isinstance(b, Fraction)
    x, y = (a, b) if both else (float(a), float(b))
    match op:
        case ast.Add():
            return x + y
        case ast.Sub():
            return x - y
        case ast.Mult():
            return x * y
        case ast.Div():
            return x / y
        case ast.Pow():
            return _power(a, b)
        case _:
            return _refuse("this operator")


def _power(a: Value, b: Value) -> Value:
    if isinstance(a, Fraction) and isinstance(b, Fraction) and b.denominator == 1:
        size = max(a.numerator.bit_length(), a.denominator.bit_length())
        if abs(b) * size > _LARGEST:
            raise OverflowError(f"{a} to the power of {b} is too large")
        return Fraction(a ** int(b))
    if a < 0:
        raise ValueError("a root of what is below 0 has no value here")
    return float(a) ** float(b)
