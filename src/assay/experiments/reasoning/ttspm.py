"""Where sampling stops paying: accuracy with 24 samples against one, and saturation points predicted from a few
samples of an item.

Everything is evaluated from samples drawn once (`ttspm_samples`), of a bundled model of 135M parameters. Models are
fitted on the questions of the part "learn" (at most eight samples of each), and held against those of "judged", at 16
and 24 samples too. Intervals resample questions, with all wordings of a question together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from assay.experiments.core import Figure, Operator, experiment
from assay.experiments.reasoning.samples import Drawn
from assay.experiments.reasoning.ttspm_samples import (
    FEW,
    JUDGED,
    RETHOUGHT,
    ROUNDS,
    SAMPLES,
    SIZES,
    TASKS,
    Group,
    Groups,
    as_logged,
    by_question,
    draw,
    greedy,
    groups,
    mean_of,
    most_likely,
    name_of,
    resampled,
    rethinking,
    tokens_of,
)
from assay.methods.core.reasoning.estimates import coverage
from assay.methods.reasoning.ttspm import TTSPM, BetaTTSPM, Fit, accuracies, allocate, fit
from assay.workloads.reasoning import WORDINGS

__all__ = ["draw", "parallel_accuracy", "saturation_correlation"]
EPS = 0.08
"""The threshold of a saturation point, of one right answer: 16 held-out samples cannot show gains below 1 / 16 (our
choice)."""
OTHER_EPS = (0.1, 0.15)


# ------------------------------------------------------------------------------------------------------------------- plans


def planned(fits: Mapping[Group, Fit], judged: Groups, each: int) -> dict[str, Any]:
    """A total of `each` samples a question spread over the groups, by fits to the learn part with `FEW` samples of
    each question.

    Coverage on the judged part, so an oracle chooses. "every question alike" is no plan; "groups shuffled" has the
    plan's numbers in another order, on average over orders; "gains as counted" spreads by the learn part's own
    accuracies up to `FEW`, without a model: at `FEW` samples a question that is every question alike.
    """
    order = list(judged)
    most = min(len(one.samples) for drawn in judged.values() for one in drawn)
    sizes = [len(judged[group]) for group in order]
    total = each * sum(sizes)
    solved = {group: [(sum(one.right), len(one.samples)) for one in drawn] for group, drawn in judged.items()}

    def reached(counts: Sequence[int]) -> np.ndarray:
        return by_question(
            {
                group: np.array([coverage(c, n, N) if N else 0.0 for c, n in solved[group]])
                for group, N in zip(order, counts, strict=True)
            }
        )

    def tokens(counts: Sequence[int]) -> float:
        return float(
            sum(tokens_of(judged[group], [N]).sum() for group, N in zip(order, counts, strict=True) if N) / sum(sizes)
        )

    plans = {
        "planned, one chance a group": allocate([fits[g].curve for g in order], total, sizes=sizes, most=most),
        "planned, unequal chances": allocate([fits[g].model for g in order], total, sizes=sizes, most=most),
        "gains as counted": _counted([fits[g].observed for g in order], total, sizes),
        "every question alike": [each] * len(order),
    }
    found = {name: reached(counts) for name, counts in plans.items()}
    chance = np.random.default_rng(0)
    turned = [chance.permutation(plans["planned, unequal chances"]).tolist() for _ in range(20)]
    found["groups shuffled"] = np.mean([reached(counts) for counts in turned], axis=0)
    alike = found["every question alike"]
    return {
        "coverage": {name: mean_of(100 * values) for name, values in found.items()},
        "over every question alike": {
            name: mean_of(100 * (values - alike)) for name, values in found.items() if values is not alike
        },
        "samples a group": {
            name: dict(zip(map(name_of, order), counts, strict=True)) for name, counts in plans.items()
        },
        "tokens a question": {name: tokens(counts) for name, counts in plans.items()},
    }


def _counted(observed: Sequence[Sequence[float]], total: int, sizes: Sequence[int]) -> list[int]:
    """As `allocate` does, by counted gains; what is left behind the last size counted goes round."""
    counts = [0] * len(observed)
    while True:
        gains = [
            own[n] - (own[n - 1] if n else 0.0) if n < len(own) else -n for own, n in zip(observed, counts, strict=True)
        ]
        fitting = [i for i, size in enumerate(sizes) if size <= total]
        if not fitting:
            return counts
        best = max(fitting, key=lambda i: gains[i])
        counts[best] += 1
        total -= sizes[best]


# -------------------------------------------------------------------------------------------------------------- experiments

SAMPLING = Operator(
    "answering a question with several samples of one model",
    free="one answer at temperature 0",
)
PREDICTING = Operator(
    "the number of samples of a question after which another hardly adds anything",
    free="of the same few samples the share p of right ones, or p (1 - p), whichever correlates more",
)
PAPER: dict[str, Any] = {"task": "AIME 2024", "model": "DeepSeek-R1-Distill-Qwen-1.5B", "samples": 32}
DEPARTURES = {
    "task": "sums of one and two digits and single steps, each in three wordings: no model that runs here solves the paper's problems",
    "model": "SmolLM2 of 135M parameters, which answers at once and does not reason at length",
    "samples": "24, which is what was drawn of each question, but for full",
}


@experiment(
    "ttspm/aime-parallel",
    points={
        "smoke": [{"samples": 8, "items": 10, "rethought": 0}],
        "small": [{"samples": SAMPLES, "items": JUDGED, "rethought": RETHOUGHT}],
        "full": [{"samples": 32, "items": JUDGED, "rethought": RETHOUGHT}],
    },
    operator=SAMPLING,
    paper=PAPER,
    departures=DEPARTURES,
    refuted_if="the whole interval of what the vote of 24 samples gains over one sample lies below 0 points",
    measured_here="accuracy of the vote of 24 samples on sums and single steps in three wordings",
    minutes=30,
)
def parallel_accuracy(samples: int, items: int, rethought: int) -> Figure:
    """Accuracy, in per cent, of the vote of so many samples; one sample of them is the paper's baseline, the likeliest
    answer is free.

    Whoever asks does not know which sample is right, so the vote decides and not coverage, which an oracle reaches (an
    arm). The interval is that of the gain over one sample, paired. Controls: the method deleted is one sample; one of
    them chosen at random is right as often; the rival is the most probable of them. In the details: accuracy against
    all tokens (the prompt once) at every N by task and wording, plans at equal samples, and rethinking.
    """
    judged = groups("judged", items, samples)
    fits = {group: fit(as_logged(drawn), upto=FEW) for group, drawn in groups("learn", items, FEW).items()}
    sizes = [size for size in SIZES if size < samples] + [samples]
    logged = {group: as_logged(drawn) for group, drawn in judged.items()}
    tables = {
        "coverage (an oracle chooses)": {g: accuracies(own, sizes) for g, own in logged.items()},
        "vote": {g: accuracies(own, sizes, selector="majority") for g, own in logged.items()},
        "most probable sample": {g: most_likely(drawn, sizes) for g, drawn in judged.items()},
    }
    tokens = {g: tokens_of(drawn, sizes) for g, drawn in judged.items()}
    whole = {way: 100 * by_question(table) for way, table in tables.items()}
    likeliest = 100 * by_question(greedy(judged))
    one, vote = whole["coverage (an oracle chooses)"][:, 0], whole["vote"][:, -1]
    gain, base = mean_of(vote - one), float(one.mean())
    return Figure(
        base + gain["median"],
        "%",
        base + gain["low"],
        base + gain["high"],
        baseline=base,
        free=float(likeliest.mean()),
        controls={
            "deleted": base,
            "random": base,
            "rival": float(whole["most probable sample"][:, -1].mean()),
        },
        arms={
            "coverage (an oracle chooses)": float(whole["coverage (an oracle chooses)"][:, -1].mean()),
            "the likeliest answer, once": float(likeliest.mean()),
        },
        details={
            "vote over the likeliest answer": mean_of(vote - likeliest),
            "by tokens": [
                {
                    "N": size,
                    "tokens": float(by_question(tokens)[:, j].mean()),
                    **{way: mean_of(values[:, j]) for way, values in whole.items()},
                }
                for j, size in enumerate(sizes)
            ],
            "by task and wording": {
                name_of(g): {
                    **{way: (100 * table[g].mean(0)).tolist() for way, table in tables.items()},
                    "tokens": tokens[g].mean(0).tolist(),
                }
                for g in judged
            },
            "plans": {str(each): planned(fits, judged, each) for each in (2, 4, 8) if each < samples},
            **({"rethinking": rethinking(judged, rethought, ROUNDS)} if rethought else {}),
        },
    )


def observed_saturation(right_ones: int, n: int, eps: float) -> int:
    """The saturation point as counted: the first N at which the unbiased coverage of n samples grows by `eps` at most;
    n - 1 where none is.

    >>> observed_saturation(0, 24, 0.05), observed_saturation(24, 24, 0.05), observed_saturation(3, 24, 0.05)
    (0, 1, 9)
    """
    before = 0.0
    for N in range(n):
        after = coverage(right_ones, n, N + 1)
        if after - before <= eps:
            return N
        before = after
    return n - 1


def predicted_saturation(right_ones: int, n: int, eps: float) -> int:
    """The saturation point by the paper's formula, of the chance that few samples show."""
    return TTSPM(right_ones / n).saturation(eps)


def correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Pearson's; 0 where one of them is constant, which says nothing about the other."""
    if x.std() == 0 or y.std() == 0:
        return 0.0
    return float(np.corrcoef(x, y)[0, 1])


@experiment(
    "ttspm/saturation-correlation",
    points={
        "smoke": [{"samples": 16, "items": 10, "eps": 0.15}],
        "small": [{"samples": SAMPLES, "items": JUDGED, "eps": EPS}],
        "full": [{"samples": 32, "items": JUDGED, "eps": EPS}],
    },
    operator=PREDICTING,
    paper={"task": "MATH-500", "model": "DeepSeek-R1-Distill-Qwen-7B", "mode": "parallel"},
    departures=DEPARTURES,
    refuted_if="the whole interval of the correlation lies below 0",
    measured_here="over questions, saturation points of coverage predicted from 8 samples and counted from 16 others",
    minutes=30,
)
def saturation_correlation(samples: int, items: int, eps: float) -> Figure:
    """Pearson's correlation, over questions in all wordings, of saturation points predicted from 8 samples and counted
    from the others.

    The baseline is no correlation. Free is the larger correlation (its size) of two statistics of the same 8 samples,
    without a model: the pass rate p, and p (1 - p). Controls: the method deleted is one point for each group (of the
    mean chance of other questions, on the learn part); random has the chances shuffled among the questions of each
    group, on average; the rival is the Beta posterior, fitted on the learn part. An interval resamples questions. In
    the details: other thresholds, each group, and predictions of coverage at 16 and 24 on the judged questions by
    models fitted to at most 8 samples of the learn part.
    """
    judged = groups("judged", items, samples)
    order = list(judged)
    few = np.array([[sum(one.right[:FEW]) for one in judged[g]] for g in order])
    rest = np.array([[sum(one.right[FEW:]) for one in judged[g]] for g in order])
    fits = {group: fit(as_logged(drawn), upto=FEW) for group, drawn in groups("learn", items, FEW).items()}
    priors = [fits[g].spread for g in order]
    at_once = _saturations(few, rest, samples - FEW, eps, priors, [fits[g].table[:, 0].mean() for g in order])
    seen, predicted = at_once["counted"], at_once["predicted"]
    tasks = np.repeat(
        np.arange(len(TASKS)), len(WORDINGS)
    )  # of each group: wordings of a question are resampled together

    def interval(of: Callable[[np.ndarray], float]) -> tuple[float, float]:
        def once(picks: np.ndarray) -> float:
            own = picks.reshape(len(TASKS), items) % items
            return of(np.concatenate([g * items + own[task] for g, task in enumerate(tasks)]))

        return resampled(len(TASKS) * items, once)

    flat = {name: values.reshape(-1).astype(float) for name, values in at_once.items()}

    def r(name: str, picks: np.ndarray | slice = slice(None)) -> float:
        return correlation(flat[name][picks], flat["counted"][picks])

    low, high = interval(lambda picks: r("predicted", picks))

    def simple(picks: np.ndarray | slice = slice(None)) -> float:
        return max(abs(r("pass rate", picks)), abs(r("p (1 - p)", picks)))

    over = interval(lambda picks: r("predicted", picks) - simple(picks))
    chance = np.random.default_rng(0)
    shuffled = [
        correlation(np.array([chance.permutation(own) for own in predicted]).reshape(-1), flat["counted"])
        for _ in range(200)
    ]
    return Figure(
        r("predicted"),
        "",
        low,
        high,
        baseline=0.0,
        free=simple(),
        controls={"deleted": r("group"), "random": float(np.mean(shuffled)), "rival": r("posterior")},
        arms={
            "the Beta posterior's saturation point": r("posterior"),
            "the pass rate (size)": abs(r("pass rate")),
            "p (1 - p) of the pass rate": r("p (1 - p)"),
        },
        details={
            "over what is free": {"median": r("predicted") - simple(), "low": over[0], "high": over[1]},
            "97.5 % of shuffles below": float(np.quantile(shuffled, 0.975)),
            "by group": {name_of(g): correlation(predicted[i], seen[i]) for i, g in enumerate(order)},
            "mean points": {
                name_of(g): [float(predicted[i].mean()), float(seen[i].mean())] for i, g in enumerate(order)
            },
            "at other thresholds": {
                str(other): _other(few, rest, samples - FEW, other, priors) for other in OTHER_EPS if other != eps
            },
            "predicted coverage": (beyond := {name_of(g): _beyond(fits[g], judged[g], samples) for g in order}),
            "mean error of predicted coverage": _errors(list(beyond.values()), str(samples)),
        },
    )


