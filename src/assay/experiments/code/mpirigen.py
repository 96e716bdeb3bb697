"""MPIrigen: are calls of MPI written in the right place, and is that the model's doing?

The authors published what their model answered for 1,000 of their test programs. Those answers are scored anew, beside what needs no model:
a template of the four calls that every program has, the calls of the nearest program, chance, a call after every line. These learn from
the other 323 test programs, but for near-copies of judged ones. GPT-3.5's figures are those of the authors' tables, and of another measure:
it wrote whole programs anew, whose lines were compared by their numbers, so that a line more or less moves every call behind it.

What the format is worth is asked of a small model that is trained here, no language model: it decides after every line which call follows,
once with the whole program in view, once with the lines so far, at equal examples and steps. A second corpus are the programs of Debian's
source packages, where no answers of the paper's model are, and this small model stands in its place.

All corpora but assay's own 26 programs are fetched by the user: `assay.workloads.programs.mpi.commands()`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import numpy as np

from assay.experiments.code import mpirigen_model as small
from assay.experiments.code import mpirigen_programs as programs
from assay.experiments.core import Figure, Operator, Trained, experiment
from assay.experiments.rates import chosen
from assay.methods.code import mpirigen as room
from assay.methods.code.mpirigen import Call, Placed, Score, Stripped
from assay.methods.core.programs.estimates import interval
from assay.workloads.programs import mpi

SMALL = 5
"""Calls of a small program, at most: where the authors' curves reach 0.8 for the first time."""
TOLERANCE = 2
SEEDS = (0, 1, 2)
DRAWS = 1000
PUBLISHED_GPT = {SMALL: (0.5387, 0.6592, 0.8125), None: (0.5335, 0.5538, 0.8018)}
"""Location, function and arguments of GPT-3.5 in the authors' tables, tolerance 2, by the most calls of a program."""
PAPER = {"corpus": "released", "calls": SMALL, "tolerance": TOLERANCE}
DEPARTURES = {
    "baseline": "GPT-3.5's figures are those of the authors' tables, by their scorers: it wrote whole programs anew, whose lines "
    "were compared by number, and its arguments are of its own hits; on Debian's programs the small model that sees the lines so far "
    "stands there",
    "scorer": "ours, which takes the best prediction near a call, whatever its index at the line: by the authors' own their answers "
    "have up to 0.06 less in place and function (both are in the details)",
    "copies": "rivals learn from no near-copy of a judged program; whether the paper's model did is not known",
}
Answers = list[list[Placed]]


@dataclass(frozen=True)
class Judged:
    """Programs with their true calls, and what every arm puts there instead; `models` by format, the answers of each seed."""

    learned: list[Stripped]
    programs: list[Stripped]
    arms: dict[str, Answers]
    models: dict[str, list[Answers]]
    makers: dict[str, room.Annotator]
    counts: dict[str, Any]


@cache
def judged(corpus: str, calls: int | None, training: bool) -> Judged:
    """The judged programs with at most so many calls, and all arms on them; the small models too, if they are to be trained."""
    found = programs.parts(corpus)
    kept = [at for at, one in enumerate(found.judged) if calls is None or len(one.calls) <= calls]
    counts: dict[str, Any] = dict(found.counts)
    models: dict[str, list[Answers]] = {}
    makers: dict[str, room.Annotator] = {
        "template": room.Template(found.learned),
        "nearest program": room.Nearest(found.learned),
        "random": room.at_random(found.learned),
        "nothing": room.nothing,
        "eight calls after every line": room.everywhere(found.learned),
        "frame": frame,
    }
    of = [found.judged[at] for at in kept]
    if corpus == "released":
        models["paper"] = [[room.placed(room.read(found.answers[at])) for at in kept]]
    if training:
        size = small.Size() if corpus != "own" else small.Size(epochs=1)
        for form, made in small.models(found.learned, size, SEEDS).items():
            models[form] = [[room.placed(one.answer(each.code, form)) for each in of] for one, _ in made]
            makers[form] = partial(made[0][0].answer, form=form)
            counts[f"examples learned from, {form}"] = made[0][1]
    arms = {name: [room.placed(make(one.code)) for one in of] for name, make in makers.items() if name not in models}
    counts |= {
        "learned": len(found.learned),
        "judged": len(of),
        "calls of the judged": sum(len(one.calls) for one in of),
    }
    return Judged(found.learned, of, arms, models, makers, counts)


