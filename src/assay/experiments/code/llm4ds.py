"""LLM4DS: are four assistants significantly above 50 % on a hundred data-science tasks, and what do contestants that run here show?

The assistants are products behind a network, and have changed since. So the claim's tests are taken anew on the success rates that
the paper reports: the exact binomial test in the place of an approximation, adjusted by Holm because four are tested at once. How
sure the count of four is follows from drawing the same experiment again with these rates. Beside it the whole protocol is run on
the bank of tasks with contestants that run offline: the solution of the most similar task, rules for tables, and SmolLM2-135M.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from assay.errors import MissingError
from assay.experiments.core import Figure, Operator, experiment
from assay.experiments.reasoning import samples
from assay.methods.code import llm4ds as room
from assay.methods.core.programs import hypotheses
from assay.methods.core.reasoning.generator import Sampling
from assay.methods.core.sandbox import SandboxMissing
from assay.workloads.programs.datascience import HARNESS, load, similarity

MODEL = "smollm2-135m"
TASKS = 100
PUBLISHED = {
    "ChatGPT (o1-preview)": 72, "Claude (3.5 Sonnet)": 70, "Perplexity (Llama-3.1-70B)": 66, "Copilot (GPT-4 Turbo)": 60,
}  # fmt: skip
"""Of a hundred tasks, as the paper reports them."""
RATES = (0.5, 0.6, 0.7)
ALPHA = 0.05
GREEDY = Sampling(temperature=0.0, max_new_tokens=224, stop=("\n```\n",))  # to where the code ends


# ------------------------------------------------------------------------------------------------------ the published rates


def above(
    counts: Sequence[int], n: int, p0: float, *, correction: str = "holm", known: dict[int, float] | None = None
) -> list[bool]:
    """Which of several success rates lie significantly above `p0`. `known` keeps p-values by count from call to call."""
    known = {} if known is None else known
    for count in set(counts) - set(known):
        known[count] = hypotheses.binomial(count, n, p0).p
    p = [known[count] for count in counts]
    return [each <= ALPHA for each in (hypotheses.holm(p) if correction == "holm" else p)]


def again(counts: Sequence[int], n: int, p0: float, repetitions: int, *, correction: str, seed: int = 0) -> np.ndarray:
    """How many are above `p0` when the experiment is repeated with these rates, independently, so many times."""
    drawn = np.random.default_rng(seed).binomial(n, np.array(counts) / n, size=(repetitions, len(counts)))
    known: dict[int, float] = {}
    return np.array([sum(above(row, n, p0, correction=correction, known=known)) for row in drawn.tolist()])


def retested(counts: Mapping[str, int], n: int) -> dict[str, Any]:
    """Every published rate against every threshold: the exact p-value, adjusted, and by the normal approximation."""
    found: dict[str, Any] = {}
    for p0 in RATES:
        exact = [hypotheses.binomial(count, n, p0).p for count in counts.values()]
        normal = [hypotheses.binomial(count, n, p0, method="normal").p for count in counts.values()]
        found[f"above {p0:.0%}"] = {
            "exact": dict(zip(counts, exact, strict=True)),
            "adjusted by Holm": dict(zip(counts, hypotheses.holm(exact), strict=True)),
            "normal": dict(zip(counts, normal, strict=True)),
            "significant": sum(p <= ALPHA for p in exact),
            "significant after Holm": sum(p <= ALPHA for p in hypotheses.holm(exact)),
        }
    found["rates"] = {
        name: {"rate": seen.median, "low": seen.low, "high": seen.high}
        for name, seen in ((name, hypotheses.wilson(count, n)) for name, count in counts.items())
    }
    found["tasks to tell 70 from 60 %"] = hypotheses.tasks_for_share(0.6, 0.7)
    found["tasks to tell 72 from 70 %"] = hypotheses.tasks_for_share(0.7, 0.72)
    return found


# ------------------------------------------------------------------------------------------------- contestants that run here


def chat(asked: str) -> str:
    """A question in the form that the model was tuned on."""
    return f"<|im_start|>user\n{asked}<|im_end|>\n<|im_start|>assistant\n"


def reply(asked: Sequence[str]) -> list[str]:
    """SmolLM2's answers at temperature 0: those checked in, kept by this machine, or drawn."""
    found = samples.generator(MODEL, "llm4ds")([chat(text) for text in asked], GREEDY)
    return [sample.text for (sample,) in found]


