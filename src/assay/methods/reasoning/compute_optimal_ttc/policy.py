"""The compute-optimal policy: which strategy for which difficulty at which budget, read off a log of generations, without a model.

    log = outcomes("q1", "parallel", attempts, "42", budgets=(1, 4, 16))       # and so on, for every question and strategy
    policy = ComputeOptimalPolicy(bins=5).fit(log, difficulty)
    policy.predict(0.3, n=16)

`of_logs` makes the same from logs of the LM Evaluation Harness: one log a way to ask, each with several samples a question.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from assay import checks
from assay.methods.core.reasoning.answers import canonical, extract
from assay.methods.core.reasoning.estimates import subsets
from assay.methods.core.reasoning.logs import Logged
from assay.methods.reasoning.compute_optimal_ttc.strategies import Attempts

NEVER = "\0"  # no answer is this: the target of a question that no sample is right about
How = Literal["weighted", "best", "majority", "chains", "last"]


@dataclass(frozen=True)
class Outcome:
    """What a strategy gives for a question when `n` generations are spent: how often it is right (0 to 1), and tokens in all."""

    item: str
    strategy: str
    n: int
    accuracy: float
    tokens: float

    def __post_init__(self) -> None:
        checks.whole("n", self.n, low=1)
        checks.number("accuracy", self.accuracy, low=0, high=1)
        checks.number("tokens", self.tokens, low=0)


def outcomes(
    item: str,
    strategy: str,
    attempts: Attempts,
    target: str,
    budgets: Sequence[int],
    *,
    how: How = "weighted",
    tokens: Sequence[float] | None = None,
    prompt_tokens: float = 0.0,
    draws: int = 64,
    seed: int = 0,
) -> list[Outcome]:
    """What smaller budgets give, from attempts that were made once: the mean over sets of whole chains.

    Chains are independent of one another (samples are chains of one), so every set of them is a smaller run. `target` is the right answer,
    canonical, `how` the way to choose (`Attempts.choose`). `tokens` are those of each attempt, `prompt_tokens` the question's, read once;
    without `tokens` an attempt counts 1. Not for searches: of n beams, fewer are no smaller search. Raises ValueError for a budget that is
    no number of whole chains, or more than there are.

    >>> attempts = Attempts(("7", "8", "7", "7"), (0.5, 0.5, 0.5, 0.5), (0, 1, 2, 3))
    >>> [(one.n, one.accuracy, one.tokens) for one in outcomes("q", "parallel", attempts, "7", (1, 4))]
    [(1, 0.75, 1.0), (4, 1.0, 4.0)]
    """
    members = [[i for i, c in enumerate(attempts.chains) if c == chain] for chain in dict.fromkeys(attempts.chains)]
    length = len(members[0]) if members else 0
    if not members or any(len(own) != length for own in members):
        raise ValueError(f"attempts must hold chains of one length, got lengths {[len(own) for own in members]}")
    costs = [1.0] * len(attempts.answers) if tokens is None else [checks.number("tokens", t, low=0) for t in tokens]
    if len(costs) != len(attempts.answers):
        raise ValueError(f"tokens must be one an attempt, {len(attempts.answers)}, got {len(costs)}")
    found = []
    for n in budgets:
        count, rest = divmod(checks.whole("budgets", n, low=1), length)
        if rest or not 1 <= count <= len(members):
            allowed = f"whole chains of {length}, at most {length * len(members)} attempts"
            raise ValueError(f"budgets must be {allowed}, got {n}")
        rights, spent = [], []
        for chosen in subsets(len(members), count, draws, seed):
            places = [i for chain in chosen for i in members[chain]]
            part = Attempts(
                tuple(attempts.answers[i] for i in places),
                tuple(attempts.scores[i] for i in places),
                tuple(attempts.chains[i] for i in places),
            )
            rights.append(part.choose(how) == target)
            spent.append(sum(costs[i] for i in places))
        found.append(Outcome(item, strategy, n, float(np.mean(rights)), prompt_tokens + float(np.mean(spent))))
    return found


def of_logs(
    logs: Mapping[str, Sequence[Logged]],
    budgets: Sequence[int],
    *,
    score: Callable[[str, str], float] | None = None,
    tokens: Callable[[str], float] | None = None,
    draws: int = 64,
    seed: int = 0,
) -> list[Outcome]:
    """Outcomes of logged samples, one log a strategy: {"short prompt": read_log(...), "worked": read_log(...)}.

    `score` judges (prompt, text) in [0, 1] for a weighted vote; without it the majority is taken. `tokens` counts those of a text; without
    it every sample counts 1. An answer is right where the log says so of a sample that gives it. Raises ValueError for questions that
    are not the same in all logs (by their names and what they want for an answer), and budgets above the samples there are.
    """
    if not logs:
        raise ValueError("logs must hold at least one, got none")
    wanted = {one.item: _wanted(one) for one in next(iter(logs.values()))}
    found: list[Outcome] = []
    for strategy, log in logs.items():
        if {one.item: _wanted(one) for one in log} != wanted:
            raise ValueError(f"logs must be of the same questions, got others in {strategy!r}")
        for one in log:
            right = next((a for a, ok in zip(one.answers, one.right, strict=True) if ok), NEVER)
            scores = tuple(1.0 if score is None else score(one.prompt, text) for text in one.texts)
            attempts = Attempts(one.answers, scores, tuple(range(len(one.answers))))
            counted = None if tokens is None else [tokens(text) for text in one.texts]
            read = 0.0 if tokens is None else tokens(one.prompt)
            found += outcomes(
                one.item, strategy, attempts, right, budgets,
                how="majority" if score is None else "weighted", tokens=counted, prompt_tokens=read, draws=draws, seed=seed,
            )  # fmt: skip
    return found


def _wanted(one: Logged) -> str:
    """The answer that a question wants, without the working that some tasks put in front of it."""
    return extract(one.target) if "####" in one.target else canonical(one.target)


# ---------------------------------------------------------------------------------------------------------------- difficulty


def pass_rate(right: Sequence[bool]) -> float:
    """Oracle difficulty: the share of a question's samples that are right. The paper takes 2048 of them, and does not charge them.

    >>> pass_rate([True, False, False, False])
    0.25
    """
    if not len(right):
        raise ValueError("right must hold at least one sample, got none")
    return sum(map(bool, right)) / len(right)


def mean_score(scores: Sequence[float]) -> float:
    """Predicted difficulty: the mean of a verifier's scores of a question's pilot samples, which costs these samples (purpose "pilot").

    >>> mean_score([0.5, 1.0])
    0.75
    """
    known = [checks.number("scores", score) for score in scores]
    if not known:
        raise ValueError("scores must hold at least one, got none")
    return sum(known) / len(known)


def difficulty_bins(difficulty: Mapping[str, float], bins: int) -> dict[str, int]:
    """The bin of each question, 0 for the lowest values (the hardest): of equal sizes, up to one question.

    Equal values are parted by the questions' names, so that the order they are given in does not matter. Raises ValueError for more bins
    than questions.

    >>> difficulty_bins({"a": 0.9, "b": 0.1, "c": 0.5, "d": 0.2}, 2)
    {'a': 1, 'b': 0, 'c': 1, 'd': 0}
    """
    bins = checks.whole("bins", bins, low=1)
    known = {item: checks.number("difficulty", value) for item, value in difficulty.items()}
    if len(known) < bins:
        raise ValueError(f"bins must be at most the number of questions, {len(known)}, got {bins}")
    order = sorted(known, key=lambda item: (known[item], item))
    place = {item: i * bins // len(order) for i, item in enumerate(order)}
    return {item: place[item] for item in known}


# -------------------------------------------------------------------------------------------------------------------- the policy


class ComputeOptimalPolicy:
    """For every bin of difficulty and every budget the strategy that was right most often (section 3 of the paper).

    `fit` reads a log and the difficulty of its questions: higher values are easier, and values must be had for new questions in the same
    way. Afterwards `table_` is {(bin, n): strategy} and `edges_` are the values between the bins. With one bin it is the best fixed
    strategy; with one strategy it is that strategy. Of equal ones that with fewer tokens wins, then the first in the log. Questions that
    are equally hard cannot be told apart, so they share a bin: with many equal values bins are larger than others, or hold nothing.

    When NOT to use it: to say what it gains on the questions it was fitted to, which is above zero by choice alone: `cross_validated`.

    >>> log = [Outcome(q, s, 4, a, 1.0) for q, s, a in [("hard", "search", 1), ("hard", "samples", 0),
    ...                                                 ("easy", "search", 0), ("easy", "samples", 1)]]
    >>> policy = ComputeOptimalPolicy(bins=2).fit(log, {"hard": 0.1, "easy": 0.9})
    >>> policy.predict(0.2, 4), policy.predict(0.8, 4)
    ('search', 'samples')
    """

    def __init__(self, *, bins: int = 5) -> None:
        self.bins = checks.whole("bins", bins, low=1)
        self.table_: dict[tuple[int, int], str] = {}
        self.edges_: list[float] = []

    def fit(self, log: Sequence[Outcome], difficulty: Mapping[str, float]) -> ComputeOptimalPolicy:
        """Choose. Raises ValueError for a question without a difficulty, an outcome that stands twice, and one that is missing: what is
        tried with n generations must be tried on all questions."""
        self.edges_, of_item = _parted(_known(log, difficulty), self.bins)
        self.table_ = _table(log, of_item)
        return self

    def bin_of(self, difficulty: float) -> int:
        """The bin that a question of this difficulty falls into."""
        if not self.table_:
            raise ValueError("fit must be called before predict")
        return bisect_right(self.edges_, checks.number("difficulty", difficulty))

    def predict(self, difficulty: float, n: int) -> str:
        """The strategy for a question of this difficulty with `n` generations. Raises ValueError for an `n` that was not in the log."""
        key = (self.bin_of(difficulty), checks.whole("n", n, low=1))
        if key not in self.table_:
            raise ValueError(f"n must be one of the log's budgets, {sorted({n for _, n in self.table_})}, got {n}")
        return self.table_[key]


def _known(log: Sequence[Outcome], difficulty: Mapping[str, float]) -> dict[str, float]:
    if not log:
        raise ValueError("log must hold at least one outcome, got none")
    if missing := {one.item for one in log} - set(difficulty):
        raise ValueError(f"difficulty must be given for every question of the log, got none for {sorted(missing)[0]!r}")
    seen = {(one.item, one.strategy, one.n) for one in log}
    if len(seen) != len(log):
        raise ValueError("log must hold an outcome once for each question, strategy and n")
    items = {one.item for one in log}
    for strategy, n in dict.fromkeys((one.strategy, one.n) for one in log):
        if lacking := sorted(item for item in items if (item, strategy, n) not in seen):
            raise ValueError(f"log must hold {strategy!r} with n = {n} for every question, got none for {lacking[0]!r}")
    return {item: difficulty[item] for item in sorted(items)}


def _parted(difficulty: Mapping[str, float], bins: int) -> tuple[list[float], dict[str, int]]:
    """The values between the bins of `difficulty_bins`, and the bin of each question by its value alone, as for a new question."""
    of_item = difficulty_bins(difficulty, bins)
    easiest = [max(difficulty[i] for i, b in of_item.items() if b == k) for k in range(bins)]
    hardest = [min(difficulty[i] for i, b in of_item.items() if b == k) for k in range(bins)]
    edges = [(low + high) / 2 for low, high in zip(easiest[:-1], hardest[1:], strict=True)]
    return edges, {item: bisect_right(edges, value) for item, value in difficulty.items()}


def _table(log: Sequence[Outcome], of_item: Mapping[str, int]) -> dict[tuple[int, int], str]:
    """The best strategy of each bin and budget."""
    found: dict[tuple[int, int], dict[str, list[Outcome]]] = {}
    for one in log:
        if one.item in of_item:
            found.setdefault((of_item[one.item], one.n), {}).setdefault(one.strategy, []).append(one)
    table = {}
    for key, tried in found.items():
        means = {
            name: (float(np.mean([o.accuracy for o in own])), -float(np.mean([o.tokens for o in own])))
            for name, own in tried.items()
        }
        table[key] = max(means, key=lambda name: means[name])
    return table


def cross_validated(
    log: Sequence[Outcome],
    difficulty: Mapping[str, float],
    *,
    bins: int = 5,
    folds: int = 2,
    groups: Mapping[str, str] | None = None,
    seed: int = 0,
) -> list[Outcome]:
    """What the policy gives for each question and budget, chosen on the other folds of its bin: the paper's two-fold cross-validation.

    Each bin is cut into `folds` at random; questions of one group (the same question asked in several ways) stay together. The outcomes
    returned are those of the chosen strategies, under their names. Bins are parted by values alone, as `predict` parts them. A fold for
    which the others of its bin hold nothing takes the choice of all bins. Raises ValueError as `fit` does, and where the other folds hold
    no outcome of a budget.
    """
    folds = checks.whole("folds", folds, low=2)
    _, of_item = _parted(_known(log, difficulty), bins)
    random = np.random.default_rng(checks.whole("seed", seed, low=0))
    if groups is not None and (missing := sorted(set(of_item) - set(groups))):
        raise ValueError(f"groups must be given for every question of the log, got none for {missing[0]!r}")
    group = {item: item if groups is None else groups[item] for item in of_item}
    order = random.permutation(sorted(set(group.values()))).tolist()
    found: list[Outcome] = []
    by_item: dict[str, list[Outcome]] = {}
    for one in log:
        by_item.setdefault(one.item, []).append(one)
    fold_of: dict[str, int] = {}
    for b in range(bins):
        there = {group[item] for item, own in of_item.items() if own == b}
        for place, name in enumerate([name for name in order if name in there]):
            fold_of.setdefault(name, place % folds)  # a group that lies in two bins stays in one fold
    for fold in range(folds):
        inside = {item for item in of_item if fold_of[group[item]] == fold}
        rest = [one for one in log if one.item not in inside]
        table, whole = _table(rest, of_item), _table(rest, dict.fromkeys(of_item, 0))
        for item in sorted(inside):
            for n in dict.fromkeys(one.n for one in by_item[item]):
                chosen = [each[key] for each, key in ((table, (of_item[item], n)), (whole, (0, n))) if key in each]
                if not chosen:
                    raise ValueError(f"folds must leave outcomes of {n} generations to choose from, got {folds}")
                name = chosen[0]
                found += [one for one in by_item[item] if one.n == n and one.strategy == name]
    return found
