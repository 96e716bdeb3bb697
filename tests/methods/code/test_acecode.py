"""ACECode: the order of rewards, the executor, trl's call, and the gradients of PPO and GRPO against what they must be."""

import copy
import itertools
import math
import statistics
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tests.tools import needs_sandbox
from torch import nn

from assay.methods.code.acecode import (
    Executed,
    Executor,
    Problem,
    Reward,
    best_of,
    ecc,
    faster_share,
    get,
    normalised,
    pass_at_1,
    program_in,
    reward_function,
    token_logprobs,
    write,
)
from assay.methods.code.acecode.training import (
    PPO,
    Critic,
    climb,
    gae,
    group_normalised,
    k3,
    policy_loss,
    rejection,
    token_rewards,
    whitened,
)
from assay.methods.core.programs.workers import Outcome, Workers
from assay.methods.core.sandbox import Limits

RATIOS = (0.2, 0.4999, 0.5, 0.8, 0.9, 1.0, 1.0999, 1.1, 1.5, 2.0, 3.0, math.inf)

# ------------------------------------------------------------------------------------------------------------------- the reward


@pytest.mark.parametrize("reward", [Reward(), Reward(smooth=True), Reward(of="correctness")])
def test_the_order_of_outcomes_is_strict_and_bounded(reward):
    right = [reward(Executed("right", 1.0, ratio)) for ratio in RATIOS]
    wrong = [reward(Executed("wrong", passed, 50.0)) for passed in (0.0, 0.3, 0.6, 0.999)]
    assert right == sorted(right)
    assert all(a < b for a, b in itertools.pairwise(wrong))
    assert -1 <= reward(Executed("no program")) < reward(Executed("failed")) < wrong[0]
    assert wrong[-1] < 0 < right[0] <= right[-1] <= 1


def test_the_steps_are_the_stated_ones_and_noise_around_one_does_nothing():
    reward = Reward()
    assert [reward(Executed("right", 1.0, ratio)) for ratio in RATIOS] == [
        0.5, 0.5, 0.625, 0.625, 0.75, 0.75, 0.75, 0.875, 0.875, 1.0, 1.0, 1.0,
    ]  # fmt: skip
    assert [reward(Executed("wrong", passed)) for passed in (0, 0.5)] == pytest.approx([-0.3, -0.2])
    assert (reward(Executed("failed")), reward(Executed("no program"))) == (-0.6, -1.0)
    smooth = Reward(smooth=True)
    assert [smooth.speed_step(ratio) for ratio in (0.1, 0.5, 1.0, math.sqrt(2), 2.0, 9.0)] == pytest.approx(
        [0, 0, 0.5, 0.75, 1, 1]
    )


def test_ablations_look_at_one_thing_only():
    slow, fast = Executed("right", 1.0, 0.3), Executed("right", 1.0, 3.0)
    quick_and_wrong, slow_and_wrong = Executed("wrong", 0.9, 3.0), Executed("wrong", 0.9, 0.3)
    correctness, speed = Reward(of="correctness"), Reward(of="speed")
    assert correctness(slow) == correctness(fast) == 0.75
    assert correctness(quick_and_wrong) == Reward()(quick_and_wrong)
    assert speed(quick_and_wrong) == speed(fast) > speed(slow_and_wrong) == speed(slow)
    assert speed(Executed("failed")) == Reward().failed


@pytest.mark.parametrize(
    "wrong",
    [
        {"right": -0.1}, {"wrong": -0.7}, {"passing": 0.5}, {"passing": -0.1}, {"no_program": -1.5}, {"speed": 0.8}, {"failed": -1.0},
        {"steps": (0.0, 1.0)}, {"edges": (0.5, 0.9, 0.9, 2.0)}, {"steps": (0.0, 0.5, 0.25, 0.75, 1.0)}, {"of": "time"},
        {"steps": (0.1, 0.25, 0.5, 0.75, 1.0)}, {"edges": (0.5, 0.9, 1.1, math.inf)},
    ],
)  # fmt: skip
def test_constants_that_break_the_order_are_refused(wrong):
    with pytest.raises(ValueError, match="must"):
        Reward(**wrong)


