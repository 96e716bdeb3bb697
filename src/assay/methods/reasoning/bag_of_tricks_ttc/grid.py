"""A grid of settings run over questions: every way with the same prompts, samples, verifiers and ledger, and its accuracy for its tokens.

settings = grid(way=["one", "majority", "best of n"], n=[8], temperature=[0.6, 0.8], verifier=["learned"])
rows = run(learn, generator, settings, verifiers)
best = chosen(rows)
judged = run(held_out, generator, [best], verifiers)
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from assay import checks
from assay.methods.core.reasoning.answers import extract
from assay.methods.core.reasoning.budget import PURPOSES, Budget, Purpose
from assay.methods.core.reasoning.estimates import over_items
from assay.methods.core.reasoning.generator import Generator, Sampling
from assay.methods.core.reasoning.verifier import Verifier
from assay.methods.reasoning.bag_of_tricks_ttc import trees, ways
from assay.methods.reasoning.bag_of_tricks_ttc.asking import Asking, Outcome

WAYS: Mapping[str, Callable[..., Outcome]] = {
    "one": ways.one,
    "best of n": ways.best_of_n,
    "majority": ways.majority,
    "weighted majority": ways.weighted_majority,
    "self-refine": ways.self_refine,
    "step-level best of n": trees.step_greedy,
    "beam": trees.beam,
    "mcts": trees.mcts,
    "depth first": trees.depth_first,
}
"""The ways by name. Their `n` is what each draws at a time: samples, next steps, or rounds of refinement."""
_FIELDS = ("way", "n", "sampling", "verifier", "wording", "temperature", "top_p")
UNJUDGED = ("one", "majority", "self-refine")
"""The ways that need no verifier."""


@dataclass(frozen=True)
class Question:
    """A question in several wordings, how its answer is read from a text, and the right one.

    `prompts` has the prompt of each wording; `answer_of` gives the canonical answer of a text, `finished` says when steps hold one.
    """

    prompts: Mapping[str, str]
    answer: str
    answer_of: Callable[[str], str] = extract
    finished: Callable[[str], bool] | None = None


@dataclass(frozen=True)
class Setting:
    """A way with its knobs: how many, how samples are drawn, the verifier by name ("" for none), the wording, the way's further options.

    Raises ValueError for an unknown way, a way that compares by score without a verifier, and options under names that it does not have.
    """

    way: str = "one"
    n: int = 1
    sampling: Sampling = field(default_factory=lambda: Sampling(temperature=0.7, top_p=0.9))
    verifier: str = ""
    wording: str = "plain"
    options: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self) -> None:
        checks.choice("way", self.way, WAYS)
        checks.whole("n", self.n, low=0 if self.way == "self-refine" else 1)
        if not self.verifier and self.way not in UNJUDGED:
            raise ValueError(f"verifier must be named for {self.way!r}, which compares by score, got ''")
        for name, _ in self.options:
            if name not in _options(self.way):
                raise ValueError(f"options of {self.way!r} must be among {list(_options(self.way))}, got {name!r}")

    def said(self) -> dict[str, Any]:
        """The setting as plain values."""
        return {
            "way": self.way, "n": self.n, "temperature": self.sampling.temperature, "top_p": self.sampling.top_p,
            "verifier": self.verifier, "wording": self.wording, **dict(self.options),
        }  # fmt: skip


def _options(way: str) -> dict[str, Any]:
    """A way's options and their defaults."""
    return WAYS[way].__kwdefaults__ or {}


def grid(base: Setting | None = None, **axes: Sequence[Any]) -> list[Setting]:
    """All combinations of values: of `Setting`'s fields, of `temperature` and `top_p`, and of the way's options. The last varies fastest.

    What a way does not have is left out of it, and equal settings are listed once: a verifier where it needs none, n where it draws one
    sample, another way's options. Raises ValueError for names that nothing has, and for an axis without values.

    >>> [setting.sampling.temperature for setting in grid(way=["majority"], n=[32], temperature=[0.6, 0.8])]
    [0.6, 0.8]
    """
    base = Setting() if base is None else base
    for name, values in axes.items():
        if isinstance(values, str) or not len(values):
            raise ValueError(f"{name} must be a list of at least one value, got {checks.shown(values)}")
        if name not in _FIELDS and not any(name in _options(way) for way in WAYS):
            raise ValueError(f"axes must be fields of a setting or options of a way, got {name!r}")
    found: dict[Setting, None] = {}
    for values in itertools.product(*axes.values()):
        given = dict(zip(axes, values, strict=True))
        drawn = {name: given.pop(name) for name in ("temperature", "top_p") if name in given}
        given["sampling"] = replace(given.get("sampling", base.sampling), **drawn)
        own = {name: given.pop(name) for name in _FIELDS if name in given}
        way = own.get("way", base.way)
        if way in UNJUDGED:
            own["verifier"] = ""
        if way == "one":
            own["n"] = 1
        options = {name: value for name, value in (dict(base.options) | given).items() if name in _options(way)}
        found[replace(base, **own, options=tuple(sorted(options.items())))] = None
    return list(found)


