"""The didactic problem: a context hides a pattern, and a trace is right from the step on at which it has said all of
it, and nothing else.

A context is `k` words of a vocabulary of `V`. A secret table turns each of them into a word of the pattern. Traces are
words and fillers: the first `k` words must be the pattern, a wrong one spoils the trace, and fillers may stand
anywhere. An expert of strength s writes the next word of the pattern that is missing with chance s and a filler else,
fillers only when it is done. The base policy is a mixture: for each trace one expert is drawn. Experts of unequal
strengths make its traces heterogeneous; a single one that is nearly always right makes them alike. After the paper's
planted subsequences; sizes, table and strengths are our choice.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from assay import checks


@dataclass(frozen=True)
class Planted:
    """The problem and the mixture: chances `weights` of experts of `strengths`. `seed` fixes the secret table.

    Words are numbers below V; V itself separates a context from its trace and is the filler (`filler`).

    Raises ValueError for sizes out of range, strengths outside [0, 1], and weights that do not add up to 1.

    >>> problem = Planted(V=5, k=2, strengths=(1.0,), weights=(1.0,))
    >>> contexts = problem.contexts(3, seed=1)
    >>> problem.first(contexts, problem.traces(contexts, 4, seed=2)).tolist()
    [2, 2, 2]
    """

    V: int = 8
    k: int = 3
    strengths: tuple[float, ...] = (0.6, 0.2, 0.05)
    weights: tuple[float, ...] = (0.1, 0.3, 0.6)
    seed: int = 0

    def __post_init__(self) -> None:
        checks.whole("V", self.V, low=2)
        checks.whole("k", self.k, low=1)
        checks.whole("seed", self.seed, low=0)
        for strength in self.strengths:
            checks.number("strengths", strength, low=0, high=1)
        if len(self.weights) != len(self.strengths) or abs(sum(self.weights) - 1) > 1e-9:
            raise ValueError(f"weights must be as many as strengths and add up to 1, got {self.weights}")

    @property
    def filler(self) -> int:
        """What stands between a context and its trace, and where nothing is said."""
        return self.V

    def contexts(self, n: int, seed: int) -> Tensor:
        """`n` contexts, (n, k)."""
        chance = torch.Generator().manual_seed(checks.whole("seed", seed, low=0))
        return torch.randint(self.V, (checks.whole("n", n, low=1), self.k), generator=chance)

    def prompts(self, contexts: Tensor) -> Tensor:
        """Contexts with a filler behind them, (n, k + 1)."""
        return torch.cat([contexts, torch.full((len(contexts), 1), self.filler)], 1)

    def patterns(self, contexts: Tensor) -> Tensor:
        """What each context hides, (n, k)."""
        table = torch.randperm(self.V, generator=torch.Generator().manual_seed(self.seed))
        return table[contexts]

    def traces(self, contexts: Tensor, H: int, seed: int) -> Tensor:
        """A trace of H words of the mixture for each context, (n, H)."""
        chance = torch.Generator().manual_seed(checks.whole("seed", seed, low=0))
        n, H = len(contexts), checks.whole("H", H, low=1)
        expert = torch.multinomial(torch.tensor(self.weights), n, replacement=True, generator=chance)
        said = torch.rand((n, H), generator=chance) < torch.tensor(self.strengths)[expert][:, None]
        number = said.cumsum(1)  # of words so far
        words = self.patterns(contexts).gather(1, (number - 1).clamp(0, self.k - 1))
        return torch.where(said & (number <= self.k), words, self.filler)

    def first(self, contexts: Tensor, traces: Tensor) -> Tensor:
        """The step of first success of each trace, (n,), 1 for the first step; H + 1 for never."""
        H, said = traces.shape[1], traces != self.filler
        number = said.cumsum(1)
        wanted = self.patterns(contexts).gather(1, (number - 1).clamp(0, self.k - 1))
        spoilt = (said & (number <= self.k) & (traces != wanted)).any(1)
        done = (number >= self.k) & ~spoilt[:, None]
        return torch.where(done.any(1), done.int().argmax(1) + 1, H + 1)

    def rewards(self, contexts: Tensor, traces: Tensor) -> Tensor:
        """The bi-level reward of each step, (n, H): 1 from the first success on."""
        steps = torch.arange(1, traces.shape[1] + 1)
        return (steps >= self.first(contexts, traces)[:, None]).float()