def _saturations(
    few: np.ndarray, rest: np.ndarray, n: int, eps: float, priors: Sequence[BetaTTSPM | None], means: Sequence[float]
) -> dict[str, np.ndarray]:
    """Points of every item, (groups, items), as each way has them, and the pass rate."""
    flat = BetaTTSPM(1.0, 1.0)  # where a group's few samples are of one kind only
    return {
        "predicted": np.array([[predicted_saturation(int(c), FEW, eps) for c in own] for own in few]),
        "posterior": np.array(
            [
                [(prior or flat).posterior(int(c), FEW).saturation(eps) for c in own]
                for own, prior in zip(few, priors, strict=True)
            ]
        ),
        "group": np.array([[TTSPM(float(p)).saturation(eps)] * few.shape[1] for p in means]),
        "pass rate": few / FEW,
        "p (1 - p)": few / FEW * (1 - few / FEW),
        "counted": np.array([[observed_saturation(int(c), n, eps) for c in own] for own in rest]),
    }


def _other(
    few: np.ndarray, rest: np.ndarray, n: int, eps: float, priors: Sequence[BetaTTSPM | None]
) -> dict[str, float]:
    found = _saturations(few, rest, n, eps, priors, [0.0] * len(few))
    return {
        name: correlation(found[name].reshape(-1).astype(float), found["counted"].reshape(-1).astype(float))
        for name in ("predicted", "posterior", "pass rate")
    }


