"""ACECode: does a policy that is rewarded for what its programs do when run become right more often, and faster?

No language model is trained. A transformer of two layers, whose tokens are whole lines, first learns to write known programs of ten
tasks of the bank evenly, right ones from fast to slow and wrong ones; at first it writes hardly anything else. Then it is
trained by executing what it writes. So what a figure can be at most follows from the programs that were chosen: how much of a gain there is
says nothing of real models, and a policy over known programs says nothing of other tasks. What is tested is whether the reward and the
algorithm find right and fast programs by execution, against what else as many executions buy.

Rewards and judgements are taken on inputs apart, by processor time, each beside the canonical solution, which is the reference. A judged
cost is in units of the reference's. All arms of a seed begin with one policy and see one table of rewards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch

from assay.experiments.core import Figure, Operator, Trained, experiment
from assay.experiments.mixers.training import in_parallel, over_seeds, train
from assay.experiments.rates import chosen, searched
from assay.methods.code.acecode import (
    Executed,
    Executor,
    Problem,
    Reward,
    best_of,
    ecc,
    faster_share,
    get,
    pass_at_1,
    write,
)
from assay.methods.code.acecode.training import PPO, Climbed, Critic, climb, rejection
from assay.methods.core.programs.judging import judge
from assay.methods.core.programs.workers import Workers
from assay.workloads.programs.task import Task, bank

Recipe = Mapping[str, Any]
Seen = dict[str, Any]
RECIPE: dict[str, Any] = {
    "tasks": 10, "programs": 6, "lines": 14, "width": 64, "layers": 2, "heads": 4, "base_steps": 200, "batch": 30, "rounds": 16,
    "samples": 4, "judged": 16, "level": 1, "tests": 3, "judged_tests": 6, "repeats": 3, "seeds": 3,
}  # fmt: skip
SMOKE: dict[str, Any] = {
    **RECIPE, "tasks": 2, "base_steps": 40, "rounds": 2, "samples": 2, "judged": 4, "tests": 2, "judged_tests": 2, "repeats": 1,
    "seeds": 2,
}  # fmt: skip
FULL: dict[str, Any] = {
    **RECIPE, "tasks": 35, "programs": 10, "lines": 40, "width": 128, "base_steps": 2000, "rounds": 100, "judged": 48, "level": 2,
    "repeats": 5, "seeds": 5,
}  # fmt: skip
BASE, AGAIN, MANY = "original", "original again", "best of N at inference"
ACE, GROUPS, REJECTION = "ppo", "grpo", "rejection sampling and fine-tuning"
CORRECT, SPEED, NOISE = "ppo, correctness only", "ppo, speed only", "ppo, random reward"
GRID = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
END = 0
WRONG = 2
"""Wrong programs of each task among those that the policy first learns."""
PATIENCE = 100.0
"""When judged a program may take so many times the reference: slow is not wrong."""
DRAWS = 60
"""Inputs that are looked at for those by which the known wrong programs are told: every sixth of them passes ten inputs at random."""
NO_PROGRAM = "?"

# -------------------------------------------------------------------------------------------------------------------- the setting


def known_programs(task: Task, recipe: Recipe) -> tuple[list[str], list[str]]:
    """Right and wrong programs of a task for the policy to learn, short ones: two wrong ones, and right ones evenly from the first, the
    expert's if it is short, to the last of the file."""

    def short(texts: Iterable[str]) -> list[str]:
        return [text for text in texts if len(lines_of(text)) <= recipe["lines"]]

    right = short(text for name, text in task.programs.items() if name != "canonical")
    right.sort(key=lambda text: text != task.programs["expert"])
    picked = np.linspace(0, len(right) - 1, recipe["programs"] - WRONG).round().astype(int)
    return [right[i] for i in dict.fromkeys(picked.tolist())], short(task.wrong.values())[:WRONG]


def lines_of(text: str) -> tuple[str, ...]:
    return tuple(line.rstrip() for line in text.splitlines() if line.strip())


def drawn_apart(task: Task, level: int, seed: int, taken: set[str]) -> Iterator[tuple[Any, ...]]:
    """Different inputs of a level, none of them among those taken."""
    seen = set(taken)
    for number in range(DRAWS):
        arguments = task.arguments(level, number, seed)
        if repr(arguments) not in seen:
            seen.add(repr(arguments))
            yield arguments


