"""Contracts without a model: what held for every input that the correctness tests gave, in the manner of Daikon. All of it our choice.

Looked for are types, signs and small closed sets of values, lengths, order, distinctness, alphabets, words, balanced brackets, the shapes
of tables, the same of elements at any depth, and relations between two arguments. A property is a candidate when it held on every
input and would seldom have held by chance (`CHANCE`, under the null model named at each). What inputs are made of is taken as seen; how
large they get is never bounded from above, for stress inputs are to be larger than those of tests.
"""

from __future__ import annotations

import builtins
import math
import string
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any

from assay import checks
from assay.methods.code.coffe.doubling import Doubling
from assay.methods.code.coffe.programs import Args, asserts, parameters, with_contract
from assay.methods.code.coffe.stress import value_here

CHANCE = 0.05
"""How likely a property may be where nothing but chance made it hold."""
UNSEEN = 0.4
"""How much of the probability of words may be unseen (Good and Turing: the share of words seen once) for them to be all there are."""
PROBES = 200
KINDS = (
    "relation", "shape", "sorted", "balanced", "words", "alphabet", "distinct", "closed", "length", "sign", "type",
)  # fmt: skip
"""What candidates say; of candidates that reject as much, the one of the earlier kind is asked for first."""
PAIRS = ("()", "[]", "{}", "<>")
LETTERS = (string.ascii_lowercase, string.ascii_uppercase, string.digits)
_BUILTINS: dict[str, Any] = {
    name: getattr(builtins, name)
    for name in (
        "all", "any", "bool", "bytes", "complex", "dict", "float", "int", "len", "list", "map", "max", "min", "range", "set", "sorted",
        "str", "sum", "tuple", "type",
    )
}  # fmt: skip


@dataclass(frozen=True)
class Candidate:
    """A condition on a program's arguments, and of which kind it is (`KINDS`)."""

    text: str
    kind: str


def holds(text: str, names: Sequence[str], args: Args) -> bool:
    """Whether a condition holds on these arguments; one that raises does not. ONLY for conditions that this module wrote.

    >>> holds("len(a) <= n", ["a", "n"], ([1, 2], 2))
    True
    """
    try:
        found = eval(text, {"__builtins__": _BUILTINS, **dict(zip(names, args, strict=True))})  # noqa: S307 - our own text
    except (TypeError, ValueError, IndexError, AttributeError):
        return False
    return bool(found)


def candidates(inputs: Sequence[Args], names: Sequence[str]) -> list[Candidate]:
    """Every property found of the observed inputs (rows of arguments named `names`), by kind.

    >>> seen = [([1, 2], 1), ([3], 0), ([2, 5, 9], 2), ([4, 4, 7, 8], 3), ([0, 6, 6, 8, 9, 9], 4)]
    >>> [one.text for one in candidates(seen, ["xs", "n"]) if one.kind in ("relation", "sorted")]
    ['n < len(xs)', 'sorted(xs) == list(xs)']
    """
    if not inputs:
        raise ValueError("inputs must hold one observation at least, got none")
    for args in inputs:
        if len(args) != len(names):
            raise ValueError(f"inputs must have {len(names)} arguments each, got {checks.shown(args)}")
    inputs = _different(inputs)
    columns = {name: [args[n] for args in inputs] for n, name in enumerate(names)}
    names_of_elements = [f"{letter}_" for letter in "vwxyz"]
    found: list[Candidate] = []
    for name, values in columns.items():
        found += _described(name, _different(values), names_of_elements)
    found += _related(columns)
    types = [one for one in found if one.kind == "type"]
    found = [one for one in found if one.kind != "type"]
    if types:
        found.append(Candidate(" and ".join(one.text for one in types), "type"))
    kept = [one for one in dict.fromkeys(found) if all(holds(one.text, names, args) for args in inputs)]
    return sorted(kept, key=lambda one: KINDS.index(one.kind))


