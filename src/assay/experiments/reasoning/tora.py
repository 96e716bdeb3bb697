r"""ToRA: is a small model right more often where it writes a program and reads its output, and does voting over such answers add to it?

SmolLM2-135M, shown four examples, writes a program for each question; the program is run in the sandbox; the model reads
its output and answers. The same model answers the same questions in text alone. Questions are asked in three wordings that
take turns. All tokens are counted: prompts, programs and outputs; and text answers are voted on until they have taken as
many. Outputs are left out, or swapped between questions, as controls.

What is measured stands in for the paper's: the model is shown examples and not trained, it is the same on both sides, and
questions are sums and small stories in place of MATH. Samples are drawn once by the loop that keeps its cache (`draw`) and
read from a file; programs are run anew.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np

from assay.errors import MissingError
from assay.experiments.core import Figure, Operator, experiment
from assay.experiments.reasoning import samples
from assay.methods.core.reasoning.budget import Budget
from assay.methods.core.reasoning.estimates import over_items
from assay.methods.core.reasoning.generator import Generator, Sample, Sampling
from assay.methods.core.reasoning.samples import key_of
from assay.methods.core.reasoning.selectors import majority
from assay.methods.core.sandbox import Limits, Sandbox
from assay.methods.reasoning.tora import (
    CALLS,
    Output,
    PythonTool,
    Tool,
    ToolLoop,
    Trajectory,
    total,
    with_tools,
)
from assay.methods.reasoning.tora.text import OUTPUT, output_block, waiting
from assay.methods.reasoning.tora.tools import WALL_SECONDS
from assay.workloads.models import load_model
from assay.workloads.reasoning import WORDINGS, Item, Wording, examples, items, prompt

MODEL, ROOM = "smollm2-135m", "tora"
GREEDY = Sampling(0.0, 1.0, 48, ("\n\n",))
WARM = replace(GREEDY, temperature=0.7)  # of the votes; our choice
VOTES = 5
"""Trajectories that are voted on."""
TEXTS = {"sum": 24, "steps": 24, "story": 3}
"""Text answers that are drawn of each kind, of which larger votes are drawn again. Those of stories are worked out line by line."""
Kinds = Sequence[Sequence[Any]]
"""Kinds of questions, each with its level."""
SUMS: Kinds = [["sum", 2], ["steps", 1]]
"""Kinds that text answers get right in 10 to 60 of 100, on the pilot part."""
STORIES: Kinds = [["story", 2]]
"""Where programs are wrong often enough for a vote to change something, on the pilot part (4 of 6 right)."""

# ------------------------------------------------------------------------------------------------------------------- prompts


def expression(item: Item) -> str:
    """What a program has to print for an example.

    >>> expression(items("steps", level=1, n=1, part="shown")[0]).split()[1] in "+-"
    True
    """
    if item.kind == "sum":
        return item.question
    if item.kind == "steps":
        return item.question.removeprefix("What is ").rstrip("?")
    first, *rest = [re.findall(r"(\d+) ([-+*]) (\d+) =", step)[0] for step in item.steps[:-1]]
    return " ".join([*first, *(part for _, sign, number in rest for part in (sign, number))])


def _asked(item: Item, wording: Wording) -> str:
    return prompt(item, wording, shots=0, worked=True).rstrip("\n") + "\n"


def tool_prompt(item: Item, wording: Wording, *, shots: int = 4) -> str:
    """The item behind examples with a program, its output and a boxed answer each."""
    lead = _asked(item, "task").partition("Input:")[0] if wording == "task" else ""
    blocks = [
        f"{_asked(one, wording).removeprefix(lead)}```python\nprint({expression(one)})\n```\n{OUTPUT}\n{one.answer}\n```\n"
        f"The answer is \\boxed{{{one.answer}}}.\n\n"
        for one in examples(item.kind, item.level, shots)
    ]
    return "".join([lead, *blocks, _asked(item, wording).removeprefix(lead)])


# -------------------------------------------------------------------------------------------------------------- what is asked


def silent(_: str) -> Output:
    """The output deleted: the program is written and nothing comes back."""
    return Output("")


class Swapped:
    """Another question's output, the next different one, in the place of each program's own."""

    def __init__(self, outputs: dict[str, Output]) -> None:
        self.outputs = outputs

    def __call__(self, program: str) -> Output:
        if program not in self.outputs:
            return Output("")
        programs = list(self.outputs)
        at = programs.index(program)
        others = [self.outputs[one] for one in programs[at + 1 :] + programs[:at]]
        return next((one for one in others if one.shown != self.outputs[program].shown), Output(""))


def first_outputs(rows: Sequence[Trajectory]) -> dict[str, Output]:
    """The first output of each program that was run first."""
    return {waiting(row.segments[0].text) or "": row.outputs[0] for row in rows if row.outputs}


@cache
def kept() -> Generator:
    """The model's samples, checked in or kept by this machine, or the model itself."""
    return samples.generator(MODEL, ROOM)


