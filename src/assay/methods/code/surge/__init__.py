"""SURGE: can a model predict what a program prints without running it, and what does that cost against running it?

    from assay.workloads.programs.surge import sources

    built = build(sources())                                # every program is run twice in the sandbox
    learned, judged = split(built.items)
    replies = [model(prompt(item, "3-shot", shots_for(item, learned))) for item in judged]
    print(report(judged, scored(judged, replies)))

After arXiv 2502.11167: eight components, 1,160 items there (`COUNTS`). Ours are fewer and made by real execution in Python, C, C++,
JavaScript and SQL; for formal proofs a small checker of our own stands where the paper has Lean. `doc_to_text` and `process_results` are a
task as lm-eval has them. Beside models stand predictors that know nothing of meaning (`BASELINES`), and running the program: `break_even`
says how long it must run before predicting pays. `variant="as_released"` extracts and scores as the released scripts do where that
differs: lists are cut or filled with zeros, and what cannot be read is wrong. Numbers are found in a text in our way in both variants, for
the released reader takes no text around them and no blanks between them. Left out: training on items (the paper's curves over their
number).

When NOT to use it: to compare with the paper's table. The items are not the paper's.
"""

from __future__ import annotations

from assay.methods.code.surge.build import LIMITS, Built, Source, build, command_of
from assay.methods.code.surge.checker import check
from assay.methods.code.surge.extract import bare, extract
from assay.methods.code.surge.items import (
    FORMS,
    SHOTS,
    STOP,
    Form,
    Item,
    as_doc,
    continued,
    doc_to_text,
    of_doc,
    process_results,
    prompt,
    read,
    shots_for,
    split,
    write,
)
from assay.methods.code.surge.predict import BASELINES, Predictor, constant, copied, empty, nearest, strongest, template
from assay.methods.code.surge.report import Cost, Report, break_even, cost, report, scored
from assay.methods.code.surge.scores import (
    COUNTS,
    Score,
    exact,
    formal,
    jaccard,
    monte_carlo,
    numbers,
    numerical,
    ratio,
    rule_of,
    score,
    sorting,
)

__all__ = [
    "BASELINES",
    "COUNTS",
    "FORMS",
    "LIMITS",
    "SHOTS",
    "STOP",
    "Built",
    "Cost",
    "Form",
    "Item",
    "Predictor",
    "Report",
    "Score",
    "Source",
    "as_doc",
    "bare",
    "break_even",
    "build",
    "check",
    "command_of",
    "constant",
    "continued",
    "copied",
    "cost",
    "doc_to_text",
    "empty",
    "exact",
    "extract",
    "formal",
    "jaccard",
    "monte_carlo",
    "nearest",
    "numbers",
    "numerical",
    "of_doc",
    "process_results",
    "prompt",
    "ratio",
    "read",
    "report",
    "rule_of",
    "score",
    "scored",
    "shots_for",
    "sorting",
    "split",
    "strongest",
    "template",
    "write",
]
