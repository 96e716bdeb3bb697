"""EllieSQL: does a small router save the tokens of the advanced pipeline, and keep its accuracy, where questions differ in what they need?

Real SQLite databases (`databases`), questions with gold SQL (`questions`), and three pipelines that a language model of 135 million
parameters really runs for every question (`collecting`). Routers learn, and thresholds are tuned, on questions about three databases;
they are judged on questions in other wordings about other databases, a quarter of them asking for queries that no router saw (`study`).
All tokens are counted, a router's own too, and of a rival's several attempts every candidate once.

How the pipelines weigh the model (`PRIOR`, `SHARP`) was chosen on examples of the library asked of each other. The tiers' sizes, the
router's features and `MOST_LOST` were fixed after a pilot on the questions that routers learn from. The tiers' costs (3, 7 and 12
candidates) and the mix of questions are ours, and how much can be saved follows from them; whether a router can save it does not.
"""

from __future__ import annotations

import math
from typing import Any

from assay.experiments.core import Figure, Guard, Operator, experiment
from assay.experiments.serving.ellie_sql.collecting import collected
from assay.experiments.serving.ellie_sql.questions import NEW_QUERIES, QUERIES
from assay.experiments.serving.ellie_sql.study import CHANCE, LENGTH, MARGIN, SHUFFLED, Study

PAPER_SAVED = 40.0

SIZES: dict[str, dict[str, Any]] = {
    "smoke": {"queries": 6, "new": 2, "wordings": 1, "learnt_of": 1, "judged_of": 1, "debian": False, "zero_shot": 0},
    "small": {
        "queries": len(QUERIES), "new": len(NEW_QUERIES), "wordings": 3, "learnt_of": 1, "judged_of": 2,
        "debian": False, "zero_shot": 6,
    },
    "full": {
        "queries": len(QUERIES), "new": len(NEW_QUERIES), "wordings": 3, "learnt_of": 6, "judged_of": 6,
        "debian": True, "zero_shot": 72,
    },
}  # fmt: skip
POINTS: dict[str, list[dict[str, Any]]] = {scale: [size] for scale, size in SIZES.items()}

ROUTING = Operator(
    "answering questions in SQL by pipelines of different cost",
    free="whichever saves most within the margin of accuracy of: trying in turn (until something is found, or until the model is sure; no "
    "candidate read twice), one cheaper pipeline for all, the advanced one with fewer candidates, the advanced one without a model",
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
        "data": "24 queries to learn from and 8 more to judge by, in written wordings over real tables: no benchmark comes with a package",
        "pipelines": "edits of known examples that SmolLM2-135M chooses from; what it writes itself stands in the details",
        "router": "the paper's cascade, of logistic regressions on hashed words and what retrieval says, threshold tuned: training half a "
        "billion parameters takes a GPU; the loss of DPO stands beside it, of linear scores on words and on what SmolLM2 reads",
    },
    "guard": Guard("execution accuracy (sets of rows)", MARGIN, higher_is_better=True, relative=False),
    "measured_here": "questions from written templates, none with an empty answer, over tables of the standard library, scikit-learn and "
    "SciPy; pipelines that read 3, 7 and 12 candidates with a small model",
    "minutes": 60,
}


@experiment(
    "ellie_sql/token-reduction",
    refuted_if="certainly less than half of the paper's 40 % is saved, or accuracy is certainly lost beyond the margin, or a router that "
    "sees only how long the question is, or one trained on shuffled results, saves as much at no less accuracy",
    refutes=lambda record: (
        record["measured"]["high"] < PAPER_SAVED / 2
        or record["quality"]["high"] < record["quality"]["baseline"] - MARGIN
        or any(
            record["arms"][blind] >= record["measured"]["median"]
            and record["quality"]["controls"][blind] >= record["quality"]["candidate"]
            for blind in (LENGTH, SHUFFLED)
        )
    ),
    **DECLARED,
)
def token_reduction(**point: Any) -> Figure:
    """Per cent of the advanced pipeline's tokens that routing saves, the router's own tokens included (this one reads none).

    The interval resamples queries, each with all its judged questions; a question counts by its mean over routers that learnt from
    different draws of the templates. `free` is the most that a rival saves among those whose accuracy lies within the margin; what a rival
    has to choose, it chooses where routers learn. The guard's controls: `deleted`, everything to basic; `random`, the same shares of
    questions to the tiers by chance, in expectation; `rival`, trying in turn until something is found.
    """
    study = Study(collected(**point))
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
        or record["arms"].get(CHANCE, -math.inf) >= record["measured"]["median"]
    ),
    **DECLARED,
)
def elasticity(**point: Any) -> Figure:
    """The router's token elasticity of performance over that of always taking the advanced pipeline.

    Where the advanced pipeline is no better than basic the ratio means nothing and counts as 0, in resamples too; a resample for which
    an elasticity is undefined (NaN) is left out and counted in the details, and a router that takes what basic takes, which has none,
    counts as 0. A rival that is as accurate with no more tokens counts as no less elastic: the ratio says little of one that takes fewer
    tokens than basic. The pair (accuracy, tokens) stands in the details. Models that read the question are left to the other claim.
    """
    study = Study(collected(**point, reading=False))
    found = study.candidate
    undefined: list[int] = []
    low, high = study.interval(lambda rows: study.elasticity(found, rows), undefined)
    value = study.elasticity(found)
    value = 0.0 if math.isnan(value) else value
    arms = {name: study.elasticity(one) for name, one in study.arms().items()}
    return Figure(
        value,
        "x",
        low=low,
        high=high,
        baseline=1.0,
        free=max([1.0, *(study.rival_elasticity(one) for one in study.rivals.values() if study.within(one))]),
        arms={name: one for name, one in arms.items() if not math.isnan(one)},
        quality=study.quality(),
        trained=study.trained(),
        details={**study.details(), "resamples_without_elasticity": sum(undefined)},
    )
