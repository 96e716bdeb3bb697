"""What an answer costs, everything included: a ledger of calls by what they were for, and limits on their sum.

A published comparison at "equal N" often leaves out what chose among the N: the judge's tokens, the plan, the attempts that failed. Here
each call is booked once, with its purpose, and the limit holds for all of them together.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Literal, get_args

from assay import checks

Purpose = Literal["solve", "plan", "verify", "retrieve", "tool", "pilot"]
"""What a call was for: answering, planning, judging, retrieving, running a tool, or finding out how hard an item is."""
PURPOSES: tuple[Purpose, ...] = get_args(Purpose)


class OutOfBudget(RuntimeError):
    """Something was asked for that the budget does not cover any more; what was spent until then stays booked."""


@dataclass(frozen=True)
class Spent:
    """What calls took: tokens read and generated, how many calls, and seconds.

    `cached` are those of the read tokens whose keys and values were there already (a kept prefix).

    >>> Spent(prompt=10, completion=3, calls=1) + Spent(prompt=5, completion=1, calls=1)
    Spent(prompt=15, completion=4, cached=0, calls=2, seconds=0.0)
    """

    prompt: int = 0
    completion: int = 0
    cached: int = 0
    calls: int = 0
    seconds: float = 0.0

    def __post_init__(self) -> None:
        for name in ("prompt", "completion", "cached", "calls"):
            checks.whole(name, getattr(self, name), low=0)
        checks.number("seconds", self.seconds, low=0)
        if self.cached > self.prompt:
            raise ValueError(f"cached must be at most prompt, {self.prompt}, got {self.cached}")

    def __add__(self, other: Spent) -> Spent:
        return Spent(
            self.prompt + other.prompt,
            self.completion + other.completion,
            self.cached + other.cached,
            self.calls + other.calls,
            self.seconds + other.seconds,
        )

    @property
    def tokens(self) -> int:
        """Tokens that were worked on: generated, and read without being kept from before."""
        return self.completion + self.prompt - self.cached


@dataclass(frozen=True)
class Entry:
    """One booking: what for, what it took, and whether it led to nothing (no answer found, a program that failed)."""

    purpose: Purpose
    spent: Spent
    failed: bool = False


class Budget:
    """A ledger with limits on tokens (`Spent.tokens`, of every purpose) and on seconds; None is no limit. Several threads may book.

    The limit is looked at before a call, by `require` or `left`; what came back is always booked, also above the limit, for it was spent.
    Raises ValueError and TypeError for limits below 0 or that are no numbers.

    >>> budget = Budget(tokens=100)
    >>> budget.book("solve", Spent(prompt=20, completion=60, calls=1))
    >>> budget.book("verify", Spent(prompt=15, calls=1), failed=True)
    >>> budget.left, budget.spent("solve").completion, budget.spent(failed=True).tokens
    (5, 60, 15)
    >>> budget.require(tokens=6)
    Traceback (most recent call last):
        ...
    assay.methods.core.reasoning.budget.OutOfBudget: 6 tokens are needed and 5 of 100 are left
    """

    def __init__(self, tokens: int | None = None, seconds: float | None = None) -> None:
        self.tokens = None if tokens is None else checks.whole("tokens", tokens, low=0)
        self.seconds = None if seconds is None else checks.number("seconds", seconds, low=0)
        self._entries: list[Entry] = []
        self._lock = threading.Lock()

    @property
    def entries(self) -> tuple[Entry, ...]:
        """All bookings in the order they came."""
        with self._lock:
            return tuple(self._entries)

    def book(self, purpose: Purpose, spent: Spent, *, failed: bool = False) -> None:
        """Book what a call took. Raises ValueError for an unknown purpose."""
        entry = Entry(checks.choice("purpose", purpose, PURPOSES), spent, checks.flag("failed", failed))
        with self._lock:
            self._entries.append(entry)

    def spent(self, purpose: Purpose | None = None, *, failed: bool | None = None) -> Spent:
        """The sum of what was booked, of one purpose or of all (None), and of failures only or of what led somewhere only."""
        if purpose is not None:
            checks.choice("purpose", purpose, PURPOSES)
        kept = [e.spent for e in self.entries if purpose in (None, e.purpose) and failed in (None, e.failed)]
        return sum(kept, Spent())

    @property
    def left(self) -> int | None:
        """The tokens that are left, 0 where more were spent than allowed; None without a limit."""
        return None if self.tokens is None else max(self.tokens - self.spent().tokens, 0)

    @property
    def over(self) -> bool:
        """Whether nothing more may be spent: no token or no second is left."""
        spent = self.spent()
        return (self.tokens is not None and spent.tokens >= self.tokens) or (
            self.seconds is not None and spent.seconds >= self.seconds
        )

    def require(self, tokens: int = 1) -> None:
        """Raise OutOfBudget where fewer tokens are left than `tokens`, or no second."""
        tokens, spent = checks.whole("tokens", tokens, low=0), self.spent()
        if self.tokens is not None and spent.tokens + tokens > self.tokens:
            raise OutOfBudget(f"{tokens} tokens are needed and {self.left} of {self.tokens} are left")
        if self.seconds is not None and spent.seconds >= self.seconds:
            raise OutOfBudget(f"{spent.seconds:.3g} seconds were spent, {self.seconds:.3g} are allowed")
