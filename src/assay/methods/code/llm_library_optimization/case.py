"""What is made faster, and what is proposed for it: a case with its contract and recorded inputs, and candidates that form a tree."""

from __future__ import annotations

import copy
import difflib
import hashlib
import math
import random
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from assay import checks

Origin = Literal["human", "model", "tool"]
ORIGINS = ("human", "model", "tool")
Args = tuple[Any, ...]
DIGITS = 16


def digest(text: str | bytes) -> str:
    """Sixteen hex digits of SHA-256."""
    return hashlib.sha256(text.encode() if isinstance(text, str) else text).hexdigest()[:DIGITS]


@dataclass(frozen=True)
class Input:
    """Recorded arguments of a call. `kind` is its class, of which speed-ups are told: "photograph", "constant", "random"."""

    name: str
    kind: str
    args: Args


@dataclass(frozen=True)
class Candidate:
    """A proposal: its whole source text, who it came from, and the digest of the candidate that it was made of.

    `origin` is "human", "model", or "tool" for what neither wrote for the occasion: a rewriting program, or a bank of candidates.

    `prompt` is what was asked for it. `name` is for readers: no verdict depends on it, and it is not part of `digest`.

    >>> first = Candidate("as shipped", "def f(x): return x + x")
    >>> second = Candidate("doubled", "def f(x): return 2 * x", origin="tool", parent=first.digest)
    >>> second.parent == first.digest
    True
    """

    name: str
    source: str
    origin: Origin = "human"
    parent: str = ""
    prompt: str = ""

    def __post_init__(self) -> None:
        checks.choice("origin", self.origin, ORIGINS)
        if not self.source.strip():
            raise ValueError(f"source of {self.name!r} must hold a program, got {checks.shown(self.source)}")

    @property
    def digest(self) -> str:
        """The digest of its source."""
        return digest(self.source)