def _errors(beyond: Sequence[Mapping[str, Mapping[str, float]]], size: str) -> dict[str, float]:
    """By how much each way's prediction at a size misses what is observed, on average over groups; and if it is
    another group's."""
    seen = np.array([of[size]["observed median"] for of in beyond])
    ways = set.intersection(*(set(of[size]) for of in beyond)) - {"observed median", "observed low", "observed high"}
    found = {way: np.array([of[size][way] for of in beyond]) for way in sorted(ways)}
    chance = np.random.default_rng(0)
    turned = [chance.permutation(found["one chance and a ceiling"]) for _ in range(200)]
    return {
        **{way: float(np.abs(values - seen).mean()) for way, values in found.items()},
        "one chance and a ceiling, of another group": float(np.mean([np.abs(one - seen).mean() for one in turned])),
    }


def _beyond(fitted: Fit, judged: Sequence[Drawn], samples: int) -> dict[str, dict[str, float]]:
    """Coverage of the judged questions at sizes beyond those of the fit, and what was predicted."""
    mean = TTSPM(float(fitted.table[:, 0].mean()))
    found = {}
    for size in sorted({min(16, samples), samples}):
        table = accuracies(as_logged(judged), [size])[:, 0]
        found[str(size)] = {
            **{f"observed {end}": value for end, value in mean_of(table).items()},
            "one chance, no ceiling": mean.predict(size),
            "one chance and a ceiling": fitted.curve.predict(size),
            **({"unequal chances": fitted.spread.predict(size)} if fitted.spread is not None else {}),
            "as at the last size fitted": fitted.observed[-1],
        }
    return found
