"""EvalPerf: how efficient is a program, among right programs of known cost, on an input large enough to tell them apart?

After "Evaluating Language Models for Efficient Code Generation" (2024). Tests of correctness are too small to show what a program costs,
and a mean speed-up is ruled by the few tasks with a large gap. So a task gets one input of its own, and a score that is a place among
references:

    found = sample_inputs([from_generator(generate)], reference, valid)      # scales 2, 4, 8, ... until something gives up
    best = choose_input(costs_of_canonical, all_finish)                      # the dearest one on which every right program finishes
    suits = suitability(profiles)                                            # is the task worth keeping?
    levels = references(costs)                                               # right programs in clusters, slowest first, scored 0 to 100
    place(cost, levels).dps                                                  # the share of the right programs that are no faster

`curate` does all of it for one task, `score_task` and `score_model` score samples. Programs are never run here: whoever calls says how
(`run`), so that the same formulas serve every meter. Costs of different meters or machines do not compare; measure references and
samples together.

The paper counts retired instructions, once each, and so does the released code. Its settings are the defaults. Two of them differ between
the paper and the released scorer: `PROTOCOLS`. In the filter of tasks clusters split at 0.2, among the references of a score at 0.1.
When NOT to use it: for tasks of few right programs, whose clusters say little; for programs whose cost is not in the call (imports,
input and output); and to compare two programs with one another, for which their costs are there: the score only says where each stands.
"""

from __future__ import annotations

from assay.methods.code.evalperf.clustering import (
    FILTER_SPLIT,
    NOISE,
    REFERENCE_SPLIT,
    Filters,
    Reference,
    Suitability,
    clusters,
    measured_anew,
    percentile,
    references,
    suitability,
)
from assay.methods.code.evalperf.curation import Curated, Outcome, Run, curate, profiles_on
from assay.methods.code.evalperf.inputs import (
    Args,
    Sampled,
    Stops,
    Synthesiser,
    SynthesiserError,
    as_args,
    choose_input,
    deep_size,
    from_generator,
    sample_input,
    sample_inputs,
    timed,
    within_64_bits,
)
from assay.methods.code.evalperf.scores import (
    PROTOCOLS,
    ModelScore,
    Place,
    ProtocolName,
    ScoringProtocol,
    TaskScore,
    common_tasks,
    place,
    score_model,
    score_task,
)

__all__ = [
    "Args",
    "Curated",
    "FILTER_SPLIT",
    "Filters",
    "ModelScore",
    "NOISE",
    "Outcome",
    "PROTOCOLS",
    "Place",
    "ProtocolName",
    "REFERENCE_SPLIT",
    "Reference",
    "Run",
    "Sampled",
    "ScoringProtocol",
    "Stops",
    "Suitability",
    "Synthesiser",
    "SynthesiserError",
    "TaskScore",
    "as_args",
    "choose_input",
    "clusters",
    "common_tasks",
    "curate",
    "deep_size",
    "from_generator",
    "measured_anew",
    "percentile",
    "place",
    "profiles_on",
    "references",
    "sample_input",
    "sample_inputs",
    "score_model",
    "score_task",
    "suitability",
    "timed",
    "within_64_bits",
]
