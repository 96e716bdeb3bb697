"""The process reward model: what each step of a trace is worth, learnt from roll-outs; and lookahead, which scores a step by its future."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from assay import checks
from assay.methods.core.reasoning.budget import Budget, Spent
from assay.methods.core.reasoning.generator import Generator, Sampling
from assay.methods.core.reasoning.search import expand
from assay.methods.core.reasoning.trace import Trace
from assay.methods.core.reasoning.verifier import Scores, Verifier, texts_of

ROLLOUTS = 16
"""Roll-outs from each step; the paper's number."""
APART = 1 << 20  # the first number of a roll-out's sample: none of those that answers are made of

Right = Callable[[str, str], bool]
"""Whether a text behind a prompt gives the right answer: (prompt, text)."""
Features = Callable[[Trace, int], Sequence[float]]
"""What the model sees of a trace up to and including step i: (trace, i) gives a row of finite numbers."""


def monte_carlo(
    generator: Generator,
    traces: Sequence[Trace],
    sampling: Sampling,
    right: Right,
    *,
    rollouts: int = ROLLOUTS,
    budget: Budget | None = None,
    seed: int = 0,
) -> list[list[float]]:
    """For every step of every trace the share of `rollouts` continuations that end right: the soft labels that the paper fits its PRM to.

    Behind the last step of a finished trace nothing can follow: its label is 1 or 0, even where another trace goes on from its text. A
    text that stands in several traces is rolled out once. Everything that was drawn is booked as "verify". The labels need the right
    answers: this is for questions of a training set.

    When NOT to use it: where steps have labels already, or where samples that share prefixes are at hand in numbers; the roll-outs are
    `rollouts` whole answers a step.
    """
    rollouts = checks.whole("rollouts", rollouts, low=1)
    asked: dict[tuple[str, str], float] = {}
    for trace in traces:
        for i, text in enumerate(texts_of(trace)):
            if i < len(trace.steps) - 1 or not trace.finished:
                asked.setdefault((trace.prompt, text), 0.0)
    keys = list(asked)
    if keys:
        prompts = [prompt + text for prompt, text in keys]
        for key, samples in zip(keys, generator(prompts, sampling, n=rollouts, first=APART, seed=seed), strict=True):
            prompt, text = key
            asked[key] = sum(bool(right(prompt, text + sample.text)) for sample in samples) / rollouts
            for sample in samples:
                if budget is not None:
                    budget.book("verify", sample.spent)
    found = [[asked.get((trace.prompt, text), 0.0) for text in texts_of(trace)] for trace in traces]
    for trace, own in zip(traces, found, strict=True):
        if trace.finished and own:
            own[-1] = float(right(trace.prompt, trace.text))
    return found


