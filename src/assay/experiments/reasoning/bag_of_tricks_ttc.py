"""Bag of tricks: what does choosing the temperature gain, where it is chosen beforehand and judged on other questions?

The paper's own setting: majority of 32 answers at top-p 0.9, temperatures 0.6 to 1.0, and 0.7 as the default. For each of seven tasks
(kinds of sums in several wordings) the temperature is chosen on questions kept for learning; what is told is its gain on other
questions, never that of the temperature that turns out best there. Beside it stand ways that choose nothing: greedy decoding, which
takes few of the tokens, and the same samples voted for by their log-probabilities.

The record has the ways against tokens too, everything charged: prompts, samples, judging.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from assay.experiments.core import Figure, Operator, experiment
from assay.experiments.reasoning import bag_of_tricks_ttc_sets as room
from assay.experiments.reasoning.bag_of_tricks_ttc_sets import Task
from assay.methods.core.reasoning.estimates import over_items
from assay.methods.core.reasoning.generator import Generator, Sampling
from assay.methods.core.reasoning.verifier import Chance, Checker, Learned, LogProbability, Verifier
from assay.methods.reasoning.bag_of_tricks_ttc import (
    Question,
    Remembered,
    Row,
    SelfEvaluation,
    Setting,
    at_tokens,
    chosen,
    grid,
    run,
)
from assay.workloads.reasoning import WORDINGS, Item, Kind, Part, Wording, answer_of, items, prompt

DEFAULT, PAPER_GRID, WIDE_GRID = room.DEFAULT, room.PAPER_GRID, room.WIDE_GRID
SIZES = (1, 2, 4, 8, 16, 32)
PAPER = {
    "way": "majority", "n": 32, "top_p": 0.9, "temperatures": list(PAPER_GRID), "model": "Llama-3.1-8B and larger",
    "tasks": "eight sets of questions, GSM8K and MATH-500 among them", "answers": "reasoned out, of up to 2048 tokens", "tries": 5,
    "chosen": "the temperature that turns out best",
}  # fmt: skip
DEPARTURES = {
    "model": "SmolLM2-135M, the largest language model that draws these samples on a processor",
    "tasks": "sums of one and two digits and single steps, in three wordings, behind four examples: what the model sometimes has right",
    "answers": "given at once, of at most 8 tokens, so that 32 can be drawn at every temperature",
    "tries": "1: where none of 32 samples holds an answer, no others are drawn, which the packed samples do not have",
    "chosen": "chosen on other questions, of each task by itself; the best in hindsight is an arm",
}


def draw() -> dict[str, Any]:
    """Draw the samples that are checked in, and write them in this room's own form."""
    room.draw()
    return {}


def question_of(item: Item, worked: bool = False) -> Question:
    """An item in its three wordings, to be answered at once or, `worked`, step by step."""
    prompts: dict[str, str] = {wording: prompt(item, wording, worked=worked) for wording in WORDINGS}
    done = (lambda text: "answer is" in text) if worked else None
    return Question(prompts, item.answer, partial(answer_of, item), done)


def questions(kind: Kind, level: int, part: Part, n: int) -> list[Question]:
    """The first n items of a task."""
    return [question_of(item) for item in items(kind, level=level, n=n, part=part)]


def at_temperatures(way: Setting, kind: Kind, wording: Wording, temperatures: Sequence[float]) -> list[Setting]:
    """A way in a task's form of sampling at each temperature, the default first."""
    ordered = sorted(temperatures, key=lambda one: (one != DEFAULT, abs(one - DEFAULT), one))
    return [replace(way, sampling=room.sampling_at(kind, each), wording=wording) for each in ordered]


def tuned(
    way: Setting, part: Part, tasks: Sequence[Task], n_items: int, temperatures: Sequence[float], repeats: int = 1
) -> dict[Task, dict[float, Row]]:
    """What a way gets in every task at every temperature."""
    found: dict[Task, dict[float, Row]] = {}
    for kind, level, wording in tasks:
        settings = at_temperatures(way, kind, wording, temperatures)
        asked = questions(kind, level, part, n_items)
        rows = run(asked, room.sets(), settings, {"log-probability": LogProbability()}, repeats=repeats)
        found[kind, level, wording] = {row.setting.sampling.temperature: row for row in rows}
    return found


def choose(learnt: Mapping[Task, Mapping[float, Row]], allowed: Sequence[float]) -> dict[Task, float]:
    """The temperature of each task that is most accurate on the questions kept for learning; the default where none is better."""
    return {
        task: chosen([row for each, row in rows.items() if each in allowed]).sampling.temperature
        for task, rows in learnt.items()
    }


