"""Does feedback make later ideas better, does the code around a failure repair more scripts, and does ranked retrieval
find what is known?

No model that writes code runs here. Ideas are drawn from a list of edits of a real script, which are then really run,
in the sandbox; repairs come from rules; whether an idea is known is told by sentence embeddings. What is measured is
thus the loop, and not a model's imagination.
"""

from __future__ import annotations

import itertools
import random
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from assay.catalogue import Paper, papers
from assay.experiments.core import Figure, Operator, experiment
from assay.experiments.reasoning.dolphin_faults import PLANTERS, faulty
from assay.experiments.reasoning.dolphin_task import EDITS, OfflineProposer, digits_file, embedder, script_of
from assay.measure.stats import Interval, share_interval, student_interval
from assay.methods.core.sandbox import Limits, Sandbox
from assay.methods.reasoning.dolphin import (
    Attempt,
    Baseline,
    Document,
    Entry,
    Idea,
    Outcome,
    RuleRepair,
    Study,
    confirmed,
    in_sandbox,
    known_from,
    measured_baseline,
    practise,
    ranked,
    research,
    similarity_scorer,
)
from assay.methods.reasoning.dolphin.practice import Runner
from assay.methods.reasoning.dolphin.repair import named_lines
from assay.methods.reasoning.dolphin.tracebacks import Part, kept_lines, own_frames, parse

WORKERS = 2
LIMITS = Limits(wall_seconds=120, cpu_seconds=30)
FRESH = range(100, 103)
"""Seeds that no idea is tried with."""


def runner(part: str = "search") -> Runner:
    """Runs the script beside its digits in the sandbox; what was run before is looked up: the same source and seed
    give the same metric."""
    run = in_sandbox(Sandbox(LIMITS), files={"digits.npz": digits_file(part)})
    known: dict[tuple[str, int], Outcome] = {}
    lock = threading.Lock()

    def once(source: str, seed: int) -> Outcome:
        with lock:
            found = known.get((source, seed))
        if found is None:
            found = run(source, seed)
            with lock:
                known[source, seed] = found
        return found

    return once


def in_threads(function: Callable[[int], Any], count: int) -> list[Any]:
    """`function` of 0 to count - 1, two at a time: what takes long is a process of its own."""
    with ThreadPoolExecutor(WORKERS) as pool:
        return list(pool.map(function, range(count)))


# ------------------------------------------------------------------------------------------------------ the loop itself


def improving(study: Study, loop: int) -> float:
    """The share of a round's ideas that were run and improved, in per cent; 0 where none was run. A script that an
    earlier idea had come to is no improvement."""
    seen: set[str] = set()
    found: list[bool] = []
    for one in study.entries:
        if one.runs and one.loop == loop:
            found.append(one.outcome == "improved" and one.source not in seen)
        seen.add(one.source)
    return 100 * float(np.mean(found)) if found else 0.0


def measured(run: Runner, base: Baseline, seed: int) -> Baseline:
    """The reference script's score under one seed, with the delta of several."""
    score = run(script_of({}), seed).metric
    assert score is not None  # it ran for `base`
    return Baseline(score, base.delta)


def studied(
    arm: str, seed: int, run: Runner, base: Baseline, embed: Any, loops: int, ideas: int
) -> tuple[Study, OfflineProposer]:
    """One study of an arm; all arms of a seed draw the same first round. Ideas are held against the reference script
    under their own seed: under one that is lucky each edit that changes nothing would count as an improvement."""
    base = measured(run, base, seed % 3)
    studies: list[Study] = []

    def anybody(_: Sequence[Entry]) -> list[Entry]:
        """As many entries that ran as improved, chosen at random."""
        (study,) = studies
        ran = [one for one in study.entries if one.score is not None]
        wins = sum(one.outcome == "improved" for one in ran)
        return random.Random(seed).sample(ran, wins)

    propose = OfflineProposer(seed, wins_by=anybody if arm == "random" else None, pairs=arm == "rival")
    studies.append(Study(embed, baseline=base, feedback=arm in ("feedback", "no bank"), bank=arm != "no bank"))
    research(studies[0], propose, propose.write, run, RuleRepair(), loops=loops, ideas=ideas, seed=seed % 3)
    return studies[0], propose


