"""Searching a tree of steps: draw, judge, select, give up the rest, and again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from assay import checks
from assay.methods.core.reasoning.budget import Budget
from assay.methods.core.reasoning.generator import Generator, Sampling
from assay.methods.core.reasoning.search import Finished, expand, judged
from assay.methods.core.reasoning.trace import Trace
from assay.methods.core.reasoning.verifier import Verifier
from assay.methods.reasoning.ets.selecting import Select


@dataclass(frozen=True)
class Round:
    """One depth of a search: how many steps were drawn, how many of them go on unfinished, how many of these were kept, and the tokens of
    the unfinished ones and what is above them, each once and without the prompt, before anything is pruned."""

    drawn: int
    unfinished: int
    kept: int
    tokens: int


@dataclass(frozen=True)
class Searched:
    """The traces that a search ended with, finished ones first, with their scores, and its rounds."""

    traces: tuple[Trace, ...]
    rounds: tuple[Round, ...]

    @property
    def tokens(self) -> float:
        """Tokens of the tree in the cache, without the prompt: the mean over the rounds that left something unfinished; 0 without any."""
        held = [found.tokens for found in self.rounds if found.unfinished]
        return sum(held) / len(held) if held else 0.0


def tree_search(
    generator: Generator,
    verifier: Verifier,
    prompt: str,
    sampling: Sampling,
    *,
    width: int,
    select: Select,
    rounds: int = 25,
    delimiter: str = "\n",
    finished: Finished | None = None,
    budget: Budget | None = None,
    seed: int = 0,
) -> Searched:
    """Search step by step: `width` first steps, then at each depth as many as are not finished yet, behind the leaves that `select` keeps.

    A finished trace takes its place of the width with it. What is not kept is given up by a generator that holds a cache
    (`TreeGenerator.keep`). It ends when nothing is unfinished, the width is used up, `rounds` are over or the budget is. Which
    answer to give is `core.reasoning.selectors`' matter, by the last scores.

    Raises ValueError for width or rounds below 1 and for a selector that gives other than `width` steps.
    """
    left, rounds = checks.whole("width", width, low=1), checks.whole("rounds", rounds, low=1)
    leaves, counts, done, seen = [Trace(prompt)], [left], [], []
    keep = getattr(generator, "keep", None)
    for number in range(rounds):
        options: dict[str, Any] = {"delimiter": delimiter, "finished": finished, "budget": budget, "seed": seed}
        grown = [trace for own in expand(generator, leaves, counts, sampling, **options) for trace in own]
        grown = judged(verifier, grown, budget=budget)
        done += [trace for trace in grown if trace.finished]
        leaves = [trace for trace in grown if not trace.finished]
        left = width - len(done)
        last = not leaves or left < 1 or number == rounds - 1 or (budget is not None and budget.over)
        counts = [] if last else select(leaves, left)
        if not last and (len(counts) != len(leaves) or sum(counts) != left):
            raise ValueError(
                f"select must share out {left} steps among {len(leaves)} traces, got {checks.shown(counts)}"
            )
        seen.append(Round(len(grown), len(leaves), sum(count > 0 for count in counts), tree_tokens(leaves)))
        if last:
            break
        leaves, counts = [t for t, n in zip(leaves, counts, strict=True) if n], [n for n in counts if n]
        if keep is not None:
            keep([trace.prompt + trace.text for trace in leaves])
    return Searched((*done, *leaves), tuple(seen))


def tree_tokens(traces: Sequence[Trace]) -> int:
    """Tokens of the tree that traces of one prompt make, each once: what their cache holds besides the prompt.

    >>> from assay.methods.core.reasoning.budget import Spent
    >>> from assay.methods.core.reasoning.generator import Sample
    >>> a, b, c = (Sample("", tokens, (), "stop", Spent()) for tokens in [(5, 6), (7,), (8, 9)])
    >>> tree_tokens([Trace("p", ("", ""), (a, b)), Trace("p", ("", ""), (a, c))])
    5
    """
    nodes: dict[tuple[int, int], int] = {}
    for trace in traces:
        node = 0
        for sample in trace.samples:
            for token in sample.tokens:
                node = nodes.setdefault((node, token), len(nodes) + 1)
    return len(nodes)
