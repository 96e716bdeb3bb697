"""What thinking ahead costs: a ledger that books every call once, and the prices that turn tokens into one number."""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass
from typing import Literal

from assay import checks
from assay.methods.serving.sleep_time_compute.chat import Reply

Phase = Literal["sleep", "test", "warm"]
PHASES: tuple[Phase, ...] = ("sleep", "test", "warm")
PAPER_T = 10.0
"""What a token costs that somebody waits for, over one made in idle time: recalled from the paper, not re-read."""


@dataclass(frozen=True)
class Tokens:
    """Tokens of some calls: generated, read, and of those read the ones from a kept prefix; and how long the calls took."""

    calls: int = 0
    completion: int = 0
    prompt: int = 0
    cached: int = 0
    seconds: float = 0.0

    def __add__(self, other: Tokens) -> Tokens:
        return Tokens(
            self.calls + other.calls,
            self.completion + other.completion,
            self.prompt + other.prompt,
            self.cached + other.cached,
            self.seconds + other.seconds,
        )


@dataclass(frozen=True)
class Entry:
    """One call: in which phase, for which context (the name of its memory), and what it took."""

    phase: Phase
    context: str
    tokens: Tokens


class Ledger:
    """Every call of a model, booked once. Several threads may book.

    >>> ledger = Ledger()
    >>> ledger.book("sleep", Reply("...", 120, 40)), ledger.book("test", Reply("7", 2, 60))
    (None, None)
    >>> ledger.total("sleep").completion, ledger.total().prompt
    (120, 100)
    """

    def __init__(self) -> None:
        self._entries: list[Entry] = []
        self._lock = threading.Lock()

    @property
    def entries(self) -> tuple[Entry, ...]:
        """All calls in the order they came back."""
        with self._lock:
            return tuple(self._entries)

    def book(self, phase: Phase, reply: Reply, *, context: str = "", seconds: float = 0.0) -> None:
        """Book one call. Raises ValueError for another phase and for seconds below 0."""
        checks.choice("phase", phase, PHASES)
        seconds = checks.number("seconds", seconds, low=0)
        tokens = Tokens(1, reply.completion_tokens, reply.prompt_tokens, reply.cached_tokens, seconds)
        with self._lock:
            self._entries.append(Entry(phase, context, tokens))

    def total(self, phase: Phase | None = None, context: str | None = None) -> Tokens:
        """The tokens of a phase (None: of all) and of a context (None: of all)."""
        if phase is not None:
            checks.choice("phase", phase, PHASES)
        kept = [
            entry.tokens for entry in self.entries if phase in (None, entry.phase) and context in (None, entry.context)
        ]
        return sum(kept, Tokens())


@dataclass(frozen=True)
class Prices:
    """What tokens cost, in generated tokens of idle time.

    `test` is the factor of whatever somebody waits for (the paper's t), `read` the price of a token that is read, `cached` that of one
    read from a kept prefix. The paper's own formula charges generated tokens only: `read` and `cached` are 0 by default. Warming is done
    in idle time. Raises ValueError and TypeError for anything but finite numbers that are not negative.

    >>> Prices().cost(Tokens(completion=120, prompt=400), "sleep"), Prices(read=0.25).cost(Tokens(completion=2, prompt=400), "test")
    (120.0, 1020.0)
    """

    test: float = PAPER_T
    read: float = 0.0
    cached: float = 0.0

    def __post_init__(self) -> None:
        for name in ("test", "read", "cached"):
            checks.number(name, getattr(self, name), low=0)

    def cost(self, tokens: Tokens, phase: Phase) -> float:
        """The cost of tokens of a phase."""
        fresh = tokens.prompt - tokens.cached
        plain = tokens.completion + self.read * fresh + self.cached * tokens.cached
        return plain * (self.test if checks.choice("phase", phase, PHASES) == "test" else 1.0)


def amortised_cost(sleep: float, test: float, queries: int, *, t: float = PAPER_T) -> float:
    """Mean cost of each of `queries` questions on one context: (`sleep` + t * `queries` * `test`) / `queries`.

    `sleep` is what sleeping took once, `test` what a question takes, both in tokens. Without a sleep phase: `sleep` 0. Raises ValueError
    for fewer questions than one, and for negative tokens.

    >>> amortised_cost(60, 2, 10), amortised_cost(0, 14, 10)
    (26.0, 140.0)
    """
    queries = checks.whole("queries", queries, low=1)
    sleep, test = checks.number("sleep", sleep, low=0), checks.number("test", test, low=0)
    return sleep / queries + checks.number("t", t, low=0) * test


def break_even(sleep: float, base: float, test: float, *, t: float = PAPER_T) -> float:
    """From how many questions on sleeping is cheaper: `sleep` / (t * (`base` - `test`)), infinity where it saves nothing.

    >>> break_even(60, 14, 2), break_even(60, 2, 2)
    (0.5, inf)
    """
    sleep, t = checks.number("sleep", sleep, low=0), checks.number("t", t, low=0)
    saved = t * (checks.number("base", base, low=0) - checks.number("test", test, low=0))
    return sleep / saved if saved > 0 else math.inf
