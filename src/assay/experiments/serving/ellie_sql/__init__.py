"""EllieSQL: does a small router save the tokens of the advanced pipeline, and keep its accuracy, where questions differ in what they need?

Real SQLite databases (`databases`), questions with gold SQL split by template (`questions`), and three pipelines that a language model of
135 million parameters really runs for every question; its log-likelihoods are kept in the cache by exact token ids, so that the second
claim does not compute them again. The router is cross-fitted: each question is routed by a router that saw no question of its template,
its threshold tuned the same way inside. All tokens are counted, a rival's several attempts as well.

How the pipelines weigh the model (`PRIOR`, `SHARP`) was chosen on examples of the library asked of each other. The candidates of the
advanced tier, the router's features and `MOST_LOST` were fixed after a pilot: the same templates with other tables and values (seed 0).
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from assay.experiments.core import Figure, Guard, Operator, Quality, Trained, experiment
from assay.experiments.serving.ellie_sql.databases import DEBIAN, VIEWS, View, build
from assay.experiments.serving.ellie_sql.questions import EXAMPLES, QUERIES, Query, Question, questions
from assay.methods.serving.ellie_sql import (
    MODES,
    TIERS,
    Answer,
    ChannelScorer,
    CountRouter,
    Database,
    Example,
    Library,
    Linked,
    PairwiseClassifier,
    Scorer,
    TierRouter,
    answer,
    by_chance,
    cascade_by_failure,
    hashed_words,
    labels,
    link,
    masked,
    nearest_neighbours,
    oracle,
    read_schema,
    routed,
    same_result,
    tep,
    tuned_threshold,
    written_sql,
)
from assay.paths import cache_dir, scratch_dir
from assay.workloads.models import load_model

MODEL = "smollm2-135m"
STRENGTHS = (0.3, 3.0, 30.0, 300.0)  # of the regressions (C), searched on the templates that are learnt from
MARGIN = 0.08  # of accuracy
MOST_LOST = 0.02  # that the threshold may lose on what is learnt from
SEED = 11  # of what is asked
PAPER_SAVED, PAPER_TEP = 40.0, 2.0
SEEDS = 3
FOLDS = 5

CANDIDATE = "cascade on question and schema"
BY_COST, WORDS = "decided by cost", "without what retrieval says"
LENGTH, SHUFFLED = "length of the question only", "trained on shuffled results"
MEANING = "MiniLM's embedding of the question"
CHANCE = "the same shares by chance"
FAILURE, DOUBT = "try in turn until something is found", "try in turn until the model is sure"

SIZES: dict[str, dict[str, Any]] = {
    "smoke": {"wordings": 1, "each": 1, "queries": 6, "debian": False, "zero_shot": 0},
    "small": {"wordings": 3, "each": 2, "queries": len(QUERIES), "debian": False, "zero_shot": 6},
    "full": {"wordings": 3, "each": 6, "queries": len(QUERIES), "debian": True, "zero_shot": 72},
}
POINTS: dict[str, list[dict[str, Any]]] = {scale: [size] for scale, size in SIZES.items()}

ROUTING = Operator(
    "answering questions in SQL by pipelines of different cost",
    free="trying in turn with all tokens charged (until something is found, or until the model is sure), or one cheaper pipeline for "
    "all, whichever saves most within the margin of accuracy",
)
DECLARED: dict[str, Any] = {
    "points": POINTS,
    "operator": ROUTING,
    "paper": {
        "data": "Bird dev, trained on Bird train",
        "pipelines": "prompts of GPT-4o-mini",
        "router": "Qwen2.5-0.5B trained by DPO",
    },
    "departures": {
        "data": "24 queries in three wordings each over six pairs of real tables: no benchmark comes with a package",
        "pipelines": "edits of known examples that SmolLM2-135M chooses from; what it writes itself stands in the details",
        "router": "the paper's cascade, of logistic regressions on hashed words and what retrieval says, threshold tuned",
    },
    "guard": Guard("execution accuracy (sets of rows)", MARGIN, higher_is_better=True, relative=False),
    "measured_here": "questions from 72 written templates over tables of Python, scikit-learn and Unicode, with a small model's pipelines",
    "minutes": 60,
}


@experiment(
    "ellie_sql/token-reduction",
    refuted_if="certainly less than half of the paper's 40 % is saved, or accuracy is certainly lost beyond the margin, or a router that "
    "sees only how long the question is, trained alike, saves as much at no less accuracy",
    refutes=lambda record: (
        record["measured"]["high"] < PAPER_SAVED / 2
        or record["quality"]["high"] < record["quality"]["baseline"] - MARGIN
        or (
            record["arms"][LENGTH] >= record["measured"]["median"]
            and record["quality"]["controls"][LENGTH] >= record["quality"]["candidate"]
        )
    ),
    **DECLARED,
)
def token_reduction(**point: Any) -> Figure:
    """Per cent of the advanced pipeline's tokens that routing saves, the router's own tokens included (this one reads none).

    The interval resamples templates; each question counts by its mean over `SEEDS` ways to divide the templates into folds. `free` is the
    most that a rival saves among those whose accuracy lies within the margin. The guard's controls: `deleted`, everything to basic;
    `random`, the same shares of questions to the tiers by chance, in expectation; `rival`, trying in turn until something is found.
    """
    study = _Study(collected(**point))
    found = study.candidate
    low, high = study.interval(lambda rows: study.saved(found, rows))
    return Figure(
        study.saved(found),
        "%",
        low=low,
        high=high,
        baseline=0.0,
        free=max([0.0, *(study.saved(one) for one in study.rivals.values() if study.within(one))]),
        arms={name: study.saved(one) for name, one in study.arms().items()},
        quality=study.quality(),
        trained=study.trained(),
        details=study.details(),
    )


@experiment(
    "ellie_sql/tep",
    refuted_if="the router's elasticity is certainly no higher than that of always taking the advanced pipeline, or accuracy is certainly "
    "lost beyond the margin, or sending the same shares of questions by chance gives as much",
    refutes=lambda record: (
        record["measured"]["high"] <= 1
        or record["quality"]["high"] < record["quality"]["baseline"] - MARGIN
        or record["arms"][CHANCE] >= record["measured"]["median"]
    ),
    **DECLARED,
)
def elasticity(**point: Any) -> Figure:
    """The router's token elasticity of performance over that of always taking the advanced pipeline.

    Where the advanced pipeline is no better than basic the ratio means nothing and counts as 0, in resamples too; a resample for which
    an elasticity is undefined (NaN) is left out and counted in the details, and a router that takes what basic takes, which has none,
    counts as 0. The pair (accuracy, tokens) stands there as well.
    """
    study = _Study(collected(**point))
    found = study.candidate
    undefined: list[int] = []
    low, high = study.interval(lambda rows: study.elasticity(found, rows), undefined)
    value = study.elasticity(found)
    value = 0.0 if math.isnan(value) else value
    rivals = [study.elasticity(one) for one in study.rivals.values() if study.within(one)]
    arms = {name: study.elasticity(one) for name, one in study.arms().items()}
    return Figure(
        value,
        "x",
        low=low,
        high=high,
        baseline=1.0,
        free=max([1.0, *(one for one in rivals if not math.isnan(one))]),
        arms={name: one for name, one in arms.items() if not math.isnan(one)},
        quality=study.quality(),
        trained=study.trained(),
        details={**study.details(), "resamples_without_elasticity": sum(undefined)},
    )


# What the tiers do ------------------------------------------------------------------------------------------------------


@dataclass
class Collected:
    """What every tier did on every question: results, tokens and doubts (n, 3); the features of the routers; which template."""

    asked: list[Question]
    results: np.ndarray
    tokens: np.ndarray
    failed: np.ndarray
    margins: np.ndarray
    words: np.ndarray
    counts: np.ndarray
    lengths: np.ndarray
    details: dict[str, Any]
    embedded: np.ndarray | None = None  # MiniLM's embeddings of the questions, and the tokens that reading them took
    embedding_tokens: np.ndarray | None = None

    @property
    def templates(self) -> np.ndarray:
        return np.unique([one.template for one in self.asked], return_inverse=True)[1]


@contextmanager
def opened(debian: bool) -> Iterator[tuple[dict[str, Database], dict[str, Any], list[View]]]:
    """The databases, their schemas, and what is asked of them; gone afterwards."""
    with scratch_dir(Path(tempfile.gettempdir()), "assay-databases.") as folder, ExitStack() as stack:
        files = build(folder)
        if not debian:
            files.pop("debian", None)
        views = [view for view in (*VIEWS, DEBIAN) if view.database in files]
        databases = {name: stack.enter_context(Database(file)) for name, file in files.items()}
        yield databases, {name: read_schema(file) for name, file in files.items()}, views


def collected(
    wordings: int, each: int, queries: int, debian: bool, zero_shot: int, scorer: Scorer | None = None
) -> Collected:
    """Run all tiers on all questions. `scorer` stands in for the language model in tests.

    `zero_shot` questions, evenly spread, are also answered by SQL that the model writes itself.
    """
    start = time.perf_counter()
    used: Sequence[Query] = QUERIES[:: len(QUERIES) // queries]
    with opened(debian) as (databases, schemas, views):
        known = questions(views, databases, schemas, range(EXAMPLES), seed=1, queries=QUERIES)
        asked = questions(
            views, databases, schemas, range(EXAMPLES, EXAMPLES + wordings), seed=SEED, each=each, queries=used
        )
        library = Library([_example(one, schemas, databases) for one in known])
        model = scorer or language_model(head_of(library))
        built = time.perf_counter() - start
        answers, linked = [], []
        for one in asked:
            schema, database = schemas[one.database], databases[one.database]
            linked.append(link(one.text, schema, database))
            answers.append([answer(tier, linked[-1], schema, database, library, model) for tier in TIERS])
        written = {}
        if isinstance(model, ChannelScorer):
            model.save()
            written = _written(model, asked, linked, databases, zero_shot)
        retrieved = np.array(
            [_retrieved(library, one, schemas[q.database]) for one, q in zip(linked, asked, strict=True)]
        )
        without = [
            answer(TIERS[-1], one, schemas[q.database], databases[q.database], library, _Silent())
            for one, q in zip(linked, asked, strict=True)
        ]
        spoken = [masked(q.text, schemas[q.database], one) for one, q in zip(linked, asked, strict=True)]
        counts = np.array([[len(one.tables), len(one.columns)] for one in linked], dtype=float)
    lengths = np.array([[len(one.text.split())] for one in asked], dtype=float)
    results = _right(answers, asked, "set")
    tokens = np.array([[one.tokens for one in row] for row in answers], dtype=float)
    meant = embedded([one.text for one in asked]) if scorer is None else None
    return Collected(
        embedded=None if meant is None else meant[0],
        embedding_tokens=None if meant is None else meant[1],
        asked=asked,
        results=results,
        tokens=tokens,
        failed=np.array([[one.executed.empty for one in row] for row in answers]),
        margins=np.array([[min(one.margin, 99.0) for one in row] for row in answers]),
        words=np.hstack([hashed_words(spoken), counts / 10, lengths / 20, retrieved]),
        counts=counts,
        lengths=lengths / 20,
        details={
            **written,
            "questions": len(asked),
            "databases": sorted(databases),
            "examples": len(known),
            "accuracy_of_tiers": dict(zip(_names(), results.mean(0).tolist(), strict=True)),
            "accuracy_of_tiers_by_class": {
                str(kind): results[[one.kind == kind for one in asked]].mean(0).tolist()
                for kind in sorted({q.kind for q in asked})
            },
            "accuracy_in_other_modes": {mode: _right(answers, asked, mode).mean(0).tolist() for mode in MODES[1:]},
            "accuracy_of_advanced_without_the_model": float(_right([[one] for one in without], asked, "set").mean()),
            "tokens_of_tiers": dict(zip(_names(), tokens.mean(0).tolist(), strict=True)),
            "labels": np.bincount(labels(results), minlength=len(TIERS)).tolist(),
            "solved_by_none": float((results.max(1) == 0).mean()),
            "dearer_tier_wrong_where_a_cheaper_is_right": float((results[:, :-1].max(1) > results[:, -1]).mean()),
            "candidates_of_tiers": np.mean([[one.candidates for one in row] for row in answers], axis=0).tolist(),
            "seconds_a_question": np.mean([[one.seconds for one in row] for row in answers], axis=0).tolist(),
            "tokens_really_read": getattr(model, "read", 0),
            "seconds_until_the_first_question": built,
            "seconds_of_all_tiers": time.perf_counter() - start - built,
        },
    )


def _written(
    model: ChannelScorer,
    asked: Sequence[Question],
    linked: Sequence[Linked],
    databases: Mapping[str, Database],
    count: int,
) -> dict[str, Any]:
    """What comes of SQL that the model writes itself."""
    if not count:
        return {}
    runs, right = [], []
    for n in np.linspace(0, len(asked) - 1, count).astype(int):
        executed = databases[asked[n].database].run(written_sql(model.model, model.tokenizer, linked[n]))
        runs.append(executed.ok)
        right.append(same_result(executed, asked[n].gold))
    return {"share_of_own_sql_that_runs": float(np.mean(runs)), "share_of_own_sql_that_is_right": float(np.mean(right))}


def embedded(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray] | None:
    """MiniLM's embeddings of the questions and the tokens it read; None where it is not installed."""
    from tokenizers import Tokenizer

    from assay.catalogue.search import embed, model_folder

    folder = model_folder()
    if folder is None:
        return None
    reads = Tokenizer.from_file(str(folder / "tokenizer.json"))
    reads.no_padding()
    return embed(folder, texts), np.array([len(reads.encode(text).ids) for text in texts], dtype=float)