class ObservedContracts:
    """A `ContractMiner` of observed inputs. Of the candidates it asks next for the one that rejects the most probes which the contracts in
    the code let through; with none that rejects any it is done.

    `probes` are inputs that somebody who knows no contract might try; by default 200 that `Doubling` makes, of up to a hundred elements.

    >>> seen = [(s, s.count("(")) for s in ("()", "(())", "()()", "((()))", "(()())")]
    >>> code = "def depth(text, pairs): return text.count('(')"
    >>> miner = ObservedContracts(code, "depth", seen)
    >>> "text.count('(') == text.count(')')" in miner.edit(code, [])
    True
    """

    def __init__(
        self, program: str, entry_point: str, inputs: Sequence[Args], *, probes: Sequence[Args] | None = None
    ) -> None:
        self.entry_point = entry_point
        self.names = parameters(program, entry_point)
        self.candidates = candidates(inputs, self.names)
        if probes is None:
            probes = [value_here(one) for one in Doubling(inputs, scale=100).proposals(PROBES)]
        self.rejected = [
            frozenset(n for n, probe in enumerate(probes) if not holds(one.text, self.names, probe))
            for one in self.candidates
        ]
        self._asked: set[int] = set()

    def edit(self, code: str, examples: Sequence[Args]) -> str | None:
        """`code` with the next contract; see the class. `examples` are not looked at."""
        there = asserts(code)
        known = [n for n, one in enumerate(self.candidates) if _normal(one.text) in there]
        gone = frozenset[int]().union(*(self.rejected[n] for n in known))
        left = [n for n in range(len(self.candidates)) if n not in self._asked and n not in known]
        best = max(left, key=lambda n: (len(self.rejected[n] - gone), -n), default=None)
        if best is None or not self.rejected[best] - gone:
            return None
        self._asked.add(best)
        return with_contract(code, self.entry_point, f"assert {self.candidates[best].text}")


def _normal(condition: str) -> str:
    (text,) = asserts(f"assert {condition}")
    return text


def _different(values: Sequence[Any]) -> list[Any]:
    """One of each, by its text: 1, 1.0 and True are three."""
    return list({repr(value): value for value in values}.values())


def _seldom(log_chance: float) -> bool:
    return log_chance <= math.log(CHANCE)


def _coin(times: int) -> float:
    """The logarithm of the chance that so many coins fall alike."""
    return -times * math.log(2)


# ------------------------------------------------------------------------------------------------------------- one argument


def _described(path: str, values: list[Any], free: Sequence[str]) -> Iterator[Candidate]:
    """What holds of different values found at `path`. `free` are names for elements."""
    present = [value for value in values if value is not None]
    if not present:
        return
    guard = "" if len(present) == len(values) else f"{path} is None or "
    kinds = sorted({type(value).__name__ for value in values if value is not None})
    what = f"type({path}) is {kinds[0]}" if len(kinds) == 1 else f"type({path}) in ({', '.join(kinds)})"
    found: list[Candidate] = [Candidate(what, "type")]
    kind = set(kinds)
    if kind <= {"int", "float"}:
        found += _numbers(path, present)
    elif kind == {"str"}:
        found += _strings(path, present)
        found += _lengths(path, present)
    elif kind <= {"list", "tuple"}:
        found += _lengths(path, present)
        found += _sequences(path, present, free)
    elif kind == {"dict"}:
        found += _lengths(path, present)
        found += _elements(path, [key for value in present for key in value], free)
        found += _elements(f"{path}.values()", [one for value in present for one in value.values()], free)
    elif kind == {"set"}:
        found += _lengths(path, present)
        found += _elements(path, [one for value in present for one in value], free)
    elif len(kinds) > 3:
        return
    for one in found:
        yield Candidate(f"({guard}{one.text})", one.kind) if guard else one


def _elements(path: str, values: list[Any], free: Sequence[str]) -> Iterator[Candidate]:
    if values and free:
        for one in _described(free[0], _different(values), free[1:]):
            yield Candidate(f"all({one.text} for {free[0]} in {path})", one.kind)
        counts = Counter(map(repr, values))
        if len(values) >= 10 and set(counts) == {"0", "1"}:  # too few different values to be seen among them
            yield Candidate(f"all({free[0]} in (0, 1) for {free[0]} in {path})", "closed")


