"""Who judges: a `Verifier` scores the steps of traces, and says what that took.

Scores lie in [0, 1] unless a verifier says otherwise. `Checker` knows the answer (an oracle: for measuring, or where answers can be
checked), `LogProbability` asks nobody, `Chance` is the control, `Learned` is fitted on checked samples of other items.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from assay import checks
from assay.methods.core.reasoning.answers import extract
from assay.methods.core.reasoning.budget import Spent
from assay.methods.core.reasoning.generator import seed_of
from assay.methods.core.reasoning.trace import Trace

Scores = tuple[list[list[float]], Spent]
"""A score for every step of every trace, and what the judging took."""


class Verifier(Protocol):
    """Scores every step of every trace. It looks at prompts, steps and samples, and at no scores given before."""

    def score(self, traces: Sequence[Trace]) -> Scores: ...


def texts_of(trace: Trace) -> list[str]:
    """What is written behind the prompt at the end of each step."""
    return ["".join(trace.steps[: i + 1]) for i in range(len(trace.steps))]


class Checker:
    """1 from the first step behind which the text ends with the right answer, else 0: an oracle, which costs nothing.

    `answers` gives the canonical answer of each prompt. Raises KeyError for a prompt that it does not know.
    """

    def __init__(self, answers: dict[str, str], *, find: Callable[[str], str] = extract) -> None:
        self.answers, self.find = answers, find

    def score(self, traces: Sequence[Trace]) -> Scores:
        """1.0 or 0.0 for every step."""
        return [
            [float(self.find(text) == self.answers[trace.prompt]) for text in texts_of(trace)] for trace in traces
        ], Spent()


class Chance:
    """Random scores, the same for the same text: what a verifier that knows nothing does."""

    def __init__(self, seed: int = 0) -> None:
        self.seed = checks.whole("seed", seed)

    def score(self, traces: Sequence[Trace]) -> Scores:
        """Uniform in [0, 1)."""
        return [
            [seed_of(self.seed, trace.prompt, text) / 2**63 for text in texts_of(trace)] for trace in traces
        ], Spent()


class LogProbability:
    """exp of the mean log-probability of a step's tokens, by the model that wrote them: in (0, 1], and free, for it is known already.

    Raises ValueError for a step whose sample has no log-probabilities (a server that gives none).
    """

    def score(self, traces: Sequence[Trace]) -> Scores:
        """For every step."""
        for trace in traces:
            if len(trace.samples) != len(trace.steps) or any(s.tokens and not s.logprobs for s in trace.samples):
                raise ValueError(f"traces must know their log-probabilities, got {checks.shown(trace.text)}")
        return [[math.exp(sample.mean_logprob) for sample in trace.samples] for trace in traces], Spent()


Features = Callable[[str, str], Sequence[float]]
"""What a learned verifier sees of (prompt, text so far): a row of numbers."""


class Learned:
    """Logistic regression on features of the text so far, fitted on samples whose answers were checked.

    The features' scales are learnt with it. Fit it on other items than those it judges. Raises ValueError for labels of one kind only, and
    for features that are not finite.
    """

    def __init__(self, features: Features, *, strength: float = 1.0) -> None:
        self.features = features
        self.strength = checks.number("strength", strength, above=0)
        self._fitted: tuple[np.ndarray, np.ndarray, np.ndarray, float] | None = None

    def fit(self, prompts: Sequence[str], texts: Sequence[str], right: Sequence[bool]) -> Learned:
        """Learn from texts and whether they were right."""
        from sklearn.linear_model import LogisticRegression

        labels = np.array([bool(one) for one in right])
        if labels.all() or not labels.any():
            raise ValueError("right must hold right and wrong ones, got one kind only")
        rows = self._rows(prompts, texts)
        mean, scale = rows.mean(0), rows.std(0)
        scale[scale == 0] = 1
        model = LogisticRegression(C=self.strength, max_iter=1000).fit((rows - mean) / scale, labels)
        self._fitted = mean, scale, model.coef_[0], float(model.intercept_[0])
        return self

    def score(self, traces: Sequence[Trace]) -> Scores:
        """The probability of being right, of the text up to each step."""
        if self._fitted is None:
            raise ValueError("fit must be called before score")
        mean, scale, weights, bias = self._fitted
        asked = [(trace.prompt, text) for trace in traces for text in texts_of(trace)]
        if not asked:
            return [[] for _ in traces], Spent()
        rows = (self._rows([p for p, _ in asked], [t for _, t in asked]) - mean) / scale
        flat = iter((1 / (1 + np.exp(-np.clip(rows @ weights + bias, -60, 60)))).tolist())
        return [[next(flat) for _ in trace.steps] for trace in traces], Spent()

    def _rows(self, prompts: Sequence[str], texts: Sequence[str]) -> np.ndarray:
        rows = np.array([list(self.features(p, t)) for p, t in zip(prompts, texts, strict=True)], dtype=float)
        if rows.ndim != 2 or not np.isfinite(rows).all():
            raise ValueError("features must give rows of finite numbers, all of one length")
        return rows
