"""Rethinking in rounds, as a Markov chain over wrong and right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from assay import checks
from assay.methods.reasoning.ttspm.curve import TTSPM


@dataclass(frozen=True)
class Chain:
    """The share of right answers after rounds of rethinking: a round turns a wrong answer right with chance `p`, a
    right one wrong with chance `forget`, and `start` is right before the first.

    With `forget` 0 and `start` 0 it is the paper's model of sequential scaling, in which right answers stay:
    `TTSPM(p)`. With `forget` it is our extension: what is reached in the end is p / (p + forget), however many rounds
    there are.

    When NOT to use it: where a round's chance depends on how many there were before (a model that clings to its first
    answer).

    >>> Chain(0.2).predict(2), Chain(0.2, forget=0.2).predict(1000), Chain(0.2, forget=0.2).limit
    (0.36, 0.5, 0.5)
    """

    p: float
    forget: float = 0.0
    start: float = 0.0

    def __post_init__(self) -> None:
        for name in ("p", "forget", "start"):
            checks.number(name, getattr(self, name), low=0, high=1)

    @property
    def limit(self) -> float:
        """What is right after very many rounds; the start where nothing ever changes."""
        moves = self.p + self.forget
        return self.p / moves if moves else self.start

    def predict(self, N: int) -> float:
        """The share that is right after N rounds."""
        stays = (1 - self.p - self.forget) ** checks.whole("N", N, low=0)
        return round(self.limit + (self.start - self.limit) * stays, 15)

    @classmethod
    def fit(cls, rounds: Sequence[Sequence[bool]]) -> Chain:
        """By maximum likelihood, from whether each round's answer of each item was right, round by round from the
        first.

        An item counts as wrong before its first round. `p` is the share of rounds behind a wrong answer that end
        right, `forget` the share behind a right one that end wrong (0 where no item was ever asked again when it was
        right). Raises ValueError without any round.

        >>> Chain.fit([[False, True, True], [True, False, True]])
        Chain(p=0.75, forget=0.5, start=0.0)
        """
        seen = {(was, now): 0 for was in (False, True) for now in (False, True)}
        for item in rounds:
            before = False
            for one in item:
                now = checks.flag("rounds", one)
                seen[before, now] += 1
                before = now
        at_risk, held = seen[False, False] + seen[False, True], seen[True, True] + seen[True, False]
        if not at_risk:
            raise ValueError("rounds must hold at least one round of one item, got none")
        return cls(seen[False, True] / at_risk, seen[True, False] / held if held else 0.0)


def rethinking_rate(rounds: Sequence[Sequence[bool]]) -> TTSPM:
    """The paper's sequential model from rounds: successes over rounds at risk, each item up to its first success (a
    geometric distribution, censored where an item was never right).

    Of independent draws instead of rounds it gives the same chance as counting right samples does, in the long run.

    >>> rethinking_rate([[False, True], [False, False], [True, False]]).p
    0.4
    """
    solved = at_risk = 0
    for item in rounds:
        for one in item:
            at_risk += 1
            if checks.flag("rounds", one):
                solved += 1
                break
    if not at_risk:
        raise ValueError("rounds must hold at least one round of one item, got none")
    return TTSPM(solved / at_risk)
