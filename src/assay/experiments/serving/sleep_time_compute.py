"""Sleep-time compute: how many tokens less does an answer take behind a memory, and what does one cost with the sleep charged?

Small decoders trained here (`sleep_time_compute_models`) read a table of digits and are asked for sums. They may think for an answer
at four lengths, or sleep over the table first, with nobody's question, and look the answer up. All of it goes through the room's own
agent, store, ledger and grader, so that the tokens are those that were booked; the models are small, the accuracies theirs.

What decides nothing here: how long a chain of thought is, is the size of the table, which we chose. What does decide: which of the
lengths are right as often as the memory, whether a memory written without the question is right at all, and the rivals that need no
idle time.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

from assay.experiments.core import Figure, Guard, Operator, Quality, Trained, experiment
from assay.experiments.mixers.training import in_parallel, over_seeds
from assay.experiments.rates import chosen
from assay.experiments.seeds import paired
from assay.experiments.serving import sleep_time_compute_models as models
from assay.experiments.serving.sleep_time_compute_models import FULL, LEVELS, RECIPE, SEARCH, SMOKE, Recipe, Said, Table
from assay.measure.stats import Interval
from assay.methods.serving.sleep_time_compute import (
    PAPER_T,
    SleepError,
    SleepTimeAgent,
    Store,
    amortised_cost,
    break_even,
    grade,
)

MARGIN = 0.03  # of accuracy: what counts as equal
QUESTIONS = 10  # a context
READ, KEPT = 0.25, 0.025
"""Prices of a token that is read, and of one from a kept prefix, in generated ones: after list prices as recalled, our choice."""
SLEEPING, DELETED, RANDOM, TWICE, ONLY, TRUSTED = (
    "sleeping", "no memory", "memory of another table", "table twice", "memory only", "memory of another table, trusted",
)  # fmt: skip
Seen = dict[str, Any]


# ----------------------------------------------------------------------------------------------------------------- one seed


def seed_scores(recipe: Recipe, seed: int) -> Seen:
    """One model on tables that it was not trained on: accuracy and tokens of every arm, by the agent's own ledger."""
    chat = models.word_model(recipe, seed)
    found = models.tables(recipe, recipe["contexts"], part="heldout")
    contexts = [models.table_text(table) for table in found]
    asked = models.questions(recipe)
    accuracy: dict[str, float] = {}
    tokens: dict[str, float] = {}
    right: dict[str, list[bool]] = {}

    def arm(name: str, agents: Sequence[SleepTimeAgent], shown: Sequence[str]) -> None:
        """Ask all questions, each about its context as it is shown, of the agent that has the context."""
        prompts = [
            one.prompts.test(
                context, kept.blocks if (kept := one.store.get(one.key(context))) else (), question, one.budget
            )
            for one, context in zip(agents, shown, strict=True)
            for question in asked
        ]
        chat.fill(prompt[-1]["content"] for prompt in prompts)
        before = sum(one.ledger.total("test").completion for one in set(agents))
        right[name] = [
            grade(one.answer(question, context).text, str(models.answer_of(table, question, recipe["base"])))
            for one, context, table in zip(agents, shown, found, strict=True)
            for question in asked
        ]
        accuracy[name] = sum(right[name]) / len(right[name])
        spent = sum(one.ledger.total("test").completion for one in set(agents)) - before
        tokens[name] = spent / len(right[name])

    def agent(budget: int = 0, form: str = "memory") -> SleepTimeAgent:
        return SleepTimeAgent(Store(), chat, budget, prompts=Said(form), turns=2)

    many = len(contexts)
    for level in range(LEVELS):
        arm(DELETED if level == 0 else f"budget {level}", [agent(level)] * many, contexts)
    chat.fill(Said().sleep(context)[0]["content"] for context in contexts)
    sleeper = agent()
    slept = [prepared(sleeper, context) for context in contexts]
    arm(SLEEPING, [sleeper] * many, contexts)
    arm(TWICE, [agent()] * many, [f"{context} table {context}" for context in contexts])
    for name, form, turned in ((ONLY, "only", 0), (RANDOM, "other", 1), (TRUSTED, "memory", 1)):
        arm(name, [with_memory(agent(form=form), contexts, slept, turned)] * many, contexts)

    entries = [memory_right(memory, table, recipe) for memory, table in zip(slept, found, strict=True)]
    known = [entry for each in entries for entry in each]
    believed = [ok for ok, entry in zip(right[SLEEPING], known, strict=True) if not entry]
    sleep = sleeper.ledger.total("sleep")
    test = sleeper.ledger.total("test")
    answers = [[models.answer_of(table, question, recipe["base"]) for question in asked] for table in found]
    return {
        "accuracy": accuracy,
        "tokens": tokens,
        "sleep_tokens": sleep.completion / many,
        "slept": sum(memory is not None for memory in slept) / many,
        "context_words": sleep.prompt / sleep.calls - 1 if sleep.calls else 0.0,
        "prompt_words": test.prompt / test.calls,
        "memory_right": sum(known) / len(known),
        "right_where_the_memory_is_wrong": sum(believed) / len(believed) if believed else None,
        "no_question": sum(max(each.count(a) for a in each) / len(each) for each in answers) / many,
        "likelihoods": chat.likelihoods(
            [Said().test(context, (), question, 0)[0]["content"] for context in contexts for question in asked],
            [answer for each in answers for answer in each],
        ),
        "most_frequent_digit": most_frequent([answer for each in answers for answer in each]),
    }