@pytest.mark.parametrize(
    "bad", [("right", 1.0, None), ("right", 0.5, 1.0), ("wrong", 1.0), ("won",), ("wrong", 2.0), ("right", 1.0, -1.0)]
)
def test_an_outcome_that_contradicts_itself_is_refused(bad):
    with pytest.raises(ValueError):
        Executed(*bad)
    with pytest.raises(ValueError, match="ratio"):
        Reward().speed_step(float("nan"))


# ----------------------------------------------------------------------------------------------------------------- the executor


class Machine:
    """Stands for workers: programs say `cost = c`, `gives = v` or `ends = state`, in arguments' units; its clock is `slow` times slow."""

    def __init__(self, slow=1.0):
        self.meter, self.limits, self.slow, self.runs = (
            SimpleNamespace(unit="s", name="cpu_seconds"),
            Limits(),
            slow,
            [],
        )

    def run(self, program, entry_point, cases, *, repeats=1, limits=None, keywords=None):
        self.runs.append((program, limits))
        held = {}
        exec(program, held)
        found = []
        for (n,) in cases:
            if "ends" in held:
                found.append([Outcome(held["ends"], error="it ended")])
                continue
            cost = (held["cost"](n) if callable(held["cost"]) else held["cost"] * n) * self.slow
            if limits is not None and cost > limits.cpu_seconds:
                found.append([Outcome("time", error="too long")])
            else:
                found.append([Outcome("returned", held.get("gives", lambda n: n)(n), cost=cost)])
        return found


PROBLEM = Problem("double", "f", "cost = 0.01", tests=[(1,), (2,), (3,)], timed=[(10,)])


def executor_on(machine, **more):
    return Executor(machine, [PROBLEM], **more)


def test_each_way_to_end_is_told_apart():
    executor = executor_on(Machine())
    right = executor.run("double", "cost = 0.005")
    assert (right.ended, right.passed, right.ratio) == ("right", 1.0, pytest.approx(2.0))
    wrong = executor.run("double", "cost = 0.01; gives = lambda n: min(n, 2)")
    assert (wrong.ended, wrong.passed) == ("wrong", 0.5)
    for state in ("raised", "time", "memory", "crashed", "void"):
        assert executor.run("double", f"ends = {state!r}").ended == "failed"
    for text in ("def f(", "", "# nothing", "```python\n```", "x = '\0'", "return 1", "def f(n, n): pass"):
        assert executor.run("double", text).ended == "no program"


def test_a_machine_that_is_twice_as_slow_gives_the_same_rewards():
    programs = [f"cost = {c}" for c in (0.001, 0.009, 0.0105, 0.015, 0.03, 0.049, 0.2)]
    for reward in (Reward(), Reward(smooth=True)):
        rewards = [
            [reward(executor_on(Machine(slow)).run("double", text)) for text in programs] for slow in (1.0, 2.0, 16.0)
        ]
        assert rewards[0] == pytest.approx(rewards[1])
        assert rewards[0] == pytest.approx(rewards[2])
    two = replace(PROBLEM, timed=[(10,), (20,)])
    for cost, ended in (
        ("1.2 if n == 20 else 0.01", "right"),
        ("1.5 if n == 20 else 0.01", "failed"),
        ("2 / n", "failed"),
    ):
        found = [
            Executor(Machine(slow), [two]).run("double", f"cost = lambda n: {cost}") for slow in (0.001, 1.0, 16.0)
        ]
        assert [one.ended for one in found] == [ended] * 3, cost


def test_more_than_five_times_the_reference_is_a_time_out():
    executor = executor_on(Machine())
    assert executor.run("double", "cost = 0.049").ended == "right"
    assert executor.run("double", "cost = 0.051").ended == "failed"
    quick = Executor(
        Machine(), [replace(PROBLEM, reference="cost = 0.00001")]
    )  # far below what a process can be stopped by
    assert quick.run("double", "cost = 0.00006").why.startswith("time: 6")
    patient = executor_on(Machine(), time_out=100)
    assert patient.run("double", "cost = 0.051").ended == "right"