@experiment(
    "dolphin/improvement-rate",
    points={
        "smoke": [{"seeds": 2, "loops": 2, "ideas": 3}],
        "small": [{"seeds": 20, "loops": 3, "ideas": 5}],
        "full": [{"seeds": 50, "loops": 5, "ideas": 8}],
    },
    operator=Operator("the next idea to try", free="another two edits at random"),
    paper={"task": "point clouds, pictures and sentences", "model": "GPT-4o and DeepSeek-V2.5", "loops": 3},
    departures={
        "task": "digits by a small network in numpy, whose training takes a third of a second",
        "model": "none: ideas are drawn from a list of edits, and with feedback three in four are put on top of what "
        "improved: how large the gain is follows from that share, whether there is one does not",
        "loops": "5 at full, where the paper has 3",
    },
    refuted_if="in the last round, the whole interval lies below the share of improvements of the first",
    measured_here="share of the last round's ideas, edits of a script, that raise its accuracy by more than a standard error",
    minutes=60,
)
def improvement_rate(seeds: int, loops: int, ideas: int) -> Figure:
    """Per cent of the ideas run in the last round that improve on the reference script, under the same seed, by more than
    one standard error.

    The baseline is the same study's first round, and the interval that of the paired gain over studies, Student's t.
    Deleted: no feedback, so that single edits are drawn in each round. Random: feedback of as many ideas that were
    chosen among all that ran. Rival and free: two edits at random. An idea on top of a win may keep what the win gained:
    what it adds stands in the details, and so does what the best idea is worth on digits that no idea has seen, on
    fresh seeds, for the first ten studies, and what the bank turned away.
    """
    run, embed = runner(), embedder()
    base = measured_baseline(run, script_of({}), seeds=range(3))
    arms = ("feedback", "deleted", "random", "rival", "no bank")

    def of_seed(seed: int) -> dict[str, Study]:
        return {arm: studied(arm, seed, run, base, embed, loops, ideas)[0] for arm in arms}

    embed([f"{title}. {summary}" for title, summary, _ in EDITS])  # once, before the threads
    found = in_threads(of_seed, seeds)
    rates = {arm: np.array([[improving(one[arm], loop + 1) for loop in range(loops)] for one in found]) for arm in arms}
    ours = rates["feedback"]
    gain = student_interval((ours[:, -1] - ours[:, 0]).tolist())
    first = float(ours[:, 0].mean())
    test = runner("test")
    worth = {
        arm: [confirmed(one[arm], test, seeds=FRESH).score for one in found[:10]]
        for arm in ("feedback", "rival", "deleted")
    }
    reference = measured_baseline(test, script_of({}), seeds=FRESH)
    last = {arm: float(rates[arm][:, -1].mean()) for arm in arms}
    added = _added([one["feedback"] for one in found])
    return Figure(
        first + gain.median,
        "%",
        first + gain.low,
        first + gain.high,
        baseline=first,
        free=last["rival"],
        controls={name: last[name] for name in ("deleted", "random", "rival")},
        details={
            "by round": {arm: rates[arm].mean(0).tolist() for arm in arms},
            "over two edits at random": _told(student_interval((ours[:, -1] - rates["rival"][:, -1]).tolist())),
            "over feedback of anything": _told(student_interval((ours[:, -1] - rates["random"][:, -1]).tolist())),
            "over the win below": _told(student_interval(added)) if len(added) > 1 else None,
            "accuracy of the best on fresh digits and seeds": {
                "the reference script": reference.score,
                **{arm: _told(student_interval(values)) for arm, values in worth.items()},
            },
            "scripts run a study": {arm: float(np.mean([one[arm].runs for one in found])) for arm in arms},
            "turned away, %": {arm: _share([one[arm] for one in found], "known") for arm in arms},
            "run again, %": {arm: float(np.mean([_again(one[arm]) for one in found])) for arm in arms},
            "baseline": [base.score, base.delta],
        },
    )


def _told(found: Interval) -> dict[str, float]:
    return {"median": found.median, "low": found.low, "high": found.high}


def _share(studies: Sequence[Study], outcome: str) -> float:
    return 100 * float(np.mean([[one.outcome == outcome for one in study.entries] for study in studies]))


def _again(study: Study) -> float:
    """Per cent of the scripts that were run for an idea though an earlier idea had come to the same script."""
    ran = [one.source for one in study.entries if one.runs]
    return 100 * (1 - len(set(ran)) / len(ran)) if ran else 0.0