def telling(
    workers: Workers, task: Task, count: int, drawn: Iterable[tuple[Any, ...]], wrong: Sequence[str]
) -> list[Any]:
    """So many inputs, the first ones but for room for such as each wrong program answers wrongly, where there are any among those drawn."""
    kept: list[Any] = []
    passed: list[Any] = []
    for arguments in drawn:
        if len(kept) == count:
            break
        room = len(kept) + len(wrong) < count
        if wrong:
            [[expected]] = workers.run(task.programs["canonical"], task.entry_point, [arguments])
            outcomes = {text: workers.run(text, task.entry_point, [arguments])[0] for text in wrong}
            unseen = [text for text in wrong if judge([expected.value], outcomes[text], task.compare).right]
            room, wrong = room or len(unseen) < len(wrong), unseen
        (kept if room else passed).append(arguments)
    return kept + passed[: count - len(kept)]


def problems(workers: Workers, tasks: Sequence[Task], recipe: Recipe, seed: int) -> tuple[list[Problem], list[Problem]]:
    """The problems with inputs for the reward, and the same ones with inputs to be judged by."""
    both: tuple[list[Problem], list[Problem]] = ([], [])
    for task in tasks:
        taken: set[str] = set()
        canonical, wrong = task.programs["canonical"], known_programs(task, recipe)[1]
        for found, tests in zip(both, (recipe["tests"], recipe["judged_tests"]), strict=True):
            small = telling(workers, task, tests, drawn_apart(task, 0, seed, taken), wrong)
            taken |= set(map(repr, small))
            large = [next(drawn_apart(task, recipe["level"], seed, taken))]
            taken |= set(map(repr, large))
            found.append(Problem(task.id, task.entry_point, canonical, small, large, task.compare))
    return both


class Language:
    """Tokens: 0 ends a program, 1 to n are the tasks, which are the prompts, and the rest are lines."""

    def __init__(self, tasks: Sequence[Task], recipe: Recipe) -> None:
        self.programs = {
            task.id: [lines_of(text) for texts in known_programs(task, recipe) for text in texts] for task in tasks
        }
        self.names = list(self.programs)
        lines = [line for texts in self.programs.values() for text in texts for line in text]
        self.words = ["", *(NO_PROGRAM for _ in self.names), *dict.fromkeys(lines)]
        self.ids = {line: n for n, line in enumerate(self.words) if n > len(self.names)}
        self.longest = 2 + max(len(text) for texts in self.programs.values() for text in texts)
        self.prompts = [[1 + n] for n in range(len(self.names))]

    def text(self, tokens: Sequence[int]) -> str:
        return "\n".join(self.words[token] for token in tokens)

    def rows(self) -> list[list[int]]:
        """All known programs behind their prompts."""
        return [
            [1 + n, *(self.ids[line] for line in text), END]
            for n, name in enumerate(self.names)
            for text in self.programs[name]
        ]


