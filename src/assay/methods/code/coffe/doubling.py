"""Stress inputs without a model: inputs that tests gave, doubled in size again and again. All of it our choice.

`Doubling` writes expressions in several manners (repeated, random like the observed, sorted, ...), most of which break the contracts of
some problem: the filter picks. `ByStrategy` draws from any hypothesis strategy, `stress_strategy` is one over the same manners.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from assay import checks
from assay.methods.code.coffe.programs import Args, Unusable
from assay.methods.code.coffe.stress import AT_ONCE, SCALE, StressInput, observed, value_here

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

MANNERS = ("repeated", "random", "wide", "sorted", "reversed", "alike", "shuffled", "spaced", "inner")
"""How a container is filled: the seed again and again; elements like the observed ones, from a range as wide as the size, in order or
against it; one element only; the numbers from 1 on in any order; the seed again and again with spaces between; as many elements as the
seed has, each of them again and again."""
LADDER = 6
"""A call takes the largest size, the next half of it, and so on, so that programs that are too slow on the largest get smaller ones."""
FEW = 20


class Doubling:
    """A `StressGenerator` that doubles the sizes of observed inputs, as often as `scale` allows.

    `observed_inputs` are rows of arguments; ranges, alphabets and lengths of new values are theirs. The size of an input is the most
    elements that one of its containers holds (of a table, its cells), or its largest number where it has none. `manners` are those
    to choose from (`MANNERS`). The same arguments and calls give the same texts; what is random in one has a seed of its own.

    >>> generator = Doubling([([3, 1, 2],)], manners=["repeated", "sorted"])
    >>> sorted({one.text for one in generator.proposals(10, doublings=2)})
    ['([3, 1, 2] * 4,)', '(sorted([random.randint(1, 3) for _ in range(12)]),)']
    """

    def __init__(
        self,
        observed_inputs: Sequence[Args],
        *,
        scale: int = SCALE,
        manners: Sequence[str] = MANNERS,
        seed: int = 0,
    ) -> None:
        self.observed = [tuple(args) for args in observed_inputs]
        if not self.observed or not self.observed[0]:
            raise ValueError("observed_inputs must hold one input with an argument at least")
        self.scale = checks.whole("scale", scale, low=1)
        self.manners = tuple(checks.choice("manners", manner, MANNERS) for manner in manners)
        if not self.manners:
            raise ValueError("manners must not be empty")
        self.chance = random.Random(checks.whole("seed", seed))
        self.columns = list(zip(*self.observed, strict=True))
        self.calls = 0

    def inputs(self, code: str, seeds: Sequence[StressInput], number: int = AT_ONCE) -> list[StressInput]:
        """`number` inputs at one rung of the ladder. `code` is not looked at: contracts are the filter's.

        Of `seeds` those are grown that are as they were observed; an input that was accepted is a long expression, which is as large as
        this generator makes them.
        """
        rung = self.calls % LADDER
        self.calls += 1
        known = {observed(args): args for args in self.observed}
        grown = [known[one] for one in seeds if one in known] or self.observed
        return [self.grown(self.chance.choice(grown), below=rung) for _ in range(number)]

    def proposals(self, number: int, *, doublings: int | None = None) -> list[StressInput]:
        """`number` inputs of observed ones and manners by chance, each doubled as often as given, else as often as chance has it."""
        return [self.grown(self.chance.choice(self.observed), doublings=doublings) for _ in range(number)]

    def grown(
        self, args: Args, *, doublings: int | None = None, below: int | None = None, manner: str | None = None
    ) -> StressInput:
        """One input made of `args`: doubled so often, or `below` times less than the scale allows, or as often as chance has it."""
        start = max(map(_size, args)) or max((abs(one) for one in args if type(one) is int), default=1) or 1
        most = max((self.scale // max(int(start), 1)).bit_length() - 1, 1)
        if doublings is None:
            doublings = self.chance.randint(1, most) if below is None else max(most - below, 1)
        size = int(start) * 2**doublings
        manner = self.chance.choice(self.manners) if manner is None else manner
        parts = [
            self._argument(value, list(column), manner, 2**doublings, size)
            for value, column in zip(args, self.columns, strict=True)
        ]
        text = f"({', '.join(parts)},)"
        return StressInput(text, self.chance.randrange(2**31)) if "random." in text else StressInput(text)

    def _argument(self, value: Any, column: list[Any], manner: str, times: int, size: int) -> str:
        kind = type(value)
        if kind is int:
            grown = value * times if abs(value * times) <= self.scale else self.scale
            return self.chance.choice([repr(value), repr(grown), f"random.randint(0, {size})", repr(size)])
        if kind is float:
            return self.chance.choice([repr(value), _fresh([one for one in column if type(one) is float], "1", 1)])
        if kind not in (str, list, dict, set):
            return repr(value)
        same = [one for one in column if type(one) is kind]
        count = max(_size(value), 1) * times if _size(value) else size
        return _container(value, same, manner, times, count)


def _size(value: Any) -> int:
    """How many elements a container holds, those of its containers included; 0 for anything else."""
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, dict):
        return max(len(value), sum(_size(one) for one in value.values()))
    if isinstance(value, list | tuple | set | frozenset):
        return max(len(value), sum(_size(one) for one in value))
    return 0


def _container(value: Any, column: list[Any], manner: str, times: int, size: int) -> str:
    """The text of a container of `size` elements, like those in `column`, filled in a manner; where that makes no sense, repeated."""
    kind, wide = type(value), size if manner == "wide" else 1
    if kind in (dict, set):
        return _fresh(column, str(size), wide)
    items = [item for one in column for item in one]
    flat = kind is list and not any(isinstance(item, list | dict | set) for item in items)
    if not value or not items:
        return _fresh(column, str(size), wide) if items else repr(value)
    if manner == "spaced" and kind is str:
        return f"' '.join([{value!r}] * {times})"
    if manner == "inner" and kind is list and all(isinstance(item, str | list) for item in value):
        return f"[{', '.join(f'{item!r} * {times}' for item in value)}]"
    if manner == "alike":
        one = value[0] if kind is str else repr(value[0])
        return f"{one!r} * {size}" if kind is str else f"[{one}] * {max(size // max(_size(value[0]), 1), 1)}"
    if manner in ("random", "wide"):
        return _fresh(column, str(size), wide)
    if manner in ("sorted", "reversed") and flat and _comparable(items):
        text = _fresh(column, str(size), 1)
        return f"sorted({text}{', reverse=True' if manner == 'reversed' else ''})"
    if manner == "shuffled" and kind is list and all(type(item) is int for item in items):
        return f"random.sample(range(1, {size + 1}), {size})"
    tables = kind is list and all(isinstance(item, list) for item in items)
    if manner == "shuffled" and tables and all(type(cell) is int for item in items for cell in item):
        side = max(int(size**0.5), 1)
        cells = f"random.sample(range(1, {side * side + 1}), {side * side})"
        return f"(lambda n, cells: [cells[k * n:k * n + n] for k in range(n)])({side}, {cells})"
    return f"{value!r} * {times}"


def _comparable(items: list[Any]) -> bool:
    kinds = {type(item) for item in items}
    return kinds <= {int, float} or kinds == {str}


def _fresh(values: list[Any], size: str, wide: int) -> str:
    """The text of a new value like these, a container with `size` elements; numbers from a range `wide` times as wide."""
    kinds = {type(value) for value in values}
    if kinds <= {int, float} and kinds:
        low, high = min(values), max(values)
        low, high = (low * wide if low < 0 else low), high * wide
        whole = kinds == {int}
        return f"random.{'randint' if whole else 'uniform'}({low!r}, {high!r})"
    if kinds == {bool}:
        return "random.choice((False, True))"
    items = [item for value in values for item in value] if len(kinds) == 1 and kinds <= {str, list, tuple, set} else []
    if kinds == {str} and items:
        return f"''.join(random.choices({''.join(sorted(set(items)))!r}, k={size}))"
    if kinds == {tuple} and len({len(value) for value in values}) == 1:
        return f"({', '.join(_fresh([value[n] for value in values], _inner(values, n), wide) for n in range(len(values[0])))},)"
    if kinds in ({list}, {set}) and items:
        rows = kinds == {list} and all(type(item) is list for item in items)
        if rows and size.isdigit():  # a table: about as many rows as columns
            size = str(max(int(int(size) ** 0.5), 1))
        inner = size if rows and _rectangular(values) else _lengths(items)
        text = f"{_fresh(items, inner, wide)} for _ in range({size})"
        return f"[{text}]" if kinds == {list} else f"{{{text}}}"
    if kinds == {dict} and any(values):
        keys, held = [key for value in values for key in value], [one for value in values for one in value.values()]
        return f"{{{_fresh(keys, _lengths(keys), wide)}: {_fresh(held, _lengths(held), wide)} for _ in range({size})}}"
    few = sorted({repr(value) for value in values})[:FEW]
    return f"random.choice([{', '.join(few)}])"


def _inner(values: list[Any], place: int) -> str:
    return _lengths([value[place] for value in values])


def _lengths(items: list[Any]) -> str:
    """The text of a length like those of the items; they do not grow."""
    lengths = [len(item) for item in items if hasattr(item, "__len__")] or [1]
    low, high = min(lengths), max(lengths)
    return str(low) if low == high else f"random.randint({low}, {high})"


def _rectangular(tables: list[Any]) -> bool:
    return all(len({len(row) for row in table}) <= 1 for table in tables)


# ---------------------------------------------------------------------------------------------------------------- hypothesis


def stress_strategy(
    observed_inputs: Sequence[Args],
    *,
    scale: int = SCALE,
    keeps: Callable[[Args], bool] | None = None,
) -> SearchStrategy[Args]:
    """A hypothesis strategy of grown inputs (tuples of arguments), smaller and repeated ones first when it shrinks.

    `keeps` is a filter, say the contracts of `holds`. Raises ImportError without hypothesis, ValueError without inputs.

    >>> from hypothesis import find
    >>> find(stress_strategy([([3, 1, 2],)]), lambda args: len(args[0]) > 20)
    ([3, 1, 2, 3, 1, 2, 3, 1, 2, 3, 1, 2, 3, 1, 2, 3, 1, 2, 3, 1, 2, 3, 1, 2],)
    """
    from hypothesis import strategies as st

    inputs = [tuple(args) for args in observed_inputs]
    Doubling(inputs, scale=scale)  # checks
    most = max(scale.bit_length() - 1, 1)

    def made(args: Args, manner: str, doublings: int, seed: int) -> Args:
        generator = Doubling(inputs, scale=scale, seed=seed)
        largest = max((scale // max(_size(args), 1)).bit_length() - 1, 1)
        return value_here(generator.grown(args, doublings=min(doublings, largest), manner=manner))

    drawn = st.builds(
        made, st.sampled_from(inputs), st.sampled_from(MANNERS), st.integers(1, most), st.integers(0, 2**16)
    )
    return drawn if keeps is None else drawn.filter(keeps)


class ByStrategy:
    """A `StressGenerator` that draws arguments from a hypothesis strategy of tuples: yours, or `stress_strategy`.

    Each call draws anew, from `seed` on; seeds and code are not looked at. Hypothesis's own containers stay small (some hundred elements);
    for larger ones map a drawn size to a value, as `stress_strategy` does.
    """

    def __init__(self, strategy: SearchStrategy[Args], *, seed: int = 0) -> None:
        self.strategy = strategy
        self.seed = checks.whole("seed", seed)

    def inputs(self, code: str, seeds: Sequence[StressInput], number: int = AT_ONCE) -> list[StressInput]:
        """Up to `number` different inputs, as literal values. Raises Unusable where the strategy's filter lets none through."""
        from hypothesis import HealthCheck, Phase, given, settings
        from hypothesis import seed as start
        from hypothesis.errors import Unsatisfiable

        found: list[Args] = []

        @start(self.seed)
        @settings(
            max_examples=number,
            deadline=None,
            database=None,
            phases=(Phase.generate,),
            suppress_health_check=list(HealthCheck),
        )
        @given(self.strategy)
        def draw(args: Args) -> None:
            found.append(args)

        self.seed += 1
        try:
            draw()
        except Unsatisfiable as error:
            raise Unusable("the strategy's filter lets nothing through") from error
        return [observed(args) for args in found[:number]]