def prepared(agent: SleepTimeAgent, context: str) -> str | None:
    """The memory of a context, slept over if need be; None where sleeping failed."""
    try:
        return agent.prepare(context).blocks[0]
    except SleepError:
        return None


def with_memory(
    agent: SleepTimeAgent, contexts: Sequence[str], memories: Sequence[str | None], turned: int
) -> SleepTimeAgent:
    """An agent that has the memories of the contexts so many places further on: its own for 0."""
    source = dict(zip(contexts, [*memories[turned:], *memories[:turned]], strict=True))
    for context, memory in source.items():
        if memory is not None:
            given = SleepTimeAgent(agent.store, lambda messages, memory=memory, **_: (memory, 0), prompts=agent.prompts)
            given.prepare(context)
    return agent


def memory_right(memory: str | None, table: Table, recipe: Recipe) -> list[bool]:
    """Of every question, whether the memory has the right answer behind it."""
    said = dict(word.partition("=")[::2] for word in ([] if memory is None else memory.split()))
    return [said.get(q) == str(models.answer_of(table, q, recipe["base"])) for q in models.questions(recipe)]


def most_frequent(answers: Sequence[int]) -> float:
    return max(answers.count(answer) for answer in set(answers)) / len(answers)


# ------------------------------------------------------------------------------------------------------------- what they show


def scores(recipe: Recipe) -> list[Seen]:
    """`seed_scores` of every seed."""
    found: list[Seen] = in_parallel(seed_scores, [(dict(recipe), seed) for seed in range(recipe["seeds"])])
    return found


def level_name(level: int) -> str:
    return DELETED if level == 0 else f"budget {level}"


def enough(seen: Seen) -> int:
    """The fewest tokens of thinking that are right as often as sleeping, less the margin; where none is, the most accurate budget.

    Chosen on the tables that are judged, which is in favour of thinking.
    """
    accuracy, tokens = seen["accuracy"], seen["tokens"]
    levels = list(range(LEVELS))
    fine = [n for n in levels if accuracy[level_name(n)] >= accuracy[SLEEPING] - MARGIN]
    if not fine:
        return max(levels, key=lambda n: accuracy[level_name(n)])
    return min(fine, key=lambda n: tokens[level_name(n)])


def costs(
    seen: Seen, *, queries: int = QUESTIONS, t: float = PAPER_T, read: float = 0.0, kept: float | None = None
) -> dict[str, float]:
    """What a question costs by each way that is right as often, in generated tokens of idle time.

    `read` is the price of a read token; with `kept` prefixes are kept, read once in idle time, and cost that much afterwards. Thinking
    is at the budget that is enough. The rivals use the same memory and no idle time: "one call" answers all questions at once, so that they
    must all be known, and never writes more than thinking about each would; "at the first question" sleeps when the first one comes.
    """
    context, question = seen["context_words"], 2.0  # the budget, and what is asked
    memory = max(seen["prompt_words"] - context - question, 0.0)
    think, test, sleep = seen["tokens"][level_name(enough(seen))], seen["tokens"][SLEEPING], seen["sleep_tokens"]

    def prompts(prefix: float, rest: float) -> tuple[float, float]:
        """Reading for one question: in idle time, and while somebody waits."""
        if kept is None:
            return 0.0, read * (prefix + rest)
        return read * prefix / queries, kept * prefix + read * rest

    idle, waited = prompts(context, question)
    idle_memory, waited_memory = prompts(context + memory, question)
    work = sleep + read * context
    all_at_once = min(sleep, queries * think)
    behind = read * context if kept is None else kept * context
    return {
        "thinking": amortised_cost(idle * queries, think + waited, queries, t=t),
        "sleeping": amortised_cost(work + idle_memory * queries, test + waited_memory, queries, t=t),
        "one call": t * (all_at_once + behind + read * queries) / queries + idle,
        "at the first question": t * (sleep + behind) / queries
        + amortised_cost(idle_memory * queries, test + waited_memory, queries, t=t),
    }