def base_policy(language: Language, recipe: Recipe, seed: int, rate: float) -> tuple[torch.nn.Module, float, float]:
    """A transformer that writes the known programs evenly; its last loss and that of the lines' frequencies, nats a line."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    width = recipe["width"]
    config = LlamaConfig(
        vocab_size=len(language.words), hidden_size=width, intermediate_size=2 * width, num_hidden_layers=recipe["layers"],
        num_attention_heads=recipe["heads"], max_position_embeddings=language.longest + 2, bos_token_id=None, eos_token_id=END,
        pad_token_id=END,
    )  # fmt: skip
    policy = LlamaForCausalLM(config)
    rows = language.rows()
    longest = max(map(len, rows))
    ids = torch.tensor([row + [END] * (longest - len(row)) for row in rows])
    targets = torch.tensor([row[1:] + [-100] * (longest - len(row)) for row in rows])
    chance = torch.Generator().manual_seed(seed)
    n = recipe["base_steps"] * recipe["batch"]
    order = torch.cat([torch.randperm(len(rows), generator=chance) for _ in range(-(-n // len(rows)))])[:n]
    batches = ((ids[part, :-1], targets[part]) for part in order.split(recipe["batch"]))
    losses = train(policy, batches, steps=recipe["base_steps"], lr=rate, weight_decay=0.0)
    counts = np.bincount(targets[targets >= 0].numpy()).astype(float)
    shares = counts[counts > 0] / counts.sum()
    return policy.eval(), float(np.mean(losses[-5:])), float(-(shares * np.log(shares)).sum())


class Bench:
    """One seed: the base policy, the executors of rewards and of judgements, and the arms that begin with it."""

    def __init__(self, recipe: Recipe, seed: int, workers: Workers, base_rate: float) -> None:
        self.recipe, self.seed = recipe, seed
        tasks = list(bank().values())[: recipe["tasks"]]
        self.language = Language(tasks, recipe)
        rewarded, judged = problems(workers, tasks, recipe, seed)
        self.rewarded = Executor(workers, rewarded, repeats=recipe["repeats"])
        self.judge = Executor(workers, judged, repeats=recipe["repeats"], time_out=PATIENCE)
        self.base, self.loss, self.floor = base_policy(self.language, recipe, seed, base_rate)

    def scorer(self, of: Callable[[Executed], float]) -> Callable[[Any, Any], list[float]]:
        """Rewards of token ids, by execution."""

        def score(prompts: Sequence[Sequence[int]], texts: Sequence[Sequence[int]]) -> list[float]:
            names = self.language.names
            return [
                of(self.rewarded.run(names[prompt[0] - 1], self.language.text(text)))
                for prompt, text in zip(prompts, texts, strict=True)
            ]

        return score

    def trained(self, arm: str, rate: float) -> Climbed:
        """An arm, from the base policy; all have the same number of executions and of steps."""
        of: Callable[[Executed], float] = Reward()
        if arm == CORRECT:
            of = Reward(of="correctness")
        elif arm == SPEED:
            of = Reward(of="speed")
        elif arm == NOISE:
            chance = np.random.default_rng(self.seed)
            of = lambda executed: float(chance.uniform(-1, 1))  # noqa: E731
        settings = PPO(
            rounds=self.recipe["rounds"], samples=self.recipe["samples"], lr=rate, longest=self.language.longest
        )
        how: dict[str, Any] = {"end": END, "settings": settings, "seed": self.seed}
        if arm == REJECTION:
            return rejection(self.base, self.language.prompts, self.scorer(of), **how)
        torch.manual_seed(self.seed)
        critic = None if arm == GROUPS else Critic(self.base)
        return climb(self.base, self.language.prompts, self.scorer(of), critic=critic, **how)

    def written(self, policy: torch.nn.Module, seed: int, count: int) -> dict[str, list[str]]:
        """`count` programs for each task."""
        rows = [prompt for prompt in self.language.prompts for _ in range(count)]
        made = write(policy, rows, end=END, longest=self.language.longest, seed=seed).completions(END)
        texts = [self.language.text(tokens) for tokens in made]
        return {name: texts[n * count : (n + 1) * count] for n, name in enumerate(self.language.names)}

    def judged(self, texts: Mapping[str, Sequence[str]]) -> Seen:
        """Costs of right programs in units of the reference's, None for wrong ones, and the mean step reward, on inputs apart."""
        found = {name: [self.judge.run(name, text) for text in of_task] for name, of_task in texts.items()}
        step = Reward()
        return {
            "costs": {
                name: [1 / one.ratio if one.ended == "right" and one.ratio else None for one in of_task]
                for name, of_task in found.items()
            },
            "reward": float(np.mean([step(one) for of_task in found.values() for one in of_task])),
        }

    def judged_policy(self, policy: torch.nn.Module, seed: int = 1) -> Seen:
        return self.judged(self.written(policy, 1000 * self.seed + seed, self.recipe["judged"]))

    def best_of_many(self) -> Seen:
        """Of N programs of the base policy the best by the reward: as many executions as training takes, at inference."""
        n = max(1, self.recipe["rounds"] * self.recipe["samples"] // self.recipe["judged"])
        many = self.written(self.base, 1000 * self.seed + 3, n * self.recipe["judged"])
        parts = {name: [texts[i : i + n] for i in range(0, len(texts), n)] for name, texts in many.items()}
        picked = {
            name: [each[best_of(self.rewarded, name, each)] for each in of_task] for name, of_task in parts.items()
        }
        return self.judged(picked)


def outcomes(recipe: Recipe, seed: int) -> Seen:
    """All arms of one seed, judged."""
    with Workers("cpu_seconds") as workers:
        bench = Bench(recipe, seed, workers, rate_of(BASE))
        seen: Seen = {BASE: bench.judged_policy(bench.base), AGAIN: bench.judged_policy(bench.base, 2)}
        for arm in (ACE, GROUPS, REJECTION, CORRECT, SPEED, NOISE):
            before = bench.rewarded.asked
            climbed = bench.trained(arm, rate_of(arm if arm in (GROUPS, REJECTION) else ACE))
            seen[arm] = {
                **bench.judged_policy(climbed.policy),
                "executions": bench.rewarded.asked - before,
                "rounds": climbed.rounds,
            }
        before = bench.rewarded.asked
        seen[MANY] = {**bench.best_of_many(), "executions": bench.rewarded.asked - before}
        seen["base"] = {"loss": bench.loss, "floor": bench.floor, "programs run": bench.rewarded.ran}
    return seen


# --------------------------------------------------------------------------------------------------------------- learning rates

SEARCHES = {BASE: "acecode/base", **dict.fromkeys((ACE, GROUPS, REJECTION), "acecode/learners")}
SEARCH_SEED = 900


def rate_of(arm: str) -> float:
    return chosen(SEARCHES[arm], arm).rate


@cache
def _for_search() -> Bench:
    return Bench(RECIPE, SEARCH_SEED, Workers("cpu_seconds"), rate_of(BASE))


def base_loss(arm: str, rate: float) -> float:
    """The base policy's loss on the programs that it is to write, which are all there are."""
    tasks = list(bank().values())[: RECIPE["tasks"]]
    return base_policy(Language(tasks, RECIPE), RECIPE, SEARCH_SEED, rate)[1]


def learner_loss(arm: str, rate: float) -> float:
    """What the step reward lacks to 1, on other inputs than any figure's."""
    bench = _for_search()
    return 1 - bench.judged_policy(bench.trained(arm, rate).policy)["reward"]


searched(SEARCHES[BASE], arms=(BASE,), grid=(3e-3, 1e-2, 3e-2))(base_loss)
searched(SEARCHES[ACE], arms=(ACE, GROUPS, REJECTION), grid=GRID)(learner_loss)

# ------------------------------------------------------------------------------------------------------------------- the claims

OPERATOR = Operator(
    "a model that writes right and fast programs",
    free="fine-tuning on the best of its own programs by the same reward, with as many executions and steps",
)
PAPER = {"models": "four code models of 1.3 to 7 billion weights", "tasks": "unseen ones", "reward": "step"}
DEPARTURES = {
    "models": "a transformer of two layers over whole lines, which first learnt the programs of the tasks evenly",
    "tasks": "those that it was trained on, judged on other inputs: a policy over known programs does not generalise to others",
    "reward": "a step function in the order that the paper describes; its constants and the settings of PPO are our choice, for the "
    "paper's are not public",
}
POINTS = {"smoke": [{"recipe": SMOKE}], "small": [{"recipe": RECIPE}], "full": [{"recipe": FULL}]}
ARMS = (GROUPS, CORRECT, SPEED, MANY)


def all_seeds(recipe: Recipe) -> list[Seen]:
    return in_parallel(outcomes, [(dict(recipe), seed) for seed in range(recipe["seeds"])])


def gain(seen: Seen, arm: str) -> float:
    """Points of pass@1 over the original model."""
    return 100 * (pass_at_1(seen[arm]["costs"]) - pass_at_1(seen[BASE]["costs"]))


def faster(seen: Seen, arm: str) -> float:
    """Per cent of cases that run faster than the original model's; 0 where that one is never right, so that there is no case."""
    return 100 * (faster_share(seen[arm]["costs"], seen[BASE]["costs"]) or 0.0)


def figure_of(recipe: Recipe, unit: str, of: Callable[[Seen, str], float], deleted: str) -> Figure:
    """A figure of the trained policy with everything beside it, of the same measure; `deleted` is the arm without what the claim is of.

    The rival must have learnt, or beating it means nothing. The method itself need not: that would be a result.
    """
    found = all_seeds(recipe)

    def mean(arm: str) -> float:
        return float(np.mean([of(seen, arm) for seen in found]))

    def shares(arm: str) -> dict[str, float]:
        """Of what is written: wrong, right and slower than the reference beyond a tenth, and so on."""
        every = [cost for seen in found for costs in seen[arm]["costs"].values() for cost in costs]
        return {
            "wrong": sum(cost is None for cost in every) / len(every),
            "slower than the reference": sum(cost is not None and cost > 1 / 0.9 for cost in every) / len(every),
            "as fast": sum(cost is not None and 1 / 1.1 <= cost <= 1 / 0.9 for cost in every) / len(every),
            "faster": sum(cost is not None and cost < 1 / 1.1 for cost in every) / len(every),
        }

    arms = [BASE, AGAIN, ACE, REJECTION, *ARMS, NOISE]
    resolution = 100 / (recipe["tasks"] * recipe["judged"]) / len(found) ** 0.5
    ours = over_seeds([of(seen, ACE) for seen in found], resolution=resolution)
    times = {arm: [get(seen[arm]["costs"], seen[BASE]["costs"]) for seen in found] for arm in arms}
    ones = dict.fromkeys(found[0][BASE]["costs"], 1.0)
    nothing = (0.0, "no program at all, by (1 + reward) / 2")
    original = (
        float(np.mean([(1 + seen[BASE]["reward"]) / 2 for seen in found])),
        "the original model, by (1 + reward) / 2",
    )
    return Figure(
        ours.median,
        unit,
        ours.low,
        ours.high,
        baseline=mean(AGAIN),
        free=mean(REJECTION),
        controls={"deleted": mean(deleted), "random": mean(NOISE), "rival": mean(REJECTION)},
        arms={arm: mean(arm) for arm in ARMS},
        trained={
            "base": Trained(
                [seen["base"]["loss"] for seen in found], found[0]["base"]["floor"], "the lines' frequencies",
                chosen(SEARCHES[BASE], BASE).rate, chosen(SEARCHES[BASE], BASE).rates,
            ),
            **{
                arm: Trained(
                    [(1 + seen[arm]["reward"]) / 2 for seen in found], *floor, chosen(SEARCHES[arm], arm).rate,
                    chosen(SEARCHES[arm], arm).rates, higher_is_better=True,
                )
                for arm, floor in ((ACE, nothing), (GROUPS, nothing), (REJECTION, original))
            },
        },
        details={
            "by seed": {arm: [of(seen, arm) for seen in found] for arm in arms},
            "pass@1": {arm: [pass_at_1(seen[arm]["costs"]) for seen in found] for arm in arms},
            "general execution time (our reading)": times,
            "efficiency among right code (our reading)": {
                arm: [ecc(seen[arm]["costs"], ones) for seen in found] for arm in arms
            },
            "what is written": {arm: shares(arm) for arm in arms},
            "mean reward, inputs apart": {arm: [seen[arm]["reward"] for seen in found] for arm in arms},
            "executions asked for": {arm: [seen[arm].get("executions", 0) for seen in found] for arm in arms},
            "distinct programs run for rewards": [seen["base"]["programs run"] for seen in found],
            "KL from the original model, nats a line, last round": {
                arm: [seen[arm]["rounds"][-1]["kl"] for seen in found] for arm in (ACE, GROUPS, CORRECT, SPEED, NOISE)
            },
            "rewards are": "assay's: the paper's constants are not public",
        },
    )  # fmt: skip


@experiment(
    "acecode/pass-at-1",
    points=POINTS,
    operator=OPERATOR,
    paper=PAPER,
    departures=DEPARTURES,
    refuted_if="the whole interval of the gain in pass@1 lies below 0 points",
    refutes=lambda record: record["measured"]["high"] < 0,
    measured_here=(
        "points of pass@1 that a small policy over known programs gains, on its own tasks and other inputs; a third of what it first "
        "learns is wrong by our choice, which bounds the gain"
    ),
    minutes=120,
    memory_gib=8,
)
def pass_at_1_gained(recipe: Recipe) -> Figure:
    """How many points of pass@1 the policy gains over the original one; the interval is Student's t over seeds.

    Deleted is the original model sampled again, random PPO on a reward of noise, the rival (and free) fine-tuning on the best samples.
    """
    return figure_of(recipe, "points", gain, AGAIN)


@experiment(
    "acecode/faster-share",
    points=POINTS,
    operator=OPERATOR,
    paper=PAPER,
    departures=DEPARTURES,
    refuted_if="the whole interval of the share lies below that of the original model against itself",
    refutes=lambda record: record["measured"]["high"] < record["baseline"],
    measured_here=(
        "per cent of samples of a small policy over known programs that are right and faster by a tenth than the original policy's right "
        "sample beside them; the spread of speeds follows from the programs that we chose"
    ),
    minutes=120,
    memory_gib=8,
)
def faster_share_of_cases(recipe: Recipe) -> Figure:
    """The share of cases that run faster than the original model's, against that of the original model sampled again.

    A case is a sample where the original model's is right; a wrong one is never faster, so that becoming right alone makes more cases
    faster. Deleted is therefore PPO on a reward without speed, but for the time-out at five times the reference.
    """
    return figure_of(recipe, "%", faster, CORRECT)
