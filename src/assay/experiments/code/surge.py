"""SURGE: is a model that runs here of any use at predicting what a program prints?

That 21 models were compared is no result that could be measured again. What stands behind it is: models are useful on simple programs, and
weak on precise numbers and on repositories. So what is counted here are models that are shown to know simple programs: intervals over
programs, above the strongest trivial answer (that of the learned part, and that of the judged items themselves, which few items tell
apart), and above what the model's own answers are worth on other programs. One model runs here, SmolLM2-135M, smaller than any of the
paper's; the count is one or none. Beside it stand the scores of all predictors by component, the predictions dealt out to other items, and
what a prediction costs against running the program.

The items are our own, made by real execution. For the long prompts' sake the model answers at most `most` items of a component.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from assay.experiments.core import Figure, Operator, experiment
from assay.experiments.reasoning import samples
from assay.methods.code import surge as room
from assay.methods.core.reasoning.generator import Sample, Sampling
from assay.workloads.programs.surge import sources

MODEL = "smollm2-135m"
SIMPLE = ("ML", "CL")
HARD = ("SC", "RL")
"""What the paper calls simple, and where it finds models weak."""
ALL = tuple(room.COUNTS)
FEW = ("ML", "SC")
"""Of the smoke scale."""
MOST = 8
NEW = 320
"""Tokens of an answer, at most: no truth takes more (the longest, an error's text, takes 302), and most take three."""
BATCH = 8
DRAWS = 2000
Lift = dict[str, float]


def sampling(form: room.Form) -> Sampling:
    """Greedy, to the end of the block that the prompt opens."""
    return Sampling(temperature=0.0, max_new_tokens=NEW, stop=() if form == "chain of thought" else ("\n```",))


@dataclass(frozen=True)
class Parts:
    """The learned items, the judged ones that are asked about, and why programs are no items."""

    learned: list[room.Item]
    judged: list[room.Item]
    refused: Mapping[str, str]


def parts(components: Sequence[str], most: int) -> Parts:
    """Items by real execution, in two parts; of each component at most `most` judged ones, the first of every program before the second."""
    built = room.build(sources(tuple(components)))
    learned, judged = room.split(built.items)
    kept: list[room.Item] = []
    for component in components:
        seen: dict[str, int] = {}
        placed: list[tuple[int, int, room.Item]] = []
        for item in (one for one in judged if one.component == component):
            placed.append((seen.get(item.group, 0), len(placed), item))
            seen[item.group] = seen.get(item.group, 0) + 1
        kept += [item for _, _, item in sorted(placed, key=lambda entry: entry[:2])[:most]]
    return Parts(learned, kept, built.refused)


def asked(found: Parts, form: room.Form) -> list[str]:
    """The prompts of the judged items."""
    return [
        room.prompt(item, form, room.shots_for(item, found.learned) if form == "3-shot" else ())
        for item in found.judged
    ]


def reply(prompts: Sequence[str], form: room.Form) -> list[Sample]:
    """What the model says: checked in, kept by this machine, or drawn, a few prompts of like length at a time."""
    kept = samples.generator(MODEL, "surge")
    order = sorted(range(len(prompts)), key=lambda at: len(prompts[at]))
    said: dict[int, Sample] = {}
    for start in range(0, len(order), BATCH):
        places = order[start : start + BATCH]
        drawn = kept([prompts[at] for at in places], sampling(form))
        said.update((at, sample) for at, (sample,) in zip(places, drawn, strict=True))
    return [said[at] for at in range(len(prompts))]


def draw() -> dict[str, samples.Kept]:
    """Ask the model about all items, in both short forms, so that what it says can be kept in a file."""
    found = parts(ALL, MOST)
    forms: tuple[room.Form, ...] = ("zero-shot", "3-shot")
    for form in forms:
        reply(asked(found, form), form)
    return {MODEL: samples.generator(MODEL, "surge")}


def answer(text: str, form: room.Form) -> str:
    """The whole reply that a continuation stands for."""
    return text if form == "chain of thought" else room.continued(text)


def lift(items: Sequence[room.Item], ours: Sequence[float], theirs: Sequence[float], *, seed: int = 0) -> Lift:
    """The mean of `ours` less `theirs` over items, with its 95 % interval: whole programs (groups) are drawn anew."""
    by_group: dict[str, list[float]] = {}
    for item, own, other in zip(items, ours, theirs, strict=True):
        by_group.setdefault(item.group, []).append(own - other)
    sums = np.array([[sum(values), len(values)] for values in by_group.values()])
    drawn = np.random.default_rng(seed).integers(len(sums), size=(DRAWS, len(sums)))
    totals = sums[drawn].sum(axis=1)
    low, high = np.quantile(totals[:, 0] / totals[:, 1], [0.025, 0.975])
    mean = float(sums[:, 0].sum() / sums[:, 1].sum())
    return {"mean": mean, "low": float(low), "high": float(high), "programs": float(len(sums))}


def lifts(items: Sequence[room.Item], ours: Sequence[float], theirs: Sequence[float]) -> dict[str, Lift]:
    """The lift on simple programs, and on precise numbers and repositories."""
    found = {}
    for name, components in (("simple", SIMPLE), ("numbers and repositories", HARD)):
        at = [number for number, item in enumerate(items) if item.component in components]
        found[name] = lift([items[n] for n in at], [ours[n] for n in at], [theirs[n] for n in at])
    return found


def useful(*found: Mapping[str, Lift]) -> float:
    """1 where the whole interval on simple programs lies above every rival."""
    return float(all(one["simple"]["low"] > 0 for one in found))


def best(items: Sequence[room.Item], scores: Mapping[str, Sequence[room.Score]]) -> list[float]:
    """The scores of the trivial answer that is best on a component's judged items: more than anybody could choose beforehand."""
    found = [0.0] * len(items)
    for component in dict.fromkeys(item.component for item in items):
        at = [number for number, item in enumerate(items) if item.component == component]
        for number, value in zip(
            at, max([[of[n].value for n in at] for of in scores.values()], key=math.fsum), strict=True
        ):
            found[number] = value
    return found


def elsewhere(items: Sequence[room.Item], replies: Sequence[str]) -> list[float]:
    """What the replies to a component's other programs are worth on each item, in the mean: nothing where there are none."""
    found = []
    for item in items:
        others = [
            reply
            for other, reply in zip(items, replies, strict=True)
            if other.component == item.component and other.group != item.group
        ]
        values = [one.value for one in room.scored([item] * len(others), others)]
        found.append(sum(values) / len(values) if values else 0.0)
    return found


def contradicts(details: Mapping[str, Any]) -> bool:
    """Whether a model is useful on simple programs, and surely more so on precise numbers and repositories."""
    found = details["lift"]
    return bool(useful(found)) and found["numbers and repositories"]["low"] > found["simple"]["high"]


def dealt(items: Sequence[room.Item], replies: Sequence[str], seed: int = 0) -> list[str]:
    """The same replies, each dealt to another item of its component (where there is another)."""
    rng = random.Random(seed)
    found = list(replies)
    for component in dict.fromkeys(item.component for item in items):
        places = [at for at, item in enumerate(items) if item.component == component]
        order = rng.sample(places, len(places))
        for here, there in zip(order, [*order[1:], order[0]], strict=True):
            found[here] = replies[there]
    return found


@experiment(
    "surge/models-compared",
    points={
        "smoke": [{"components": list(FEW), "most": 3, "form": "3-shot"}],
        "small": [{"components": list(ALL), "most": MOST, "form": "3-shot"}],
        "full": [{"components": list(ALL), "most": 1000, "form": "3-shot"}],
    },
    operator=Operator(
        "knowing what a program prints without running it",
        free="the strongest of five trivial answers: none, the most frequent, the nearest program's, a template, the input",
    ),
    paper={"models": "21, open and closed", "items": 1160, "form": "3-shot", "components": list(ALL)},
    departures={
        "models": "one that runs on two cores, SmolLM2-135M, which is smaller than any of the paper's",
        "items": "our own, in the same eight components, made by running them; the details say how many",
        "form": "the three shots show answers without steps; all is one text to be continued, no conversation, by 320 tokens at most",
    },
    refuted_if=(
        "a model that beats the strongest trivial answer on simple programs beats it by more on numerics and repositories, "
        "the intervals apart"
    ),
    refutes=lambda record: contradicts(record["details"]),
    measured_here=(
        "how many models that run here (of one) are shown to beat the strongest trivial answer, and their own answers to other programs, "
        "on simple programs; high counts those for which the former is not ruled out"
    ),
    minutes=30,
    memory_gib=6,
)
def models_compared(components: Sequence[str], most: int, form: room.Form) -> Figure:
    """The count, with nobody asked, the replies dealt out at random, and the nearest program's answer as controls.

    `free` is the test the other way round: 1 where the trivial answer that was strongest on the learned part surely does as well.
    """
    found = parts(components, most)
    items = found.judged
    trivial = {name: make(found.learned) for name, make in room.BASELINES.items()}
    chosen = room.strongest(found.learned)
    scores = {name: room.scored(items, [predict(item) for item in items]) for name, predict in trivial.items()}
    strongest = [scores[chosen[item.component]][at].value for at, item in enumerate(items)]
    here = best(items, scores)

    def against(ours: Sequence[room.Score], theirs: Sequence[float] = strongest) -> dict[str, Lift]:
        return lifts(items, [one.value for one in ours], theirs)

    def counted(ours: Sequence[room.Score], texts: Sequence[str]) -> float:
        return useful(against(ours), against(ours, here), against(ours, elsewhere(items, texts)))

    forms: tuple[room.Form, ...] = ("zero-shot", form)
    said = {one: reply(asked(found, one), one) for one in forms}
    replies = {one: [answer(sample.text, one) for sample in drawn] for one, drawn in said.items()}
    asked_of = {one: room.scored(items, texts) for one, texts in replies.items()}
    by_chance = room.scored(items, dealt(items, replies[form]))
    ours = against(asked_of[form])
    shown, possible = counted(asked_of[form], replies[form]), float(ours["simple"]["high"] > 0)
    released = room.scored(items, replies[form], variant="as_released")
    return Figure(
        shown,
        "models",
        shown,
        max(shown, possible),
        baseline=0.0,
        free=float(ours["simple"]["high"] <= 0),
        controls={
            "deleted": useful(against(scores["empty"])),
            "random": useful(against(by_chance)),
            "rival": useful(against(scores["nearest neighbour"])),
        },
        arms={"zero-shot": counted(asked_of["zero-shot"], replies["zero-shot"])},
        details={
            "items": {"learned": len(found.learned), "judged": len(items), "no items": dict(found.refused)},
            "strongest trivial answer, by the learned part": chosen,
            "lift": ours,
            "lift, over the trivial answer that is best on these items": against(asked_of[form], here),
            "lift, over its own replies to other programs": against(asked_of[form], elsewhere(items, replies[form])),
            "lift, zero-shot": against(asked_of["zero-shot"]),
            "lift, replies dealt to other items": against(by_chance),
            "lift, nearest neighbour": against(scores["nearest neighbour"]),
            "scores of the model": {one: room.report(items, values).as_dict() for one, values in asked_of.items()},
            "scores of the model, as released": room.report(items, released).as_dict(),
            "scores of its replies dealt to other items": room.report(items, by_chance).as_dict(),
            "scores of trivial answers": {name: room.report(items, values).as_dict() for name, values in scores.items()},
            "cost": {
                one: room.cost(
                    items, asked_of[one], [sample.spent.seconds for sample in drawn],
                    [sample.spent.prompt + sample.spent.completion for sample in drawn],
                ).as_dict()
                for one, drawn in said.items()
            },
            "answers cut off": {one: sum(sample.ended == "length" for sample in drawn) for one, drawn in said.items()},
            "seconds of a prediction": f"as drawn, {BATCH} prompts at a time, by the machine that drew it",
            "longest run": max(item.seconds for item in items),
        },
    )  # fmt: skip