@dataclass(frozen=True)
class Row:
    """What a setting got: of each question the share of its repeats that were right, and the tokens of one on average.

    `by_purpose` are the tokens of all questions by what they were for, `failed` those of repeats that gave no answer, `completion` the
    generated ones among all: all of them per question, on average.
    """

    setting: Setting
    right: tuple[float, ...]
    tokens: tuple[float, ...]
    by_purpose: Mapping[str, float]
    failed: float
    completion: float

    @property
    def accuracy(self) -> tuple[float, float, float]:
        """The mean with its 95 % interval over questions."""
        return over_items(self.right)

    @property
    def cost(self) -> float:
        """Tokens a question, on average: read, generated and judged."""
        return float(np.mean(self.tokens))


def run(
    questions: Sequence[Question],
    generator: Generator,
    settings: Iterable[Setting],
    verifiers: Mapping[str, Verifier] | None = None,
    *,
    tokens: int | None = None,
    repeats: int = 1,
    delimiter: str = "\n",
    seed: int = 0,
) -> list[Row]:
    """Every setting on every question, `repeats` times with other samples. `tokens` limits what one question may take in all, by any way.

    Samples depend on prompt, sampling and seed only: settings that differ in nothing else see the same ones, and a `Cached` generator
    draws them once. Each setting is charged as if it were alone. Raises ValueError without questions, for a wording that a question
    lacks and a verifier that is not there.
    """
    if not questions:
        raise ValueError("questions must hold at least one, got none")
    repeats, verifiers = checks.whole("repeats", repeats, low=1), verifiers or {}
    rows = []
    for setting in settings:
        if setting.verifier and setting.verifier not in verifiers:
            raise ValueError(f"verifiers must hold {setting.verifier!r}, got {list(verifiers)}")
        verifier = verifiers.get(setting.verifier)
        ledger: dict[Purpose, int] = dict.fromkeys(PURPOSES, 0)
        right, costs, failed, completion = [], [], 0, 0
        for question in questions:
            prompt = question.prompts[checks.choice("wording", setting.wording, question.prompts)]
            hits = cost = 0
            for repeat in range(repeats):
                budget = Budget(tokens)
                asking = Asking(
                    prompt, generator, setting.sampling, verifier, budget, question.answer_of, question.finished,
                    delimiter, seed, repeat,
                )  # fmt: skip
                found = WAYS[setting.way](asking, setting.n, **dict(setting.options))
                hits += found.answer == question.answer
                spent = sum(entry.spent.tokens for entry in budget.entries)
                cost += spent
                failed += 0 if found.answer else spent
                for entry in budget.entries:
                    ledger[entry.purpose] += entry.spent.tokens
                    completion += entry.spent.completion
            right.append(hits / repeats)
            costs.append(cost / repeats)
        each = len(questions) * repeats
        shares: dict[str, float] = {purpose: total / each for purpose, total in ledger.items() if total}
        rows.append(Row(setting, tuple(right), tuple(costs), shares, failed / each, completion / each))
    return rows


def chosen(rows: Sequence[Row]) -> Setting:
    """The most accurate setting, the first of equal ones: list cheaper ones, or the default, first.

    Choose on other questions than you judge on. Raises ValueError without rows.
    """
    if not rows:
        raise ValueError("rows must hold at least one, got none")
    return max(rows, key=lambda row: float(np.mean(row.right))).setting


def at_tokens(rows: Sequence[Row], tokens: float) -> tuple[float, ...]:
    """The accuracy of each question where a way takes exactly `tokens` a question: its two neighbouring settings, tossed for.

    `rows` are settings of one way on the same questions that differ in size. Whoever may spend between the tokens of two of them can
    toss which to use, and reaches every point between. Raises ValueError for tokens below the cheapest or above the dearest.

    >>> small = Row(Setting("majority", 1), right=(0.0, 1.0), tokens=(10.0, 10.0), by_purpose={}, failed=0.0, completion=4.0)
    >>> large = replace(small, setting=Setting("majority", 4), right=(1.0, 1.0), tokens=(30.0, 30.0))
    >>> at_tokens([small, large], 15)
    (0.25, 1.0)
    """
    ordered = sorted(rows, key=lambda row: row.cost)
    if not ordered or len({len(row.right) for row in ordered}) != 1:
        raise ValueError("rows must hold at least one, all of the same questions")
    tokens = checks.number("tokens", tokens, low=ordered[0].cost, high=ordered[-1].cost)
    high = next(i for i, row in enumerate(ordered) if row.cost >= tokens)
    after, before = ordered[high], ordered[max(high - 1, 0)]
    width = after.cost - before.cost
    share = (tokens - before.cost) / width if width else 1.0
    return tuple((1 - share) * a + share * b for a, b in zip(before.right, after.right, strict=True))