def _added(studies: Sequence[Study]) -> list[float]:
    """By study: the mean, over ideas on top of a win, of accuracy above that win's, in points. Studies without one are
    left out."""
    found = []
    for study in studies:
        scores = {one.idea.title: one.score for one in study.entries if one.score is not None}
        pairs = [
            100 * (one.score - below)
            for one in study.entries
            if one.score is not None and (below := scores.get(one.idea.title.partition(" on top of ")[2])) is not None
        ]
        found += [float(np.mean(pairs))] if pairs else []
    return found


# -------------------------------------------------------------------------------------------------------------- repairs


def scripts() -> list[str]:
    """The reference script under settings that take its different paths."""
    some: list[dict[str, Any]] = [
        {}, {"activation": "tanh", "shift": 1}, {"components": 16, "dropout": 0.2}, {"adam": True, "mixup": True},
        {"coarse": True, "standard": True}, {"squares": True, "clip": 1.0, "mirror": True},
    ]  # fmt: skip
    return [script_of(settings).replace("BUDGET = 4e7", "BUDGET = 2e6") for settings in some]


def raises(source: str, outcome: Outcome) -> bool:
    """Whether a traceback names a line of the script: one that a limit ended, or whose metric is no number, is left
    out."""
    return not outcome.ok and any(one.frames for one in own_frames(parse(outcome.error), source))


def planted(run: Runner, each: int, seed: int = 0) -> list[tuple[str, str]]:
    """`each` scripts of every kind of fault that really raise in the script's own code, (kind, script)."""
    found: dict[str, list[str]] = {kind: [] for kind in PLANTERS}
    for kind, text in itertools.islice(faulty(scripts(), seed), 40 * each * len(PLANTERS)):
        if len(found[kind]) < each and text not in found[kind] and raises(text, run(text, 0)):
            found[kind].append(text)
        if all(len(own) == each for own in found.values()):
            break
    return [(kind, text) for kind, own in found.items() for text in own]


def told_where(text: str, outcome: Outcome) -> bool:
    """Whether a traceback names the line that the fault stands in; a missing import has none, and counts as told."""
    line = changed_line(text, scripts())
    return line is None or line in named_lines(Attempt(text, tuple(own_frames(parse(outcome.error), text))))


def changed_line(text: str, known: Sequence[str]) -> int | None:
    """The line in which a script differs from one of the known ones; None where it has another number of lines."""
    lines = kept_lines(text)
    for one in known:
        apart = [n for n, (a, b) in enumerate(zip(lines, kept_lines(one), strict=False), 1) if a != b]
        if len(apart) == 1 and len(lines) == len(kept_lines(one)):
            return apart[0]
    return None


def difference(ours: np.ndarray, theirs: np.ndarray) -> Interval:
    """The mean of paired differences of per cents with Student's interval. Where no script differs that would be of
    no width: then it is as wide as the share that may differ, of which none was seen (exact)."""
    if (ours == theirs).all():
        left_open = 100 * share_interval(0, len(ours)).high
        return Interval(0.0, -left_open, left_open, len(ours))
    return student_interval((ours - theirs).tolist())


def any_lines(attempt: Attempt, parts: Sequence[Part]) -> list[int]:
    """The lines that the traceback names, and behind them all others at random."""
    lines = list(range(1, len(kept_lines(attempt.source)) + 1))
    random.Random(attempt.source).shuffle(lines)
    return list(dict.fromkeys([*named_lines(attempt), *lines]))


def nearest_lines(attempt: Attempt, parts: Sequence[Part]) -> list[int]:
    """The lines that the traceback names, and behind them all others, the nearest to the innermost first."""
    named = named_lines(attempt)
    lines = sorted(range(1, len(kept_lines(attempt.source)) + 1), key=lambda line: abs(line - named[0]))
    return list(dict.fromkeys([*named, *lines]))