def test_a_program_is_run_once_whatever_its_layout_and_beside_its_reference():
    machine = Machine()
    executor = executor_on(machine, repeats=3)
    first = executor.run("double", "cost=0.005 # fast")
    runs = len(machine.runs)
    assert executor.run("double", "```\ncost = 0.005\n```") is first
    assert len(machine.runs) == runs
    assert (executor.asked, executor.ran) == (2, 1)
    beside = [program for program, _ in machine.runs[4:]]
    assert beside == [PROBLEM.reference, "cost=0.005 # fast", "cost=0.005 # fast", PROBLEM.reference] + [
        PROBLEM.reference, "cost=0.005 # fast",
    ]  # fmt: skip
    stopped = max(limits.cpu_seconds for program, limits in machine.runs if "fast" in program)
    assert stopped == pytest.approx(5 * 0.01 * (1 + 2 + 3 + 10))


def test_references_and_names_that_cannot_serve_are_refused():
    with pytest.raises(ValueError, match="reference"):
        Executor(Machine(), [replace(PROBLEM, reference="ends = 'raised'")]).run("double", "cost = 1")
    with pytest.raises(ValueError, match="costs nothing"):
        Executor(Machine(), [replace(PROBLEM, reference="cost = 0")]).run("double", "cost = 1")
    with pytest.raises(ValueError, match="different names"):
        Executor(Machine(), [PROBLEM, PROBLEM])
    with pytest.raises(ValueError, match="timed"):
        Problem("x", "f", "", [], [])
    with pytest.raises(ValueError, match="'double'"):
        executor_on(Machine()).run("triple", "cost = 1")


def test_programs_are_taken_out_of_what_a_model_says():
    assert program_in("x = 1") == "x = 1"
    assert program_in("First\n```py\na = 1\n```\nbetter:\n```python\nb = 2\n```\n") == "b = 2\n"
    assert program_in("```python\ncut = 0") == "cut = 0"
    quoting = "```python\nx = '```'\n```\nA fence is written ```so```\nand stands on its own line."
    assert program_in(quoting) == "x = '```'\n"
    assert program_in([{"role": "user", "content": "?"}, {"role": "assistant", "content": "y = 1"}]) == "y = 1"
    assert normalised("f(1,\n 2)  # why") == normalised("f(1, 2)")
    assert normalised("(" * 5000) is None
    with pytest.raises(TypeError, match="completion"):
        program_in([])
    with pytest.raises(TypeError, match="content"):
        program_in([{"role": "assistant", "content": [{"type": "text", "text": "x"}]}])


def test_it_is_called_as_trls_trainer_calls_it():
    """GRPOTrainer passes keywords only: prompts, completions, token ids, every other column, and its state; and reads the name."""
    score = reward_function(executor_on(Machine()))
    texts = ["cost = 0.005", "cost = 0.02", "no !", "cost = 0.01; gives = lambda n: 0"]
    wanted = [1.0, 0.625, -1.0, -0.3]
    columns = {"task": ["double"] * 4, "difficulty": [1, 2, 3, 4], "trainer_state": object()}
    found = score(prompts=["write f"] * 4, completions=texts, completion_ids=[[1, 2]] * 4, **columns)
    assert found == pytest.approx(wanted)
    assert all(type(one) is float for one in found)
    chats = [[{"role": "assistant", "content": f"```python\n{text}\n```"}] for text in texts]
    assert score(prompts=[[{"role": "user", "content": "write f"}]] * 4, completions=chats, **columns) == found
    assert score.__name__ == "execution_reward"
    with pytest.raises(ValueError, match="column 'task'"):
        score(completions=texts)
    with pytest.raises(ValueError, match="4 completions"):
        score(completions=texts, task=["double"])


def test_the_same_reward_picks_the_best_of_many():
    executor = executor_on(Machine())
    texts = ["cost = 0.02", "gives = lambda n: 0; cost = 0.0001", "cost = 0.004", "cost = 0.003"]
    assert best_of(executor, "double", texts) == 2  # the last one is on the same step
    assert best_of(executor, "double", texts, Reward(smooth=True)) == 2
    assert best_of(executor, "double", texts, Reward(of="correctness")) == 0
    with pytest.raises(ValueError, match="completions"):
        best_of(executor, "double", [])