def frame(code: Sequence[str]) -> list[room.Item]:
    """MPI_Init at the top of main and MPI_Finalize at its end."""
    at = room.anchors(code)
    places = [("top of main", "MPI_Init(&argc, &argv);"), ("end of main", "MPI_Finalize();")]
    return room.numbered_items([(at[name], text) for name, text in places if name in at])


@cache
def bank() -> dict[str, Stripped]:
    """assay's own programs, without their calls."""
    return {name: room.take_out(text) for name, text in mpi.own().items()}


def scored(found: Judged, answers: Answers, tolerance: int) -> list[Score]:
    """Every program's score."""
    return [
        room.score(one.calls, answer, tolerance=tolerance) for one, answer in zip(found.programs, answers, strict=True)
    ]


# ----------------------------------------------------------------------------------------------- place and function, in one figure


def both(scores: Sequence[Score]) -> float:
    """The smaller of the two accuracies: both are about 0.8, so this is. Programs without a hit have no function, as in the paper."""
    functions = [one.function for one in scores if one.function is not None]
    return float(min(np.mean([one.location for one in scores]), np.mean(functions))) if functions else 0.0


def over_runs(runs: Sequence[Sequence[Score]], value: Callable[[Sequence[Score]], float]) -> tuple[float, float, float]:
    """The mean over seeds of a figure over programs, and its interval: programs are drawn again, with the runs of all seeds."""

    def statistic(rows: Sequence[Sequence[Score]]) -> float:
        return float(np.mean([value(run) for run in zip(*rows, strict=True)]))

    rows = list(zip(*runs, strict=True))
    low, high = interval(rows, statistic, draws=DRAWS)
    return statistic(rows), low, high


def summary(scores: Sequence[Score]) -> dict[str, float | None]:
    """All figures of an arm, rounded."""
    return {name: _rounded(value) for name, value in room.over_programs(scores).items()}


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def trained(found: Judged, tolerance: int, value: Callable[[Sequence[Score]], float]) -> dict[str, Trained]:
    """The models trained here, over chance: MPI_Finalize at main's end would be no floor for who does not see that it is the end."""
    floor = value(scored(found, found.arms["random"], tolerance))
    marks: dict[str, Trained] = {}
    for form in small.FORMS:
        runs, rate = found.models[form], chosen(small.SEARCH, form)
        of_seeds = [value(scored(found, answers, tolerance)) for answers in runs]
        marks[form] = Trained(of_seeds, floor, "known calls at random places", rate.rate, rate.rates, True, 1.0)
    return marks


OPERATOR = Operator(
    "putting calls of MPI into a program",
    free="counting in known programs: the calls that half of them have, each at its usual place, with the usual arguments among the "
    "program's names",
)
POINTS: dict[str, list[dict[str, Any]]] = {
    "smoke": [{"corpus": "own", "calls": None, "tolerance": TOLERANCE}],
    "small": [
        {"corpus": "released", "calls": SMALL, "tolerance": TOLERANCE},
        {"corpus": "released", "calls": None, "tolerance": TOLERANCE},
        {"corpus": "debian", "calls": None, "tolerance": TOLERANCE},
    ],
    "full": [
        {"corpus": corpus, "calls": calls, "tolerance": tolerance}
        for corpus in ("released", "debian")
        for calls in (SMALL, None)
        for tolerance in room.TOLERANCES
    ],
}
DECIDES = {"small": PAPER, "full": PAPER}


