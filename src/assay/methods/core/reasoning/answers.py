"""When two answers are the same: numbers in one form, and where in a text the answer stands."""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation
from fractions import Fraction

from assay import checks

LONGEST = 400  # characters of an answer that is read as a number: longer ones are kept as text
_WHOLE = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)"  # "1,200" is a number, "1,2" is two
_NUMBER = rf"[-+]?(?:{_WHOLE}(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d{{1,3}})?"
_FRACTION = re.compile(rf"({_NUMBER})\s*/\s*({_NUMBER})\Z")
_LATEX = re.compile(r"\\d?frac\{(-?\d+)\}\{(-?\d+)\}")
_ANSWER = re.compile(r"answer(?:\s+is|\s*[:=])", re.IGNORECASE)
_LAST = re.compile(rf"{_NUMBER}(?:\s*/\s*\d+)?")


def canonical(answer: str) -> str:
    r"""One spelling for each answer, so that votes for the same thing are counted together.

    Numbers become a whole number or a fraction in lowest terms (1/2, 0.5, .50 and 2/4 are one), thousands' commas, a leading dollar sign, a
    trailing full stop and a trailing per cent sign are left out ("50%" is "50"). Anything else is put in lower case with single spaces.
    "" stays "", which stands for no answer. Raises TypeError for what is no text.

    >>> [canonical(x) for x in ("1/2", "0.50", r"\frac{2}{4}", "$1,200.", " The  Cat ", "-0")]
    ['1/2', '1/2', '1/2', '1200', 'the cat', '0']
    """
    if not isinstance(answer, str):
        raise TypeError(f"answer must be text, got {checks.shown(answer)}")
    text = _LATEX.sub(r"\1/\2", answer.strip().strip("$").strip().rstrip("."))
    value = number(text.rstrip("%").strip())
    return " ".join(text.lower().split()) if value is None else str(value)


def number(text: str) -> Fraction | None:
    """The exact value of a number or a fraction of two; None for anything else, and for what is longer than any answer.

    >>> number("3.25"), number("1,000"), number("seven"), number("1/0")
    (Fraction(13, 4), Fraction(1000, 1), None, None)
    """
    if len(text) > LONGEST:
        return None
    found = _FRACTION.match(text)
    parts = [found[1], found[2]] if found else [text]
    values: list[Fraction] = []
    for part in parts:
        if not re.fullmatch(_NUMBER, part):
            return None
        try:
            values.append(Fraction(Decimal(part.replace(",", ""))))
        except InvalidOperation:
            return None
    if len(values) == 1:
        return values[0]
    return values[0] / values[1] if values[1] else None


def extract(text: str) -> str:
    r"""The answer that a text ends with, canonical: what is in the last \boxed{...}, else what follows the last "answer is" or "answer:",
    else the last number; "" where there is none of them.

    >>> extract("3 + 4 makes 7. The answer is 7."), extract(r"so \boxed{\frac{1}{2}}"), extract("I do not know")
    ('7', '1/2', '')
    """
    if (inside := boxed(text)) is not None:
        return canonical(inside)
    if said := list(_ANSWER.finditer(text)):
        rest = text[said[-1].end() :].strip().partition("\n")[0]
        first = _LAST.search(rest)
        return canonical(first[0] if first else rest)
    numbers = _LAST.findall(text)
    return canonical(numbers[-1]) if numbers else ""


def boxed(text: str) -> str | None:
    r"""What stands in the last \boxed{...} of a text, braces matched; None where there is none or it does not close.

    >>> boxed(r"\boxed{a{b}c} and more")
    'a{b}c'
    """
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    start += len("\\boxed{")
    depth = 1
    for at in range(start, len(text)):
        depth += (text[at] == "{") - (text[at] == "}")
        if not depth:
            return text[start:at]
    return None
