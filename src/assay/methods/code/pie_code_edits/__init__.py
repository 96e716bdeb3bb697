"""PIE: from an archive of submissions to a model that rewrites slow programs into faster ones, and what k of its samples are worth.

After "Learning Performance-Improving Code Edits" (ICLR 2024, arXiv 2302.07867). Whoever hands in a right program for a problem, and
later a faster right one, has shown an edit. From such pairs a model learns to rewrite programs: it is trained on them with the decile of
speed that each target reached and asked for the best one (`training_records`, `prompt`), or shown the most similar ones (`Index`). Of k
samples the fastest right one counts, and the program that was there where none is.

    pairs = build_pairs(submissions)                                       # same author, same problem, later, > 10 % faster
    problems = split_by_problem({pair.problem for pair in pairs}, {"train": 0.9, "test": 0.1})
    train = tagged([pair for pair in pairs if pair.problem in problems["train"]], submissions)
    write_records(path, training_records(train))                           # for trl and peft
    question = prompt(program, examples=Index(train).nearest(program))     # for a model that was not trained
    edits = EditTask(program, tests).edits(samples, sandbox)               # compiled, run in the sandbox, judged outside
    scores([edits], k=8)

Costs are of any one meter: instructions as callgrind counts them repeat (the paper simulates a processor for this), seconds do not.

When NOT to use it: with tests that wrong programs pass (the fastest program is then one that leaves something out); with pairs split at
random, for problems in both splits hand out answers; and to compare means of speed-ups between sets of programs, for they follow from the
sizes of the inputs.
"""

from assay.methods.code.pie_code_edits.pairs import (
    Pair,
    Submission,
    build_pairs,
    high_quality,
    performance_tags,
    split_by_problem,
    tagged,
)
from assay.methods.code.pie_code_edits.prompts import AS_RELEASED, prompt, training_records, write_records
from assay.methods.code.pie_code_edits.retrieval import Embed, Index, token_vectors
from assay.methods.code.pie_code_edits.scores import (
    Edits,
    Scores,
    best_at_k,
    correct_at_k,
    opt_rate,
    runtime_best_at_k,
    scores,
    speedup_best_at_k,
)
from assay.methods.code.pie_code_edits.selfplay import distinct, self_play_pairs
from assay.methods.code.pie_code_edits.tasks import FLAGS, EditTask, Found, Test, TooCheap, accuracy

__all__ = [
    "AS_RELEASED",
    "FLAGS",
    "EditTask",
    "Edits",
    "Embed",
    "Found",
    "Index",
    "Pair",
    "Scores",
    "Submission",
    "Test",
    "TooCheap",
    "accuracy",
    "best_at_k",
    "build_pairs",
    "correct_at_k",
    "distinct",
    "high_quality",
    "opt_rate",
    "performance_tags",
    "prompt",
    "runtime_best_at_k",
    "scores",
    "self_play_pairs",
    "speedup_best_at_k",
    "split_by_problem",
    "tagged",
    "token_vectors",
    "training_records",
    "write_records",
]