def test_in_the_sandbox_answers_cannot_be_faked():
    needs_sandbox()
    slow = "def f(n):\n    total = 0\n    for i in range(n):\n        total += i\n    return total"
    problem = Problem("sum", "f", slow, tests=[(0,), (5,)], timed=[(100_000,)])
    equal = "class Any(int):\n    def __eq__(self, other): return True\n    __hash__ = int.__hash__\ndef f(n): return Any(7)"
    formula, same = "def f(n):\n    return n * (n - 1) // 2", slow + "  # the same"
    texts = (formula, same, equal, "def f(n): return 1 // n", "import os\nos._exit(0)")
    with Workers("operations", packages=False) as workers:
        executor = Executor(workers, [problem], repeats=1)
        ended = {text: executor.run("sum", text) for text in texts}
    ends = [one.ended for one in ended.values()]
    assert ends == ["right", "right", "wrong", "failed", "failed"]
    ratios = [one.ratio for one in ended.values()]
    assert ratios[0] > 100
    assert ratios[1] == 1.0


# -------------------------------------------------------------------------------------------------------------------- figures


def test_figures_by_hand():
    original = {"a": [2.0, None, 2.0, 2.0], "b": [4.0, 4.0, 4.0, None], "c": [None] * 4}
    trained = {"a": [1.0, 1.0, 1.9, None], "b": [2.0, 4.0, 8.0, 1.0], "c": [1.0] * 4}
    assert pass_at_1(original) == 0.5
    assert get(trained, original) == pytest.approx((1.3 / 2 + 3.75 / 4) / 2)
    assert get(original, original) == 1
    assert ecc(trained, {"a": 1.5, "b": 4.0, "c": 0.5}) == pytest.approx(4 / 11)
    assert faster_share(trained, original) == pytest.approx(2 / 6)
    assert faster_share(trained, original, dead_zone=0) == pytest.approx(3 / 6)
    assert faster_share(original, original) == 0
    assert (
        get({"a": [None]}, {"a": [1.0]})
        is ecc({"a": [None]}, {"a": 1.0})
        is faster_share({"a": [1.0]}, {"a": [None]})
        is None
    )


def test_figures_refuse_what_does_not_belong_together():
    with pytest.raises(ValueError, match="original"):
        get({"a": [1.0]}, {"b": [1.0]})
    with pytest.raises(ValueError, match="as many samples"):
        faster_share({"a": [1.0]}, {"a": [1.0, 2.0]})
    with pytest.raises(ValueError, match="samples"):
        pass_at_1({"a": []})
    with pytest.raises(ValueError, match="cost"):
        pass_at_1({"a": [-1.0]})
    with pytest.raises(ValueError, match="lacks b"):
        ecc({"b": [1.0]}, {"a": 1.0})


# --------------------------------------------------------------------------------------------------------- the parts of training


def drawn(n=6, length=5, words=7, seed=0):
    """A policy (a table), ids, a mask of rows of different lengths, and advantages, in float64."""
    chance = torch.Generator().manual_seed(seed)
    table = torch.randn(words, words, generator=chance, dtype=torch.float64, requires_grad=True)
    ids = torch.randint(words, (n, length + 1), generator=chance)
    mask = torch.arange(length) < torch.randint(1, length + 1, (n, 1), generator=chance)
    return table, ids, mask, torch.randn(n, length, generator=chance, dtype=torch.float64)


def logp_of(table, ids):
    return token_logprobs(lambda given: table[given], ids)[0]


def test_at_ratio_one_the_gradient_is_the_policy_gradient():
    table, ids, mask, advantages = drawn()
    logp = logp_of(table, ids)
    (ours,) = torch.autograd.grad(policy_loss(logp, logp.detach(), advantages, mask, 0.2), table)
    (theirs,) = torch.autograd.grad(-(logp_of(table, ids) * advantages)[mask].mean(), table)
    assert torch.allclose(ours, theirs, atol=1e-14)
    assert ours.abs().max() > 0.01


