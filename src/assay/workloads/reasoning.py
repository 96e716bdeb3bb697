"""Questions whose answers can be checked, made from templates: sums, sums in steps, word problems, chains of deduction.

Every question belongs to one part by a hash of its text: those of "shown" stand as examples in prompts, "pilot" is for choosing kinds,
levels and settings, "learn" for fitting verifiers and estimators, "judged" for figures. So nothing that is judged was seen before. Each
kind is asked in three wordings, so that no result rests on one of them.

>>> (item,) = items("sum", level=1, n=1, part="judged")
>>> prompt(item, "question", shots=1).count("Question:"), right(item, f" {item.answer}\\n")
(2, True)
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Literal, get_args

from assay import checks

Kind = Literal["sum", "steps", "story", "chain"]
Part = Literal["shown", "pilot", "learn", "judged"]
Wording = Literal["plain", "question", "task"]
KINDS: tuple[Kind, ...] = get_args(Kind)
PARTS: tuple[Part, ...] = get_args(Part)
WORDINGS: tuple[Wording, ...] = get_args(Wording)
LEVELS = {"sum": 3, "steps": 4, "story": 3, "chain": 4}
_SHARES = {"shown": 0.1, "pilot": 0.2, "learn": 0.3, "judged": 0.4}
_TRIES = 200


@dataclass(frozen=True)
class Item:
    """A question, its answer in canonical form, and how it is worked out, one step a line, the last of them stating the answer."""

    kind: Kind
    level: int
    question: str
    answer: str
    steps: tuple[str, ...]

    @property
    def part(self) -> Part:
        """The part that the question belongs to."""
        at = int.from_bytes(hashlib.blake2b(self.question.encode(), digest_size=8).digest(), "big") / 2**64
        for part in PARTS[:-1]:
            if at < _SHARES[part]:
                return part
            at -= _SHARES[part]
        return PARTS[-1]


def items(kind: Kind, *, level: int = 1, n: int = 50, part: Part = "judged", seed: int = 0) -> list[Item]:
    """`n` different questions of a kind and a level (1 is the easiest, `LEVELS` the hardest) that belong to `part`, fixed by the seed.

    Raises ValueError for an unknown kind, part or level, and where there are not so many questions.
    """
    kind, part = checks.choice("kind", kind, KINDS), checks.choice("part", part, PARTS)
    level, n = checks.whole("level", level, low=1, high=LEVELS[kind]), checks.whole("n", n, low=1)
    chance = random.Random(f"{kind} {level} {part} {checks.whole('seed', seed)}")
    found: dict[str, Item] = {}
    for _ in range(_TRIES * n):
        item = _MAKERS[kind](level, chance)
        if item.part == part:
            found.setdefault(item.question, item)
        if len(found) == n:
            return list(found.values())
    raise ValueError(f"n must be at most {len(found)} for {kind} of level {level} in {part}, got {n}")


def prompt(item: Item, wording: Wording = "plain", *, shots: int = 4, worked: bool = False) -> str:
    """The item behind `shots` examples of its kind and level, ready to be continued by its answer, or by its steps where `worked`.

    Sums have no steps: `worked` changes nothing there. Examples are the same for all items of a kind and level.
    """
    checks.choice("wording", wording, WORDINGS)
    shots, worked = checks.whole("shots", shots, low=0), checks.flag("worked", worked)
    shown = examples(item.kind, item.level, shots)
    blocks = [_asked(each, wording, worked) + _answered(each, worked) for each in shown]
    return "".join([_TASKS[item.kind] if wording == "task" else "", *blocks, _asked(item, wording, worked)])


@cache
def examples(kind: Kind, level: int, shots: int) -> tuple[Item, ...]:
    """The questions of "shown" that stand in prompts."""
    return tuple(items(kind, level=level, n=shots, part="shown")) if shots else ()


def stop(item: Item, *, worked: bool = False) -> tuple[str, ...]:
    """What ends an answer: the end of the line, or an empty line behind steps."""
    return ("\n\n",) if worked and len(item.steps) > 1 else ("\n",)


def answer_of(item: Item, text: str) -> str:
    """The answer that a continuation gives, "" where it gives none: behind "answer is" the first number (or yes or no), else the last one
    of the text."""
    found = re.split(r"answer is", text)[-1] if "answer is" in text else text
    if item.kind == "chain":
        said = re.findall(r"\b(yes|no)\b", found.lower())
        return (said[0] if "answer is" in text else said[-1]) if said else ""
    numbers = re.findall(r"-?\d+", found[:1000])
    if not numbers:
        return ""
    return str(int((numbers[0] if "answer is" in text or len(item.steps) == 1 else numbers[-1])[:40]))


def right(item: Item, text: str) -> bool:
    """Whether a continuation gives the right answer."""
    return answer_of(item, text) == item.answer


def _asked(item: Item, wording: Wording, worked: bool) -> str:
    if item.kind == "sum":
        numbers = item.question.split(" + ")
        return {
            "plain": f"{item.question} =",
            "question": f"Question: What is {' plus '.join(numbers)}?\nAnswer:",
            "task": f"Input: {' and '.join(numbers)}\nOutput:",
        }[wording]
    lead = {"plain": "{}\n", "question": "Question: {}\nAnswer:\n", "task": "Input: {}\nOutput:\n"}[wording]
    return lead.format(item.question) if worked else lead.format(item.question) + "The answer is"


def _answered(item: Item, worked: bool) -> str:
    if item.kind == "sum":
        return f" {item.answer}\n"
    return "\n".join(item.steps) + "\n\n" if worked else f" {item.answer}.\n\n"


_TASKS = {
    "sum": "Add the numbers.\n",
    "steps": "Add or subtract the numbers from left to right, one step a line.\n\n",
    "story": "Work out how much is paid, one step a line.\n\n",
    "chain": "Decide from what is said, one step a line. The answer is yes or no.\n\n",
}


# -------------------------------------------------------------------------------------------------------------- templates


def _sum(level: int, chance: random.Random) -> Item:
    low, high = 10 ** (level - 1) if level > 1 else 0, 10**level - 1
    a, b = chance.randint(low, high), chance.randint(low, high)
    return Item("sum", level, f"{a} + {b}", str(a + b), (str(a + b),))


def _steps(level: int, chance: random.Random) -> Item:
    """level + 1 numbers below 20, never below 0 on the way."""
    value = chance.randint(1, 19)
    question, steps = str(value), []
    for _ in range(level):
        more = chance.randint(1, 19)
        sign = "-" if more <= value and chance.random() < 0.5 else "+"
        new = value - more if sign == "-" else value + more
        question += f" {sign} {more}"
        steps.append(f"{value} {sign} {more} = {new}")
        value = new
    return Item("steps", level, f"What is {question}?", str(value), (*steps, f"The answer is {value}."))


_NAMES = ("Ann", "Ben", "Carla", "Dan", "Eva", "Finn", "Greta", "Hugo")
_THINGS = ("pens", "cups", "books", "apples", "lamps", "chairs", "keys", "stamps")


def _story(level: int, chance: random.Random) -> Item:
    """A price times a count; at level 2 something is added; at level 3 a discount is taken off as well."""
    name, thing, other = chance.choice(_NAMES), *chance.sample(_THINGS, 2)
    count, price = chance.randint(2, 9), chance.randint(2, 9)
    total = count * price
    told = f"{name} buys {count} {thing} for {price} dollars each"
    steps = [f"{count} {thing} cost {count} * {price} = {total} dollars."]
    if level > 1:
        more = chance.randint(2, 19)
        told += f" and {other} for {more} dollars"
        steps.append(f"With the {other} that is {total} + {more} = {total + more} dollars.")
        total += more
    told += "."
    if level > 2:
        less = chance.randint(1, min(9, total - 1))
        told += f" {name} has a coupon for {less} dollars."
        steps.append(f"With the coupon that is {total} - {less} = {total - less} dollars.")
        total -= less
    question = f"{told} How many dollars does {name} pay?"
    return Item("story", level, question, str(total), (*steps, f"The answer is {total}."))


_BEINGS = ("wumpus", "yumpus", "zumpus", "dumpus", "rompus", "numpus", "tumpus", "vumpus", "impus", "jompus")
_TRAITS = ("red", "cold", "happy", "small", "loud", "sweet")


def _chain(level: int, chance: random.Random) -> Item:
    """level links, in any order, with one that leads nowhere; the last says that a being is something, or is not."""
    beings = chance.sample(_BEINGS, level + 2)
    name, trait, other = chance.choice(_NAMES), *chance.sample(_TRAITS, 2)
    yes = chance.random() < 0.5
    links = [f"Every {a} is a {b}." for a, b in zip(beings[: level - 1], beings[1:level], strict=True)]
    links.append(f"Every {beings[level - 1]} is {'' if yes else 'not '}{trait}.")
    apart = [f"Every {beings[level]} is {'not ' if yes else ''}{trait}.", f"Every {beings[level + 1]} is {other}."]
    told = [*links, *apart]
    chance.shuffle(told)
    question = f"{' '.join(told)} {name} is a {beings[0]}. Is {name} {trait}?"
    steps = [f"{name} is a {being}." for being in beings[:level]]
    steps.append(f"{name} is {'' if yes else 'not '}{trait}.")
    answer = "yes" if yes else "no"
    return Item("chain", level, question, answer, (*steps, f"The answer is {answer}."))


_MAKERS: dict[Kind, Callable[[int, random.Random], Item]] = {
    "sum": _sum,
    "steps": _steps,
    "story": _story,
    "chain": _chain,
}