def sandbox() -> Tool:
    """What runs programs. Their limit is time of the processor: the model, and whatever else runs, takes it from them, and what a program
    of one line prints must not depend on that."""
    return PythonTool(Sandbox(Limits(wall_seconds=120, cpu_seconds=WALL_SECONDS)))


@cache
def programs() -> Tool:
    """The same, equal programs being run once."""
    return cache(sandbox())


def turns(kinds: Kinds, wordings: Sequence[Wording], n_items: int) -> Iterator[tuple[Wording, list[Item]]]:
    """`n_items` questions of each kind in groups of one wording: wordings take turns, so that no question stands twice."""
    for kind, level in kinds:
        every = items(kind, level=level, n=n_items, part="judged")
        for at, wording in enumerate(wordings):
            yield wording, every[at :: len(wordings)]


def plainly(questions: Sequence[Item], wording: Wording) -> tuple[list[str], Sampling]:
    """The prompts of text answers, and how those that are voted on are drawn.

    Stories are worked out: at once this model has hardly any right. Sums have nothing to be worked out.
    """
    kind, worked = questions[0].kind, questions[0].kind == "story"
    return [prompt(item, wording, worked=worked) for item in questions], samples.sampling_of(kind, worked, 0.8)


@dataclass(frozen=True)
class Asked:
    """One question in one wording, and what was answered by each arm."""

    item: Item
    wording: Wording
    tool: Trajectory
    arms: dict[str, Trajectory]
    drawn: samples.Drawn
    greedy: samples.Drawn | None = None  # of text
    votes: tuple[Trajectory, ...] = ()


DELETED, RANDOM = "deleted", "random"


def asked(kinds: Kinds, wordings: Sequence[Wording], n_items: int, *, votes: int = 0) -> list[Asked]:
    """All questions answered by every arm: with outputs deleted and swapped, or where there are votes, by so many trajectories."""
    found = []
    for wording, questions in turns(kinds, wordings, n_items):
        prompts = [tool_prompt(item, wording) for item in questions]
        rows = [row for (row,) in with_tools(kept(), prompts, GREEDY, programs())]
        controls: dict[str, Tool] = {} if votes else {DELETED: silent, RANDOM: Swapped(first_outputs(rows))}
        arms = {name: with_tools(kept(), prompts, GREEDY, tool) for name, tool in controls.items()}
        many = with_tools(kept(), prompts, WARM, programs(), n=votes) if votes else [[] for _ in rows]
        short, warm = plainly(questions, wording)
        greedy: list[list[Sample]] = [] if votes else kept()(short, replace(warm, temperature=0.0))
        drawn = kept()(short, warm, n=TEXTS[questions[0].kind])
        for at, item in enumerate(questions):
            likeliest = samples.Drawn(item, short[at], greedy[at]) if greedy else None
            own_arms = {name: own[at][0] for name, own in arms.items()}
            text = samples.Drawn(item, short[at], drawn[at])
            found.append(Asked(item, wording, rows[at], own_arms, text, likeliest, tuple(many[at])))
    return found


# -------------------------------------------------------------------------------------------------------------- what they show


def text_tokens(one: Asked) -> tuple[int, float]:
    """Tokens of the prompt of a text answer, and of one answer."""
    spent = [sample.spent for sample in one.drawn.samples]
    return spent[0].prompt, sum(each.completion for each in spent) / len(spent)