def by_question(tasks: Mapping[Task, Sequence[float]]) -> list[float]:
    """A value for each question: the mean over the wordings in which it was asked, which are not independent."""
    kinds = dict.fromkeys((kind, level) for kind, level, _ in tasks)
    of = [[list(values) for (*own, _), values in tasks.items() if tuple(own) == kind] for kind in kinds]
    return [value for wordings in of for value in np.mean(np.array(wordings), 0).tolist()]


def gains(rows: Mapping[Task, Row], base: Mapping[Task, Row]) -> dict[Task, list[float]]:
    """Points that each question gains, by task."""
    return {
        task: [100 * (ours - theirs) for ours, theirs in zip(row.right, base[task].right, strict=True)]
        for task, row in rows.items()
    }


def mean_gain(rows: Mapping[Task, Row], base: Mapping[Task, Row]) -> float:
    """Points gained on average."""
    return float(np.mean(by_question(gains(rows, base))))


def interval(values: Sequence[float]) -> dict[str, float]:
    """A mean with its interval over questions."""
    mean, low, high = over_items(values)
    return {"mean": mean, "low": low, "high": high}


def bounds(values: Sequence[float], most: Sequence[float]) -> tuple[float, float, float]:
    """The mean gain with its interval over questions, of which each can gain or lose `most`: 0 where the default was chosen.

    Resampling is blind to what was not seen. Where no question gained, 3 of those that can may still gain all they can of as many as
    were asked (the rule of three); so may 3 lose where none lost.
    """
    mean, low, high = over_items(values)
    can = [each for each in most if each]
    unseen = 3 * float(np.mean(can)) / len(values) if can else 0.0
    low = low if min(values) < 0 else min(low, mean - unseen)
    return mean, low, high if max(values) > 0 else max(high, mean + unseen)


@experiment(
    "bag_of_tricks_ttc/temperature-gain",
    points={
        "smoke": [{"way": "majority", "n": 8, "learn": 6, "judged": 9, "wordings": ["question"], "worked": 0}],
        "small": [
            {
                "way": "majority", "n": 32, "learn": room.LEARN, "judged": room.JUDGED, "wordings": list(WORDINGS),
                "worked": 0,
            }
        ],
        "full": [
            {"way": "majority", "n": 32, "learn": 26, "judged": 40, "wordings": list(WORDINGS), "worked": 40},
        ],
    },
    operator=Operator(
        "answering by the majority of samples", free="greedy decoding: one answer, one sample's tokens, nothing chosen"
    ),
    paper=PAPER,
    departures=DEPARTURES,
    refuted_if=(
        "the whole interval of the gain of the temperature that was chosen beforehand, over the default, lies below 0 points"
    ),
    measured_here=(
        "accuracy of SmolLM2-135M's majority answers to three kinds of sums, in several wordings; "
        "each task's temperature chosen on other questions"
    ),
    minutes=180,
)  # fmt: skip
def temperature_gain(way: str, n: int, learn: int, judged: int, wordings: Sequence[Wording], worked: int) -> Figure:
    """Points of accuracy that the temperature chosen on learning questions gains over the default on judged ones.

    The mean over the kinds of sums decides, each averaged over its wordings; the paper's "up to" is told as the gain where the
    learning questions promised most (in the details, with its interval). Controls: the default itself (nothing chosen: 0 by
    definition), a temperature of the grid drawn at random (its expectation), and as the rival the default's samples voted for by their
    log-probabilities, which takes as many tokens. Arms: greedy decoding, a grid that reaches down to 0.2, and the temperatures that are
    best in hindsight, which is what must not be told as a gain. Intervals resample questions; a question's wordings stay together.
    """
    tasks = [task for task in room.TASKS if task[2] in wordings]
    base_way = Setting(way, n, options=(("tries", 1),))
    votes = Setting("weighted majority", n, verifier="log-probability")
    learnt = tuned(base_way, "learn", tasks, learn, WIDE_GRID)
    seen = tuned(base_way, "judged", tasks, judged, WIDE_GRID)
    base = at(seen, dict.fromkeys(tasks, DEFAULT))
    picked, wide = choose(learnt, PAPER_GRID), choose(learnt, WIDE_GRID)
    ours = at(seen, picked)
    gain = gains(ours, base)
    most = by_question({task: [100.0 * (each != DEFAULT)] * judged for task, each in picked.items()})
    mean, low, high = bounds(by_question(gain), most)
    at_random = [mean_gain(at(seen, dict.fromkeys(tasks, each)), base) for each in PAPER_GRID]
    greedy = {task: rows[0.0] for task, rows in tuned(Setting("one"), "judged", tasks, judged, [0.0]).items()}
    voted = {task: rows[DEFAULT] for task, rows in tuned(votes, "judged", tasks, judged, [DEFAULT]).items()}
    hindsight = at(seen, choose(seen, PAPER_GRID))
    promised = {
        task: float(np.mean(own))
        for task, own in gains(at(learnt, picked), at(learnt, dict.fromkeys(tasks, DEFAULT))).items()
    }
    best = max(promised, key=lambda task: promised[task])
    return Figure(
        mean,
        "points",
        low,
        high,
        baseline=0.0,
        free=mean_gain(greedy, base),
        controls={
            "deleted": 0.0,
            "random": float(np.mean(at_random)),
            "rival": mean_gain(voted, base),
        },
        arms={
            "greedy decoding": mean_gain(greedy, base),
            "a grid from 0.2 to 1.0": mean_gain(at(seen, wide), base),
            "the best temperatures in hindsight": mean_gain(hindsight, base),
        },
        details={
            "tasks": {
                named(task): {
                    "chosen": picked[task],
                    "chosen of the wide grid": wide[task],
                    "gain": interval(gain[task]),
                    "promised on learning questions": promised[task],
                    "accuracy by temperature": {f"{t:g}": float(np.mean(row.right)) for t, row in seen[task].items()},
                    "accuracy of greedy decoding": float(np.mean(greedy[task].right)),
                }
                for task in seen
            },
            "where most was promised": {"task": named(best), "promised": promised[best], **interval(gain[best])},
            "gain by wording": {
                wording: interval(by_question({task: own for task, own in gain.items() if task[2] == wording}))
                for wording in wordings
            },
            "tokens a question": {
                "the default": float(np.mean([row.cost for row in base.values()])),
                "chosen": float(np.mean([row.cost for row in ours.values()])),
                "greedy decoding": float(np.mean([row.cost for row in greedy.values()])),
                "choosing, a learning question": float(
                    np.mean([sum(rows[each].cost for each in PAPER_GRID) for rows in learnt.values()])
                ),
            },
            "one sample": of_one_sample(tasks, learn, judged, n),
            "ways": ways_at_equal_tokens(tasks, learn, judged, n),
            "step by step": step_by_step(worked) if worked else {},
        },
    )  # fmt: skip