@experiment(
    "mpirigen/location-accuracy",
    points=POINTS,
    decides=DECIDES,
    operator=OPERATOR,
    paper=PAPER,
    departures=DEPARTURES,
    refuted_if="the smaller of the accuracies of location and function lies below GPT-3.5's, programs drawn again: the whole interval",
    measured_here=(
        "the smaller of the accuracies of location and function of the authors' published answers, scored anew on 1,000 of their test "
        "programs (those of at most 5 calls decide); on Debian's programs, a small model trained here that sees the whole program"
    ),
    minutes=30,
    memory_gib=6,
)
def location_accuracy(corpus: str, calls: int | None, tolerance: int) -> Figure:
    """The paper's model, or one trained here, against counting; nothing, chance and the nearest program are the controls."""
    # training takes a minute for the small programs, and answering several for all
    found = judged(corpus, calls, corpus != "released" or calls is not None)
    method = "paper" if corpus == "released" else "whole program"
    runs = [scored(found, answers, tolerance) for answers in found.models[method]]
    value, low, high = over_runs(runs, both)
    arms = {name: scored(found, answers, tolerance) for name, answers in found.arms.items()}
    so_far = [scored(found, answers, tolerance) for answers in found.models.get("left to right", [])]
    if corpus == "released":
        baseline = min(PUBLISHED_GPT[calls][:2]) if tolerance == TOLERANCE and calls in PUBLISHED_GPT else None
    else:
        baseline = float(np.mean([both(run) for run in so_far]))
    details: dict[str, Any] = {
        **found.counts,
        "scores by arm": {name: summary(scores) for name, scores in arms.items()}
        | {
            f"{form}, seed {seed}": summary(scored(found, one, tolerance))
            for form, each in found.models.items()
            for seed, one in enumerate(each)
        },
        "scores of the common core": core_summary(found, tolerance),
        "method less others, the same programs drawn again": {
            name: [round(each, 4) for each in paired(runs, arms[name])] for name in ("template", "nearest program")
        },
        "curve by the most calls of a program": curves(found, method, tolerance),
    }
    if corpus == "released":
        details["by the released scorer: location, function, arguments"] = as_released(calls)
        if tolerance == TOLERANCE and calls in PUBLISHED_GPT:
            details["GPT-3.5, by the authors' tables: location, function, arguments"] = PUBLISHED_GPT[calls]
    if so_far:
        whole = [scored(found, answers, tolerance) for answers in found.models["whole program"]]
        details["whole program less left to right, by seed"] = apart(whole, so_far, both)
        details["the same of F1, one to one"] = apart(
            whole, so_far, lambda scores: float(np.mean([one.f1 for one in scores]))
        )
    if corpus == "debian":
        details["own programs on two ranks"] = on_ranks(found.makers)
    return Figure(
        value,
        "",
        low,
        high,
        baseline=baseline,
        free=both(arms["template"]),
        controls={
            name: both(arms[arm])
            for name, arm in (("deleted", "nothing"), ("random", "random"), ("rival", "nearest program"))
        },
        arms={name: both(arms[name]) for name in ("eight calls after every line", "frame")}
        | {
            form: float(np.mean([both(scored(found, one, tolerance)) for one in runs_of]))
            for form, runs_of in found.models.items()
            if form != method
        },
        trained=trained(found, tolerance, both) if so_far else {},
        details=details,
    )


def paired(runs: Sequence[Sequence[Score]], others: Sequence[Score]) -> tuple[float, float, float]:
    """How far the method lies above an arm, the mean over seeds, with its interval: the same programs are drawn for both."""
    rows = list(zip(zip(*runs, strict=True), others, strict=True))

    def statistic(drawn: Sequence[tuple[Sequence[Score], Score]]) -> float:
        ours = zip(*(each for each, _ in drawn), strict=True)
        return float(np.mean([both(run) for run in ours])) - both([other for _, other in drawn])

    return (statistic(rows), *interval(rows, statistic, draws=DRAWS))