class ProcessReward:
    """A process verifier: logistic regression on features of a trace up to each step, fitted to the share of roll-outs that ended right.

    Soft labels y are fitted by binary cross-entropy, as in the paper, where a language model with a head is trained; here the row
    counts y times as right and 1 - y times as wrong. A trace is worth what its last step is (in the paper's ablation better than
    the least or the product over steps). Scores lie in (0, 1) and cost no token.

    Raises ValueError for features that are not finite and for labels of one kind only.

    When NOT to use it: with features that tell nothing about what was written; see then how far its scores are from `Chance`'s.

    >>> from assay.methods.core.reasoning.trace import Trace
    >>> traces = [Trace("p", (text,), finished=True) for text in ("a", "aa", "b", "bb")]
    >>> reward = ProcessReward(lambda trace, i: [trace.text.count("a")]).fit(traces, [[1.0], [0.9], [0.0], [0.1]])
    >>> (good,), (bad,) = reward.score(traces[::3])[0]
    >>> good > 0.5 > bad
    True
    """

    def __init__(self, features: Features, *, strength: float = 1.0) -> None:
        self.features = features
        self.strength = checks.number("strength", strength, above=0)
        self._fitted: tuple[np.ndarray, np.ndarray, np.ndarray, float] | None = None

    def fit(self, traces: Sequence[Trace], labels: Sequence[Sequence[float]]) -> ProcessReward:
        """Learn from a label in [0, 1] for every step of every trace. Fit it on other questions than those it judges."""
        from sklearn.linear_model import LogisticRegression

        rows = self._rows(traces)
        if [len(own) for own in labels] != [len(trace.steps) for trace in traces]:
            raise ValueError("labels must be one a step for every trace, got other numbers of them")
        wanted = np.array([checks.number("labels", y, low=0, high=1) for own in labels for y in own])
        if not len(rows) or wanted.min() == wanted.max():
            raise ValueError("labels must hold different values, got one kind only")
        mean, scale = rows.mean(0), rows.std(0)
        scale[scale == 0] = 1
        twice = np.concatenate([rows, rows])
        kinds = np.repeat([1, 0], len(rows))
        weights = np.concatenate([wanted, 1 - wanted])
        model = LogisticRegression(C=self.strength, max_iter=1000)
        model.fit(((twice - mean) / scale)[weights > 0], kinds[weights > 0], weights[weights > 0])
        self._fitted = mean, scale, model.coef_[0], float(model.intercept_[0])
        return self

    def score(self, traces: Sequence[Trace]) -> Scores:
        """The value of every step."""
        if self._fitted is None:
            raise ValueError("fit must be called before score")
        mean, scale, weights, bias = self._fitted
        if not any(trace.steps for trace in traces):
            return [[] for _ in traces], Spent()
        rows = self._rows(traces)
        if rows.shape[1] != len(mean):
            raise ValueError(f"features must be as many as in fit, {len(mean)}, got {rows.shape[1]}")
        z = (rows - mean) / scale @ weights + bias
        flat = iter((0.5 + 0.5 * np.tanh(z / 2)).tolist())
        return [[next(flat) for _ in trace.steps] for trace in traces], Spent()

    def _rows(self, traces: Sequence[Trace]) -> np.ndarray:
        made = [list(self.features(trace, i)) for trace in traces for i in range(len(trace.steps))]
        rows = np.array(made, dtype=float)
        if made and (rows.ndim != 2 or not np.isfinite(rows).all()):
            raise ValueError("features must give rows of finite numbers, all of one length")
        return rows


class Lookahead:
    """A verifier that rolls each trace out by `steps` further greedy steps and gives its last step the value at the end of them.

    What it rolls out is in the cost that `score` returns, so that it is booked as "verify"; with the roll-outs a search over n beams costs
    n (steps + 1) generations. With `steps` 0, and for finished traces, it is the inner verifier.

    When NOT to use it: by default. At equal cost it was mostly worse than plain beam search in the paper.
    """

    def __init__(
        self,
        generator: Generator,
        verifier: Verifier,
        sampling: Sampling,
        *,
        steps: int = 1,
        delimiter: str | int = "\n",
        seed: int = 0,
    ) -> None:
        self.generator, self.verifier = generator, verifier
        self.sampling = replace(sampling, temperature=0.0)
        self.steps = checks.whole("steps", steps, low=0)
        self.delimiter, self.seed = delimiter, seed

    def score(self, traces: Sequence[Trace]) -> Scores:
        """The inner verifier's scores, the last of each trace replaced by the value of its roll-out."""
        kept, ledger = Budget(), list(traces)
        for _ in range(self.steps):
            grown = expand(
                self.generator,
                _once(ledger),
                [1] * len(_once(ledger)),
                self.sampling,
                delimiter=self.delimiter,
                budget=kept,
                seed=self.seed,
            )
            longer = {(one.prompt, one.text): after for one, (after,) in zip(_once(ledger), grown, strict=True)}
            ledger = [trace if trace.finished else longer[trace.prompt, trace.text] for trace in ledger]
        scores, judging = self.verifier.score(traces)
        grew = [i for i, trace in enumerate(traces) if ledger[i] is not trace]
        if not grew:
            return scores, kept.spent() + judging
        ends, more = self.verifier.score([ledger[i] for i in grew])
        found = [list(own) for own in scores]
        for i, end in zip(grew, ends, strict=True):
            if found[i]:
                found[i][-1] = end[-1]
        return found, kept.spent() + judging + more


def _once(traces: Sequence[Trace]) -> list[Trace]:
    """Unfinished traces, those with the same text once: a greedy roll-out is the same for all of them."""
    return list({(trace.prompt, trace.text): trace for trace in traces if not trace.finished}.values())