RIVALS = ("one call", "at the first question")


def log_mean(values: Sequence[float]) -> Interval:
    """The geometric mean over seeds, with Student's interval of the logarithms."""
    found = over_seeds([math.log(value) for value in values])
    return Interval(math.exp(found.median), math.exp(found.low), math.exp(found.high), found.n)


def passes(seen: Seen) -> tuple[int, float]:
    """How many answers without thinking take as many tokens as one behind a memory, its share of the sleep included, and how often
    one of them is right: an oracle chooses. At least one."""
    spent = seen["sleep_tokens"] / QUESTIONS + seen["tokens"][SLEEPING]
    k = max(int(spent / max(seen["tokens"][DELETED], 1)), 1)
    return k, sum(1 - (1 - p) ** k for p in seen["likelihoods"]) / len(seen["likelihoods"])


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def quality_of(found: Sequence[Seen]) -> Quality:
    """Accuracy behind a memory against that of the best budget of thinking, with Student's t over the seeds' differences."""
    ours = [seen["accuracy"][SLEEPING] for seen in found]
    best = [max(seen["accuracy"][level_name(n)] for n in range(LEVELS)) for seen in found]
    lost, base = paired(ours, best), mean(best)

    def of(arm: str) -> float:
        return mean([seen["accuracy"][arm] for seen in found])

    controls = {
        "deleted": of(DELETED),
        "random": of(RANDOM),
        "rival": mean([passes(seen)[1] for seen in found]),
        TWICE: of(TWICE),
        ONLY: of(ONLY),
        TRUSTED: of(TRUSTED),
        "no question (the best constant answer)": mean([seen["no_question"] for seen in found]),
    }
    rival = "as many tokens of answers without thinking, the right one picked by an oracle (pass@k)"
    return Quality(base + lost.median, base, base + lost.low, base + lost.high, controls, rival)


def as_trained(found: Sequence[Seen]) -> dict[str, Trained]:
    """The abilities that are compared, all of one model a seed. Answers without thinking are a control: they may fail."""
    rate = chosen(SEARCH, "one model of all kinds")
    floor = max(seen["most_frequent_digit"] for seen in found)
    arms = {
        "thinking": [max(seen["accuracy"][level_name(n)] for n in range(1, LEVELS)) for seen in found],
        "sleeping": [seen["accuracy"][SLEEPING] for seen in found],
    }
    return {
        name: Trained(values, floor, "the most frequent digit", rate.rate, rate.rates, higher_is_better=True)
        for name, values in arms.items()
    }


def shown(found: Sequence[Seen], recipe: Recipe) -> dict[str, Any]:
    """What both claims' records tell beside their figures."""
    return {
        "accuracy": {arm: [seen["accuracy"][arm] for seen in found] for arm in found[0]["accuracy"]},
        "test_tokens": {arm: mean([seen["tokens"][arm] for seen in found]) for arm in found[0]["tokens"]},
        "sleep_tokens": [seen["sleep_tokens"] for seen in found],
        "prompt_words_behind_a_memory": mean([seen["prompt_words"] for seen in found]),
        "budget_that_is_enough": [enough(seen) for seen in found],
        "contexts_with_a_memory": [seen["slept"] for seen in found],
        "memory_right": [seen["memory_right"] for seen in found],
        "right_where_the_memory_is_wrong": [seen["right_where_the_memory_is_wrong"] for seen in found],
        "answers_of_pass_at_k": [passes(seen)[0] for seen in found],
        "tables": recipe["contexts"],
        "questions_a_table": len(models.questions(recipe)),
    }


