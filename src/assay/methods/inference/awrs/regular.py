"""Regular expressions read byte by byte, with an answer to "can this still become a match?" after each of them.

The pattern is parsed by Python's own `re`, turned into an automaton over characters that is determinised as it is used, and read
through UTF-8. A state is kept per text, so that a check costs the new bytes. (The `regex` package knows partial matches too, but
starts over with each call, and says yes to prefixes it can only rule out later.)
"""

from __future__ import annotations

import bisect
import importlib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from assay import checks
from assay.methods.inference.awrs.constraints import Automaton, Constraint

MOST_STATES = 50_000  # before it is determinised
MOST_ARCS = 200_000  # a step looks at all that leave its states: a tenth of a second
LAST = 0x10FFFF
SURROGATES = (0xD800, 0xDFFF)
Span = tuple[int, int]
Edge = Literal["inside", "bound", "free"]  # where an anchor is meaningless, implied, or would make a difference

_parser: Any = importlib.import_module("re._parser")
_compiler: Any = importlib.import_module("re._compiler")
_REFUSED = {
    "ASSERT": "look-ahead and look-behind",
    "ASSERT_NOT": "negative look-ahead and look-behind",
    "GROUPREF": "references to groups",
    "GROUPREF_EXISTS": "references to groups",
    "ATOMIC_GROUP": "atomic groups",
    "POSSESSIVE_REPEAT": "possessive repeats",
}


def regex(pattern: str) -> Constraint:
    """Texts that `pattern`, in Python's syntax, matches from the first to the last byte, as UTF-8.

    Exact: `prefix` holds of a text if and only if some continuation matches. Anchors may stand at the two ends, where they mean
    nothing. Raises TypeError for anything but text, and ValueError for a pattern that does not compile or that needs what an
    automaton does not have (look-around, back references, atomic groups, possessive repeats, word boundaries), that matches nothing,
    or that expands to more than 50,000 states or 200,000 steps between them.

    >>> date = regex(r"\\d{4}-\\d\\d")
    >>> date.prefix(b"20"), date.complete(b"2025-04"), date.prefix(b"2a")
    (True, True, False)
    """
    return Regex(characters(pattern))


class Regex(Automaton):
    """A state is that of the characters read, and the bytes of the next one that have come so far."""

    def __init__(self, chars: Characters) -> None:
        super().__init__((chars.start, b""))
        self._chars = chars

    def take(self, state: tuple[int, bytes], byte: int) -> tuple[int, bytes] | None:
        at, pending = state
        pending += bytes((byte,))
        spelt = utf8_span(pending)
        if spelt is None:
            return None
        low, high, whole = spelt
        if not whole:
            return (at, pending) if self._chars.any_of(at, low, high) else None
        after = self._chars.step(at, low)
        return None if after is None else (after, b"")

    def is_final(self, state: tuple[int, bytes]) -> bool:
        return not state[1] and self._chars.accepts(state[0])


def utf8_span(piece: bytes) -> tuple[int, int, bool] | None:
    """The code points whose UTF-8 form begins with `piece` (first and last), and whether it is whole; None where there are none.

    >>> utf8_span(b"A"), utf8_span("é".encode()[:1]), utf8_span(b"\\xff")
    ((65, 65, True), (192, 255, False), None)
    """
    lead = piece[0]
    if lead < 0x80:
        return (lead, lead, True) if len(piece) == 1 else None
    shapes = ((2, 0xC0, 5, 0x80), (3, 0xE0, 4, 0x800), (4, 0xF0, 3, 0x10000))
    shape = next((shape for shape in shapes if lead >> shape[2] == shape[1] >> shape[2]), None)
    if shape is None:
        return None
    length, _, bits, least = shape
    if len(piece) > length or any(byte >> 6 != 0b10 for byte in piece[1:]):
        return None
    value = lead & ((1 << bits) - 1)
    for byte in piece[1:]:
        value = value << 6 | byte & 0x3F
    open_bits = 6 * (length - len(piece))
    low, high = max(value << open_bits, least), min((value + 1 << open_bits) - 1, LAST)
    if SURROGATES[0] <= low <= SURROGATES[1]:
        low = SURROGATES[1] + 1
    if SURROGATES[0] <= high <= SURROGATES[1]:
        high = SURROGATES[0] - 1
    return (low, high, not open_bits) if low <= high else None