class _Silent:
    """No language model: all candidates are alike, and their priors decide."""

    def score(self, question: str, candidates: Sequence[str]) -> tuple[list[float], int]:
        return [0.0] * len(candidates), 0


RETRIEVED = 6


def _retrieved(library: Library, linked: Linked, schema: Any) -> list[float]:
    """What looking for examples says, which all tiers do and which takes no tokens: how alike the nearest three are, how well the best
    candidate of the widest tier fits and by how much better than the next, and what share of the skeletons can be filled at all."""
    similar = library.similar(linked, schema)
    alike = [cosine for cosine, _ in similar[:3]]
    found = library.candidates(linked, schema, skeletons=TIERS[-1].skeletons, most=TIERS[-1].candidates)
    priors = [one.prior for one in found] or [0.0]
    return [
        *alike,
        *[0.0] * (3 - len(alike)),
        priors[0] / 5,
        priors[0] - priors[1] if len(priors) > 1 else 1.0,
        len(found) / TIERS[-1].candidates,
    ]


def _names() -> list[str]:
    return [tier.name for tier in TIERS]


def _example(one: Question, schemas: Mapping[str, Any], databases: Mapping[str, Database]) -> Example:
    schema = schemas[one.database]
    return Example(one.text, one.sql, schema, link(one.text, schema, databases[one.database]))