@pytest.mark.parametrize(("advantage", "ratio", "moves"), [
    (1.0, 1.19, True), (1.0, 1.21, False), (1.0, 0.5, True), (-1.0, 0.81, True), (-1.0, 0.79, False), (-1.0, 1.5, True),
])  # fmt: skip
def test_beyond_the_clip_on_the_side_that_improves_nothing_moves(advantage, ratio, moves):
    logp = torch.tensor([[math.log(ratio)]], dtype=torch.float64, requires_grad=True)
    policy_loss(
        logp, torch.zeros_like(logp), torch.full_like(logp, advantage), torch.ones(1, 1, dtype=torch.bool), 0.2
    ).backward()
    assert logp.grad.item() == pytest.approx(-advantage * ratio if moves else 0.0)


def test_without_advantages_the_policys_part_does_not_move():
    table, ids, mask, advantages = drawn()
    logp = logp_of(table, ids)
    (gradient,) = torch.autograd.grad(policy_loss(logp, logp.detach() - 0.1, 0 * advantages, mask, 0.2), table)
    assert not gradient.any()


def test_what_was_not_written_counts_nowhere():
    table, ids, mask, advantages = drawn()
    logp = logp_of(table, ids)
    spoilt = torch.where(mask, advantages, torch.nan)
    assert policy_loss(logp, logp.detach(), spoilt, mask, 0.2).isfinite()
    rewards = token_rewards(torch.arange(6.0, dtype=torch.float64), mask, logp.detach(), logp.detach() - 1, 0.5)
    assert not rewards[~mask].any()
    assert rewards.sum(1).tolist() == pytest.approx([n - 0.5 * int(row.sum()) for n, row in enumerate(mask)])
    found, returns = gae(rewards, advantages, mask)
    assert not found[~mask].any()
    assert not returns[~mask].any()


def test_k3_is_never_negative_and_unbiased():
    chance = torch.Generator().manual_seed(1)
    p, q = torch.randn(2, 50, generator=chance, dtype=torch.float64).log_softmax(-1)
    assert (k3(p, q) >= 0).all()
    exact = (p.exp() * (p - q)).sum()
    assert (p.exp() * k3(p, q)).sum() == pytest.approx(float(exact), rel=1e-12)
    assert not k3(p, p).any()


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 1.0), (1.0, 1.0), (0.9, 0.0)])
def test_advantages_are_the_sum_of_discounted_errors(gamma, lam):
    _, _, mask, values = drawn(seed=3)
    rewards = torch.where(
        mask, torch.randn(mask.shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64), 0.0
    )
    found, returns = gae(rewards, values, mask, gamma=gamma, lam=lam)
    for row, many in enumerate(mask.sum(1).tolist()):
        v = [*values[row, :many].tolist(), 0.0]
        errors = [float(rewards[row, t]) + gamma * v[t + 1] - v[t] for t in range(many)]
        wanted = [sum((gamma * lam) ** (k - t) * errors[k] for k in range(t, many)) for t in range(many)]
        assert found[row, :many].tolist() == pytest.approx(wanted)
        assert returns[row, :many].tolist() == pytest.approx([a + b for a, b in zip(wanted, v, strict=False)])


def test_whitening_and_groups():
    _, _, mask, advantages = drawn()
    white = whitened(advantages, mask)
    assert white[mask].mean().item() == pytest.approx(0, abs=1e-12)
    assert white[mask].std(correction=0).item() == pytest.approx(1, rel=1e-6)
    assert not whitened(torch.ones_like(advantages), mask).any()
    scores = torch.tensor([1.0, 2.0, 3.0, 5.0, 5.0, 5.0], dtype=torch.float64)
    found = group_normalised(scores, 3)
    assert found.tolist() == pytest.approx([-math.sqrt(1.5), 0, math.sqrt(1.5), 0, 0, 0], abs=1e-6)
    assert group_normalised(7 * scores + 3, 3).tolist() == pytest.approx(found.tolist(), abs=1e-6)


# -------------------------------------------------------------------------------------------------------------------- training