# ------------------------------------------------------------------------------------------------------------ characters


class Spans:
    """A set of characters: sorted spans of code points, ends included. Surrogates are no characters: UTF-8 does not spell them."""

    def __init__(self, spans: Iterable[Span]) -> None:
        self.lows: list[int] = []
        self.highs: list[int] = []
        for low, high in sorted(part for span in spans for part in _without_surrogates(span)):
            if self.highs and low <= self.highs[-1] + 1:
                self.highs[-1] = max(self.highs[-1], high)
            else:
                self.lows.append(low)
                self.highs.append(high)

    def meets(self, low: int, high: int) -> bool:
        """Whether some character of low..high is in the set."""
        place = bisect.bisect_left(self.highs, low)
        return place < len(self.lows) and self.lows[place] <= high

    def __bool__(self) -> bool:
        return bool(self.lows)


def _without_surrogates(span: Span) -> Iterator[Span]:
    low, high = span
    for part in ((low, min(high, SURROGATES[0] - 1)), (max(low, SURROGATES[1] + 1), high)):
        if part[0] <= part[1]:
            yield part


@dataclass(frozen=True)
class Graph:
    """An automaton without empty steps: arcs of each state, where it starts, and which states are final. Every state can reach one."""

    arcs: tuple[tuple[tuple[Spans, int], ...], ...]
    start: int
    final: frozenset[int]


class Characters:
    """A graph determinised as it is walked. Its states are numbers; every state met can reach the end."""

    start = 0

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        first = frozenset((graph.start,))
        self._sets: list[frozenset[int]] = [first]
        self._numbers = {first: 0}
        self._steps: list[dict[int, int | None]] = [{}]

    def step(self, state: int, code: int) -> int | None:
        """The state behind the character `code`, None where it does not fit."""
        steps = self._steps[state]
        if code not in steps:
            arcs = (arc for place in self._sets[state] for arc in self._graph.arcs[place])
            after = frozenset(target for spans, target in arcs if spans.meets(code, code))
            steps[code] = self._numbered(after) if after else None
        return steps[code]

    def any_of(self, state: int, low: int, high: int) -> bool:
        """Whether some character of low..high fits."""
        return any(spans.meets(low, high) for place in self._sets[state] for spans, _ in self._graph.arcs[place])

    def accepts(self, state: int) -> bool:
        return not self._graph.final.isdisjoint(self._sets[state])

    def _numbered(self, places: frozenset[int]) -> int:
        number = self._numbers.setdefault(places, len(self._sets))
        if number == len(self._sets):
            self._sets.append(places)
            self._steps.append({})
        return number


def characters(
    pattern: str, *, search: bool = False, flags: int = 0, least: int = 0, most: int | None = None
) -> Characters:
    """The automaton of `pattern`; with `search` of the texts in which it is found, of `least` to `most` characters. Errors: see `regex`."""
    if not isinstance(pattern, str):
        raise TypeError(f"pattern must be text, got {checks.shown(pattern)}")
    edge: Edge = "free" if search else "bound"
    try:
        parsed = _parser.parse(pattern, flags)
        builder = _Builder(pattern, parsed.state)
        start = builder.state()
        end = builder.sequence(parsed, start, parsed.state.flags, edge, edge)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"pattern must be a regular expression, got {checks.shown(pattern)}: {error}") from None
    graph = _counted(_without_empty_steps(builder, start, end), pattern, least, most)
    if graph is None:
        raise ValueError(
            f"pattern must match some text of {least} to {most or 'any number of'} characters: {pattern!r}"
        )
    return Characters(graph)