def apart(
    ours: Sequence[Sequence[Score]], theirs: Sequence[Sequence[Score]], value: Callable[[Sequence[Score]], float]
) -> list[float]:
    """How far a figure of ours lies above theirs, seed by seed."""
    return [round(value(one) - value(other), 4) for one, other in zip(ours, theirs, strict=True)]


def core_summary(found: Judged, tolerance: int) -> dict[str, dict[str, float | None]]:
    """The figures of every arm and the first seed of every model, of the eight functions of the common core alone."""
    everybody = found.arms | {form: runs[0] for form, runs in found.models.items()}
    has = [at for at, one in enumerate(found.programs) if any(call.function in room.CORE for _, call in one.calls)]
    return {
        name: summary([room.score(found.programs[at].calls, answers[at], tolerance=tolerance, core=True) for at in has])
        for name, answers in everybody.items()
    }


def curves(found: Judged, method: str, tolerance: int) -> dict[str, dict[str, list[float | None]]]:
    """Location and function by the most calls, as the authors draw them, of the method and of the template."""
    seen = {}
    for name, answers in ((method, found.models[method][0]), ("template", found.arms["template"])):
        made = room.curve(scored(found, answers, tolerance), (3, 4, 5, 6, 8, 10, 15, 20, 40))
        seen[name] = {
            str(most): [_rounded(row[key]) for key in ("location", "function", "f1")] for most, row in made.items()
        }
    return seen


def as_released(calls: int | None) -> dict[str, list[float | None]]:
    """The authors' answers by their own scorer, at each tolerance: their tables, as far as one program more or less allows."""
    answered = [one for one in mpi.released() if one.answer]
    found: dict[str, list[float | None]] = {}
    for tolerance in room.TOLERANCES:
        rows = [
            room.score_as_released(one.label, one.answer, tolerance=tolerance)
            for one in answered
            if calls is None or room.calls_as_released(one.label) <= calls
        ]
        kept = [[value for value in column if value is not None] for column in zip(*rows, strict=True)]
        found[str(tolerance)] = [round(float(np.mean(column)), 4) if column else None for column in kept]
    return found


def on_ranks(
    makers: dict[str, room.Annotator],
    names: Sequence[str] = ("template", "nearest program", "whole program"),
) -> Any:
    """Of assay's own programs, how many run on two ranks and print what the true program prints, by what put the calls there."""
    if not room.have_mpi():
        return "not run: mpicc and mpiexec are not installed (Debian: mpich)"
    limits = replace(room.running.LIMITS, cpu_seconds=3)  # ranks that wait for each other are not still
    truth = {name: room.run(text, limits=limits)[0] for name, text in mpi.own().items()}
    found: dict[str, dict[str, int]] = {}
    for arm in ("true calls, put back", *names):
        seen = {"right": 0, "ran, other lines": 0, "does not compile": 0, "failed": 0, "hangs": 0}
        for name, one in bank().items():
            items = list(one.items) if arm == "true calls, put back" else makers[arm](one.code)
            ran = room.run(room.put_back(one.code, items), limits=limits)[0]
            seen["right" if ran.same(truth[name]) else "ran, other lines" if ran.how == "ran" else ran.how] += 1
        found[arm] = seen
    return found


# ---------------------------------------------------------------------------------------------------------------------- arguments


def arguments(scores: Sequence[Score]) -> float:
    """The mean share of equal arguments, of programs with a hit in place and function, as in the paper."""
    shares = [one.arguments for one in scores if one.arguments is not None]
    return float(np.mean(shares)) if shares else 0.0


Fill = Callable[[Call, Sequence[str]], tuple[str, ...]]
"""Arguments for a call in the lines of a program."""


