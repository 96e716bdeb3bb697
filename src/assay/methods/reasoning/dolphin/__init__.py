"""A loop of research over a script that can be run: ideas, experiments with repair, outcomes fed back (Yuan et al.,
2025, arXiv 2501.03916).

    study = Study(embed, baseline=measured_baseline(run, script), higher_is_better=True, journal="study.jsonl")
    research(study, proposer, write, run, repair, loops=3, ideas=10)
    best = confirmed(study, run, seeds=range(100, 105))               # on seeds that no idea has seen

- `ideas`: an idea, and the bank that turns near-copies away before they cost a run.
- `literature`: which documents ideas start from, by relevance to the topic and by the task's attributes; whether an
idea is known already.
- `tracebacks`: what of a traceback is the script's own, and the code around it, as it calls and is called.
- `practice`: running a script, repairing it at most five times.
- `repair`: a repairer by rules, for those who have no model that writes code.
- `loop`: what an outcome is (improved, maintained, declined), the study with its journal, and the loop.
- `by_model`: a proposer and a repairer that ask a `Generator`.

Sources: the paper's abstract and method and the repository's README; the code is not released. Prompts, and what is
marked so, are our choice.
"""

from assay.methods.reasoning.dolphin.by_model import ModelProposer, ModelRepair
from assay.methods.reasoning.dolphin.ideas import Bank, Idea, Seen
from assay.methods.reasoning.dolphin.literature import Document, known_from, ranked, similarity_scorer
from assay.methods.reasoning.dolphin.loop import (
    Baseline,
    Entry,
    Study,
    classify,
    confirmed,
    measured_baseline,
    research,
)
from assay.methods.reasoning.dolphin.practice import Attempt, Outcome, Practice, Request, in_sandbox, practise
from assay.methods.reasoning.dolphin.repair import RuleRepair
from assay.methods.reasoning.dolphin.tracebacks import Failure, Frame, is_library, local_structure, own_frames, parse

__all__ = [
    "Attempt", "Bank", "Baseline", "Document", "Entry", "Failure", "Frame", "Idea", "ModelProposer", "ModelRepair",
    "Outcome", "Practice",
    "Request", "RuleRepair", "Seen", "Study", "classify", "confirmed", "in_sandbox", "is_library", "known_from",
    "local_structure",
    "measured_baseline", "own_frames", "parse", "practise", "ranked", "research", "similarity_scorer",
]  # fmt: skip