def _right(answers: Sequence[Sequence[Answer]], asked: Sequence[Question], mode: Any) -> np.ndarray:
    return np.array(
        [
            [float(same_result(a.executed, q.gold, mode=mode)) for a in row]
            for row, q in zip(answers, asked, strict=True)
        ]
    )


def head_of(library: Library) -> str:
    """What the model reads before every candidate: one example of a filter and one of a join."""
    first = library.examples[EXAMPLES]
    joined = next(one for one in library.examples if " JOIN " in one.sql)
    return "".join(f"SQL: {one.sql}\nQuestion: {one.question}\n\n" for one in (first, joined))


def language_model(head: str) -> ChannelScorer:
    """The bundled model in bfloat16, its scores kept in the cache."""
    loaded = load_model(MODEL, dtype=torch.bfloat16)
    identity = f"{loaded.folder.name} bfloat16 torch {torch.__version__}"
    memory = cache_dir() / "ellie_sql" / f"{loaded.folder.name}.json"
    return ChannelScorer(loaded.model, loaded.tokenizer, head=head, memory=memory, identity=identity)


# Routing ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Arm:
    """What a way of routing did on each question, averaged over the seeds: right or wrong, and tokens with the router's own."""

    right: np.ndarray
    tokens: np.ndarray


class _Study:
    """All ways of routing on the same questions."""

    def __init__(self, seen: Collected) -> None:
        self.seen = seen
        self.n = len(seen.asked)
        self.scores: dict[str, list[float]] = {}
        self.strengths: list[float] = []
        self.shares: np.ndarray = np.zeros(len(TIERS))
        self.candidate = self._trained(CANDIDATE, seen.words)
        self.fixed = {f"always {name}": self._sent(np.full(self.n, t)) for t, name in enumerate(_names())}
        failure = cascade_by_failure(seen.failed, seen.results, seen.tokens)
        self.rivals = {
            FAILURE: Arm(*failure),
            DOUBT: self._in_doubt(),
            **{f"always {name}": self.fixed[f"always {name}"] for name in _names()[:-1]},
        }
        self.controls = {
            LENGTH: self._trained(LENGTH, seen.lengths),
            SHUFFLED: self._trained(SHUFFLED, seen.words, shuffled=True),
            BY_COST: self._trained(BY_COST, seen.words, how="cost"),
            WORDS: self._trained(WORDS, seen.words[:, :-RETRIEVED]),
        }
        if seen.embedded is not None:
            own = seen.embedding_tokens
            self.controls[MEANING] = self._trained(MEANING, seen.embedded, own=0.0 if own is None else own)
        self.others = self._others()

    # -- arms

    def _folds(self, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        from sklearn.model_selection import GroupKFold

        groups = self.seen.templates
        count = min(FOLDS, len(set(groups)))
        yield from GroupKFold(count, shuffle=True, random_state=seed).split(groups, groups=groups)

    def _sent(self, tiers: np.ndarray, own: Any = 0.0) -> Arm:
        rows = np.arange(self.n)
        return Arm(self.seen.results[rows, tiers], self.seen.tokens[rows, tiers] + own)

    def _trained(
        self, name: str, features: np.ndarray, *, shuffled: bool = False, own: Any = 0.0, how: str = "cascade"
    ) -> Arm:
        """A cascade, cross-fitted: strength and threshold are chosen on the templates that it learns from."""
        seen = self.seen
        found = []
        for seed in range(SEEDS):
            tiers = np.zeros(self.n, dtype=int)
            for learn, keep in self._folds(seed):
                results = seen.results[learn]
                if shuffled:
                    results = results[np.random.default_rng(seed).permutation(len(learn))]
                router, strength = tuned(features[learn], results, seen.tokens[learn], seen.templates[learn], how)
                tiers[keep] = router.predict(features[keep])
                if name == CANDIDATE:
                    self.strengths.append(strength)
            if name == CANDIDATE:
                self.shares += np.bincount(tiers, minlength=len(TIERS)) / self.n / SEEDS
            found.append(self._sent(tiers, own))
            self.scores.setdefault(name, []).append(self.gained(found[-1]))
        return Arm(np.mean([one.right for one in found], axis=0), np.mean([one.tokens for one in found], axis=0))

    def _simple(self, router: Any, features: np.ndarray) -> Arm:
        """A router without a threshold, cross-fitted."""
        from sklearn.base import clone

        found = []
        for seed in range(SEEDS):
            tiers = np.zeros(self.n, dtype=int)
            for learn, keep in self._folds(seed):
                tiers[keep] = clone(router).fit(features[learn], self.seen.results[learn]).predict(features[keep])
            found.append(self._sent(tiers))
        return Arm(np.mean([one.right for one in found], axis=0), np.mean([one.tokens for one in found], axis=0))

    def _in_doubt(self) -> Arm:
        """Trying in turn while the model's margin is small; how small is tuned as the router's threshold is."""
        seen = self.seen
        limits = [
            0.0,
            *np.quantile(seen.margins[:, :-1], np.linspace(0.05, 1, 20)),
            math.inf,
        ]  # the last one: always in doubt
        right, tokens = np.zeros(self.n), np.zeros(self.n)
        for seed in range(SEEDS):
            for learn, keep in self._folds(seed):
                tried = []
                for limit in limits:
                    doubt = seen.failed | (seen.margins < limit)
                    got, cost = cascade_by_failure(doubt[learn], seen.results[learn], seen.tokens[learn])
                    enough = got.mean() >= seen.results[learn, -1].mean() - MOST_LOST
                    tried.append((enough, -cost.mean() if enough else got.mean(), limit))
                limit = max(tried)[2]
                got, cost = cascade_by_failure(
                    (seen.failed | (seen.margins < limit))[keep], seen.results[keep], seen.tokens[keep]
                )
                right[keep] += got / SEEDS
                tokens[keep] += cost / SEEDS
        return Arm(right, tokens)

    def _others(self) -> dict[str, Arm]:
        from sklearn.linear_model import LogisticRegression

        seen = self.seen
        regression = LogisticRegression(C=float(np.median(self.strengths)), max_iter=1000)
        return {
            "label classifier": self._simple(TierRouter(regression), seen.words),
            "pairwise": self._simple(TierRouter(PairwiseClassifier()), seen.words),
            "the paper's cascade, at 0.5": self._simple(TierRouter(regression, how="cascade"), seen.words),
            "five nearest neighbours": self._simple(nearest_neighbours(min(5, self.n // 2)), seen.counts),
            "table count": self._simple(CountRouter(), seen.counts),
            "oracle": self._sent(oracle(seen.results)),
            "oracle, the hopeless to advanced": self._sent(oracle(seen.results, hopeless="last")),
        }

    def arms(self) -> dict[str, Arm]:
        chance = by_chance(_whole(self.shares), self.seen.results, self.seen.tokens)
        expected = Arm(np.full(self.n, chance.accuracy), np.full(self.n, chance.cost))
        return {CHANCE: expected, **self.rivals, **self.controls, **self.others}

    # -- figures

    def saved(self, arm: Arm, rows: Any = slice(None)) -> float:
        """Per cent of the advanced pipeline's tokens."""
        return 100 * (1 - float(arm.tokens[rows].mean() / self.seen.tokens[rows, -1].mean()))

    def elasticity(self, arm: Arm, rows: Any = slice(None)) -> float:
        """Over the advanced pipeline's; NaN where undefined, 0 where the advanced pipeline gains nothing."""
        basic, advanced = self.fixed["always basic"], self.fixed["always advanced"]
        base = float(basic.right[rows].mean()), float(basic.tokens[rows].mean())
        whole = tep(float(advanced.right[rows].mean()), float(advanced.tokens[rows].mean()), *base)
        own = tep(float(arm.right[rows].mean()), float(arm.tokens[rows].mean()), *base)
        return own / whole if whole > 0 or math.isnan(whole) else 0.0

    def gained(self, arm: Arm) -> float:
        """How much better an arm routes than chance: its accuracy above that of the best mixture of single pipelines at its own tokens."""
        return float(arm.right.mean()) - self._chord(float(arm.tokens.mean()))

    def _chord(self, tokens: float) -> float:
        """The accuracy that the best mixture of single pipelines by chance has at so many tokens."""
        results, costs = self.seen.results.mean(0), self.seen.tokens.mean(0)
        best = max((r for r, c in zip(results, costs, strict=True) if c <= tokens), default=0.0)
        for a in range(len(costs)):
            for b in range(len(costs)):
                if costs[a] < tokens < costs[b]:
                    share = (tokens - costs[a]) / (costs[b] - costs[a])
                    best = max(best, (1 - share) * results[a] + share * results[b])
        return float(best)

    def within(self, arm: Arm) -> bool:
        return float(arm.right.mean()) >= float(self.seen.results[:, -1].mean()) - MARGIN

    def interval(self, figure: Callable[[Any], float], undefined: list[int] | None = None) -> tuple[float, float]:
        """95 % over resampled templates."""
        groups = self.seen.templates
        rows_of = [np.flatnonzero(groups == g) for g in range(groups.max() + 1)]
        chance = np.random.default_rng(0)
        values = []
        for _ in range(1000):
            rows = np.concatenate([rows_of[g] for g in chance.integers(0, len(rows_of), len(rows_of))])
            values.append(figure(rows))
        fine = [value for value in values if not math.isnan(value)] or [0.0]
        if undefined is not None:
            undefined.append(sum(map(math.isnan, values)))
        low, high = np.quantile(fine, [0.025, 0.975])
        value = figure(slice(None))
        value = 0.0 if math.isnan(value) else value
        return float(min(low, value)), float(max(high, value))

    def quality(self) -> Quality:
        baseline = float(self.seen.results[:, -1].mean())
        lost = self.candidate.right - self.seen.results[:, -1]
        low, high = self.interval(lambda rows: float(lost[rows].mean()))
        arms = self.arms()
        return Quality(
            float(self.candidate.right.mean()),
            baseline,
            baseline + low,
            baseline + high,
            controls={
                "deleted": float(self.seen.results[:, 0].mean()),
                "random": float(arms[CHANCE].right.mean()),
                "rival": float(arms[FAILURE].right.mean()),
                **{name: float(arms[name].right.mean()) for name in (DOUBT, LENGTH, SHUFFLED, "always intermediate")},
            },
            rival=FAILURE,
        )

    def trained(self) -> dict[str, Trained]:
        """Each trained arm's accuracy above that of the best mixture of single pipelines by chance at its own tokens: chance is 0, and what
        the oracle gains is perfect."""
        strength = float(np.median(self.strengths))
        best = self.gained(self.others["oracle"])
        return {
            CANDIDATE: Trained(
                self.scores[CANDIDATE], 0.0, "single pipelines mixed by chance", strength, STRENGTHS, True, best
            )
        }

    def details(self) -> dict[str, Any]:
        arms = {CANDIDATE: self.candidate, "always advanced": self.fixed["always advanced"], **self.arms()}
        return {
            **self.seen.details,
            "accuracy_and_tokens": {
                name: [float(one.right.mean()), float(one.tokens.mean())] for name, one in arms.items()
            },
            "shares_of_tiers": dict(zip(_names(), self.shares.tolist(), strict=True)),
            "gained_over_mixtures_by_chance": self.scores,
            "curve": self._curve(),
            "break_even_share_of_basic_questions_at_25_router_tokens": 25
            / max(float(np.ptp(self.seen.tokens.mean(0)[[0, -1]])), 1e-9),
        }

    def _curve(self) -> list[list[float]]:
        """(threshold, accuracy, tokens) of the candidate's kind of router at fixed thresholds, of one division into folds."""
        from sklearn.linear_model import LogisticRegression

        seen, probabilities = self.seen, np.ones((self.n, len(TIERS)))
        router = TierRouter(LogisticRegression(C=float(np.median(self.strengths)), max_iter=1000), how="cascade")
        for learn, keep in self._folds(0):
            probabilities[keep] = router.fit(seen.words[learn], seen.results[learn]).predict_proba(seen.words[keep])
        found = []
        for threshold in np.linspace(0, 1, 11):
            one = routed(router.decide(probabilities, float(threshold)), seen.results, seen.tokens)
            found.append([float(threshold), one.accuracy, one.cost])
        return found


def _whole(shares: np.ndarray) -> list[float]:
    return [float(one) for one in shares / shares.sum()]


def tuned(
    features: np.ndarray, results: np.ndarray, costs: np.ndarray, groups: np.ndarray, how: str = "cascade"
) -> tuple[TierRouter, float]:
    """A fitted router: of all strengths and thresholds the ones that are cheapest without losing more than `MOST_LOST` of the advanced
    pipeline's accuracy on templates kept out of learning."""
    from sklearn.linear_model import LogisticRegression

    tried = []
    least = float(results[:, -1].mean()) - MOST_LOST
    folds = min(FOLDS, len(set(groups)))
    for strength in STRENGTHS:
        regression = LogisticRegression(C=strength, max_iter=1000)
        plain = TierRouter(regression, how=how, costs=costs.mean(0).tolist())
        threshold, curve = tuned_threshold(
            plain, features, results, costs, groups=groups, most_lost=MOST_LOST, folds=folds
        )
        _, accuracy, cost = next(one for one in curve if one[0] == threshold)
        enough = accuracy >= least - 1e-12
        tried.append((enough, -cost if enough else accuracy, strength, threshold))
    _, _, strength, threshold = max(tried)
    regression = LogisticRegression(C=strength, max_iter=1000)
    router = TierRouter(regression, how=how, threshold=threshold, costs=costs.mean(0).tolist())
    return router.fit(features, results), strength
