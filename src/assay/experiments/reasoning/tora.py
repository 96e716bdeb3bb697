r"""ToRA: is a small model right more often where it writes a program and reads its output, and does voting over such answers add to it?

SmolLM2-135M, shown four examples, writes a program for each question; the program is run in the sandbox; the model reads
its output and answers. The same model answers the same questions in text alone. Both are asked in three wordings. All tokens
are counted: prompts, programs and outputs; and text answers are voted on until they have taken as many. Outputs are left
out, or swapped between questions, as controls.

What is measured stands in for the paper's: the model is shown examples and not trained, it is the same on both sides, and
questions are sums and small stories in place of MATH. Samples are drawn once by the loop that keeps its cache (`draw`) and
read from a file; programs are run anew.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
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
from assay.workloads.models import load_model
from assay.workloads.reasoning import WORDINGS, Item, Kind, Wording, examples, items, prompt

MODEL, ROOM = "smollm2-135m", "tora"
GREEDY = Sampling(0.0, 1.0, 64, ("\n\n",))
WARM = replace(GREEDY, temperature=0.7)  # of the votes; our choice
VOTES, TEXTS = 8, 24
"""Trajectories that are voted on; text answers that were drawn, of which larger votes are drawn again."""
Kinds = Sequence[Sequence[Any]]
"""Kinds of questions, each with its level."""
SUMS: Kinds = [["sum", 2], ["steps", 1]]
"""Kinds that text answers get right in 10 to 60 of 100, on the pilot part."""
STORIES: Kinds = [["story", 2]]
"""Where programs are wrong often enough for a vote to change something, on the pilot part (4 of 6 right); text is right hardly ever."""

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


def programs() -> Tool:
    """What runs programs."""
    return PythonTool()


def texts(kind: Kind, level: int, wording: Wording, n_items: int, *, temperature: float) -> list[samples.Drawn]:
    """Text answers to questions that are judged: one at temperature 0, else `TEXTS` that are voted on (fewer of stories)."""
    n = 1 if not temperature else TEXTS if [kind, level] in SUMS else VOTES
    asked = items(kind, level=level, n=n_items, part="judged")
    prompts = [prompt(item, wording) for item in asked]
    found = kept()(prompts, samples.sampling_of(kind, False, temperature), n=n)
    return [samples.Drawn(*one) for one in zip(asked, prompts, found, strict=True)]


@dataclass(frozen=True)
class Asked:
    """One question in one wording, and what was answered by each arm."""

    item: Item
    wording: Wording
    tool: Trajectory
    arms: dict[str, Trajectory]
    greedy: samples.Drawn
    drawn: samples.Drawn
    votes: tuple[Trajectory, ...] = ()


DELETED, RANDOM = "deleted", "random"


def asked(kinds: Kinds, wordings: Sequence[Wording], n_items: int, *, votes: int = 0) -> list[Asked]:
    """All questions in all wordings, answered by every arm."""
    found = []
    for kind, level in kinds:
        questions = items(kind, level=level, n=n_items, part="judged")
        for wording in wordings:
            prompts = [tool_prompt(item, wording) for item in questions]

            def solve(tool: Tool, prompts: Sequence[str] = prompts, n: int = 0) -> list[list[Trajectory]]:
                return with_tools(kept(), prompts, WARM if n else GREEDY, tool, n=n or 1)

            rows = [row for (row,) in solve(programs())]
            controls = {DELETED: solve(silent), RANDOM: solve(Swapped(first_outputs(rows)))}
            many = solve(programs(), n=votes) if votes else [[] for _ in rows]
            greedy = texts(kind, level, wording, n_items, temperature=0.0)
            drawn = texts(kind, level, wording, n_items, temperature=0.8)
            for at, item in enumerate(questions):
                arms = {name: own[at][0] for name, own in controls.items()}
                found.append(Asked(item, wording, rows[at], arms, greedy[at], drawn[at], tuple(many[at])))
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
    counts = chance.multinomial(n, shares, draws) + 0.5 * chance.random((draws, len(different)))
    if "" in different:
        counts[:, different.index("")] -= n  # no answer wins only where there is no other
    best = counts.argmax(1)
    return float(np.mean([different[at] == wanted for at in best])) if wanted in different else 0.0


def by_question(found: Sequence[Asked], value: Callable[[Asked], float]) -> list[float]:
    """The mean over the wordings of each question: questions are resampled, wordings of one are no further questions."""
    groups: dict[tuple[str, int, str], list[float]] = {}
    for one in found:
        groups.setdefault((one.item.kind, one.item.level, one.item.question), []).append(value(one))
    return [sum(values) / len(values) for values in groups.values()]


def percent(found: Sequence[Asked], value: Callable[[Asked], float]) -> float:
    return 100 * float(np.mean(by_question(found, value)))


def of_tool(one: Asked) -> float:
    return float(one.tool.answer == one.item.answer)


def of_greedy(one: Asked) -> float:
    return float(one.greedy.right[0])


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
        mean, low, high = over_items(by_question(found, value))
        return {"tokens": tokens, "accuracy": 100 * mean, "low": 100 * low, "high": 100 * high}

    drawn = min(len(one.drawn.samples) for one in found)
    curve = {"text, greedy": point(of_greedy, float(np.mean([total_of(one.greedy) for one in found])))}
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
    loops = {name: ToolLoop(loaded.model, loaded.tokenizer, reuse=name == "kept") for name in ("kept", "restart")}
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    rows: dict[str, list[Trajectory]] = {}
    for turn in range(rounds):
        for name in list(loops)[:: -1 if turn % 2 else 1]:
            began = time.perf_counter()
            rows[name] = [row for (row,) in loops[name](prompts, GREEDY, programs())]
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
    "task": "MATH", "model": "ToRA-7B, trained on 16k trajectories of GPT-4 and on shaped ones", "calls": CALLS, "temperature": 0.0,
    "baseline": "WizardMath-70B, text alone",
}  # fmt: skip
DEPARTURES = {
    "task": "two-digit sums, and sums and differences of two numbers, in three wordings: its text is right in 10 to 60 of 100",
    "model": "SmolLM2-135M shown four examples, not trained: no model that runs here solves MATH",
    "baseline": "the same model in text alone; the paper's is ten times as large as the one with tools",
}
SMALL: dict[str, Any] = {"kinds": SUMS, "wordings": list(WORDINGS), "n_items": 16}
FULL: dict[str, Any] = {**SMALL, "n_items": 48}
SMOKE: dict[str, Any] = {"kinds": SUMS[:1], "wordings": ["plain"], "n_items": 4}
STORY: dict[str, Any] = {"kinds": STORIES, "wordings": list(WORDINGS), "n_items": 10, "k": VOTES}
TIMED = 8  # trajectories on which the loop is timed


@experiment(
    "tora/math-7b",
    points={"smoke": [{**SMOKE, "timed": 0}], "small": [{**SMALL, "timed": TIMED}], "full": [{**FULL, "timed": 32}]},
    operator=OPERATOR,
    paper=PAPER,
    departures=DEPARTURES,
    refuted_if="the same model in text alone, at temperature 0, is right as often: the whole interval of the difference lies at or below 0",
    measured_here="accuracy of SmolLM2-135M, shown four examples, on sums of two numbers in three wordings; text alone is its baseline",
)
def math_7b(kinds: Kinds, wordings: Sequence[Wording], n_items: int, timed: int) -> Figure:
    """Accuracy with the tool over text alone, with text voted to equal tokens beside it."""
    found = asked(kinds, wordings, n_items)
    base = percent(found, of_greedy)
    gain, low, high = over_items(by_question(found, lambda one: of_tool(one) - of_greedy(one)))
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
        "questions": len(by_question(found, of_tool)),
        "by_kind_and_wording": {"tool": table(found, of_tool), "text, greedy": table(found, of_greedy)},
        "accuracy_against_all_tokens": against_tokens(found),
        "costs": costs(found, lambda one: [one.tool]),
        "text_answers_at_equal_tokens": float(np.mean([equal_votes(one, total(one.tool).tokens) for one in found])),
        "what earns it": "the program" if program >= 100 * gain + base else "the program, and reading its output",
    }
    if timed:
        details["loop"] = measured([tool_prompt(one.item, one.wording) for one in found[:timed]])
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
        "full": [{**STORY, "n_items": 48}],
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
        "task": "small stories with a product and a sum, in three wordings: programs of this model are wrong for a third of them",
        "model": DEPARTURES["model"],
        "k": "8 trajectories are voted on; the vote of 50 is estimated from them, drawn with replacement, and stands in the details",
    },
    refuted_if="answers voted on are right less often than the one at temperature 0: the whole interval of the difference lies below 0",
    measured_here="accuracy of SmolLM2-135M, shown four examples, on stories in three wordings: 8 answers voted, over one at temperature 0",
)
def math_34b_sc50(kinds: Kinds, wordings: Sequence[Wording], n_items: int, k: int) -> Figure:
    """Accuracy of a vote over trajectories, over the likeliest trajectory."""
    found = asked(kinds, wordings, n_items, votes=k)
    base = percent(found, of_tool)
    gain, low, high = over_items(by_question(found, lambda one: of_votes(one) - of_tool(one)))
    single = percent(found, of_one_vote)
    rival = percent(found, lambda one: of_text_votes(one, tokens_of_votes(one)))
    by_k = {
        str(n): percent(
            found,
            lambda one, n=n: voted([row.answer for row in one.votes], one.item.answer, n),  # type: ignore[misc]
        )
        for n in (1, 2, 4, 8, 50)
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
            "text alone, at temperature 0": percent(found, of_greedy),
        },
        details={
            "questions": len(by_question(found, of_tool)),
            "accuracy_by_votes_drawn_with_replacement": by_k,
            "by_kind_and_wording": {
                "voted": table(found, of_votes), "greedy": table(found, of_tool), "text, greedy": table(found, of_greedy),
            },
            "costs": costs(found, lambda one: one.votes),
            "costs_of_one_at_temperature_0": costs(found, lambda one: [one.tool]),
            "the output deleted": percent(found, lambda one: float(one.arms[DELETED].answer == one.item.answer)),
            "the output of another question": percent(
                found, lambda one: float(one.arms[RANDOM].answer == one.item.answer)
            ),
        },
    )  # fmt: skip


# -------------------------------------------------------------------------------------------------------------------- drawing


def keep(row: Trajectory, sampling: Sampling, number: int) -> list[tuple[str, Sample]]:
    """The segments of a trajectory as the samples that `with_tools` asks for: each is known by the text it continues."""
    found, text = [], ""
    asked = replace(sampling, stop=(*sampling.stop, OUTPUT))
    for at, segment in enumerate(row.segments):
        found.append((key_of(MODEL, row.prompt + text, asked, 0, number), _kept(segment)))
        text += segment.text
        if at < len(row.outputs):
            text += output_block(text, row.outputs[at].shown)
    return found


def draw() -> dict[str, samples.Kept]:
    """Draw what the experiments ask for at `small`, by the loop that keeps its cache, so that no examples are read twice; then ask."""
    store = samples.generator(MODEL, ROOM)
    loaded = load_model(MODEL)
    loop, tool = ToolLoop(loaded.model, loaded.tokenizer), programs()
    for point in (SMALL, STORY):
        for kind, level in point["kinds"]:
            for wording in WORDINGS:
                questions = items(kind, level=level, n=point["n_items"], part="judged")
                _draw(store, loop, tool, questions, wording, point.get("k", 0))
    math_7b(**SMALL, timed=0)
    math_34b_sc50(**STORY)
    return {MODEL: store}


def _draw(
    store: samples.Kept, loop: ToolLoop, tool: Tool, questions: Sequence[Item], wording: Wording, votes: int
) -> None:
    """Draw every arm of some questions in one wording."""
    prompts = [tool_prompt(item, wording) for item in questions]
    short = [prompt(item, wording) for item in questions]
    zero, warm = (samples.sampling_of(questions[0].kind, False, temperature) for temperature in (0.0, 0.8))
    rows = [row for (row,) in loop(prompts, GREEDY, tool)]
    store.add([one for row in rows for one in keep(row, GREEDY, 0)])
    for control in (silent, Swapped(first_outputs(rows))):
        begun = [
            row.prompt + row.segments[0].text + output_block(row.segments[0].text, control(program).shown)
            for row in rows
            if (program := waiting(row.segments[0].text)) is not None
        ]
        later = loop(begun, GREEDY, control, calls=CALLS - 1) if begun else []
        store.add([one for (row,) in later for one in keep(row, GREEDY, 0)])
    store.add(plain(loop, short, zero, 1))
    if votes:
        many = loop(prompts, WARM, tool, n=votes)
        store.add([one for own in many for number, row in enumerate(own) for one in keep(row, WARM, number)])
        store.add(plain(loop, short, warm, VOTES))


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