END, WORDS = 0, 6


class Table(nn.Module):
    """A policy whose next word depends on the last one only; with `out` 1 a critic."""

    def __init__(self, out=WORDS, seed=0):
        super().__init__()
        chance = torch.Generator().manual_seed(seed)
        self.table = nn.Embedding(WORDS, out, _weight=0.1 * torch.randn(WORDS, out, generator=chance))

    def forward(self, ids):
        found = self.table(ids)
        return found[..., 0] if found.shape[-1] == 1 else found


PROMPTS = [[1], [2], [3]]
QUICK = PPO(rounds=12, samples=8, lr=0.1, longest=4, kl=0.01)


def fives(prompts, texts):
    """The share of fives, which the base policy writes as often as anything."""
    return [text.count(5) / max(1, len(text)) for text in texts]


def reached(policy):
    texts = write(policy, PROMPTS * 50, end=END, longest=4, seed=9).completions(END)
    return sum(fives(None, texts)) / len(texts)


def drift(found, base):
    """Mean KL of the next word from the base policy, over words."""
    p, q = (policy.table.weight.detach().log_softmax(-1) for policy in (found, base))
    return (p.exp() * (p - q)).sum(-1).mean().item()


@pytest.mark.parametrize("way", ["ppo", "grpo", "rejection"])
def test_all_three_ways_learn_what_is_rewarded_and_leave_the_policy_given_alone(way):
    base = Table()
    before = base.table.weight.detach().clone()
    if way == "rejection":
        climbed = rejection(base, PROMPTS, fives, end=END, settings=QUICK)
    else:
        climbed = climb(base, PROMPTS, fives, end=END, settings=QUICK, critic=Table(1) if way == "ppo" else None)
    assert torch.equal(base.table.weight, before)
    assert reached(base) < 0.35
    assert reached(climbed.policy) > 0.8
    assert len(climbed.rounds) == 12
    assert climbed.rounds[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert climbed.kl > 0.1
    assert climbed.rounds[-1]["reward"] > climbed.rounds[0]["reward"] + 0.3


def stepped_by_hand(rows, loss_of, settings, steps):
    """The table after so many steps on a mean over tokens of `loss_of(logp, old logp, row, place)`; rows are (prompt, words written)."""
    weight = nn.Parameter(Table().table.weight.detach().clone())
    optimizer = torch.optim.AdamW([weight], lr=settings.lr, weight_decay=0.0)
    old = None
    for _ in range(steps):
        every = (weight / settings.temperature).log_softmax(-1)
        logp = [
            [every[last, word] for last, word in zip([prompt[-1], *text], text, strict=False)] for prompt, text in rows
        ]
        old = old or [[one.item() for one in row] for row in logp]
        losses = [
            loss_of(a, b, n, t) for n, row in enumerate(logp) for t, (a, b) in enumerate(zip(row, old[n], strict=True))
        ]
        optimizer.zero_grad()
        (sum(losses) / len(losses)).backward()
        nn.utils.clip_grad_norm_([weight], settings.most_gradient)
        optimizer.step()
    return weight.detach()


def recorded(train, settings):
    """What was written in the one round of `train(score)`, with the end, and the scores; and the table that it made."""
    rows, scores = [], []

    def score(prompts, texts):
        rows.extend((p, [*t, END] if len(t) < settings.longest else t) for p, t in zip(prompts, texts, strict=True))
        scores.extend(fives(prompts, texts))
        return scores

    return train(score).policy.table.weight.detach(), rows, scores


@pytest.mark.parametrize("critic", [False, True])
def test_a_round_of_climbing_is_what_it_is_by_hand(critic):
    most = 1e3 if critic else 0.05  # a critic's gradient counts in the norm too
    some = replace(QUICK, rounds=1, epochs=3, kl=0.0, entropy=0.0, gamma=1.0, lam=0.5, clip=0.1, most_gradient=most)

    def train(score):
        return climb(Table(), PROMPTS, score, end=END, settings=some, critic=zero_critic() if critic else None, seed=5)

    found, rows, scores = recorded(train, some)
    if critic:  # the critic says 0, so that what is left is the discounted score, whitened over all words
        plain = [
            [0.5 ** (len(text) - 1 - t) * score for t in range(len(text))]
            for (_, text), score in zip(rows, scores, strict=True)
        ]
        flat = [one for row in plain for one in row]
        mean, spread = statistics.mean(flat), statistics.pstdev(flat)
        advantages = [[(one - mean) / spread for one in row] for row in plain]
    else:
        groups = [scores[n : n + some.samples] for n in range(0, len(scores), some.samples)]
        each = [(one - statistics.mean(group)) / (statistics.pstdev(group) or 1) for group in groups for one in group]
        advantages = [[value] * len(text) for value, (_, text) in zip(each, rows, strict=True)]

    def surrogate(logp, old, row, place):
        ratio, advantage = (logp - old).exp(), advantages[row][place]
        limit = 1.1 if advantage > 0 else 0.9
        kept = ratio if (ratio - limit) * advantage < 0 else torch.tensor(limit)
        return -kept * advantage

    wanted = stepped_by_hand(rows, surrogate, some, 3)
    assert torch.allclose(found, wanted, atol=2e-5)
    assert (found - Table().table.weight.detach()).abs().max() > 0.1


def test_a_round_of_rejection_is_maximum_likelihood_of_the_best_by_hand():
    some = replace(QUICK, rounds=1, epochs=3)
    found, rows, scores = recorded(lambda score: rejection(Table(), [[1]], score, end=END, settings=some, seed=2), some)
    best = {tuple(text) for (_, text), score in zip(rows, scores, strict=True) if score == max(scores)}
    assert len(best) == 1 < len(set(scores))
    kept = [*best.pop()]
    taught = [([1], kept if kept[-1] == END else [*kept, END])]
    wanted = stepped_by_hand(taught, lambda logp, old, row, place: -logp, replace(some, temperature=1.0), 3)
    assert torch.allclose(found, wanted, atol=2e-5)


def test_the_same_seed_trains_the_same_policy_and_another_another():
    few = replace(QUICK, rounds=2)
    one, same, other = (climb(Table(), PROMPTS, fives, end=END, settings=few, seed=seed).policy for seed in (3, 3, 4))
    assert torch.equal(one.table.weight, same.table.weight)
    assert not torch.equal(one.table.weight, other.table.weight)


@pytest.mark.parametrize("critic", [None, 1])
def test_a_constant_reward_makes_no_drift(critic):
    few = replace(QUICK, rounds=6, entropy=0.0)

    def trained(score):
        return climb(Table(), PROMPTS, score, end=END, settings=few, critic=critic and Table(critic)).policy

    told, same = trained(fives), trained(lambda prompts, texts: [0.7] * len(texts))
    if critic is None:
        assert torch.allclose(same.table.weight, Table().table.weight, atol=1e-4)  # no advantages at all
    assert drift(same, Table()) < 0.35 * drift(told, Table())


@pytest.mark.parametrize("critic", [None, 1])
def test_where_kl_is_dear_the_policy_stays_at_the_reference(critic):
    def trained(kl):
        some = replace(QUICK, rounds=8, lr=0.03, kl=kl, entropy=0.0)
        return climb(Table(), PROMPTS, fives, end=END, settings=some, critic=critic and Table(critic)).policy

    free, dear = drift(trained(0.0), Table()), drift(trained(1e3), Table())
    assert dear < 0.1 * free


def test_without_advantages_only_entropy_kl_and_the_critic_move():
    """A critic that knows the reward leaves no advantages: lam 0, and the value of every state what is to come."""
    still = replace(QUICK, rounds=1, entropy=0.0, kl=0.0)
    found = climb(Table(), PROMPTS, lambda p, t: [0.0] * len(t), end=END, settings=still, critic=zero_critic()).policy
    assert torch.equal(found.table.weight, Table().table.weight)
    told = climb(
        Table(),
        PROMPTS,
        lambda p, t: [0.0] * len(t),
        end=END,
        settings=replace(still, entropy=0.1),
        critic=zero_critic(),
    )
    assert not torch.equal(told.policy.table.weight, Table().table.weight)
    critic = zero_critic()
    climb(Table(), PROMPTS, fives, end=END, settings=still, critic=critic)
    assert critic.table.weight.any()


def zero_critic():
    critic = Table(1)
    nn.init.zeros_(critic.table.weight)
    return critic


def test_rejection_learns_only_from_the_best_that_is_right():
    base = Table()
    none = rejection(base, PROMPTS, lambda p, t: [-0.1] * len(t), end=END, settings=replace(QUICK, rounds=2))
    assert torch.equal(none.policy.table.weight, base.table.weight)
    counted = []
    rejection(
        base, PROMPTS, lambda p, t: counted.append(len(t)) or fives(p, t), end=END, settings=replace(QUICK, rounds=3)
    )
    assert counted == [24, 24, 24]


def test_scores_and_rates_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="24 finite"):
        climb(Table(), PROMPTS, lambda p, t: [float("nan")] * len(t), end=END, settings=QUICK)
    with pytest.raises(ValueError, match="24 finite"):
        rejection(Table(), PROMPTS, lambda p, t: [1.0], end=END, settings=QUICK)
    with pytest.raises(ValueError, match="prompts"):
        climb(Table(), [], fives, end=END, settings=QUICK)
    for wrong in ({"clip": 0.0}, {"lam": 1.1}, {"rounds": 0}, {"kl": -1.0}, {"lr": float("nan")}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            PPO(**wrong)


# ----------------------------------------------------------------------------------------------------------------- a real model


@pytest.fixture(scope="module")
def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=WORDS, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=16,
        bos_token_id=None, eos_token_id=END, pad_token_id=END,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


class Whole(nn.Module):
    """The same model without its cache."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model(ids)


def test_writing_with_a_cache_is_writing_without_and_prompts_may_differ_in_length(llama):
    prompts = [[1, 2, 3], [4], [5, 1], [2], [1, 1, 1]] * 4
    made, whole = (write(model, prompts, end=END, longest=5, seed=2) for model in (llama, Whole(llama)))
    assert torch.equal(made.ids, whole.ids)
    assert torch.equal(made.mask, whole.mask)
    texts = made.completions(END)
    assert all(1 <= keep.sum() <= 5 for keep in made.mask)
    for row, prompt, text in zip(made.ids.tolist(), prompts, texts, strict=True):
        assert row[: len(prompt) + len(text)] == [*prompt, *text]
        assert END not in text
    assert len({tuple(text) for text in texts}) > 5
    logp, entropy = token_logprobs(llama, made.ids, 0.8)
    one = token_logprobs(llama, torch.tensor([[*prompts[1], *texts[1]]]), 0.8)[0]
    assert torch.allclose(logp[1, : one.shape[1]], one[0], atol=1e-5)  # padding on the right changes nothing
    assert (entropy > 0).all()
    for bad in ([], [[1], []]):
        with pytest.raises(ValueError, match="prompts"):
            write(llama, bad, end=END)


def test_words_come_as_often_as_the_model_says():
    base = Table(seed=5)
    made = write(base, [[1]] * 4000, end=END, longest=1, temperature=0.5, seed=1)
    seen = torch.bincount(made.ids[:, 1], minlength=WORDS) / 4000
    assert torch.allclose(seen, (base.table.weight[1].detach() / 0.5).softmax(-1), atol=0.03)


def test_a_transformers_model_climbs(llama):
    critic = Critic(llama)
    assert not critic(torch.tensor([[1, 2]])).any()
    assert Critic(copy.deepcopy(llama).to("meta", torch.bfloat16)).head.weight.device.type == "meta"
    before = {name: value.clone() for name, value in llama.state_dict().items()}
    few = replace(QUICK, rounds=8, lr=0.02)
    climbed = climb(llama, PROMPTS, fives, end=END, settings=few, critic=critic)
    assert climbed.rounds[-1]["reward"] > climbed.rounds[0]["reward"] + 0.3
    assert climbed.kl > 0
    assert all(torch.equal(value, before[name]) for name, value in llama.state_dict().items())