@dataclass(frozen=True)
class Case:
    """A place in a library that is to become faster, and all that a claim about it is held against.

    - `contract` says in a sentence what the place promises, to people and to a model.
    - `reference` is the library's code, frozen; candidates descend from it.
    - `inputs` are recorded ones, of several kinds; `decides` is the kind that decides about acceptance, fixed before anything is timed.
    - `random` makes further arguments for the gate from a generator of random numbers, `draws` times; None where nobody can.
    - `tolerance` is None where answers must be equal bit for bit, else the relative (and absolute) error that floats may have.
    - `prepare` turns recorded arguments into those of the call, outside of what is timed: a text into its tree, an array into a view
      with gaps between its rows. Without it the call gets copies.

    Arguments are made once for all timed calls: a place that changes them in place is timed on what it left of them.
    Raises ValueError for no inputs, two of one name, and a kind that no input has.
    """

    name: str
    contract: str
    reference: Candidate
    inputs: tuple[Input, ...]
    decides: str
    random: Callable[[random.Random], Args] | None = None
    draws: int = 200
    tolerance: float | None = None
    prepare: Callable[[Args], Args] | None = None

    def __post_init__(self) -> None:
        names = [one.name for one in self.inputs]
        if not names or len(set(names)) != len(names):
            raise ValueError(f"inputs of {self.name!r} must have different names, one or more, got {names}")
        checks.choice("decides", self.decides, self.kinds)
        checks.whole("draws", self.draws, low=0)
        if self.tolerance is not None:
            checks.number("tolerance", self.tolerance, above=0)

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds of its inputs, in their order."""
        return tuple(dict.fromkeys(one.kind for one in self.inputs))

    def drawn(self) -> Iterable[Input]:
        """The random inputs: the same ones every time."""
        for number in range(self.draws if self.random is not None else 0):
            assert self.random is not None
            yield Input(f"random {number}", "drawn at random", self.random(random.Random(number)))

    def arguments(self, one: Input) -> Args:
        """The arguments of the call on an input, made anew: what a call does to them is not there for the next program."""
        return self.prepare(one.args) if self.prepare is not None else copy.deepcopy(one.args)

    @cached_property
    def digest(self) -> str:
        """Of the reference, of all recorded inputs and of the random ones: what a verdict is about."""
        own = [f"{one.name}\0{one.kind}\0{digest_of(one.args)}" for one in (*self.inputs, *self.drawn())]
        return digest("\1".join([self.reference.digest, self.decides, repr(self.tolerance), *own]))


def digest_of(value: Any) -> str:
    """The digest of plain values and NumPy arrays, the same in every process. Raises TypeError for anything else.

    >>> digest_of((1, "a")) == digest_of((1, "a")), digest_of(1) == digest_of(1.0), digest_of(0.0) == digest_of(-0.0)
    (True, False, False)
    """
    found = hashlib.sha256()
    _feed(value, found.update)
    return found.hexdigest()[:DIGITS]


def _feed(value: Any, put: Callable[[bytes], object]) -> None:
    kind = type(value).__name__.encode()
    if value is None or isinstance(value, (bool, int)):
        put(kind + repr(value).encode() + b"\0")
    elif isinstance(value, float):
        put(kind + struct.pack("<d", value))
    elif isinstance(value, (str, bytes, bytearray)):
        text = value.encode("utf-8", "surrogatepass") if isinstance(value, str) else bytes(value)
        put(kind + str(len(text)).encode() + b"\0" + text)
    elif isinstance(value, (list, tuple)):
        put(kind + str(len(value)).encode() + b"\0")
        for item in value:
            _feed(item, put)
    elif isinstance(value, dict):
        put(kind + str(len(value)).encode() + b"\0")
        for key, item in value.items():
            _feed(key, put)
            _feed(item, put)
    elif _is_array(value) and not value.dtype.hasobject:
        put(f"array {value.dtype.str} {value.shape} {value.strides}\0".encode() + value.tobytes())
    else:
        raise TypeError(f"inputs must be plain values or NumPy arrays, got {checks.shown(value)}: use prepare")


def _is_array(value: Any) -> bool:
    return hasattr(value, "tobytes") and hasattr(value, "strides") and hasattr(value, "dtype")


def same(wanted: Any, got: Any, tolerance: float | None = None) -> bool:
    """Whether two answers are equal: of one type, in the same order, floats bit for bit or within the tolerance.

    NaN equals NaN, 0.0 does not equal -0.0 (within a tolerance it does). A dict's order counts, as it does for who goes through it.

    >>> same([1, 2.0], [1, 2.0]), same(1, True), same(0.0, -0.0), same(0.1 + 0.2, 0.3, 1e-9)
    (True, False, False, True)
    """
    if type(wanted) is not type(got):
        return False
    if isinstance(wanted, float):
        if tolerance is None:
            return struct.pack("<d", wanted) == struct.pack("<d", got)
        both = math.isnan(wanted) and math.isnan(got)
        return both or math.isclose(wanted, got, rel_tol=tolerance, abs_tol=tolerance)
    if isinstance(wanted, complex):
        return same(wanted.real, got.real, tolerance) and same(wanted.imag, got.imag, tolerance)
    if isinstance(wanted, (list, tuple)):
        return len(wanted) == len(got) and all(
            same(one, other, tolerance) for one, other in zip(wanted, got, strict=True)
        )
    if isinstance(wanted, dict):
        return same(list(wanted.items()), list(got.items()), tolerance)
    if _is_array(wanted):
        if wanted.dtype != got.dtype or wanted.shape != got.shape:
            return False
        if wanted.dtype.hasobject:  # its bytes are addresses
            return same(wanted.tolist(), got.tolist(), tolerance)
        if tolerance is None or wanted.dtype.kind not in "fc":
            return bool(wanted.tobytes() == got.tobytes())
        import numpy as np

        return bool(np.isclose(got, wanted, rtol=tolerance, atol=tolerance, equal_nan=True).all())
    return bool(wanted == got)


# ----------------------------------------------------------------------------------------------------------------- the tree


def patch_between(before: Candidate, after: Candidate) -> str:
    """What one candidate changed in another, as a unified diff."""
    lines = difflib.unified_diff(
        before.source.splitlines(keepends=True), after.source.splitlines(keepends=True), before.name, after.name
    )
    return "".join(line if line.endswith("\n") else f"{line}\n" for line in lines)


@dataclass(frozen=True)
class Tree:
    """Candidates by what they were made of. Raises ValueError for a parent that is not among them, and for a circle."""

    candidates: tuple[Candidate, ...]
    _by_digest: Mapping[str, Candidate] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_by_digest", {one.digest: one for one in self.candidates})
        for one in self.candidates:
            if one.parent and one.parent not in self._by_digest:
                raise ValueError(f"parent of {one.name!r} must be the digest of a candidate, got {one.parent!r}")
            self.line(one)

    def line(self, candidate: Candidate) -> list[Candidate]:
        """From the root to a candidate: which step brought what can be read off their attempts."""
        found = [candidate]
        while found[-1].parent:
            if len(found) > len(self.candidates):
                raise ValueError(f"the parents of {candidate.name!r} go round in a circle")
            found.append(self._by_digest[found[-1].parent])
        return found[::-1]

    def children(self, candidate: Candidate) -> Sequence[Candidate]:
        """Those that were made of it."""
        return [one for one in self.candidates if one.parent == candidate.digest]
