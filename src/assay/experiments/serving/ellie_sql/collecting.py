"""What every pipeline, and every rival of the router, does on every question; and what routers can see of it.

The language model is really run; its log-likelihoods are kept in the cache by exact token ids, so that the second claim does not compute
them again.
"""

from __future__ import annotations

import contextlib
import functools
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from assay.experiments.serving.ellie_sql.databases import DEBIAN, JUDGED, VIEWS, build
from assay.experiments.serving.ellie_sql.questions import NEW_QUERIES, QUERIES, Question, questions
from assay.methods.serving.ellie_sql import (
    MODES,
    TIERS,
    Answer,
    Candidate,
    ChannelScorer,
    Database,
    Example,
    Library,
    Linked,
    Scorer,
    Tier,
    answer,
    hashed_words,
    labels,
    link,
    masked,
    read_schema,
    router_text,
    same_result,
    written_sql,
)
from assay.paths import cache_dir, scratch_dir
from assay.workloads.models import load_model

MODEL = "smollm2-135m"
SEED_EXAMPLES, SEED_LEARNT, SEED_JUDGED = 1, 0, 11
WIDTHS = (2, 4, 6, 8, 10)  # candidates of the narrower advanced pipelines
RETRIEVED = 6  # features that say what retrieval says
TIMED = 2  # questions that the tiers are timed on
MINILM, READS = "MiniLM's embedding of the question", "preferences (DPO) of a model that reads the question"


@dataclass
class Collected:
    """What was seen of n questions; those that are `judged` are none of those that routers learn from.

    `results`, `tokens`, `failed` and `margins` are (n, 3), by tier. `retried` (n, 3) is what trying tier t costs after the ones before it,
    if no candidate is read twice and the prompt's head once. `narrow` are the results and tokens (n, widths) of the advanced pipeline
    with fewer candidates, `silent` (n,) its results without a model, which take no tokens. `words`, `counts` and `lengths` are features
    that take no tokens; `read` holds features that take some, with those.
    """

    asked: list[Question]
    judged: np.ndarray
    results: np.ndarray
    tokens: np.ndarray
    failed: np.ndarray
    margins: np.ndarray
    retried: np.ndarray
    narrow: tuple[np.ndarray, np.ndarray]
    silent: np.ndarray
    words: np.ndarray
    counts: np.ndarray
    lengths: np.ndarray
    details: dict[str, Any]
    read: dict[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)

    @property
    def queries(self) -> np.ndarray:
        """Which query each question asks, as numbers: wordings of one query are no independent questions."""
        return np.unique([one.query for one in self.asked], return_inverse=True)[1]

    @property
    def templates(self) -> np.ndarray:
        """Which query in which wording."""
        return np.unique([one.template for one in self.asked], return_inverse=True)[1]


@contextmanager
def opened(debian: bool) -> Iterator[tuple[dict[str, Database], dict[str, Any]]]:
    """The databases and their schemas; gone afterwards."""
    with scratch_dir(Path(tempfile.gettempdir()), "assay-databases.") as folder, ExitStack() as stack:
        files = build(folder)
        if not debian:
            files.pop("debian", None)
        databases = {name: stack.enter_context(Database(file)) for name, file in files.items()}
        yield databases, {name: read_schema(file) for name, file in files.items()}


