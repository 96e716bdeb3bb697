"""Problems made stateful, and their answers judged: context and question apart, numbers compared exactly, passes among samples.

`variant="as_released"` of the splitter and the grader is what the released scripts do, for comparing figures with theirs: the splitter
cuts at every full stop, also inside "$1.50", and leaves a problem of one sentence with the context "."; the grader compares texts, so
that "3.0" is not 3.
"""

from __future__ import annotations

import math
import re
from decimal import Decimal
from fractions import Fraction
from typing import NamedTuple

from assay import checks
from assay.methods.serving.sleep_time_compute.prompts import VARIANTS, Variant

_END = re.compile(r"""(?<![.!?])[.!?]++["'”’)\]]*+(?=\s)""")
_TITLE = re.compile(r"(?:^|[\s(\"'“‘])(?:mr|mrs|ms|dr|prof|st|vs|approx|e\.g|i\.e)\.$", re.IGNORECASE)
_INITIAL = re.compile(r"(?:^|\s)[A-Z]\.$")
_ASK = r"(?:how|what|which|who|when|where|find|calculate|determine)\b"
_ASKS = re.compile(rf"[,;:]\s+(?=(?:then\s+|and\s+)?{_ASK})", re.IGNORECASE)
_ASKED, _WORD = re.compile(_ASK, re.IGNORECASE), re.compile(r"\S+")
_NUMBER = re.compile(
    r"(?<![\w.])(?:[-−+]?\$?[-−]?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|[-−+]?\$?\.\d+)(?:\s?/\s?\d+(?:\.\d+)?)?"
)
_RELEASED = re.compile(r"-?[$0-9.,]{2,}|-?[0-9]+")


class Split(NamedTuple):
    """A problem in two parts."""

    context: str
    question: str


def split(problem: str, *, variant: Variant = "paper") -> Split:
    """The last sentence of a problem as its question, and what stands before it as the context.

    Sentences end at ".", "!" or "?" before a space; a full stop ends none inside a number, before a small letter, behind a title ("Dr.") or
    behind an initial, unless a word that asks follows. A problem of one sentence is cut before the clause that asks ("If Ann has 3 pears, |
    how many ...?"). Context, a space, and question are the problem, up to white space. Raises ValueError for a problem without two such
    parts (its context would be empty), and for another variant.

    >>> split("A pear costs $1.50. Ann buys 4 pears. How much does she pay?")
    Split(context='A pear costs $1.50. Ann buys 4 pears.', question='How much does she pay?')
    >>> split("A pear costs $1.50. How much are 4?", variant="as_released")
    Split(context='A pear costs $1. 50.', question='How much are 4?')
    """
    checks.choice("variant", variant, VARIANTS)
    if not isinstance(problem, str):
        raise TypeError(f"problem must be text, got {checks.shown(problem)}")
    if variant == "as_released":
        pieces = [piece.strip() for piece in problem.split(".") if piece.strip()]
        if not pieces:
            raise ValueError(f"problem must hold a sentence, got {checks.shown(problem)}")
        return Split(". ".join(pieces[:-1]).strip() + ".", pieces[-1])
    text = problem.strip()
    ends = [match.end() for match in _END.finditer(text)]
    at = next((end for end in reversed(ends) if _ends(text, end)), 0)
    if not at:
        at = max((match.end() for match in _ASKS.finditer(text)), default=0)
    if not at:
        raise ValueError(f"problem must have a context before its question, got {checks.shown(problem)}")
    return Split(text[:at].rstrip(), text[at:].lstrip())


def _ends(text: str, at: int) -> bool:
    """Whether a sentence ends before `at`, where punctuation has ended and white space begins."""
    before = text[max(at - 20, 0) : at]  # longer than any title
    if not before.endswith("."):
        return True
    rest = _WORD.search(text, at)
    if (rest is not None and rest.group()[0].islower()) or _TITLE.search(before):
        return False
    return _INITIAL.search(before) is None or (rest is not None and _ASKED.match(rest.group()) is not None)


def number_in(text: str) -> Fraction | None:
    """The last number of a text, exactly; None if it has none.

    Understood are signs, "$", thousands with commas, decimals, fractions ("3/4") and what follows "####" in the data set's solutions. A
    per cent sign is a unit like others: "50%" is 50. A fraction over 0 is no number.

    >>> number_in("That is $1,234.50, I think..."), number_in("#### 7"), number_in("none")
    (Fraction(2469, 2), Fraction(7, 1), None)
    """
    if not isinstance(text, str):
        raise TypeError(f"text must be text, got {checks.shown(text)}")
    found = [_value(match.group()) for match in _NUMBER.finditer(text.rpartition("####")[2])]
    numbers = [value for value in found if value is not None]
    return numbers[-1] if numbers else None


def _value(text: str) -> Fraction | None:
    bare = re.sub(r"[\s$,+]", "", text).replace("−", "-")
    above, _, below = bare.partition("/")
    try:
        return Fraction(Decimal(above)) / Fraction(Decimal(below or 1))  # Decimal reads digits without end
    except ArithmeticError:
        return None


def grade(answer: str, expected: str, *, variant: Variant = "paper") -> bool:
    """Whether the last number of an answer is the expected one, exactly.

    Raises ValueError when the expected answer holds no number, and for another variant.

    >>> grade("It is 3.0.", "#### 3"), grade("It is 3.0.", "#### 3", variant="as_released")
    (True, False)
    """
    checks.choice("variant", variant, VARIANTS)
    wanted = number_in(expected)
    if wanted is None:
        raise ValueError(f"expected must hold a number, got {checks.shown(expected)}")
    if variant == "paper":
        return number_in(answer) == wanted
    found = _RELEASED.findall(answer)
    return _standard(found[-1] if found else "") == _standard(expected.rpartition("#### ")[2])


def _standard(text: str) -> str:
    """As the released grader compares: without dollars and commas, and without full stops at the ends."""
    return text.replace("$", "").replace(",", "").strip(".")


def pass_at_k(samples: int, right: int, k: int) -> float:
    """The chance that one of `k` answers is right, of `samples` of which `right` were: 1 - C(samples - right, k) / C(samples, k).

    Raises ValueError for more right ones, or more taken, than there are.

    >>> pass_at_k(4, 1, 2)
    0.5
    """
    samples = checks.whole("samples", samples, low=1)
    right, k = checks.whole("right", right, low=0, high=samples), checks.whole("k", k, low=1, high=samples)
    return 1 - math.comb(samples - right, k) / math.comb(samples, k)