def seconds_of_answers(recipe: Recipe, seen: Seen, *, contexts: int = 3) -> dict[str, float]:
    """Median seconds of the test phase for one question on this machine, one request at a time, of the first seed's model.

    "prefix kept" runs the question alone behind a cache of what stands before it; that says the same as reading all of it.
    """
    chat = models.word_model(recipe, 0)
    level, asked = enough(seen), models.questions(recipe)
    times: dict[str, list[float]] = {}
    differed = 0
    for table in models.tables(recipe, contexts, part="heldout"):
        context = models.table_text(table)
        memory = models.memory_text(table, recipe)
        for name, blocks, budget in (("thinking", [], level), ("sleeping", [memory], 0)):
            prompts = [Said().test(context, blocks, question, budget)[0]["content"] for question in asked]
            prefix = prompts[0].rpartition(f" w{budget} ")[0]
            cache = chat.read(prefix)
            for prompt in prompts:
                said = []
                for how, kept in ((name, None), (f"{name}, prefix kept", cache)):
                    start = time.perf_counter()
                    said.append(chat.once(prompt, prefix if kept is not None else "", kept))
                    times.setdefault(how, []).append(time.perf_counter() - start)
                differed += said[0] != said[1]
    medians = {name: sorted(values)[len(values) // 2] for name, values in times.items()}
    return {**medians, "answers_that_a_kept_prefix_changed": float(differed)}


def of_size(level: int, recipe: Recipe) -> float:
    """The ratio of tokens, by arithmetic, for lists of another length at that budget of thinking: what is our choice in the figure."""
    table = [[0] * recipe["values"]] * recipe["lists"]
    lengths = [len(models.thought(table, question, level, recipe["base"])) for question in models.questions(recipe)]
    return mean(lengths) / len(models.thought(table, "A", 0, recipe["base"]))


# ---------------------------------------------------------------------------------------------------------------- experiments

ANSWERS = Operator(
    "answers to several questions about one context",
    free="the same memory without idle time: all questions in one call, or worked out when the first one comes, whichever is less",
)
GUARD = Guard(
    "share of right answers",
    MARGIN,
    higher_is_better=True,
    relative=False,
)
PAPER: dict[str, Any] = {
    "task": "stateful GSM-Symbolic and stateful AIME", "model": "GPT-4o-mini, GPT-4o, and reasoning models", "budgets": 5,
    "questions": QUESTIONS, "t": PAPER_T, "sleeps": 1,
}  # fmt: skip
DEPARTURES = {
    "task": "sums of digits in small tables: no model that runs here solves the paper's problems",
    "budgets": "four lengths of thinking: the answer at once, the sum of each list first, all running sums, every cell read out too",
    "model": "decoders of about 0.2M parameters trained here for this task, one for sleeping, thinking and answering",
}
HERE = (
    "tokens of models trained here that add up digits of a table: how many a chain of thought has follows from the size of the table, "
    "which we chose, as we did what a memory holds; which chains are needed, and whether memories are right, is measured"
)
POINTS: dict[str, list[dict[str, Any]]] = {
    "smoke": [{"recipe": SMOKE}],
    "small": [{"recipe": RECIPE}],
    "full": [{"recipe": FULL}],
}


def rival_as_good(record: Mapping[str, Any]) -> bool:
    """Whether something that needs no memory is right as often: answers at equal tokens, or the table read twice."""
    quality = record["quality"]
    return any(quality["controls"][name] >= quality["candidate"] - MARGIN for name in ("rival", TWICE))


@experiment(
    "sleep_time_compute/test-time-tokens",
    points=POINTS,
    operator=ANSWERS,
    guard=GUARD,
    paper=PAPER,
    departures=DEPARTURES,
    refuted_if="an answer behind a memory takes as many tokens as the shortest thinking that is right as often, or pass@k at equal tokens "
    "or the table read twice is right as often",
    refutes=lambda record: record["measured"]["high"] < 1 or rival_as_good(record),
    measured_here=HERE,
    minutes=600,
)
def fewer_test_tokens(recipe: dict[str, Any]) -> Figure:
    """Tokens of the shortest thinking that is right as often as sleeping (within 0.03), over those of an answer behind a memory.

    The geometric mean over seeds. The tokens of the sleep are not in this figure, as in the paper; they are in the other claim. The guard
    is the accuracy against that of the best budget. Controls, all learnt by the same model from as many rows: no memory, the memory of
    another table marked as such, and pass@k at equal tokens with an oracle; further the table twice, the memory without the table,
    another table's memory that is believed, and the best constant answer for a table, which nothing without the question can beat.
    """
    found = scores(recipe)
    ratios = log_mean([seen["tokens"][level_name(enough(seen))] / seen["tokens"][SLEEPING] for seen in found])
    one = [costs(seen, t=1.0) for seen in found]  # all of it while somebody waits
    free = [each["thinking"] / min(each[name] for name in RIVALS) for each in one]
    thought = {
        f"thinking at budget {n}": mean(
            [seen["tokens"][level_name(enough(seen))] / seen["tokens"][level_name(n)] for seen in found]
        )
        for n in range(1, LEVELS)
    }
    return Figure(
        ratios.median,
        "x",
        low=ratios.low,
        high=ratios.high,
        baseline=1.0,
        free=log_mean(free).median,
        quality=quality_of(found),
        trained=as_trained(found),
        details={
            **shown(found, recipe),
            "tokens_of_the_shortest_thinking_over": thought,
            "ratio_with_so_many_cells_in_a_list_computed": {
                str(n): of_size(enough(found[0]), {**recipe, "values": n}) for n in (2, 4, 8, 16)
            },
            "test_seconds": seconds_of_answers(recipe, found[0]),
        },
    )


@experiment(
    "sleep_time_compute/amortised-cost",
    points=POINTS,
    operator=ANSWERS,
    guard=GUARD,
    paper=PAPER,
    departures=DEPARTURES,
    refuted_if="ten questions cost as much with a sleep as by thinking about each, in the paper's formula, or with every token charged, "
    "those that are read too, where both sides keep prefixes; or pass@k at equal tokens or the table read twice is right as often",
    refutes=lambda record: (
        record["measured"]["high"] < 1
        or max(record["details"]["ratio_with_every_token_charged"]) < 1
        or rival_as_good(record)
    ),
    measured_here=HERE + "; that a token in idle time costs a tenth is the paper's price, recalled",
    minutes=600,
)
def amortised(recipe: dict[str, Any]) -> Figure:
    """Cost a question of the shortest thinking that is right as often, over that with a sleep, for all ten questions about a table.

    By the paper's formula: tokens generated, those that somebody waits for at ten times the price; the geometric mean over seeds. In the
    details: the same for fewer questions and at equal prices, the number of questions from which it pays, and with the tokens that are read
    charged at a quarter of generated ones, with prefixes kept (at a tenth of that) and without.
    """
    found = scores(recipe)
    ways = [costs(seen) for seen in found]
    ratio = log_mean([each["thinking"] / each["sleeping"] for each in ways])
    free = log_mean([each["thinking"] / min(each[name] for name in RIVALS) for each in ways])
    every = [costs(seen, read=READ, kept=KEPT) for seen in found]
    fresh = [costs(seen, read=READ) for seen in found]

    def over(listed: list[dict[str, float]]) -> list[float]:
        return [each["thinking"] / each["sleeping"] for each in listed]

    curve = {
        f"t = {t:g}": {
            str(queries): averaged([costs(seen, queries=queries, t=t) for seen in found]) for queries in (1, 2, 5, 10)
        }
        for t in (PAPER_T, 1.0)
    }
    return Figure(
        ratio.median,
        "x",
        low=ratio.low,
        high=ratio.high,
        baseline=1.0,
        free=free.median,
        arms={
            "one call for all ten questions": log_mean([e["thinking"] / e["one call"] for e in ways]).median,
            "slept at the first question": log_mean([e["thinking"] / e["at the first question"] for e in ways]).median,
        },
        quality=quality_of(found),
        trained=as_trained(found),
        details={
            **shown(found, recipe),
            "cost_a_question": curve,
            "ratio_at_equal_prices": over([costs(seen, t=1.0) for seen in found]),
            "ratio_with_every_token_charged": over(every),
            "ratio_with_every_token_charged_and_no_prefix_kept": over(fresh),
            "cost_with_every_token_charged": averaged(every),
            "cost_with_every_token_charged_and_no_prefix_kept": averaged(fresh),
            "pays_from_questions": {
                f"t = {t:g}": [
                    min(
                        break_even(
                            seen["sleep_tokens"],
                            seen["tokens"][level_name(enough(seen))],
                            seen["tokens"][SLEEPING],
                            t=t,
                        ),
                        1e9,
                    )
                    for seen in found
                ]
                for t in (PAPER_T, 1.0)
            },
        },
    )


def averaged(listed: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: mean([each[name] for each in listed]) for name in listed[0]}