def collected(
    queries: int,
    new: int,
    wordings: int,
    learnt_of: int,
    judged_of: int,
    debian: bool,
    zero_shot: int,
    scorer: Scorer | None = None,
    reading: bool = True,
) -> Collected:
    """Run all tiers on all questions. `scorer` stands in for the language model in tests.

    `queries` of the known ones and `new` ones are asked in `wordings` of each part at most, to learn from of `learnt_of` different views
    each, to judge by of `judged_of`. `zero_shot` questions, evenly spread, are also answered by SQL that the model writes itself.
    `reading` adds the features of models that read the question.
    """
    start = time.perf_counter()
    used, unknown = QUERIES[:: len(QUERIES) // queries], NEW_QUERIES[: min(new, len(NEW_QUERIES))]
    with opened(debian) as (databases, schemas):
        known = questions(VIEWS, databases, schemas, "examples", seed=SEED_EXAMPLES, queries=(*QUERIES, *NEW_QUERIES))
        learnt = questions(
            VIEWS, databases, schemas, "learnt", seed=SEED_LEARNT, queries=used, wordings=wordings, each=learnt_of
        )
        views = [view for view in (*JUDGED, DEBIAN) if view.database in databases]
        asking = (*used, *unknown)
        judged = questions(
            views, databases, schemas, "judged", seed=SEED_JUDGED, queries=asking, wordings=wordings, each=judged_of
        )
        asked = [*learnt, *judged]
        library = Library([_example(one, schemas, databases) for one in known])
        model = scorer or language_model(head_of(library))
        built = time.perf_counter() - start
        places = [(schemas[one.database], databases[one.database]) for one in asked]
        linked = [link(one.text, *place) for one, place in zip(asked, places, strict=True)]

        kept = _Kept(library)

        def answered(tier: Tier, one: Linked, place: Any, by: Scorer = model, source: Any = kept) -> Answer:
            schema, database = place
            return answer(tier, one, schema, database, source, by)

        pairs = list(zip(linked, places, strict=True))
        # the dearest first: its candidates are read together, and most of the others' are among them
        rows = [[answered(tier, *pair) for tier in reversed(TIERS)][::-1] for pair in pairs]
        retried = [_retried(model, one, row) for one, row in zip(linked, rows, strict=True)]
        widths = [Tier(f"advanced of {width}", TIERS[-1].skeletons, width, "vote") for width in WIDTHS]
        narrow = [[answered(tier, *pair) for tier in widths] for pair in pairs]
        silent = [[answered(TIERS[-1], *pair, _Silent())] for pair in pairs]
        extra: dict[str, Any] = {}
        if isinstance(model, ChannelScorer):
            _keep(model)
            extra = _written(model, asked, linked, databases, zero_shot) | _timed(
                model, pairs, functools.partial(answered, by=model, source=library)
            )
        before = time.perf_counter()
        retrieved = [_retrieved(library, one, place[0]) for one, place in pairs]
        spoken = [masked(q.text, place[0], one) for q, (one, place) in zip(asked, pairs, strict=True)]
        counts = np.array([[len(one.tables), len(one.columns)] for one in linked], dtype=float)
        lengths = np.array([[len(one.text.split())] for one in asked], dtype=float) / 20
        words = np.hstack([hashed_words(spoken), counts / 10, lengths, np.array(retrieved)])
        featured = (time.perf_counter() - before) / len(asked)
        read = {}
        if reading and scorer is None:
            read[MINILM] = embedded([one.text for one in asked])
        if reading and isinstance(model, ChannelScorer):
            read[READS] = read_by(model, [router_text(one) for one in linked])
    results = _right(rows, asked, "set")
    tokens = np.array([[one.tokens for one in row] for row in rows], dtype=float)
    apart = np.arange(len(asked)) >= len(learnt)
    return Collected(
        asked=asked,
        judged=apart,
        results=results,
        tokens=tokens,
        failed=np.array([[one.executed.empty for one in row] for row in rows]),
        margins=np.array([[min(one.margin, 99.0) for one in row] for row in rows]),
        retried=np.array(retried, dtype=float),
        narrow=(_right(narrow, asked, "set"), np.array([[one.tokens for one in row] for row in narrow], dtype=float)),
        silent=_right(silent, asked, "set")[:, 0],
        words=words,
        counts=counts,
        lengths=lengths,
        read={name: one for name, one in read.items() if one is not None},
        details={
            **extra,
            "examples": len(known),
            "questions_learnt_from": len(learnt),
            "questions_judged": len(judged),
            "databases_judged": sorted({one.database for one in judged}),
            "accuracy_of_tiers_on_questions_learnt_from": _by_tier(results[~apart]),
            "accuracy_of_tiers": _by_tier(results[apart]),
            "accuracy_of_tiers_by_class": {
                str(kind): results[apart & np.array([one.kind == kind for one in asked])].mean(0).tolist()
                for kind in sorted({one.kind for one in judged})
            },
            "accuracy_in_other_modes": {mode: _right(rows, asked, mode)[apart].mean(0).tolist() for mode in MODES[1:]},
            "tokens_of_tiers": _by_tier(tokens[apart]),
            "labels": np.bincount(labels(results[apart]), minlength=len(TIERS)).tolist(),
            "solved_by_none": float((results[apart].max(1) == 0).mean()),
            "dearer_tier_wrong_where_a_cheaper_is_right": float(
                (results[apart, :-1].max(1) > results[apart, -1]).mean()
            ),
            "candidates_of_tiers": np.mean([[len(one.candidates) for one in row] for row in rows], axis=0).tolist(),
            "seconds_of_the_router_s_features_a_question": featured,
            "tokens_really_read": getattr(model, "read", 0),
            "seconds_until_the_first_question": built,
            "seconds_of_everything": time.perf_counter() - start,
        },
    )


def _by_tier(values: np.ndarray) -> dict[str, float]:
    return dict(zip([tier.name for tier in TIERS], values.mean(0).tolist(), strict=True))


def _retried(model: Scorer, linked: Linked, row: Sequence[Answer]) -> list[float]:
    """What each tier costs after those before it, where no candidate is read twice: the bill of all candidates so far, less the last."""
    bills = [0.0]
    for last in range(len(row)):
        candidates = list(dict.fromkeys(sql for one in row[: last + 1] for sql in one.candidates))
        bills.append(float(model.score(linked.question, candidates)[1]))
    return np.diff(bills).tolist()


def _keep(model: ChannelScorer) -> None:
    """Write the scores into the cache. One that cannot be written costs time later, and nothing now."""
    with contextlib.suppress(OSError):
        model.save()


def _timed(model: ChannelScorer, pairs: Sequence[Any], answered: Any) -> dict[str, Any]:
    """Seconds of each tier, with nothing kept, on a few questions."""
    kept, read = model.known, model.read
    seconds: list[list[float]] = []
    for place in np.linspace(0, len(pairs) - 1, min(TIMED, len(pairs))).astype(int):
        seconds.append([])
        for tier in TIERS:
            model.known = {}
            seconds[-1].append(answered(tier, *pairs[place]).seconds)
    model.known, model.read = kept, read
    return {"seconds_a_question_of_tiers": np.mean(seconds, axis=0).tolist()}


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


@torch.inference_mode()
def read_by(model: ChannelScorer, texts: Sequence[str], batch: int = 16) -> tuple[np.ndarray, np.ndarray]:
    """The model's last hidden state behind each text (n, width), scaled to unit length, and the tokens it read, with one for its answer."""
    rows = [model.tokenizer(text)["input_ids"][-512:] for text in texts]
    made = np.zeros((len(rows), model.model.config.hidden_size))
    order = sorted(range(len(rows)), key=lambda n: len(rows[n]))
    for at in range(0, len(order), batch):
        part = order[at : at + batch]
        longest = max(len(rows[n]) for n in part)
        ids = torch.zeros(len(part), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for place, n in enumerate(part):
            ids[place, longest - len(rows[n]) :] = torch.tensor(rows[n])
            mask[place, longest - len(rows[n]) :] = 1
        seen = model.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),
            use_cache=False,
            output_hidden_states=True,
            logits_to_keep=1,
        )
        made[part] = seen.hidden_states[-1][:, -1].float().numpy()
    made /= np.linalg.norm(made, axis=1, keepdims=True)
    return made, np.array([len(row) + 1 for row in rows], dtype=float)


