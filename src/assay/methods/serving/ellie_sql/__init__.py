"""EllieSQL: each question goes to the cheapest of three text-to-SQL pipelines that will get it right.

After "EllieSQL: Cost-Efficient Text-to-SQL with Complexity-Aware Routing" (arXiv 2503.22402, COLM 2025). Schema linking, shared by all
tiers, prunes the schema; a small router reads question and pruned schema and picks a tier; only that tier runs. Labels come from running
the tiers in the order of their cost on training questions: the first whose result equals the gold result.

    schema, database = read_schema(path), Database(path)
    linked = link(question, schema, database)
    found = answer(TIERS[0], linked, schema, database, library, scorer)     # found.sql, found.executed.rows, found.tokens

    router = TierRouter(LogisticRegression(), how="cascade").fit(features, results)

`TierRouter` knows nothing of SQL and routes any tiered task; `ModelRouter` puts it behind `model="auto"` of the server. SQL that a model
wrote runs through `Database`, whatever wrote it.

The settings of DPO are those of the released configuration, the others recalled. Departures, all at a small model's size: the tiers edit
known examples (`pipelines`), and linking is by words. When NOT to use routing: where the cheap tier is as good, or the dear one with
fewer candidates (take it), or where a failed execution tells as much as the router (`cascade_by_failure`, all tokens charged).
"""

from __future__ import annotations

from assay.methods.serving.ellie_sql.dpo import (
    DPORouter,
    PreferenceClassifier,
    dpo_loss,
    preferences,
    router_text,
)
from assay.methods.serving.ellie_sql.edits import Candidate, Example, Library, abstracted, bindings
from assay.methods.serving.ellie_sql.execution import (
    MODES,
    Database,
    Executed,
    Limits,
    result_key,
    same_result,
)
from assay.methods.serving.ellie_sql.functions import FUNCTIONS
from assay.methods.serving.ellie_sql.pipelines import TIERS, Answer, Tier, answer, written_sql
from assay.methods.serving.ellie_sql.routing import (
    ConstantRouter,
    CountRouter,
    PairwiseClassifier,
    Routed,
    TierRouter,
    by_chance,
    cascade_by_failure,
    hashed_words,
    labels,
    nearest_neighbours,
    oracle,
    routed,
    tep,
    tuned_threshold,
)
from assay.methods.serving.ellie_sql.schema import Column, Linked, Schema, link, masked, read_schema
from assay.methods.serving.ellie_sql.scoring import ChannelScorer, Scorer
from assay.methods.serving.ellie_sql.served import ModelRouter, request_features, request_text

__all__ = [
    "Answer",
    "Candidate",
    "ChannelScorer",
    "Column",
    "ConstantRouter",
    "CountRouter",
    "DPORouter",
    "Database",
    "Example",
    "Executed",
    "FUNCTIONS",
    "Library",
    "Limits",
    "Linked",
    "MODES",
    "ModelRouter",
    "PairwiseClassifier",
    "PreferenceClassifier",
    "Routed",
    "Schema",
    "Scorer",
    "TIERS",
    "Tier",
    "TierRouter",
    "abstracted",
    "answer",
    "bindings",
    "by_chance",
    "cascade_by_failure",
    "dpo_loss",
    "hashed_words",
    "labels",
    "link",
    "masked",
    "nearest_neighbours",
    "oracle",
    "preferences",
    "read_schema",
    "request_features",
    "request_text",
    "result_key",
    "routed",
    "router_text",
    "same_result",
    "tep",
    "tuned_threshold",
    "written_sql",
]