def _numbers(path: str, values: list[Any]) -> Iterator[Candidate]:
    """Null model of a sign: each different value is as likely below as above."""
    low, high, whole = min(values), max(values), all(type(value) is int for value in values)
    if _seldom(_coin(len(values))):
        if low >= 2 and whole and 2 in values:
            yield Candidate(f"{path} >= 2", "sign")
        elif low > 0:
            yield Candidate(f"{path} >= 1" if whole else f"{path} > 0", "sign")
        elif low == 0:
            yield Candidate(f"{path} >= 0", "sign")
        if high < 0:
            yield Candidate(f"{path} < 0", "sign")
        if low >= 0 and high <= 1 and not whole:
            yield Candidate(f"{path} <= 1", "closed")
        if whole and len({value % 2 for value in values}) == 1:
            yield Candidate(f"{path} % 2 == {low % 2}", "closed")


def _lengths(path: str, values: list[Any]) -> Iterator[Candidate]:
    """Null models: whoever tries four inputs tries the shortest allowed one; lengths are even like coins; five are not alike by chance."""
    lengths = [len(value) for value in values]
    if len(values) >= 4 and min(lengths) >= 1:
        if len(values) >= 5 and len(set(lengths)) == 1 and lengths[0] > 1:
            yield Candidate(f"len({path}) == {lengths[0]}", "length")
        yield Candidate(f"len({path}) >= {2 if min(lengths) == 2 else 1}", "length")
    if len(set(lengths)) >= 3 and _seldom(_coin(len(values))) and not any(length % 2 for length in lengths):
        yield Candidate(f"len({path}) % 2 == 0", "length")


def _strings(path: str, values: list[str]) -> Iterator[Candidate]:
    counts = Counter("".join(values))
    if not counts:
        return
    yield Candidate(f"set({path}) <= set({_alphabet(counts)!r})", "alphabet")
    for pair in PAIRS:
        brackets = counts[pair[0]] + counts[pair[1]]
        if brackets >= 8 and all(_balanced(value, *pair) for value in values):
            opened, closed = repr(pair[0]), repr(pair[1])
            yield Candidate(
                f"{path}.count({opened}) == {path}.count({closed}) and "
                f"all({path}[:n_].count({opened}) >= {path}[:n_].count({closed}) for n_ in range(len({path})))",
                "balanced",
            )
    words = Counter(word for value in values for word in value.split())
    once = sum(count == 1 for count in words.values())
    if words.total() >= 8 and once / words.total() <= UNSEEN and max(len(value.split()) for value in values) > 1:
        yield Candidate(f"set({path}.split()) <= {{{', '.join(map(repr, sorted(words)))}}}", "words")
    spaced = [value for value in values if " " in value]
    if _seldom(_coin(len(spaced))):
        yield Candidate(f"' '.join({path}.split()) == {path}", "words")


def _alphabet(counts: Counter[str]) -> str:
    """The characters that were seen; letters and digits stand for all of their class where three are there and new ones still turned up."""
    allowed = set(counts)
    for letters in LETTERS:
        seen = [counts[one] for one in letters if counts[one]]
        if len(seen) >= 3 and sum(seen) < 10 * len(seen):
            allowed |= set(letters)
    return "".join(sorted(allowed))


def _balanced(text: str, opened: str, closed: str) -> bool:
    depth = 0
    for one in text:
        depth += (one == opened) - (one == closed)
        if depth < 0:
            return False
    return depth == 0


