"""LLM4DS: a controlled experiment on data-science code, with hypothesis tests in the place of bare percentages.

    from assay.workloads.programs.datascience import HARNESS, load

    tasks = load(installed=True)
    outcomes = tried(tasks, [Retrieval(tasks), TableRules()], Sandboxed(HARNESS.read_text()))
    experiment = Experiment({task.id: {"kind": task.kind, "level": task.level} for task in tasks}, ["nearest solution", "table rules"])
    experiment.record(outcomes)
    print(experiment.report(p0=[0.5, 0.6, 0.7]).text())

After arXiv 2411.11908: four assistants, a hundred problems by kind and difficulty, one prompt a kind, success against 50, 60 and 70
%, and the effects of kind and difficulty. The paper's tests are the default: one-sided binomial (exact here), chi-square,
Shapiro-Wilk with Kruskal-Wallis and Dunn. Ours beside them: Holm over models, McNemar and Friedman on the same tasks, equivalence,
power, and a mixed model for several attempts. `read` takes anybody's outcomes from JSON lines.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from assay.methods.code.llm4ds.contestants import (
    Contestant,
    Retrieval,
    TableRules,
    Writer,
    program_of,
    programs_of,
    prompt_of,
)
from assay.methods.code.llm4ds.judging import Question, Ran, Runner, Sandboxed, Verdict, judge
from assay.methods.code.llm4ds.mixed import Mixed, mixed_logistic
from assay.methods.code.llm4ds.outcomes import Outcome
from assay.methods.code.llm4ds.report import Answer, Report
from assay.methods.code.llm4ds.study import Experiment, read

__all__ = [
    "Answer",
    "Contestant",
    "Experiment",
    "Mixed",
    "Outcome",
    "Question",
    "Ran",
    "Report",
    "Retrieval",
    "Runner",
    "Sandboxed",
    "TableRules",
    "Verdict",
    "Writer",
    "judge",
    "mixed_logistic",
    "program_of",
    "programs_of",
    "prompt_of",
    "read",
    "tried",
]

Similarity = Callable[[Sequence[Sequence[int]], Sequence[Sequence[int]]], float]


def tried(
    tasks: Sequence[Question],
    contestants: Sequence[Contestant],
    run: Runner,
    *,
    seed: int = 0,
    similarity: Similarity | None = None,
) -> list[Outcome]:
    """One attempt of every contestant at every task, run and judged. With `similarity` pictures are compared with the solution's.

    A plot that was not drawn has no similarity. Raises ValueError for contestants of one name.
    """
    names = [contestant.name for contestant in contestants]
    if len(set(names)) != len(names):
        raise ValueError(f"contestants must have different names, got {names}")
    right: Mapping[str, Verdict] = {}
    if similarity is not None:
        drawn = [task for task in tasks if task.kind == "visualization"]
        right = judge(drawn, {task.id: task.solution for task in drawn}, run, seed=seed)
    found = []
    for contestant in contestants:
        verdicts = judge(tasks, programs_of(contestant, tasks), run, seed=seed)
        for task in tasks:
            one, model = verdicts[task.id], right.get(task.id)
            alike = None if similarity is None or model is None else _alike(one.picture, model.picture, similarity)
            factors = {"kind": task.kind, "level": task.level}
            seconds = one.seconds if one.passed and one.seconds else None
            found.append(Outcome(task.id, contestant.name, one.passed, 1, seconds, alike, factors))
    return found


def _alike(one: Any, other: Any, similarity: Similarity) -> float | None:
    """How alike two pictures are; None where there are not two of one size, for a program may send anything."""
    if not isinstance(one, list) or not isinstance(other, list) or not one or len(one) != len(other):
        return None
    widths = {len(row) if isinstance(row, list) else -1 for row in (*one, *other)}
    numbers = all(type(x) is int and 0 <= x <= 255 for row in one if isinstance(row, list) for x in row)
    return similarity(one, other) if len(widths) == 1 and -1 not in widths and numbers else None
