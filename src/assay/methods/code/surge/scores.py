"""How a predicted output is scored, by component: pure functions of two texts.

Every score lies in [0, 1]. An answer that cannot be read ("unparsable") is told from one that is wrong; both score 0.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Any, Literal, Protocol

from assay import checks
from assay.methods.code.surge.extract import VARIANTS, extract

COUNTS = {"ML": 150, "CL": 150, "RL": 60, "SC": 150, "TC": 150, "BG": 150, "DR": 200, "FL": 150}
"""The items of the paper by component, 1,160: multi-lingual, competition, repository, scientific, time-consuming, buggy, dependent on the
compiler, formal."""
SMALLEST = 1e-10
TRACE = 1e-6
"""A score up to this is called wrong: the released rule gives about 1e-10 for zeros."""
_NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?")
State = Literal["right", "partly", "wrong", "unparsable"]


@dataclass(frozen=True)
class Score:
    """A score in [0, 1], and what it is: right at 1, unparsable where the answer has not the form that its scorer reads."""

    value: float
    state: State


class Scored(Protocol):
    """What an item must have to be scored."""

    @property
    def component(self) -> str: ...
    @property
    def family(self) -> str: ...
    @property
    def truth(self) -> str: ...


def numbers(text: str) -> list[float]:
    """All numbers of a text in their order; those that are no finite float are left out.

    >>> numbers("x = -1.5, y = 2e3.")
    [-1.5, 2000.0]
    """
    return [value for found in _NUMBER.findall(text) if math.isfinite(value := float(found))]


def exact(answer: str, truth: str) -> float:
    """1 where the texts are equal."""
    return float(answer == truth)


def numerical(answer: str, truth: str, *, variant: str = "paper") -> float | None:
    """1 less the mean relative error |o - g| / (|g| + 1e-10) over the numbers of the two texts, in [0, 1]; None for an answer without any.

    A number that is missing is an error of 1, and so is one that is too many; `as_released` puts zeros in the place of those that are
    missing, an answer without any included, and cuts off those that are too many. A true 0 makes any other number there score 0 in all.
    Raises ValueError for a truth without a number.

    >>> numerical("9 9", "9 9"), numerical("9 9 9 1", "9 9"), numerical("9 9 9 1", "9 9", variant="as_released")
    (1.0, 0.5, 1.0)
    """
    checks.choice("variant", variant, VARIANTS)
    found, wanted = numbers(answer), numbers(truth)
    if not wanted:
        raise ValueError(f"truth must hold a number, got {checks.shown(truth)}")
    if not found and variant == "paper":
        return None
    if variant == "as_released":
        found = [*found[: len(wanted)], *[0.0] * (len(wanted) - len(found))]
    errors = [abs(o - g) / (abs(g) + SMALLEST) for o, g in zip(found, wanted, strict=False)]
    errors += [1.0] * abs(len(found) - len(wanted))
    return _clipped(1 - sum(errors) / len(errors))


def sorting(answer: str, truth: str, *, variant: str = "paper") -> float | None:
    """Spearman's rank correlation of the numbers of two texts, in [0, 1]; None for an answer without any.

    It does not change under a rising map of either list. Lists of different lengths are compared as far as both go, and the score is
    multiplied by the share that this is of the longer one; `as_released` gives 0. Where a list is constant there are no ranks: 1 for equal
    lists, else 0. Raises ValueError for a truth without a number.

    >>> sorting("10 20 30", "1 5 6"), sorting("3 2 1", "1 2 3"), sorting("1 2", "1 2 3 4")
    (1.0, 0.0, 0.5)
    """
    checks.choice("variant", variant, VARIANTS)
    found, wanted = numbers(answer), numbers(truth)
    if not wanted:
        raise ValueError(f"truth must hold a number, got {checks.shown(truth)}")
    if not found and variant == "paper":
        return None
    if variant == "as_released" and len(found) != len(wanted):
        return 0.0
    size = min(len(found), len(wanted))
    return _spearman(found[:size], wanted[:size]) * size / max(len(found), len(wanted))


def monte_carlo(answer: str, truth: str, *, variant: str = "paper") -> float | None:
    """The numerical rule on what stands after the last colon of each text."""
    return numerical(answer.rpartition(":")[2], truth.rpartition(":")[2], variant=variant)


def jaccard(answer: str, truth: str) -> float:
    """The share of lower-cased words (between white space) that both texts have, of those that one has; 1 for two empty texts. Symmetric.

    It rewards the boilerplate of error texts: hold it against a template of them.

    >>> jaccard("NameError: name x", "nameerror: name y")
    0.5
    """
    one, other = set(answer.lower().split()), set(truth.lower().split())
    return len(one & other) / len(one | other) if one | other else 1.0


def ratio(answer: str, truth: str, *, variant: str = "paper") -> float:
    """difflib's ratio of matching characters, the truth as its first text: it is not symmetric.

    `as_released` leaves difflib's heuristic on that calls frequent characters of an answer of 200 or more junk.
    """
    checks.choice("variant", variant, VARIANTS)
    return SequenceMatcher(None, truth, answer, autojunk=variant == "as_released").ratio()


def formal(answer: str, truth: str, *, variant: str = "paper") -> float | None:
    """Two verdicts on a proof, `{"pass": bool, "errors": [{"line": int, "message": str}]}`; None for an answer that is none.

    Both pass: 1. Only one does: 0. Neither: the mean over the true errors of the Jaccard of the messages, where an error is predicted on
    that line (the best of several; `as_released` the first), else 0; without true errors 1 if none was predicted. A fence around the answer
    is taken off, but not `as_released`, which reads the reply as a whole. Raises ValueError for a truth that is no verdict.

    >>> formal('{"pass": false, "errors": [{"line": 3, "message": "no q"}]}', '{"pass": false, "errors": [{"line": 3, "message": "no p"}]}')
    0.3333333333333333
    """
    checks.choice("variant", variant, VARIANTS)
    wanted = _verdict(truth)
    if wanted is None:
        raise ValueError(f"truth must be a verdict on a proof, got {checks.shown(truth)}")
    found = _verdict(answer if variant == "as_released" else extract(answer))
    if found is None:
        return 0.0 if variant == "as_released" else None
    if found["pass"] != wanted["pass"]:
        return 0.0
    if wanted["pass"]:
        return 1.0
    if not wanted["errors"]:
        return float(not found["errors"])
    total = 0.0
    for error in wanted["errors"]:
        alike = [jaccard(one["message"], error["message"]) for one in found["errors"] if one["line"] == error["line"]]
        total += 0.0 if not alike else alike[0] if variant == "as_released" else max(alike)
    return total / len(wanted["errors"])


def rule_of(component: str, family: str) -> str:
    """Which rule scores a program of this family: "exact", "numerical", "sorting", "monte carlo", "jaccard", "ratio" or "formal".

    Of scientific and time-consuming programs the families "numerical", "sorting" and "monte carlo" have rules of their own; of repositories
    those in C++ are exact. Raises ValueError for a component that there is not.

    >>> rule_of("TC", "sorting"), rule_of("TC", "counting"), rule_of("RL", "c++"), rule_of("BG", "name")
    ('sorting', 'exact', 'exact', 'jaccard')
    """
    checks.choice("component", component, list(COUNTS))
    if component in ("SC", "TC"):
        return family if family in ("numerical", "sorting", "monte carlo") else "exact"
    if component == "RL":
        return "exact" if family == "c++" else "ratio"
    return {"ML": "exact", "CL": "exact", "BG": "jaccard", "DR": "jaccard", "FL": "formal"}[component]


_RULES: dict[str, Callable[..., float | None]] = {
    "numerical": numerical, "sorting": sorting, "monte carlo": monte_carlo, "formal": formal, "ratio": ratio,
}  # fmt: skip
_PLAIN: dict[str, Callable[[str, str], float]] = {"exact": exact, "jaccard": jaccard}


def score(item: Scored, reply: str, *, variant: str = "paper") -> Score:
    """The score of a model's whole reply to an item, its answer extracted first.

    An empty answer is unparsable and scores 0. `as_released` calls nothing unparsable: what cannot be read is wrong. A grid (family
    "sudoku") counts as the better of two extractions. When NOT to use it: on what `extract` gave already, if that may hold a fence.

    >>> from types import SimpleNamespace
    >>> score(SimpleNamespace(component="SC", family="numerical", truth="2.0"), "Output: about 2.0")
    Score(value=1.0, state='right')
    """
    checks.choice("variant", variant, VARIANTS)
    rule = rule_of(item.component, item.family)
    answers = [extract(reply, variant=variant)]
    if item.family == "sudoku":
        answers.append(extract(reply, variant="paper" if variant == "as_released" else "as_released"))
    if rule == "formal" and variant == "as_released":
        answers = [reply]
    values = [_value(rule, answer, item.truth, variant) for answer in answers]
    read = [value for value in values if value is not None]
    if not read:
        return Score(0.0, "wrong" if variant == "as_released" else "unparsable")
    best = max(read)
    return Score(best, "right" if best == 1 else "partly" if best > TRACE else "wrong")


def _value(rule: str, answer: str, truth: str, variant: str) -> float | None:
    if not answer.strip():
        return None
    if rule in _PLAIN:
        return _PLAIN[rule](answer, truth)
    return _RULES[rule](answer, truth, variant=variant)


def _clipped(value: float) -> float:
    return min(max(value, 0.0), 1.0)


def _ranks(values: list[float]) -> list[float]:
    """The place of each value in their order, equal ones at the mean of their places."""
    order = sorted(values)
    return [(order.index(value) + len(order) - 1 - order[::-1].index(value)) / 2 for value in values]


def _spearman(found: list[float], wanted: list[float]) -> float:
    a, b = _ranks(found), _ranks(wanted)
    middle = (len(a) - 1) / 2
    across = sum((x - middle) * (y - middle) for x, y in zip(a, b, strict=True))
    spread = math.sqrt(sum((x - middle) ** 2 for x in a) * sum((y - middle) ** 2 for y in b))
    if spread == 0:
        return float(found == wanted)
    return 1.0 if a == b else _clipped(across / spread)


def _verdict(text: str) -> dict[str, Any] | None:
    """A verdict on a proof, None for what is none."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or not isinstance(found.get("pass"), bool):
        return None
    errors = found.get("errors", [])
    if not isinstance(errors, list):
        return None
    for error in errors:
        if (
            not isinstance(error, dict)
            or type(error.get("line")) is not int
            or not isinstance(error.get("message"), str)
        ):
            return None
    return {"pass": found["pass"], "errors": errors}