def equal_votes(one: Asked, tokens: float) -> int:
    """How many text answers take as many tokens, their prompt read once; at least one."""
    read, each = text_tokens(one)
    return max(int((tokens - read) // each), 1)


def voted(answers: Sequence[str], wanted: str, n: int, *, draws: int = 400) -> float:
    """How often the majority of `n` answers is right, when they are drawn from these with replacement; of equal ones any may win.

    >>> voted(["7", "7", "8", ""], "7", 101), voted(["", ""], "7", 3)
    (1.0, 0.0)
    """
    different = list(dict.fromkeys(answers))
    chance = np.random.default_rng(0)
    shares = np.array([answers.count(one) for one in different]) / len(answers)
    counts = chance.multinomial(n, shares, draws)
    rank = np.where(counts > 0, counts + 0.5 * chance.random(counts.shape), -np.inf)
    if "" in different:
        rank[:, different.index("")] -= n  # no answer wins only where there is no other
    best = rank.argmax(1)
    return float(np.mean([different[at] == wanted for at in best])) if wanted in different else 0.0


def percent(found: Sequence[Asked], value: Callable[[Asked], float]) -> float:
    return 100 * float(np.mean([value(one) for one in found]))


def of_tool(one: Asked) -> float:
    return float(one.tool.answer == one.item.answer)


def of_greedy(one: Asked) -> float:
    assert one.greedy is not None
    return float(one.greedy.right[0])


def of_one_text(one: Asked) -> float:
    return float(np.mean(one.drawn.right))


def of_text_votes(one: Asked, tokens: float) -> float:
    return voted(one.drawn.answers, one.item.answer, equal_votes(one, tokens))


def of_votes(one: Asked) -> float:
    return float(majority([row.answer for row in one.votes]) == one.item.answer)


def of_one_vote(one: Asked) -> float:
    return float(np.mean([row.answer == one.item.answer for row in one.votes]))


def tokens_of_votes(one: Asked, *, kept: bool = True) -> float:
    """Tokens of all trajectories that are voted on: the prompt is read once."""
    return sum(total(row, kept=kept).tokens for row in one.votes)


def costs(found: Sequence[Asked], rows: Callable[[Asked], Sequence[Trajectory]]) -> dict[str, float]:
    """Tokens of the mean question, and what of them was what, both with kept caches and by restarts."""
    with_cache, restarted = Budget(), Budget()
    for one in found:
        for row in rows(one):
            row.charge(with_cache, kept=True)
            row.charge(restarted, kept=False)
    every = [row for one in found for row in rows(one)]
    return {
        "tokens": with_cache.spent().tokens / len(found),
        "tokens_by_restarts": restarted.spent().tokens / len(found),
        "read_with_kept_caches": (with_cache.spent().prompt - with_cache.spent().cached) / len(found),
        "read_by_restarts": (restarted.spent().prompt - restarted.spent().cached) / len(found),
        "written": with_cache.spent().completion / len(found),
        "read_of_outputs": with_cache.spent("tool").prompt / len(found),
        "program_seconds": with_cache.spent("tool").seconds / len(found),
        "programs": with_cache.spent("tool").calls / len(found),
        "programs_failed": with_cache.spent("tool", failed=True).calls / len(found),
        "without_a_program": sum(not row.outputs for row in every) / len(every),
    }


def against_tokens(found: Sequence[Asked]) -> dict[str, dict[str, float]]:
    """Accuracy against all tokens, with intervals over questions: text votes of several sizes, and the tool."""

    def point(value: Callable[[Asked], float], tokens: float) -> dict[str, float]:
        mean, low, high = over_items([value(one) for one in found])
        return {"tokens": tokens, "accuracy": 100 * mean, "low": 100 * low, "high": 100 * high}

    drawn = min(len(one.drawn.samples) for one in found)
    curve = {"text, greedy": point(of_greedy, float(np.mean([total_of(one.greedy) for one in found if one.greedy])))}
    for n in (n for n in (1, 4, 8, 16, 24, 64) if n <= drawn or n == 64):
        tokens = float(np.mean([text_tokens(one)[0] + n * text_tokens(one)[1] for one in found]))
        curve[f"text, majority of {n}"] = point(lambda one, n=n: voted(one.drawn.answers, one.item.answer, n), tokens)  # type: ignore[misc]
    curve["tool"] = point(of_tool, costs(found, lambda one: [one.tool])["tokens"])
    return curve


def total_of(drawn: samples.Drawn) -> int:
    budget = Budget()
    drawn.charge(budget, range(len(drawn.samples)))
    return budget.spent().tokens


def table(found: Sequence[Asked], value: Callable[[Asked], float]) -> dict[str, float]:
    """Per cent by kind and wording."""
    groups: dict[str, list[float]] = {}
    for one in found:
        groups.setdefault(f"{one.item.kind} {one.item.level}, {one.wording}", []).append(value(one))
    return {name: 100 * float(np.mean(values)) for name, values in groups.items()}


def measured(prompts: Sequence[str], *, rounds: int = 2) -> dict[str, Any]:
    """The loop on the model itself, with kept caches and by restarts, in turns: seconds, tokens read, and whether they wrote the same."""
    try:
        loaded = load_model(MODEL)
    except MissingError as error:
        return {"not measured": str(error)}
    tool = sandbox()
    loops = {name: ToolLoop(loaded.model, loaded.tokenizer, reuse=name == "kept") for name in ("kept", "restart")}
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    rows: dict[str, list[Trajectory]] = {}
    for turn in range(rounds):
        for name in list(loops)[:: -1 if turn % 2 else 1]:
            began = time.perf_counter()
            rows[name] = [row for (row,) in loops[name](prompts, GREEDY, tool)]
            seconds[name].append(time.perf_counter() - began)
    read = {
        name: sum(one.spent.prompt - one.spent.cached for row in own for one in row.segments)
        for name, own in rows.items()
    }
    return {
        "trajectories": len(prompts),
        "seconds": {name: min(values) for name, values in seconds.items()},
        "restart_over_kept_seconds": min(seconds["restart"]) / min(seconds["kept"]),
        "tokens_read": read,
        "restart_over_kept_tokens_read": read["restart"] / read["kept"],
        "same_tokens_written": [
            [one.tokens for one in a.segments] == [one.tokens for one in b.segments]
            for a, b in zip(rows["kept"], rows["restart"], strict=True)
        ].count(True),
    }


# ----------------------------------------------------------------------------------------------------------------- experiments

OPERATOR = Operator(
    "answers to questions that have to be computed",
    free="a vote over text answers that take as many tokens in all, their prompt read once",
)
PAPER: dict[str, Any] = {
    "limit": "five seconds by the clock", "tokens": "1024 a segment", "task": "MATH",
    "model": "ToRA-7B, trained on 16k trajectories of GPT-4 and on shaped ones", "calls": CALLS, "temperature": 0.0,
    "baseline": "WizardMath-70B, text alone",
}  # fmt: skip
DEPARTURES = {
    "task": "two-digit sums, and sums and differences of two numbers, in three wordings by turns, which a rule would compute without a "
    "model: of its answers in text 10 to 60 of 100 are right",
    "model": "SmolLM2-135M shown four examples, not trained: no model that runs here solves MATH",
    "baseline": "the same model in text alone; the paper's is ten times as large as the one with tools",
    "limit": "five seconds of the processor, so that no verdict hangs on what else it does",
    "tokens": "at most 48 a segment, which no sum needs; the released code allows 1024",
}
SMALL: dict[str, Any] = {"kinds": SUMS, "wordings": list(WORDINGS), "n_items": 18}
FULL: dict[str, Any] = {**SMALL, "n_items": 144}
SMOKE: dict[str, Any] = {"kinds": SUMS[:1], "wordings": ["plain"], "n_items": 4}
STORY: dict[str, Any] = {"kinds": STORIES, "wordings": list(WORDINGS), "n_items": 30, "k": VOTES}
TIMED = 8  # trajectories on which the loop is timed


@experiment(
    "tora/math-7b",
    points={"smoke": [{**SMOKE, "timed": 0}], "small": [{**SMALL, "timed": TIMED}], "full": [{**FULL, "timed": 32}]},
    operator=OPERATOR,
    paper=PAPER,
    departures=DEPARTURES,
    refuted_if="the same model in text alone, at temperature 0, is right more often: the whole interval of the difference lies below 0",
    measured_here="accuracy of SmolLM2-135M, shown four examples, on sums of two numbers in three wordings; text alone is its baseline",
)
def math_7b(kinds: Kinds, wordings: Sequence[Wording], n_items: int, timed: int) -> Figure:
    """Accuracy with the tool over text alone, with text voted to equal tokens beside it."""
    found = asked(kinds, wordings, n_items)
    base = percent(found, of_greedy)
    gain, low, high = over_items([of_tool(one) - of_greedy(one) for one in found])
    rival = percent(found, lambda one: of_text_votes(one, total(one.tool).tokens))
    program = percent(found, lambda one: float(one.tool.value == one.item.answer))
    controls = {
        name: percent(found, lambda one, name=name: float(one.arms[name].answer == one.item.answer))  # type: ignore[misc]
        for name in (DELETED, RANDOM)
    }
    arms = {
        "one program, its output the answer (PAL)": program,
        "text voted to the tokens of a restart": percent(
            found, lambda one: of_text_votes(one, total(one.tool, kept=False).tokens)
        ),
    }
    details: dict[str, Any] = {
        "questions": len(found),
        "by_kind_and_wording": {"tool": table(found, of_tool), "text, greedy": table(found, of_greedy)},
        "accuracy_against_all_tokens": against_tokens(found),
        "costs": costs(found, lambda one: [one.tool]),
        "text_answers_at_equal_tokens": float(np.mean([equal_votes(one, total(one.tool).tokens) for one in found])),
        "what earns it": "the program" if program >= 100 * gain + base else "the program, and reading its output",
    }
    if timed:
        kind, level = kinds[0]
        alike = items(kind, level=level, n=timed, part="judged")
        details["loop"] = measured([tool_prompt(item, wordings[0]) for item in alike])
    return Figure(
        base + 100 * gain,
        "%",
        base + 100 * low,
        base + 100 * high,
        baseline=base,
        free=rival,
        controls={**controls, "rival": rival},
        arms=arms,
        details=details,
    )


@experiment(
    "tora/math-34b-sc50",
    points={
        "smoke": [{**STORY, "wordings": ["plain"], "n_items": 3}],
        "small": [STORY],
        "full": [{**STORY, "n_items": 144}],
    },
    operator=OPERATOR,
    paper={
        "task": "MATH",
        "model": "ToRA-Code-34B, trained",
        "calls": CALLS,
        "k": 50,
        "baseline": "one answer at temperature 0",
    },
    departures={
        "task": "small stories with a product and a sum, in three wordings by turns: programs of this model are wrong for a third of them",
        "model": DEPARTURES["model"],
        "k": f"{VOTES} trajectories are voted on; the vote of 50 is estimated from them, drawn with replacement, and stands in the details",
        **{name: DEPARTURES[name] for name in ("limit", "tokens")},
    },
    refuted_if="answers voted on are right less often than the one at temperature 0: the whole interval of the difference lies below 0",
    measured_here="accuracy of SmolLM2-135M, shown four examples, on stories in three wordings: answers voted, over one at temperature 0",
)
def math_34b_sc50(kinds: Kinds, wordings: Sequence[Wording], n_items: int, k: int) -> Figure:
    """Accuracy of a vote over trajectories, over the likeliest trajectory."""
    found = asked(kinds, wordings, n_items, votes=k)
    base = percent(found, of_tool)
    gain, low, high = over_items([of_votes(one) - of_tool(one) for one in found])
    single = percent(found, of_one_vote)
    rival = percent(found, lambda one: of_text_votes(one, tokens_of_votes(one)))
    by_k = {
        str(n): percent(
            found,
            lambda one, n=n: voted([row.answer for row in one.votes], one.item.answer, n),  # type: ignore[misc]
        )
        for n in (1, 2, k, 50)
    }
    return Figure(
        base + 100 * gain,
        "%",
        base + 100 * low,
        base + 100 * high,
        baseline=base,
        free=rival,
        controls={DELETED: base, RANDOM: single, "rival": rival},
        arms={
            "programs alone voted (PAL)": percent(
                found, lambda one: float(majority([row.value for row in one.votes]) == one.item.answer)
            ),
            "text alone, worked out, one answer": percent(found, of_one_text),
        },
        details={
            "questions": len(found),
            "text_answers_at_equal_tokens": float(np.mean([equal_votes(one, tokens_of_votes(one)) for one in found])),
            "accuracy_by_votes_drawn_with_replacement": by_k,
            "by_kind_and_wording": {
                "voted": table(found, of_votes), "greedy": table(found, of_tool), "text, one answer": table(found, of_one_text),
            },
            "costs": costs(found, lambda one: one.votes),
            "costs_of_one_at_temperature_0": costs(found, lambda one: [one.tool]),
        },
    )  # fmt: skip


# -------------------------------------------------------------------------------------------------------------------- drawing


def keep(row: Trajectory, sampling: Sampling, number: int) -> list[tuple[str, Sample]]:
    """The segments of a trajectory as the samples that `with_tools` asks for: each is known by the text it continues."""
    found, text = [], ""
    for at, segment in enumerate(row.segments):
        found.append((key_of(MODEL, row.prompt + text, _called(sampling), 0, number), _kept(segment)))
        text += segment.text
        if at < len(row.outputs):
            text += output_block(text, row.outputs[at].shown)
    return found


def _called(sampling: Sampling) -> Sampling:
    """How segments are asked for: they end where an output is called for, too."""
    return replace(sampling, stop=(*sampling.stop, OUTPUT))


def draw() -> dict[str, samples.Kept]:
    """Draw what the experiments ask for at `small`, by the loop that keeps its cache, so that no examples are read twice; then ask.

    What was drawn of a group of questions is kept when all of it is there, so that it goes on behind the last group where it was stopped.
    """
    store = samples.generator(MODEL, ROOM)
    loaded = load_model(MODEL)
    loop, tool = ToolLoop(loaded.model, loaded.tokenizer), programs()
    for point in (SMALL, STORY):
        for wording, questions in turns(point["kinds"], point["wordings"], point["n_items"]):
            begins = [key_of(MODEL, tool_prompt(item, wording), _called(GREEDY), 0, 0) for item in questions]
            if not store.has(begins):
                store.add(every_arm(loop, tool, questions, wording, point.get("k", 0)))
    math_7b(**SMALL, timed=0)
    math_34b_sc50(**STORY)
    return {MODEL: store}


def every_arm(
    loop: ToolLoop, tool: Tool, questions: Sequence[Item], wording: Wording, votes: int
) -> list[tuple[str, Sample]]:
    """All samples of some questions in one wording, those by which they are known to be there last."""
    prompts = [tool_prompt(item, wording) for item in questions]
    short, warm = plainly(questions, wording)
    rows = [row for (row,) in loop(prompts, GREEDY, tool)]
    found: list[tuple[str, Sample]] = []
    if votes:
        many = loop(prompts, WARM, tool, n=votes)
        found += [one for own in many for number, row in enumerate(own) for one in keep(row, WARM, number)]
        found += plain(loop, short, warm, TEXTS[questions[0].kind])
    else:  # text answers to sums that are voted on are there for all rooms
        found += plain(loop, short, replace(warm, temperature=0.0), 1)
        for control in (silent, Swapped(first_outputs(rows))):
            begun = [
                row.prompt + row.segments[0].text + output_block(row.segments[0].text, control(program).shown)
                for row in rows
                if (program := waiting(row.segments[0].text)) is not None
            ]
            later = loop(begun, GREEDY, control, calls=CALLS - 1) if begun else []
            found += [one for (row,) in later for one in keep(row, GREEDY, 0)]
    return found + [one for row in rows for one in reversed(keep(row, GREEDY, 0))]


def plain(loop: ToolLoop, prompts: Sequence[str], sampling: Sampling, n: int) -> list[tuple[str, Sample]]:
    """Text answers, under the keys of a generator's."""
    rows = loop(prompts, sampling, silent, calls=0, n=n)
    return [
        (key_of(MODEL, row.prompt, sampling, 0, number), _kept(row.segments[0]))
        for own in rows
        for number, row in enumerate(own)
    ]


def _kept(sample: Sample) -> Sample:
    """A sample as it is written down: it costs what reading its whole context costs, and its log-probabilities are left out."""
    return replace(sample, logprobs=(), spent=replace(sample.spent, cached=0, seconds=round(sample.spent.seconds, 4)))