def draw() -> dict[str, samples.Kept]:
    """Ask the model for all tasks, so that what it says can be kept in a file."""
    kept = samples.generator(MODEL, "llm4ds")
    kept([chat(room.prompt_of(task)) for task in load()], GREEDY)
    return {MODEL: kept}


def contestants(tasks: Sequence[room.Question]) -> list[room.Contestant]:
    """Who takes part; of the model only where it, or what it said, is there."""
    found: list[room.Contestant] = [room.Retrieval(tasks), room.TableRules()]
    asked = [room.prompt_of(task) for task in tasks]
    try:
        said = dict(zip(asked, reply(asked), strict=True))
    except MissingError:
        return found
    return [*found, room.Writer(lambda prompts: [said[prompt] for prompt in prompts], MODEL)]


def run_here() -> room.Report | str:
    """The protocol with contestants that run here, or why it was not run."""
    tasks = load(installed=True)
    try:
        runner = room.Sandboxed(HARNESS.read_text(encoding="utf-8"))
    except SandboxMissing as missing:
        return str(missing)
    who = contestants(tasks)
    study = room.Experiment(
        {task.id: {"kind": task.kind, "level": task.level} for task in tasks},
        {one.name: "a program of this repository" if one.name != MODEL else "135M, Q4_1, greedy" for one in who},
    )
    study.record(room.tried(tasks, who, runner, similarity=similarity))
    return study.report(RATES)


# ---------------------------------------------------------------------------------------------------------------- experiment


@experiment(
    "llm4ds/above-baseline",
    points={
        "smoke": [{"p0": 0.5, "correction": "holm", "repetitions": 200, "contestants_here": False}],
        "small": [{"p0": 0.5, "correction": "holm", "repetitions": 20_000, "contestants_here": True}],
        "full": [{"p0": 0.5, "correction": "holm", "repetitions": 200_000, "contestants_here": True}],
    },
    operator=Operator(
        "telling the success rates of assistants from a threshold", free="reading the bare percentages, without a test"
    ),
    paper={"p0": 0.5, "correction": "none", "assistants": "four products, asked in 2024"},
    departures={
        "correction": "Holm over the four: at 5 % each, four tests err more often than 5 % together",
        "assistants": "they are not asked again: their success rates are those that the paper reports",
    },
    refuted_if="by the exact test, adjusted by Holm, fewer than all four of the published success rates are above 50 %",
    refutes=lambda record: record["measured"]["median"] < len(PUBLISHED),
    measured_here="the paper's own success rates, tested anew; low and high are of the same experiment repeated at these rates",
    computed="the exact test is taken on success rates that the paper reports; the assistants themselves are not asked again",
)
def above_baseline(p0: float, correction: str, repetitions: int, contestants_here: bool) -> Figure:
    """How many published rates are above `p0`; the same for rates at `p0` itself, and for the bare percentages."""
    counts = list(PUBLISHED.values())
    value = sum(above(counts, TASKS, p0, correction=correction))
    repeated = again(counts, TASKS, p0, repetitions, correction=correction)
    by_chance = again([round(p0 * TASKS)] * len(counts), TASKS, p0, repetitions, correction=correction, seed=1)
    low, high = np.quantile(repeated, [0.025, 0.975])
    details: dict[str, Any] = {
        "published": PUBLISHED,
        "tests": retested(PUBLISHED, TASKS),
        "all four again, if repeated": float((repeated == len(counts)).mean()),
        "any above by chance, all at the threshold": float((by_chance > 0).mean()),
    }
    arms = {}
    if contestants_here:
        report = run_here()
        if isinstance(report, str):
            details["contestants here"] = report
        else:
            details["contestants here"] = report.as_dict()
            details["contestants here, in words"] = report.text()
            arms["contestants that run here"] = float(
                sum(answer.significant for answer in report.asked("success") if answer.about.endswith(f"above {p0:g}"))
            )
    return Figure(
        float(value),
        "models",
        min(float(low), float(value)),
        max(float(high), float(value)),
        baseline=float(by_chance.mean()),
        controls={
            "deleted": 0.0,  # without a test nothing is significant
            "random": float(by_chance.mean()),
            "rival": float(sum(count / TASKS > p0 for count in counts)),
        },
        arms=arms,
        details=details,
    )
