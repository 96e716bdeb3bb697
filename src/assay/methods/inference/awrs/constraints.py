"""What a text must satisfy, said of bytes: the protocol, and how constraints are written, wrapped and joined.

Tokens of byte-level vocabularies are no whole characters, so constraints take bytes. `prefix(text)` says whether `text` can still
become a complete text; it must hold of every beginning of a text of which it holds. `complete(text)` says whether it is one already.

Constraints that can go on from where they were are `Incremental`: they have states, so that a check costs only the new bytes, and
what is known of a state (a mask over the vocabulary) can be kept. The states of an `Automaton` are numbers. Any other constraint
is wrapped by `incremental`, whose states are the texts themselves.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable
from typing import Any, Protocol, cast, runtime_checkable

from assay import checks

State = Hashable


@runtime_checkable
class Constraint(Protocol):
    """What an answer must be, as two questions about its bytes, which may end within a character.

    `prefix` says whether some continuation may be allowed; `complete` whether the answer may end here.
    """

    def prefix(self, text: bytes) -> bool: ...
    def complete(self, text: bytes) -> bool: ...


@runtime_checkable
class Incremental(Constraint, Protocol):
    """A constraint with states. `advance` gives the state behind a piece of text, None where no complete text lies that way."""

    start: State

    def advance(self, state: Any, piece: bytes) -> State | None: ...
    def accepts(self, state: Any) -> bool: ...


class _Recent(ABC):
    """`prefix` and `complete` by states, going on from one of the last texts asked about that `text` begins with."""

    start: Any
    KEPT = 4

    def __init__(self) -> None:
        self._recent: list[tuple[bytes, Any]] = []

    @abstractmethod
    def advance(self, state: Any, piece: bytes) -> Any: ...

    @abstractmethod
    def accepts(self, state: Any) -> bool: ...

    def prefix(self, text: bytes) -> bool:
        return self._after(text) is not None

    def complete(self, text: bytes) -> bool:
        state = self._after(text)
        return state is not None and self.accepts(state)

    def _after(self, text: bytes) -> Any:
        known, state = max(
            (one for one in self._recent if text.startswith(one[0])),
            key=lambda one: len(one[0]),
            default=(b"", self.start),
        )
        state = self.advance(state, text[len(known) :])
        if state is not None:
            self._recent = [(text, state), *(one for one in self._recent if one[0] != text)][: self.KEPT]
        return state


class Automaton(_Recent):
    """A constraint that reads byte by byte. Its states are numbered as they are met, and each step is computed once.

    A subclass says what a state is (hashable), where it begins, and how it takes a byte. An automaton grows with what it is shown:
    make one for each request rather than one for all.
    """

    start = 0

    def __init__(self, first: Hashable) -> None:
        super().__init__()
        self._states: list[Hashable] = [first]
        self._numbers: dict[Hashable, int] = {first: 0}
        self._steps: list[dict[int, int | None]] = [{}]

    @abstractmethod
    def take(self, state: Any, byte: int) -> Hashable | None:
        """The state behind a byte; None where no complete text lies that way."""

    @abstractmethod
    def is_final(self, state: Any) -> bool:
        """Whether the text read so far is complete."""

    def step(self, number: int, byte: int) -> int | None:
        steps = self._steps[number]
        if byte not in steps:
            after = self.take(self._states[number], byte)
            steps[byte] = None if after is None else self._numbered(after)
        return steps[byte]

    def advance(self, state: int, piece: bytes) -> int | None:
        at: int | None = state
        for byte in piece:
            at = self.step(cast(int, at), byte)
            if at is None:
                return None
        return at

    def accepts(self, state: int) -> bool:
        return self.is_final(self._states[state])

    def _numbered(self, state: Hashable) -> int:
        number = self._numbers.setdefault(state, len(self._states))
        if number == len(self._states):
            self._states.append(state)
            self._steps.append({})
        return number


class _Texts:
    """Any constraint as an incremental one: a state is the text so far."""

    start: State = b""

    def __init__(self, constraint: Constraint) -> None:
        self.prefix, self.complete = constraint.prefix, constraint.complete

    def advance(self, state: bytes, piece: bytes) -> bytes | None:
        text = state + piece
        return text if checks.flag("what prefix returns", self.prefix(text)) else None

    def accepts(self, state: bytes) -> bool:
        return checks.flag("what complete returns", self.complete(state))


class Both(_Recent):
    """Two constraints at once. The second is asked only about what the first allows, so put the cheap one first."""

    def __init__(self, first: Constraint, second: Constraint) -> None:
        super().__init__()
        self._first, self._second = incremental(first), incremental(second)
        self.start = (self._first.start, self._second.start)

    def advance(self, state: tuple[State, State], piece: bytes) -> tuple[State, State] | None:
        first = self._first.advance(state[0], piece)
        second = None if first is None else self._second.advance(state[1], piece)
        return None if second is None else (first, second)

    def accepts(self, state: tuple[State, State]) -> bool:
        return self._first.accepts(state[0]) and self._second.accepts(state[1])


class _Functions:
    def __init__(self, prefix: Callable[[bytes], bool], complete: Callable[[bytes], bool]) -> None:
        self._prefix, self._complete = prefix, complete

    def prefix(self, text: bytes) -> bool:
        return checks.flag("what prefix returns", self._prefix(text))

    def complete(self, text: bytes) -> bool:
        return checks.flag("what complete returns", self._complete(text))


def functions(prefix: Callable[[bytes], bool], complete: Callable[[bytes], bool]) -> Constraint:
    """A constraint from two functions of bytes. `prefix` must hold of every beginning of a text of which it holds.

    Raises TypeError for what cannot be called, and, when asked, for a function that does not return True or False.

    >>> short = functions(lambda text: len(text) <= 3, lambda text: len(text) == 3)
    >>> short.prefix(b"ab"), short.complete(b"ab"), short.prefix(b"abcd")
    (True, False, False)
    """
    for name, given in (("prefix", prefix), ("complete", complete)):
        if not callable(given):
            raise TypeError(f"{name} must be a function of bytes, got {checks.shown(given)}")
    return _Functions(prefix, complete)


def both(first: Constraint, second: Constraint) -> Constraint:
    """Both constraints at once; the second is asked only about what the first allows, so put the cheap one first.

    A text that both allow to go on may have no completion that satisfies both.
    """
    return Both(checked("first", first), checked("second", second))


def incremental(constraint: Constraint) -> Incremental:
    """The constraint itself if it has states, else one whose states are texts."""
    if isinstance(constraint, Incremental):
        return constraint
    return _Texts(constraint)


def checked(name: str, value: Any) -> Constraint:
    """`value` if it is a constraint. Raises TypeError."""
    if isinstance(value, type) or not isinstance(value, Constraint):
        raise TypeError(f"{name} must have the methods prefix(bytes) and complete(bytes), got {checks.shown(value)}")
    return value