class _Builder:
    """States with arcs for characters and empty steps, after Thompson."""

    def __init__(self, pattern: str, state: Any) -> None:
        self.pattern, self._state = pattern, state
        self.arcs: list[list[tuple[Spans, int]]] = []
        self.empty: list[list[int]] = []

    def state(self) -> int:
        if len(self.arcs) >= MOST_STATES:
            raise ValueError(f"pattern must need at most {MOST_STATES} states: {checks.shown(self.pattern)}")
        self.arcs.append([])
        self.empty.append([])
        return len(self.arcs) - 1

    def sequence(self, items: Iterable[Any], at: int, flags: int, begin: Edge = "inside", end: Edge = "inside") -> int:
        """Append items behind the state `at` and return the state behind them."""
        left = list(items)
        while left and _anchor(left[0], "BEGINNING"):
            self._refuse_anchor(begin, flags)
            left.pop(0)
            begin = "bound"
        while left and _anchor(left[-1], "END"):
            self._refuse_anchor(end, flags)
            left.pop()
            end = "bound"
        if begin == "free" and not (left and _is_group(left[0])):
            at, begin = self._anything(at), "bound"
        trailing = end == "free" and not (left and _is_group(left[-1]))
        inner_end: Edge = "bound" if trailing else end
        for place, (op, value) in enumerate(left):
            first: Edge = begin if place == 0 else "inside"
            last: Edge = inner_end if place == len(left) - 1 else "inside"
            at = self._item(str(op), op, value, at, flags, first, last)
        return self._anything(at) if trailing else at

    def _item(self, name: str, op: Any, value: Any, at: int, flags: int, begin: Edge, end: Edge) -> int:
        if name in ("LITERAL", "NOT_LITERAL", "ANY", "IN"):
            after = self.state()
            self.arcs[at].append((_one_character(op, value, flags, self._state), after))
            return after
        if name == "SUBPATTERN":
            _, added, removed, inner = value
            return self.sequence(inner, at, (flags | added) & ~removed, begin, end)
        if name == "BRANCH":
            after = self.state()
            for inner in value[1]:
                first = self.state()
                self.empty[at].append(first)
                self.empty[self.sequence(inner, first, flags, begin, end)].append(after)
            return after
        if name in ("MAX_REPEAT", "MIN_REPEAT"):
            low, high, inner = value
            return self._repeat(low, high, inner, at, flags)
        if name == "AT":
            what = "word boundaries" if "BOUNDARY" in str(value) else "anchors inside a pattern"
        else:
            what = _REFUSED.get(name, name)
        raise ValueError(f"pattern must do without {what}: {checks.shown(self.pattern)}")

    def _repeat(self, low: int, high: Any, inner: Any, at: int, flags: int) -> int:
        for _ in range(low):
            at = self.sequence(inner, at, flags)
        after = self.state()
        if high == _parser.MAXREPEAT:
            self.empty[at].append(after)
            self.empty[self.sequence(inner, after, flags)].append(after)
            return after
        for _ in range(high - low):
            self.empty[at].append(after)
            at = self.sequence(inner, at, flags)
        self.empty[at].append(after)
        return after

    def _anything(self, at: int) -> int:
        after = self.state()
        self.empty[at].append(after)
        self.arcs[after].append((Spans([(0, LAST)]), after))
        return after

    def _refuse_anchor(self, edge: Edge, flags: int) -> None:
        if edge == "inside" or flags & re.MULTILINE:
            where = "anchors under (?m)" if flags & re.MULTILINE else "anchors inside a pattern"
            raise ValueError(f"pattern must do without {where}: {checks.shown(self.pattern)}")


def _anchor(item: Any, end: str) -> bool:
    return str(item[0]) == "AT" and str(item[1]).startswith(f"AT_{end}")


def _is_group(item: Any) -> bool:
    return str(item[0]) in ("BRANCH", "SUBPATTERN")


_known: dict[str, Spans] = {}  # what `re` said about classes of characters