def named(task: Task) -> str:
    """A task in words."""
    return "{}{} as {}".format(*task)


def at(rows: Mapping[Task, Mapping[float, Row]], temperatures: Mapping[Task, float]) -> dict[Task, Row]:
    """Each task's row at a temperature of its own."""
    return {task: rows[task][each] for task, each in temperatures.items()}


def of_one_sample(tasks: Sequence[Task], learn: int, judged: int, n: int) -> dict[str, Any]:
    """The same for a single sample, its accuracy averaged over n: without a vote it counts how sharp the samples are."""
    learnt = tuned(Setting("one"), "learn", tasks, learn, WIDE_GRID, repeats=n)
    seen = tuned(Setting("one"), "judged", tasks, judged, WIDE_GRID, repeats=n)
    base = at(seen, dict.fromkeys(tasks, DEFAULT))
    picked = {"the paper's grid": choose(learnt, PAPER_GRID), "a grid from 0.2 to 1.0": choose(learnt, WIDE_GRID)}
    return {name: interval(by_question(gains(at(seen, own), base))) for name, own in picked.items()}


# ----------------------------------------------------------------------------------------------------- ways at equal tokens


def looks(text_prompt: str, text: str) -> list[float]:
    """What a small learned verifier sees: the answer's length, and how it compares with the larger of the two numbers asked about."""
    asked = [int(number) for number in re.findall(r"\d+", text_prompt)[-2:]]
    said = re.findall(r"\d+", text[:100])
    value = int(said[0][:20]) if said else -1
    return [len(text), float(len(said)), float(value >= max(asked)), len(str(value)) - len(str(max(asked)))]


def learned(kind: Kind, level: int, wording: Wording, n_items: int, n: int) -> Learned:
    """A verifier fitted on the checked samples of learning questions."""
    sampling = room.sampling_at(kind, DEFAULT)
    asked = questions(kind, level, "learn", n_items)
    prompts, texts, right = [], [], []
    for question in asked:
        (samples,) = room.sets()([question.prompts[wording]], sampling, n=n)
        prompts += [question.prompts[wording]] * n
        texts += [sample.text for sample in samples]
        right += [question.answer_of(sample.text) == question.answer for sample in samples]
    return Learned(looks).fit(prompts, texts, right)


def curve(rows: Sequence[Row]) -> list[dict[str, float]]:
    """Accuracy with its interval against all tokens."""
    return [
        {"n": row.setting.n, "tokens": row.cost, **interval(row.right)} for row in sorted(rows, key=lambda r: r.cost)
    ]