def _sequences(path: str, values: list[Any], free: Sequence[str]) -> Iterator[Candidate]:
    tuples = all(type(value) is tuple for value in values) and len({len(value) for value in values}) == 1
    if tuples and 1 <= len(values[0]) <= 4:
        places = {f"{path}[{n}]": [value[n] for value in values] for n in range(len(values[0]))}
        for place, items in places.items():
            yield from _described(place, _different(items), free)
        yield from _related(places)
        return
    items = [item for value in values for item in value]
    if items and len({type(item) for item in items if type(item) is not float}) <= 1:
        yield from _ordered(path, values)
    kinds = {type(item) for item in items}
    if kinds == {int} and len(values) >= 3 and max(map(len, values)) >= 2:
        yield Candidate(f"sorted({path}) == list(range(1, len({path}) + 1))", "closed")
    if kinds == {str} and free and _seldom(sum(_coin(len(value) - 1) for value in values if value)):
        yield Candidate(f"len(set(map(len, {path}))) <= 1", "shape")
    if kinds == {list} and free:
        if _seldom(sum(_coin(len(value) - 1) for value in values if value)):
            yield Candidate(f"len(set(map(len, {path}))) <= 1", "shape")
            yield Candidate(f"all(len({path}) == len({free[0]}) for {free[0]} in {path})", "shape")
        cells = f"{free[1]} for {free[0]} in {path} for {free[1]} in {free[0]}" if len(free) > 1 else ""
        if cells and len(values) >= 3:
            yield Candidate(f"sorted({cells}) == list(range(1, sum(map(len, {path})) + 1))", "closed")
    yield from _elements(path, items, free)


def _ordered(path: str, values: list[Any]) -> Iterator[Candidate]:
    """Null models: every order of a list's different elements is as likely; elements are drawn from those that were seen anywhere."""
    try:
        different = [len(set(value)) for value in values]
        pool = len({item for value in values for item in value})
        up = all(sorted(value) == list(value) for value in values)
        down = all(sorted(value, reverse=True) == list(value) for value in values)
    except TypeError:  # elements without an order, or lists
        return
    if _seldom(-sum(math.lgamma(n + 1) for n in different)):
        if up:
            yield Candidate(f"sorted({path}) == list({path})", "sorted")
        if down:
            yield Candidate(f"sorted({path}, reverse=True) == list({path})", "sorted")
    if different == [len(value) for value in values]:
        chance = sum(math.log1p(-n / (pool + 1)) for length in different for n in range(length))
        if _seldom(chance):
            yield Candidate(f"len(set({path})) == len({path})", "distinct")


# ------------------------------------------------------------------------------------------------------------- two arguments


def _related(columns: Mapping[str, list[Any]]) -> Iterator[Candidate]:
    """Null model: of two different numbers either is as likely the larger, in every observation anew."""
    for (a, left), (b, right) in permutations(columns.items(), 2):
        pairs = _different(list(zip(left, right, strict=True)))
        if _all(left, int, float) and _all(right, int, float) and _seldom(_coin(len(pairs))):
            if all(x < y for x, y in pairs):
                yield Candidate(f"{a} < {b}", "relation")
            else:
                yield Candidate(f"{a} <= {b}", "relation")
        if _all(left, int) and _all(right, str, list, tuple):
            sizes = [(n, len(value)) for n, value in pairs]
            if len({size for _, size in sizes}) >= 3 and all(n == size for n, size in sizes):
                yield Candidate(f"{a} == len({b})", "relation")
            elif _seldom(_coin(len(pairs))):
                yield Candidate(
                    f"{a} < len({b})" if all(n < size for n, size in sizes) else f"{a} <= len({b})", "relation"
                )
        if _all(right, list, tuple, str) and len(pairs) >= 3 and (_all(right, str) <= _all(left, str)):
            yield Candidate(f"{a} in {b}", "relation")
        if a < b and _all(left, str, list, tuple) and _all(right, str, list, tuple):
            sizes = sorted({(len(x), len(y)) for x, y in pairs})
            if len(sizes) >= 2 and len(pairs) >= 3 and all(x == y for x, y in sizes):
                yield Candidate(f"len({a}) == len({b})", "relation")


def _all(values: Sequence[Any], *kinds: type) -> bool:
    return all(type(value) in kinds for value in values)