def _one_character(op: Any, value: Any, flags: int, state: Any) -> Spans:
    """The characters that one item of a parsed pattern matches."""
    if not flags & re.IGNORECASE:
        if str(op) == "LITERAL":
            return Spans([(value, value)])
        if str(op) == "IN" and all(str(name) in ("LITERAL", "RANGE") for name, _ in value):
            return Spans((given, given) if str(name) == "LITERAL" else given for name, given in value)
    key = f"{op!r} {value!r} {flags & (re.IGNORECASE | re.ASCII | re.DOTALL)}"
    if key not in _known:
        # `re` itself is asked, for every character at once: its categories and its cases are many
        one = _parser.SubPattern(state, [(op, value)])
        run = _parser.SubPattern(state, [(_parser.MAX_REPEAT, (1, _parser.MAXREPEAT, one))])
        before, state.flags = state.flags, flags
        try:
            runs = _compiler.compile(run, flags).finditer(_every_character())
        finally:
            state.flags = before
        _known[key] = Spans((_code_point(found.start()), _code_point(found.end() - 1)) for found in runs)
    return _known[key]


@cache
def _every_character() -> str:
    return "".join(map(chr, (*range(SURROGATES[0]), *range(SURROGATES[1] + 1, LAST + 1))))


def _code_point(place: int) -> int:
    """The character at a place of `_every_character()`."""
    return place if place < SURROGATES[0] else place + SURROGATES[1] + 1 - SURROGATES[0]


def _without_empty_steps(builder: _Builder, start: int, end: int) -> Graph:
    arcs: list[tuple[tuple[Spans, int], ...]] = []
    final = set()
    looked = 0
    for state in range(len(builder.arcs)):
        reached, todo = {state}, [state]
        while todo:
            for target in builder.empty[todo.pop()]:
                if target not in reached:
                    reached.add(target)
                    todo.append(target)
        looked += len(reached)
        if looked > MOST_ARCS:  # optional parts repeated, each of which may be left out: (a?){500}
            raise ValueError(f"pattern must need at most {MOST_ARCS} steps: {checks.shown(builder.pattern)}")
        arcs.append(tuple(arc for place in sorted(reached) for arc in builder.arcs[place] if arc[0]))
        if end in reached:
            final.add(state)
    return Graph(tuple(arcs), start, frozenset(final))


def _counted(graph: Graph, pattern: str, least: int, most: int | None) -> Graph | None:
    """The graph restricted to texts of `least` to `most` characters and to states from which an end is reached; None if none is."""
    cap = least if most is None else most
    numbers = {(graph.start, 0): 0}
    arcs: list[list[tuple[Spans, int]]] = []
    todo = [(graph.start, 0)]
    total = 0
    for place, count in todo:  # grows as it is walked
        found = []
        for spans, target in graph.arcs[place] if most is None or count < most else ():
            after = (target, min(count + 1, cap))
            if after not in numbers:
                if len(numbers) >= MOST_STATES:
                    raise ValueError(
                        f"pattern must need at most {MOST_STATES} states with its lengths: {checks.shown(pattern)}"
                    )
                numbers[after] = len(todo)
                todo.append(after)
            found.append((spans, numbers[after]))
        arcs.append(found)
        total += len(found)
        if total > MOST_ARCS:
            raise ValueError(f"pattern must need at most {MOST_ARCS} steps with its lengths: {checks.shown(pattern)}")
    final = {numbers[key] for key in todo if key[0] in graph.final and key[1] >= least}
    alive = _reaching(arcs, final)
    if 0 not in alive:
        return None
    kept = tuple(tuple(arc for arc in found if arc[1] in alive) for found in arcs)
    return Graph(kept, 0, frozenset(final))


def _reaching(arcs: Sequence[Sequence[tuple[Spans, int]]], final: set[int]) -> set[int]:
    """The states from which a final one is reached."""
    before: list[list[int]] = [[] for _ in arcs]
    for place, found in enumerate(arcs):
        for _, target in found:
            before[target].append(place)
    alive, todo = set(final), list(final)
    while todo:
        for place in before[todo.pop()]:
            if place not in alive:
                alive.add(place)
                todo.append(place)
    return alive
