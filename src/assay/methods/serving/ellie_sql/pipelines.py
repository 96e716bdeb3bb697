"""Three tiers of text-to-SQL, the wider the dearer: all edit known examples and let a language model choose, as far as they look.

The paper's tiers are prompts for a large model. Ours are the same idea for one of a hundred million parameters, which chooses better
than it writes (`written_sql` shows what it writes): basic looks at one skeleton and takes the model's best candidate unseen;
intermediate looks at more and repairs, going on to the next candidate while execution fails or finds nothing (execution-guided); advanced
looks at many, runs them all and lets candidates with the same result vote with the model's probabilities.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from assay import checks
from assay.methods.serving.ellie_sql.edits import Candidate, Library
from assay.methods.serving.ellie_sql.execution import Database, Executed, result_key
from assay.methods.serving.ellie_sql.schema import Linked, Schema
from assay.methods.serving.ellie_sql.scoring import Scorer

PRIOR = 0.15  # what one unit of a prior counts in nats a token of the question; chosen on examples, none of the questions asked

SHARP = 5.0  # by how much the votes of candidates differ more than their scores do; chosen like PRIOR


@dataclass(frozen=True)
class Tier:
    """How far a pipeline looks: so many skeletons, so many candidates of them for the model, and what execution is used for.

    `execution` is "none", "repair" (the first candidate whose result is not empty) or "vote" (the result with the most probability).
    """

    name: str
    skeletons: int
    candidates: int
    execution: str = "none"

    def __post_init__(self) -> None:
        checks.whole("skeletons", self.skeletons, low=1)
        checks.whole("candidates", self.candidates, low=1)
        checks.choice("execution", self.execution, ("none", "repair", "vote"))


TIERS = (
    Tier("basic", skeletons=1, candidates=3),
    Tier("intermediate", skeletons=3, candidates=7, execution="repair"),
    Tier("advanced", skeletons=8, candidates=12, execution="vote"),
)


@dataclass(frozen=True)
class Answer:
    """What a tier said: its SQL ("" for none), what it gave, the tokens the model read for it, the seconds, and how sure the model was.

    `candidates` is the SQL that it chose among, best prior first. `margin` is the difference of the two best scores in
    nats a token: infinite where there was nothing to choose, 0 without any candidate.
    """

    sql: str
    executed: Executed
    tokens: int
    seconds: float
    margin: float
    candidates: tuple[str, ...]


def answer(
    tier: Tier,
    linked: Linked,
    schema: Schema,
    database: Database,
    library: Library,
    scorer: Scorer,
) -> Answer:
    """Answer the linked question by one tier. Every query runs through `Database`, the chosen one as well.

    A tier that votes leaves out candidates that find nothing, and one that repairs goes past them: where the right answer is empty,
    both are wrong unless every candidate finds nothing.
    """
    start = time.perf_counter()
    found = library.candidates(linked, schema, skeletons=tier.skeletons, most=tier.candidates)
    if not found:
        return Answer("", Executed("error", error="no candidate"), 0, time.perf_counter() - start, 0.0, ())
    candidates = tuple(one.sql for one in found)
    scores, tokens = scorer.score(linked.question, candidates)
    ranked = _ranked(found, scores)
    margin = ranked[0][0] - ranked[1][0] if len(ranked) > 1 else math.inf
    sql, executed = CHOOSERS[tier.execution](ranked, database)
    return Answer(sql, executed, tokens, time.perf_counter() - start, margin, candidates)


def _ranked(found: Sequence[Candidate], scores: Sequence[float]) -> list[tuple[float, str]]:
    """(score, SQL), best first; equal ones in the order of their priors."""
    scored = [(score + PRIOR * one.prior, one.sql) for one, score in zip(found, scores, strict=True)]
    return sorted(scored, key=lambda pair: -pair[0])


def _best(ranked: Sequence[tuple[float, str]], database: Database) -> tuple[str, Executed]:
    return ranked[0][1], database.run(ranked[0][1])


def _repaired(ranked: Sequence[tuple[float, str]], database: Database) -> tuple[str, Executed]:
    """The best candidate that finds something; the best one where none does."""
    first: Executed | None = None
    for _, sql in ranked:
        executed = database.run(sql)
        if not executed.empty:
            return sql, executed
        first = first or executed
    assert first is not None
    return ranked[0][1], first


def _voted(ranked: Sequence[tuple[float, str]], database: Database) -> tuple[str, Executed]:
    """The best candidate of the result on which the most probability falls; the best candidate where all results are empty."""
    weights: dict[object, float] = {}
    first: dict[object, tuple[str, Executed]] = {}
    for score, sql in ranked:
        executed = database.run(sql)
        if executed.empty:
            continue
        key = result_key(executed)
        weights[key] = weights.get(key, 0.0) + math.exp(SHARP * (score - ranked[0][0]))
        first.setdefault(key, (sql, executed))
    if not weights:
        return _best(ranked, database)
    return first[max(weights, key=lambda key: weights[key])]


CHOOSERS = {"none": _best, "repair": _repaired, "vote": _voted}


def written_sql(model: Any, tokenizer: Any, linked: Linked, *, new_tokens: int = 48) -> str:
    """The SQL that a causal model of transformers writes by itself, greedily, when it is shown the linked schema and the question.

    What the paper's basic pipeline asks a large model for. Small ones write little that runs: measure it before building on it.
    """
    prompt = f"SQLite tables:\n{linked.text()}\n\nQuestion: {linked.question}\nSQL: SELECT"
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    made = model.generate(
        ids, max_new_tokens=checks.whole("new_tokens", new_tokens, low=1), do_sample=False, pad_token_id=0
    )
    text = str(tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True))
    return "SELECT" + text.partition(";")[0].partition("\n\n")[0]