@experiment(
    "dolphin/execution-success",
    points={
        "smoke": [{"each": 1, "seed": 0}],
        "small": [{"each": 4, "seed": 0}],
        "full": [{"each": 40, "seed": 0}],
    },
    operator=Operator(
        "repairing a script that raises", free="the same rules at the lines nearest to the one that raises"
    ),
    paper={"scripts": "15 that a model wrote", "repairer": "DeepSeek-V2.5", "rounds": 5},
    departures={
        "scripts": "variants of a real script with one planted fault each, of eight kinds, that really raise: nearly all at a line that "
        "the traceback names, where the code around it has little to add",
        "repairer": "rules, the same with and without the code around the failure: no model that writes code runs here",
    },
    refuted_if="the whole interval lies below what the traceback alone repairs",
    measured_here="share of scripts with a planted fault that run after at most five repairs by rules",
    minutes=60,
)
def execution_success(each: int, seed: int) -> Figure:
    """Per cent of the scripts that run after at most five repairs by the rules that know the code around the failure.

    Baseline and deleted: the same rules at all own lines that the traceback names, its callers' too. Random: behind
    these at random lines, in place of those that the code around the failure points to. Rival and free: behind these at
    the lines nearest to the one that raises. All have five repairs. The interval is Student's t of the paired gain over
    scripts; where no script differs it is what that leaves open. How large the gain is follows from the mix of faults,
    which is ours: as many of each kind, by fault in the details. A run that ends well is called repaired, as in the
    paper. In the details: how often it gives an unbroken script's metric, at how many of the faults the traceback
    points, where only ways that look further can differ, and on how many scripts they do.
    """
    run = runner()
    cases = planted(run, each, seed)
    whole = {run(text, 0).metric for text in scripts()}
    ways: dict[str, Any] = {
        "structure": {"repair": RuleRepair(), "structure": True, "rounds": 5},
        "traceback": {"repair": RuleRepair(), "structure": False, "rounds": 5},
        "random lines": {"repair": RuleRepair(lines=any_lines), "structure": False, "rounds": 5},
        "nearest lines": {"repair": RuleRepair(lines=nearest_lines), "structure": False, "rounds": 5},
    }

    told = [told_where(text, run(text, 0)) for _, text in cases]

    def tried(i: int) -> dict[str, tuple[bool, bool, int]]:
        made = {name: practise(cases[i][1], run, **way) for name, way in ways.items()}
        return {name: (one.last.ok, one.last.metric in whole, one.repairs) for name, one in made.items()}

    found = in_threads(tried, len(cases))
    success = {name: np.array([100.0 * one[name][0] for one in found]) for name in ways}
    gain = difference(success["structure"], success["traceback"])
    base = float(success["traceback"].mean())
    return Figure(
        base + gain.median,
        "%",
        base + gain.low,
        base + gain.high,
        baseline=base,
        free=float(success["nearest lines"].mean()),
        controls={
            "deleted": base,
            "random": float(success["random lines"].mean()),
            "rival": float(success["nearest lines"].mean()),
        },
        details={
            "scripts": len(cases),
            "by fault": {
                kind: {
                    name: float(success[name][[i for i, case in enumerate(cases) if case[0] == kind]].mean())
                    for name in ways
                }
                for kind in dict.fromkeys(kind for kind, _ in cases)
            },
            "faults that the traceback points at, %": 100 * float(np.mean(told)),
            "scripts that one way alone repairs": {
                name: int((success["structure"] != success[name]).sum()) for name in ways if name != "structure"
            },
            "gives an unbroken script's metric, %": {
                name: 100 * float(np.mean([one[name][1] for one in found])) for name in ways
            },
            "repairs a script": {name: float(np.mean([one[name][2] for one in found])) for name in ways},
        },
    )


# -------------------------------------------------------------------------------------------------------- what is known

ATTRIBUTES = "saves {saves}; for {models} models"


def documents_of(some: Sequence[Paper]) -> list[Document]:
    """Papers of the catalogue by title and summary."""
    return [Document(one.title, one.summary) for one in some]


def told_again(paper: Paper) -> Idea:
    """The paper's method in the words of its claims: what was gained over what, without its title and its summary."""
    claims = " ".join(f"{claim.metric}, against {claim.baseline}." for claim in paper.claims)
    return Idea(paper.claims[0].metric, summary=claims)


def accepted(
    hidden: Sequence[Paper], shown: Sequence[Paper], embed: Any, threshold: float, way: str, seed: int
) -> tuple[list[str], list[str]]:
    """Of ideas of hidden papers (novel) and of shown ones (known), those that a check lets through, by slug."""
    documents = documents_of(shown)
    passed: tuple[list[str], list[str]] = ([], [])
    for known, paper in [*((0, one) for one in hidden), *((1, one) for one in shown)]:
        kept = documents
        topic = similarity_scorer(embed, paper.family)
        if way in ("ranked", "random"):
            text = ATTRIBUTES.format(saves=", ".join(paper.saves), models=", ".join(paper.models))
            kept = ranked(documents, topic, similarity_scorer(embed, text), least=LEAST)
        if way == "random":
            kept = random.Random(f"{seed} {paper.slug}").sample(documents, len(kept))
        elif way == "plain":
            kept = ranked(documents, topic, lambda d: [10.0] * len(d), least=1.0, most=10)
        elif way == "none":
            kept = []
        if known_from(told_again(paper), kept, embed, threshold=threshold) is None:
            passed[known].append(paper.slug)
    return passed


