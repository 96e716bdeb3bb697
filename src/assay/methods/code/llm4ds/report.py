"""The questions of the experiment, answered: success against rates, factors, pairs, times, similarity, and how many tasks it would take.

Success is counted by tasks: of several attempts the first counts, and all of them together are looked at by a mixed model. Models are
compared on tasks that all of them tried, times on tasks that all of them solved. Families of tests are adjusted by Holm: all models against
one rate, all models by one factor, all pairs. Several rates are several families: for one model they are nested, so that the lowest
that is not passed ends the matter, but over all models and rates together errors add up a little.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any, Protocol

from assay.measure.stats import Interval
from assay.methods.code.llm4ds.mixed import mixed_logistic
from assay.methods.code.llm4ds.outcomes import Outcome
from assay.methods.core.programs.hypotheses import (
    LEAST_EXPECTED,
    Finding,
    binomial,
    compare_groups,
    equivalent_shares,
    friedman,
    holm,
    independence,
    mcnemar,
    power_of_share,
    tasks_for_share,
    wilson,
)

LEAST_SOLVED = 5
"""Tasks that a model must have solved to take part in the comparison of times, and that all must have solved together; our choice."""
POWER = 0.8


class Tried(Protocol):
    """What a report reads of an experiment: tasks with their levels of each factor, models, and every outcome by model, task, attempt."""

    tasks: dict[str, dict[str, str]]
    models: dict[str, str]
    factors: tuple[str, ...]
    metrics: tuple[str, ...]

    @property
    def outcomes(self) -> tuple[Outcome, ...]: ...


@dataclass(frozen=True)
class Answer:
    """One question about one model, pair or factor. `adjusted` is p by Holm within its family, and decides; `statement` says it in
    words."""

    question: str
    about: str
    finding: Finding
    adjusted: float
    significant: bool
    statement: str


@dataclass(frozen=True)
class Report:
    """What an experiment says. `rates` are the models' success rates with Wilson's intervals, `guards` what a reader must not overlook,
    `power` how many tasks a claim needs."""

    tasks: int
    rates: Mapping[str, Interval]
    answers: tuple[Answer, ...]
    guards: tuple[str, ...]
    power: tuple[str, ...]

    def asked(self, question: str) -> list[Answer]:
        """The answers to one question: "success", "factor", "pairs", "equivalence", "seconds", "similarity", "attempts"."""
        return [answer for answer in self.answers if answer.question == question]

    def statements(self, question: str) -> list[str]:
        """The same in words."""
        return [answer.statement for answer in self.asked(question)]

    def text(self) -> str:
        """All of it in words."""
        lines = [f"{len(self.rates)} models on {self.tasks} tasks"]
        for question, title in QUESTIONS.items():
            if said := self.statements(question):
                lines += ["", title, *(f"  {statement}" for statement in said)]
        for title, further in (("How many tasks it takes", self.power), ("Mind", self.guards)):
            lines += ["", title, *(f"  {statement}" for statement in further)]
        return "\n".join(lines) + "\n"

    def as_dict(self) -> dict[str, Any]:
        """All of it for JSON."""
        return asdict(self)


QUESTIONS = {
    "success": "Is a model's success rate above a given one?",
    "factor": "Does success depend on what kind of task it is?",
    "pairs": "Do two models differ in what they solve?",
    "equivalence": "Are two models as good as each other?",
    "seconds": "Do the times of right programs differ?",
    "similarity": "Do the pictures differ in how like the right ones they are?",
    "attempts": "Do models differ over all attempts?",
}


def made(experiment: Tried, p0: Sequence[float], alpha: float, margin: float, delta: float, seed: int) -> Report:
    """The report on an experiment."""
    first = _first_attempts(experiment)
    models = list(experiment.models)
    common = [task for task in experiment.tasks if all(task in first[model] for model in models)]
    if not common:
        raise ValueError("outcomes must hold a task that every model tried, got none")
    passed = {model: [first[model][task].passed for task in common] for model in models}
    answers = _success(passed, p0, alpha)
    guards = _guards(experiment, first, common, p0)
    for factor in experiment.factors:
        answers += _by_factor(experiment, passed, common, factor, alpha, seed, guards)
    if len(models) > 1:
        answers += _pairs(passed, alpha, margin)
        for metric in ("seconds", "similarity"):
            if metric in experiment.metrics:
                answers += _numbers(first, common, metric, alpha, seed, guards)
        answers += _attempts(experiment, alpha, guards)
    n = len(common)
    rates = {model: wilson(sum(own), n) for model, own in passed.items()}
    return Report(n, rates, tuple(answers), tuple(guards), tuple(_power(n, p0, alpha, delta)))


def _first_attempts(experiment: Tried) -> dict[str, dict[str, Outcome]]:
    found: dict[str, dict[str, Outcome]] = {model: {} for model in experiment.models}
    for one in experiment.outcomes:  # by attempt
        found[one.model].setdefault(one.task, one)
    if missing := [model for model, own in found.items() if not own]:
        raise ValueError(f"outcomes must hold some of every model, got none of {missing[0]!r}")
    return found


# ------------------------------------------------------------------------------------------------------------------- success


def _success(passed: Mapping[str, Sequence[bool]], p0: Sequence[float], alpha: float) -> list[Answer]:
    found = []
    for rate in p0:
        findings = {model: binomial(sum(own), len(own), rate) for model, own in passed.items()}
        adjusted = holm([finding.p for finding in findings.values()])
        for (model, finding), p in zip(findings.items(), adjusted, strict=True):
            above = p <= alpha
            assert finding.low is not None
            assert finding.high is not None
            said = (
                f"{model}: {finding.statistic:.0f} of {finding.n} tasks, {100 * finding.effect:.1f} % (95 % interval "
                f"{100 * finding.low:.1f} to {100 * finding.high:.1f} %), is {'' if above else 'not '}significantly above "
                f"{100 * rate:g} %: {_p(finding.p, p)}."
            )
            found.append(Answer("success", f"{model} above {rate:g}", finding, p, above, said))
    return found


def _by_factor(
    experiment: Tried,
    passed: Mapping[str, Sequence[bool]],
    common: Sequence[str],
    factor: str,
    alpha: float,
    seed: int,
    guards: list[str],
) -> list[Answer]:
    """A test for every model, and one of the tasks: how many models pass those of each level."""
    levels = list(dict.fromkeys(experiment.tasks[task][factor] for task in common))
    if len(levels) < 2:
        return []
    of_level = {
        level: [at for at, task in enumerate(common) if experiment.tasks[task][factor] == level] for level in levels
    }
    if few := [level for level, at in of_level.items() if len(at) < LEAST_EXPECTED]:
        guards.append(
            f"{factor}: {', '.join(few)} has fewer than {LEAST_EXPECTED:g} tasks, which shows next to nothing."
        )
    findings, shares = {}, {}
    for model, own in passed.items():
        counts = [(sum(own[at] for at in some), len(some)) for some in of_level.values()]
        findings[model] = independence([[won, of - won] for won, of in counts], seed=seed)
        shares[model] = ", ".join(f"{level} {won} of {of}" for level, (won, of) in zip(levels, counts, strict=True))
    adjusted = holm([finding.p for finding in findings.values()])
    answers = []
    for (model, finding), p in zip(findings.items(), adjusted, strict=True):
        differs = "depends on" if p <= alpha else "does not significantly depend on"
        if sum(passed[model]) in (0, len(common)):
            said = f"{model}: {'no' if not sum(passed[model]) else 'every'} task is passed, whatever its {factor}."
            answers.append(Answer("factor", f"{model} by {factor}", finding, p, False, said))
            continue
        said = (
            f"{model}: success {differs} {factor} ({shares[model]}): {finding.method}, Cramer's V {finding.effect:.2f}, "
            f"{_p(finding.p, p)}."
        )
        answers.append(Answer("factor", f"{model} by {factor}", finding, p, p <= alpha, said))
    if len(passed) > 1 and all(len(some) >= 3 for some in of_level.values()):
        share = [sum(own[at] for own in passed.values()) / len(passed) for at in range(len(common))]
        groups = {level: [share[at] for at in some] for level, some in of_level.items()}
        overall = compare_groups(groups, alpha=alpha).overall
        differs = "depends on" if overall.p <= alpha else "does not significantly depend on"
        said = f"all models: how many solve a task {differs} {factor}: {overall.method} over tasks, {_p(overall.p)}."
        answers.append(Answer("factor", f"all by {factor}", overall, overall.p, overall.p <= alpha, said))
    return answers


def _pairs(passed: Mapping[str, Sequence[bool]], alpha: float, margin: float) -> list[Answer]:
    pairs = list(combinations(passed, 2))
    answers = []
    differ = [mcnemar(passed[a], passed[b]) for a, b in pairs]
    for (a, b), finding, p in zip(pairs, differ, holm([each.p for each in differ]), strict=True):
        assert finding.low is not None
        assert finding.high is not None
        word = "differ" if p <= alpha else "do not differ significantly"
        said = (
            f"{a} and {b} {word}: {100 * finding.effect:+.1f} points (95 % interval {100 * finding.low:+.1f} to "
            f"{100 * finding.high:+.1f}), {_p(finding.p, p)}."
        )
        answers.append(Answer("pairs", f"{a}, {b}", finding, p, p <= alpha, said))
    equal = [equivalent_shares(passed[a], passed[b], margin) for a, b in pairs]
    for (a, b), finding, p in zip(pairs, equal, holm([each.p for each in equal]), strict=True):
        word = "are" if p <= alpha else "are not shown to be"
        said = f"{a} and {b} {word} within {100 * margin:g} points of each other: {_p(finding.p, p)}."
        answers.append(Answer("equivalence", f"{a}, {b}", finding, p, p <= alpha, said))
    return answers


# ------------------------------------------------------------------------------------------------------------ times, similarity


def _numbers(
    first: Mapping[str, Mapping[str, Outcome]],
    common: Sequence[str],
    metric: str,
    alpha: float,
    seed: int,
    guards: list[str],
) -> list[Answer]:
    """Times of right programs, or similarity of pictures: on the tasks that all have (our choice), and apart, as the paper does."""

    def value(model: str, task: str) -> float | None:
        one = first[model][task]
        found: float | None = getattr(one, metric)
        return found if metric == "similarity" or one.passed else None

    own = {model: {task: x for task in common if (x := value(model, task)) is not None} for model in first}
    if not any(own.values()):
        return []
    enough = {model: values for model, values in own.items() if len(values) >= LEAST_SOLVED}
    if left := [model for model in own if model not in enough]:
        guards.append(f"{metric}: {', '.join(left)} left out, with fewer than {LEAST_SOLVED} tasks to compare.")
    if len(enough) < 2:
        return []
    answers = []
    apart = compare_groups({model: list(values.values()) for model, values in enough.items()}, alpha=alpha).overall
    said = f"apart, each over its own tasks: {_differ(apart.p, alpha)}; {apart.method}, {_p(apart.p)}."
    answers.append(Answer(metric, "apart", apart, apart.p, apart.p <= alpha, said))
    shared = [task for task in common if all(task in values for values in enough.values())]
    if len(shared) < LEAST_SOLVED:
        guards.append(f"{metric}: {len(shared)} tasks that all have, fewer than {LEAST_SOLVED}: not compared on them.")
        return answers
    guards.append(
        f"{metric}: compared on the {len(shared)} of {len(common)} tasks that all have, which are no random ones."
    )
    seen = friedman({model: [values[task] for task in shared] for model, values in enough.items()}, seed=seed)
    overall = seen.overall
    said = (
        f"on the same {len(shared)} tasks: {_differ(overall.p, alpha)}; {overall.method}, "
        f"Kendall's W {overall.effect:.2f}, {_p(overall.p)}."
    )
    answers.append(Answer(metric, "same tasks", overall, overall.p, overall.p <= alpha, said))
    for pair in seen.pairs:
        more = "higher" if pair.z > 0 else "lower"
        word = f"is {more}" if pair.adjusted <= alpha else f"is not significantly {more}"
        said = f"{pair.first} {word} than {pair.second}: {_p(pair.p, pair.adjusted)}."
        finding = Finding("mean ranks", pair.p, pair.z, len(shared), pair.z, "z")
        about = f"{pair.first}, {pair.second}"
        answers.append(Answer(metric, about, finding, pair.adjusted, pair.adjusted <= alpha, said))
    return answers


def _differ(p: float, alpha: float) -> str:
    return "they differ" if p <= alpha else "no significant difference"


def _attempts(experiment: Tried, alpha: float, guards: list[str]) -> list[Answer]:
    """The mixed model, where there are several attempts."""
    if all(one.attempt == 1 for one in experiment.outcomes):
        return []
    counts: dict[str, dict[str, tuple[int, int]]] = {model: {} for model in experiment.models}
    for one in experiment.outcomes:
        won, of = counts[one.model].get(one.task, (0, 0))
        counts[one.model][one.task] = won + one.passed, of + 1
    extreme = [
        model
        for model, own in counts.items()
        if sum(won for won, _ in own.values()) in (0, sum(of for _, of in own.values()))
    ]
    if extreme:
        guards.append(f"attempts: {', '.join(extreme)} left out of the mixed model, with all or no attempts passed.")
    rest = {model: own for model, own in counts.items() if model not in extreme}
    if len(rest) < 2:
        return []
    found = mixed_logistic(rest)
    rates = ", ".join(f"{model} {100 * rate:.1f} %" for model, rate in found.rates.items())
    said = (
        f"over all attempts, tasks differing by {found.spread:.1f} in log-odds ({rates}): "
        f"{_differ(found.finding.p, alpha)}; {_p(found.finding.p)}."
    )
    return [Answer("attempts", "all", found.finding, found.finding.p, found.finding.p <= alpha, said)]


# --------------------------------------------------------------------------------------------------------------- what to mind


def _guards(
    experiment: Tried, first: Mapping[str, Mapping[str, Outcome]], common: Sequence[str], p0: Sequence[float]
) -> list[str]:
    found = [
        f"The rates tested against ({', '.join(f'{100 * rate:g} %' for rate in p0)}) are conventions: none is what guessing gives.",
        "No significant difference is no equality: see the test for equivalence.",
        "Outcomes do not tell whether a model had seen the tasks, or their solutions, before.",
    ]
    if n := len(experiment.tasks) - len(common):
        found.append(f"{n} of {len(experiment.tasks)} tasks were not tried by every model and are left out.")
    attempts = Counter((one.model, one.task) for one in experiment.outcomes)
    if len(set(attempts.values())) > 1:
        low, high = min(attempts.values()), max(attempts.values())
        found.append(
            f"Models or tasks had {low} to {high} attempts: nothing but the first attempts is compared by tasks."
        )
    elif max(attempts.values()) > 1:
        found.append(
            "Several attempts a task: tests by tasks count the first; attempts at one task are not independent."
        )
    else:
        found.append(
            "One attempt a task: how a model varies from attempt to attempt is not told from how tasks differ."
        )
    if unnamed := [model for model, version in experiment.models.items() if not version]:
        found.append(
            f"No version or date is recorded for {', '.join(unnamed)}: models that change cannot be tried again."
        )
    if len(first) > 1:
        found.append(f"{len(first)} models: p-values are adjusted by Holm, and the adjusted ones decide.")
        if len(p0) > 1:
            found.append(
                f"{len(p0)} rates: each is a family of tests of its own; over all of them errors add up a little."
            )
    return found


def _power(n: int, p0: Sequence[float], alpha: float, delta: float) -> list[str]:
    """For each rate, what these tasks can show, and how many would show a difference of `delta`."""
    found = []
    for rate in p0:
        told = next(
            (p for p in range(1, 101) if p / 100 > rate and power_of_share(n, rate, p / 100, alpha=alpha) >= POWER),
            None,
        )
        here = (
            f"{n} tasks tell {told} % from {100 * rate:g} %"
            if told
            else f"{n} tasks tell no rate from {100 * rate:g} %"
        )
        more = ""
        if rate + delta < 1:
            needed = tasks_for_share(rate, rate + delta, alpha=alpha, power=POWER)
            more = f"; {100 * (rate + delta):g} % takes {needed} tasks"
        found.append(f"With {POWER:.0%} power and before adjustment, {here}{more}.")
    return found


def _p(p: float, adjusted: float | None = None) -> str:
    def small(value: float) -> str:
        return "< 0.001" if value < 0.001 else f"= {value:.3f}"

    return f"p {small(p)}" + ("" if adjusted is None else f", adjusted {small(adjusted).removeprefix('= ')}")