class _Kept:
    """A library whose candidates for a question are looked for once by all the pipelines that look as far."""

    def __init__(self, library: Library) -> None:
        self.library = library
        self.found: dict[tuple[int, int], list[Candidate]] = {}

    def candidates(self, linked: Linked, schema: Any, *, skeletons: int, most: int) -> list[Candidate]:
        """As `Library.candidates`."""
        key = (id(linked), skeletons)
        if key not in self.found:
            every = TIERS[-1].candidates
            self.found[key] = self.library.candidates(linked, schema, skeletons=skeletons, most=every)
        return self.found[key][:most]


class _Silent:
    """No language model: all candidates are alike, and their priors decide."""

    def score(self, question: str, candidates: Sequence[str]) -> tuple[list[float], int]:
        return [0.0] * len(candidates), 0


def _retrieved(library: Library, linked: Linked, schema: Any) -> list[float]:
    """What looking for examples says, which takes no tokens: how alike the nearest three are, how well the best candidate of the widest
    tier fits and by how much better than the next, and how many candidates of all that the widest tier would take there are."""
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
    first = library.examples[2]
    joined = next(one for one in library.examples if " JOIN " in one.sql)
    return "".join(f"SQL: {one.sql}\nQuestion: {one.question}\n\n" for one in (first, joined))


def language_model(head: str) -> ChannelScorer:
    """The bundled model in bfloat16, its scores kept in the cache."""
    loaded = load_model(MODEL, dtype=torch.bfloat16)
    identity = f"{loaded.folder.name} bfloat16 torch {torch.__version__}"
    memory = cache_dir() / "ellie_sql" / f"{loaded.folder.name}.json"
    return ChannelScorer(loaded.model, loaded.tokenizer, head=head, memory=memory, identity=identity)
