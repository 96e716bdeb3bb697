"""Plan and Budget (arXiv 2505.16122): split a question into parts, and give each a share of a token budget that decays with its place.

    solver = PlanAndBudget(generator, ModelPlanner(generator, ask), ask)
    solved = solver.solve(["Ann buys 3 pens for 2 dollars each and a cup for 4 dollars. What does she pay?"])

- `budgets`: the split among parts (`allocate`), the split that the budget model calls best (`bam_allocate`), and the score `e3`.
- `plans`: plans by a model (`ModelPlanner`) or by a rule (`RulePlanner`), and what they cost.
- `controller`: `PlanAndBudget`, over a model here or any OpenAI-compatible server (`core.reasoning.HttpGenerator`).
- `caps`: the same caps inside `generate` of transformers, as a logits processor.

Source: the paper's budget model and E3, and the released code (junhongmit/P-and-B) for schedules, totals and the flow of calls. The
prompts are our own. Published totals leave planning out; here it is booked.

When NOT to use it: with models whose answers are short, and where one cap for all (a limit on new tokens, chosen on other questions)
does as well, which costs no plan.
"""

from assay.methods.reasoning.plan_and_budget.budgets import (
    LEVEL_TOKENS,
    SCHEDULES,
    Schedule,
    Uncertainty,
    allocate,
    bam_allocate,
    decay,
    e3,
    fit_uncertainty,
)
from assay.methods.reasoning.plan_and_budget.caps import PartCaps
from assay.methods.reasoning.plan_and_budget.controller import Mode, PlanAndBudget, Solved, part_sampling, request
from assay.methods.reasoning.plan_and_budget.plans import (
    ModelPlanner,
    Plan,
    Planner,
    RulePlanner,
    parse_assessment,
    parse_plan,
    prompt_tokens,
)

__all__ = [
    "LEVEL_TOKENS",
    "SCHEDULES",
    "Mode",
    "ModelPlanner",
    "PartCaps",
    "Plan",
    "PlanAndBudget",
    "Planner",
    "RulePlanner",
    "Schedule",
    "Solved",
    "Uncertainty",
    "allocate",
    "bam_allocate",
    "decay",
    "e3",
    "fit_uncertainty",
    "parse_assessment",
    "parse_plan",
    "part_sampling",
    "prompt_tokens",
    "request",
]