def ways_at_equal_tokens(tasks: Sequence[Task], learn: int, judged: int, n: int) -> dict[str, Any]:
    """The ways that draw whole answers, at the default temperature: accuracy against tokens by wording, all kinds of sums together."""
    found: dict[str, Any] = {}
    for wording in dict.fromkeys(task[2] for task in tasks):
        rows: dict[tuple[str, int], list[Row]] = {}
        for kind, level, _ in (task for task in tasks if task[2] == wording):
            asked = questions(kind, level, "judged", judged)
            answers = {each.prompts[wording]: each.answer for each in asked}
            verifiers: dict[str, Verifier] = {
                "chance": Chance(),
                "log-probability": LogProbability(),
                "learned": learned(kind, level, wording, learn, n),
                "checker (an oracle)": Checker(answers, find=asked[0].answer_of),
            }
            base = Setting(sampling=room.sampling_at(kind, DEFAULT), wording=wording)
            for size in (size for size in SIZES if size <= n):
                settings = grid(base, way=["majority"], n=[size], tries=[1])
                settings += grid(base, way=["best of n", "weighted majority"], n=[size], verifier=list(verifiers))
                for row in run(asked, room.sets(), settings, verifiers, repeats=min(4, n // size)):
                    name = f"{row.setting.way}, {row.setting.verifier}".rstrip(", ")
                    rows.setdefault((name, size), []).append(row)
        names = dict.fromkeys(name for name, _ in rows)
        found[wording] = {name: curve([pooled(own) for (way, _), own in rows.items() if way == name]) for name in names}
    return found


def pooled(rows: Sequence[Row]) -> Row:
    """Rows of one setting on several tasks as one."""
    return replace(
        rows[0],
        right=tuple(value for row in rows for value in row.right),
        tokens=tuple(value for row in rows for value in row.tokens),
    )


# -------------------------------------------------------------------------------------------------------------- step by step


WORKED = Sampling(DEFAULT, room.TOP_P, 16, ("\n\n",))
"""How a step is drawn: a line of at most 16 tokens."""


def step_by_step(
    n_items: int, *, level: int = 2, wording: Wording = "plain", model: Generator | None = None
) -> dict[str, Any]:
    """All ways on sums that are worked out line by line: accuracy at as many tokens as the dearest way takes at its smallest size.

    The score is the model's own probability, for all of them; for best of N also its own judgement. A way that cannot spend so many tokens
    stands with its largest size ("tokens" of its curve say how many that are).
    """
    asked = [question_of(item, True) for item in items("steps", level=level, n=n_items, part="judged")]
    model = room.sets() if model is None else model
    verifiers: dict[str, Verifier] = {"log-probability": LogProbability(), "self-evaluation": Remembered(judge(model))}
    whole = Setting(sampling=replace(WORKED, max_new_tokens=64), wording=wording)
    steps = Setting("beam", 2, WORKED, "log-probability", wording)
    settings = [
        *grid(whole, way=["one"]),
        *grid(whole, way=["majority"], n=[2, 8, 32, 64], tries=[1]),
        *grid(whole, way=["best of n", "weighted majority"], n=[2, 8, 32, 64], verifier=["log-probability"]),
        *grid(whole, way=["best of n"], n=[2, 8], verifier=["self-evaluation"]),
        *grid(whole, way=["self-refine"], n=[1, 3]),
        *grid(steps, way=["step-level best of n"], n=[2, 8]),
        *grid(steps, n=[2, 4], width=[2]),
        *grid(steps, way=["mcts"], n=[2, 3], simulations=[3]),
        *grid(steps, way=["depth first"], n=[2, 4]),
    ]
    rows: dict[str, list[Row]] = {}
    for row in run(asked, model, settings, verifiers):
        rows.setdefault(f"{row.setting.way}, {row.setting.verifier}".rstrip(", "), []).append(row)
    equal = max(min(row.cost for row in own) for own in rows.values())
    most = {name: min(equal, max(row.cost for row in own)) for name, own in rows.items()}
    return {
        "curves": {name: curve(own) for name, own in rows.items()},
        "tokens": equal,
        "at equal tokens": {name: interval(at_tokens(own, most[name])) for name, own in rows.items()},
    }


def judge(model: Generator) -> SelfEvaluation:
    """The model asked whether a text is right, three times."""
    ask = "{}{}\n\nIs the answer right, yes or no?\nThe answer is right:"
    return SelfEvaluation(model, lambda asked, text: ask.format(asked, text), Sampling(DEFAULT, room.TOP_P, 2, ("\n",)))