THRESHOLDS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
LEAST = 4.0
"""Scores by similarity that are kept: the paper's 8 of a model's scores keeps a tenth of the documents here, or
none."""


@experiment(
    "dolphin/novel-ideas",
    points={
        "smoke": [{"splits": 3, "each": 4}],
        "small": [{"splits": 20, "each": 20}],
        "full": [{"splits": 200, "each": 30}],
    },
    operator=Operator("telling ideas that are known", free="the nearest of all documents, without any ranking"),
    paper={"ideas": "20 that GPT-4o wrote", "judge": "people", "least": 8},
    departures={
        "ideas": "methods of the catalogue in the words of their claims, half of them from papers that the retrieval does not hold",
        "judge": "known by construction: a paper that the retrieval holds is known, one that it does not hold is new",
        "least": "4 of 10, since scores are similarities and not a model's",
    },
    refuted_if="the whole interval lies below the share of novel ideas where nothing is retrieved",
    measured_here="share of novel ones among the ideas that a check by sentence embeddings lets through",
    minutes=30,
)
def novel_ideas(splits: int, each: int) -> Figure:
    """Per cent of novel ideas among those that pass the check against documents ranked by topic and by attributes.

    Half of the ideas are known by construction, so that without retrieval (baseline, deleted) half of what passes is
    novel. Random: as many documents at random. Rival and free: the nearest of all documents. In the details: ten
    documents by topic alone, and how many novel ideas each way turns away wrongly. Each way has its own threshold,
    chosen by the most right decisions on one half of the papers; the other half is judged. Splits share papers: the
    interval is a bootstrap over papers, and more splits do not narrow it beyond that.
    """
    embed = embedder()
    everything = sorted(papers(), key=lambda paper: random.Random(paper.slug).random())
    learn, judged = everything[::2], everything[1::2]
    ways = ("ranked", "plain", "random", "none", "all")

    def split(half: Sequence[Paper], seed: int) -> tuple[list[Paper], list[Paper]]:
        drawn = random.Random(f"novel {seed}").sample(half, 2 * each)
        return drawn[:each], drawn[each:]

    def chosen(way: str) -> float:
        def right(threshold: float) -> float:
            found = [accepted(*split(learn, n), embed, threshold, way, n) for n in range(max(2, splits // 4))]
            return float(np.mean([len(novel) + each - len(known) for novel, known in found]))

        return max(THRESHOLDS, key=right)

    thresholds = {way: chosen(way) for way in ways}
    found = {way: [accepted(*split(judged, n), embed, thresholds[way], way, n) for n in range(splits)] for way in ways}
    slugs = [one.slug for one in judged]
    counts = {
        way: np.array([[sum(part[known].count(slug) for part in own) for known in (0, 1)] for slug in slugs])
        for way, own in found.items()
    }
    share = {way: _novel(own.sum(0)) for way, own in counts.items()}
    drawn = np.random.default_rng(0).integers(0, len(slugs), (2000, len(slugs)))
    shares = {way: np.array([_novel(own[picks].sum(0)) for picks in drawn]) for way, own in counts.items()}
    low, high = np.quantile(shares["ranked"], (0.025, 0.975))
    gain = np.quantile(shares["ranked"] - shares["all"], (0.025, 0.975))
    return Figure(
        share["ranked"],
        "%",
        float(low),
        float(high),
        baseline=share["none"],
        free=share["all"],
        controls={"deleted": share["none"], "random": share["random"], "rival": share["all"]},
        arms={"ten documents by topic alone": share["plain"]},
        details={
            "thresholds": thresholds,
            "novel ideas let through, %": {
                way: 100 * float(own[:, 0].sum()) / (each * splits) for way, own in counts.items()
            },
            "known ideas let through, %": {
                way: 100 * float(own[:, 1].sum()) / (each * splits) for way, own in counts.items()
            },
            "over all documents": {
                "median": share["ranked"] - share["all"], "low": float(gain[0]), "high": float(gain[1]),
            },
        },
    )  # fmt: skip


def _novel(passed: np.ndarray) -> float:
    """Per cent of novel ones of (novel, known) ideas; 0 where none passed."""
    return 100 * float(passed[0]) / max(1.0, float(passed.sum()))