def refilled(found: Judged, answers: Answers, fill: Fill) -> Answers:
    """The same calls at the same places with other arguments."""
    return [
        [(line, Call(call.function, fill(call, one.code))) for line, call in answer]
        for one, answer in zip(found.programs, answers, strict=True)
    ]


def drawn_arguments(known: Sequence[Stripped], seed: int = 0) -> Fill:
    """Arguments of a random known call of the function."""
    rng = np.random.default_rng(seed)
    seen: dict[str, list[tuple[str, ...]]] = {}
    for one in known:
        for _, call in one.calls:
            seen.setdefault(call.function, []).append(call.arguments)
    return lambda call, code: (
        seen[call.function][int(rng.integers(len(seen[call.function])))] if call.function in seen else ()
    )


ARGUMENT_POINTS = {scale: [point for point in grid if point["corpus"] != "debian"] for scale, grid in POINTS.items()}
"""The small model writes usual arguments: what they are worth is what counting is."""


@experiment(
    "mpirigen/argument-accuracy",
    points=ARGUMENT_POINTS,
    decides=DECIDES,
    operator=OPERATOR,
    paper=PAPER,
    departures=DEPARTURES,
    refuted_if="the share of right arguments lies below GPT-3.5's, programs drawn again: the whole interval",
    measured_here=(
        "the share of right arguments, of calls that are hit in place and function, in the authors' published answers, scored anew "
        "(programs of at most 5 calls decide); controls and counting fill in the arguments of the same hits"
    ),
    minutes=30,
    memory_gib=6,
)
def argument_accuracy(corpus: str, calls: int | None, tolerance: int) -> Figure:
    """The arguments of the method's own hits, and what those hits are worth with no arguments, drawn ones, or the usual ones."""
    found = judged(corpus, calls, corpus != "released")
    method = "paper" if corpus == "released" else "whole program"
    runs = [scored(found, answers, tolerance) for answers in found.models[method]]
    value, low, high = over_runs(runs, arguments)
    usual = room.usual_arguments(found.learned)

    def filled(fill: Fill) -> float:
        every = [refilled(found, answers, fill) for answers in found.models[method]]
        return float(np.mean([arguments(scored(found, answers, tolerance)) for answers in every]))

    own = {
        name: arguments(scored(found, answers, tolerance)) for name, answers in found.arms.items() if name != "nothing"
    }
    by_counting = filled(lambda call, code: usual(call.function, len(call.arguments), code))
    if corpus == "released":
        baseline = PUBLISHED_GPT[calls][2] if tolerance == TOLERANCE and calls in PUBLISHED_GPT else None
    else:
        baseline = float(
            np.mean([arguments(scored(found, answers, tolerance)) for answers in found.models["left to right"]])
        )
    joint = {
        form: round(float(np.mean([one.joint for one in scored(found, each[0], tolerance)])), 4)
        for form, each in found.models.items()
    }
    joint |= {
        name: round(float(np.mean([one.joint for one in scored(found, each, tolerance)])), 4)
        for name, each in found.arms.items()
    }
    return Figure(
        value,
        "",
        low,
        high,
        baseline=baseline,
        free=by_counting,
        controls={
            "deleted": filled(lambda call, code: ()),
            "random": filled(drawn_arguments(found.learned)),
            "rival": own["nearest program"],
        },
        arms={f"{name}, its own hits": own[name] for name in ("template", "eight calls after every line")},
        trained=trained(found, tolerance, arguments_and_place) if "whole program" in found.models else {},
        details={
            **found.counts,
            "calls right in place, function and every argument, of all": joint,
            "programs without a hit": {
                form: sum(one.function is None for one in scored(found, each[0], tolerance))
                for form, each in found.models.items()
            },
        },
    )


def arguments_and_place(scores: Sequence[Score]) -> float:
    """The share of calls that are wholly right: what tells whether a model was trained, for arguments alone are of its own hits."""
    return float(np.mean([one.joint for one in scores]))
