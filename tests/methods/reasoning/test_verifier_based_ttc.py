"""Verifier or imitation: the diagnostics, reweighting near the base, the planted problem, and the two ways to train."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from torch import nn

from assay.methods.core.reasoning.logs import Logged, read_log
from assay.methods.reasoning.verifier_based_ttc import (
    Planted,
    anti_concentration,
    best_of_n_weights,
    budget_curve,
    fit,
    fit_verifier,
    heterogeneity,
    imitate,
    policy_gradient,
    recommend,
    returns,
    reweighted,
    stepwise_heterogeneity,
)
from assay.methods.reasoning.verifier_based_ttc.training import verified

# ------------------------------------------------------------------------------------------------------------- diagnostics


def bilevel(target, H):
    """The return of a trace that is right from the step on at which it has said `target`."""
    return lambda trace: float(next((H - t for t in range(H) if trace[t] == target), 0))


@pytest.mark.parametrize("seed", range(4))
def test_stepwise_variances_add_up_to_that_of_the_return(seed):
    random, table = np.random.default_rng(seed), {}

    def policy(prefix):
        return table.setdefault(prefix, random.dirichlet([0.5] * 3).tolist())

    stepwise, whole = stepwise_heterogeneity(policy, bilevel(1, 4), 4)
    assert stepwise == pytest.approx(whole, abs=1e-12)
    assert 0 < whole <= (4 / 2) ** 2
    chances = {t: np.prod([table[t[:i]][t[i]] for i in range(4)]) for t in itertools.product(range(3), repeat=4)}
    values = np.array([bilevel(1, 4)(t) for t in chances])
    p = np.array(list(chances.values()))
    assert whole == pytest.approx(p @ values**2 - (p @ values) ** 2, abs=1e-12)


def test_a_deterministic_policy_has_no_heterogeneity():
    assert stepwise_heterogeneity(lambda prefix: [0.0, 1.0], bilevel(1, 3), 3) == (0.0, 0.0)
    found = heterogeneity([[3.0] * 5, [0.0] * 5])
    assert (found.mean, found.median, found.flat) == (0.0, 0.0, 1.0)


def test_heterogeneity_is_at_most_half_the_horizon():
    H = 32
    widest = heterogeneity([[0.0, float(H)] * 500])
    assert widest.mean == pytest.approx(H / 2, rel=2e-3)
    random = np.random.default_rng(0)
    found = heterogeneity([returns(random.integers(1, 60, 50).tolist(), H).tolist() for _ in range(20)])
    assert 0 < found.mean < H / 2
    assert 0 < found.error < found.mean


def test_the_estimate_of_the_variance_has_no_bias():
    random = np.random.default_rng(0)
    few = heterogeneity(random.normal(0, 3, (4000, 3)).tolist())
    assert few.mean == pytest.approx(3, rel=0.03)  # with n instead of n - 1 it would be 2.45
    assert abs(few.mean - 3) < 4 * few.error


def test_anti_concentration_falls_with_e_and_is_a_share():
    random = np.random.default_rng(0)
    own = [returns(random.geometric(0.1, 40).tolist(), 32).tolist() for _ in range(20)]
    shares = [anti_concentration(own, e) for e in (0.0, 0.25, 1.0, 4.0, 100.0)]
    assert shares == sorted(shares, reverse=True)
    assert 0 < shares[0] < 1
    assert shares[-1] == 0
    assert anti_concentration([[2.0, 2.0]]) == 0.0


def test_anti_concentration_counts_from_roots_of_e_above_the_mean():
    own = [[0.0, 0.0, 0.0, 4.0]]  # mean 1, deviation 2
    assert [anti_concentration(own, e) for e in (0.0, 1.0, 2.0, 2.25, 2.3)] == [0.25] * 4 + [0.0]


def test_equal_returns_that_are_no_whole_numbers_have_no_spread():
    same = [[0.1] * 3, [0.3] * 7]
    found = heterogeneity(same)
    assert (found.mean, found.median, found.flat) == (0.0, 0.0, 1.0)
    assert anti_concentration([*same, [0.0, 0.0, 0.0, 4.0]]) == 0.25


def test_the_jackknife_leaves_each_prompt_out_once():
    own = np.random.default_rng(3).integers(0, 9, (7, 5)).astype(float)
    left = [math.sqrt(np.delete(own, i, 0).var(1, ddof=1).mean()) for i in range(7)]
    found = heterogeneity(own.tolist())
    assert found.error == pytest.approx(math.sqrt(6 / 7 * np.sum((left - np.mean(left)) ** 2)))
    assert found.median == pytest.approx(np.median(own.std(1, ddof=1)))
    assert heterogeneity([[1.0, 2.0]]).error == math.inf  # one prompt says nothing about others


def test_cutting_is_annotating_anew():
    problem = Planted()
    contexts = problem.contexts(200, 1)
    traces = problem.traces(contexts, 24, 2)
    whole = problem.first(contexts, traces).tolist()
    last = None
    for H in (3, 6, 12, 24):
        cut = problem.first(contexts, traces[:, :H]).tolist()
        now = returns(cut, H)
        assert returns(whole, H).tolist() == now.tolist()
        assert now.tolist() == problem.rewards(contexts, traces[:, :H]).sum(1).tolist()
        assert last is None or (now >= last).all()
        last = now


def test_a_budget_curve_shows_success_and_return():
    (first, second) = budget_curve([2, None, 5], [4, 8])
    assert first == (4, pytest.approx(1 / 3), 1.0)
    assert second == (8, pytest.approx(2 / 3), pytest.approx(11 / 3))
    same = [budget_curve(first, [8])[0] for first in ([1, None], [8, None])]
    assert same[0][1] == same[1][1]  # equally often right,
    assert same[0][2] > same[1][2]  # and not equally soon


def test_advice_follows_the_rates():
    assert recommend(10.0, 0.2, 400, 32).way == "verifier"
    assert recommend(10.0, 0.2, 4, 32).way == "imitation"  # too few prompts
    assert recommend(0.0, 0.2, 400, 32).way == "imitation"  # alike
    for c in (0.0, 0.04):
        assert recommend(10.0, c, 400, 32).way == "imitation"  # next to nothing above the mean
    grown = [recommend(H / 4, 0.2, H, H) for H in (16, 64, 256)]
    ratio = [one.imitation_rate / one.verifier_rate for one in grown]
    assert np.allclose(np.diff(np.log(ratio)), np.log(2))  # the gap grows like the root of H


def test_a_log_of_the_harness_is_diagnosed(tmp_path):
    path = tmp_path / "samples_x.jsonl"
    rows = [
        {"doc_id": i, "target": "7", "arguments": [["p", {}]], "filtered_resps": ["7"],
         "resps": [["so it is 7", "7", "it is 8", "one two three four 7"]]}
        for i in range(3)
    ]  # fmt: skip
    path.write_text("\n".join(map(json.dumps, rows)))
    found = fit(path)
    assert found.H == 5
    assert found.first[0] == (4, 1, None, 5)
    assert found.heterogeneity.mean == pytest.approx(np.std([2, 5, 0, 1], ddof=1))
    assert found.curve([1, 5]) == [(1, 0.25, 0.25), (5, 0.75, 2.0)]
    assert found.advice(1000).way == "verifier"
    characters = fit(read_log(path), length=len, H=8)
    assert characters.first[0][1] == 1
    assert characters.H == 8


# ------------------------------------------------------------------------------------------------------------- reweighting


@pytest.mark.parametrize("divergence", ["chi2", "kl"])
def test_reweighting_stays_in_its_ball_and_uses_it(divergence):
    rewards = np.random.default_rng(0).random(50)
    last = 0.0
    for radius in (0.0, 0.01, 0.3, 2.0, 1e6):
        weights = reweighted(rewards.tolist(), radius, divergence=divergence)
        assert weights.sum() == pytest.approx(1)
        assert (weights >= 0).all()
        ratio = weights * 50
        inside = ratio[ratio > 0]
        distance = ((ratio - 1) ** 2).mean() if divergence == "chi2" else (inside * np.log(inside)).mean()
        assert distance <= radius + 1e-6
        if 0 < radius < 1e6:
            assert distance == pytest.approx(radius, rel=1e-4)
        reached = float(weights @ rewards)
        assert reached > last
        last = reached
    assert last == pytest.approx(rewards.max())
    assert np.allclose(reweighted(rewards.tolist(), 0.0, divergence=divergence), 1 / 50)


@pytest.mark.parametrize("divergence", ["chi2", "kl"])
def test_reweighting_knows_rewards_by_their_differences_alone(divergence):
    wanted = reweighted([-1.0, 0.0, 1.0, 1.0], 0.3, divergence=divergence)
    for scale in (1e308, 1e-300, 7.0):
        assert reweighted([-scale, 0.0, scale, scale], 0.3, divergence=divergence) == pytest.approx(wanted)
    assert reweighted([5.0], 0.3, divergence=divergence).tolist() == [1.0]


@pytest.mark.parametrize("divergence", ["chi2", "kl"])
def test_reweighting_is_the_best_of_its_ball(divergence):
    from scipy.optimize import minimize

    rewards, radius = np.array([0.0, 0.2, 0.25, 0.9]), 0.4

    def distance(w):
        ratio = np.maximum(w, 1e-12) * 4
        return ((ratio - 1) ** 2).mean() if divergence == "chi2" else (ratio * np.log(ratio)).mean()

    best = minimize(
        lambda w: -w @ rewards, np.full(4, 0.25), bounds=[(0, 1)] * 4, method="SLSQP",
        constraints=[{"type": "eq", "fun": lambda w: w.sum() - 1}, {"type": "ineq", "fun": lambda w: radius - distance(w)}],
    )  # fmt: skip
    assert reweighted(rewards.tolist(), radius, divergence=divergence) @ rewards == pytest.approx(-best.fun, abs=1e-4)


def test_best_of_n_with_a_true_and_with_a_useless_verifier():
    right = np.array([1.0] * 3 + [0.0] * 7)
    for N in (1, 2, 5):
        assert best_of_n_weights(right.tolist(), N)[:3].sum() == pytest.approx(1 - 0.7**N)
        assert best_of_n_weights([0.5] * 10, N)[:3].sum() == pytest.approx(0.3)
    noise = np.random.default_rng(0).random((400, 10))
    assert np.mean([best_of_n_weights(own.tolist(), 4)[:3].sum() for own in noise]) == pytest.approx(0.3, abs=0.03)


# ----------------------------------------------------------------------------------------------------- the planted problem


def test_experts_solve_it_as_their_strengths_say():
    problem = Planted(strengths=(0.5,), weights=(1.0,), k=2)
    contexts = problem.contexts(20_000, 1)
    first = problem.first(contexts, problem.traces(contexts, 6, 2))
    assert (first == 2).float().mean() == pytest.approx(0.25, abs=0.01)
    assert (first == 3).float().mean() == pytest.approx(0.25, abs=0.01)
    unsolved = (0.5**6) * (1 + 6)
    assert (first > 6).float().mean() == pytest.approx(unsolved, abs=0.01)


def test_a_wrong_word_spoils_a_trace_until_the_pattern_is_said():
    problem = Planted(V=5, k=2)
    context = problem.contexts(1, 3)
    a, b = problem.patterns(context)[0].tolist()
    wrong, f = next(w for w in range(5) if w not in (a, b)), problem.filler
    for trace, first in (
        ([a, b, f, f], 2), ([f, a, f, b], 4), ([a, wrong, b, f], 5), ([wrong, a, b, f], 5), ([a, b, wrong, a], 2), ([f, f, f, a], 5),
    ):  # fmt: skip
        assert problem.first(context, torch.tensor([trace])).tolist() == [first]


def test_a_single_strong_expert_makes_traces_alike():
    def sigma(**mixture):
        problem = Planted(**mixture)
        contexts = problem.contexts(1, 0).repeat(2000, 1)
        return heterogeneity([(25 - problem.first(contexts, problem.traces(contexts, 24, 1))).tolist()]).mean

    assert sigma(strengths=(1.0,), weights=(1.0,)) == 0
    assert sigma(strengths=(0.97,), weights=(1.0,)) < 1
    assert sigma() > 4


# ---------------------------------------------------------------------------------------------------------------- training


class Table(nn.Module):
    """Logits of the next word from the place alone: what can be checked by counting."""

    def __init__(self, length, words):
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(length, words))

    def forward(self, ids):
        return self.logits[: ids.shape[1]].expand(len(ids), -1, -1)


class Score(nn.Module):
    """A score of each place from its word."""

    def __init__(self, length, words):
        super().__init__()
        self.worth = nn.Parameter(torch.zeros(length, words))

    def forward(self, ids):
        return self.worth[torch.arange(ids.shape[1]), ids]


PROMPTS = torch.zeros(4000, 1, dtype=torch.long)


def sample(policy, prompts, seed):
    """Two words, each from the table's softmax."""
    chance = torch.Generator().manual_seed(seed)
    p = torch.softmax(policy.logits.detach()[:2], -1)
    return torch.stack([torch.multinomial(row, len(prompts), replacement=True, generator=chance) for row in p], 1)


def right(traces):
    """Right: the first word is 2, whatever comes then."""
    return traces[:, 0] == 2


def chances(policy):
    return torch.softmax(policy.logits.detach()[:2], -1)


@pytest.fixture
def base():
    policy = Table(3, 3)
    with torch.no_grad():
        policy.logits[:2] = torch.log(torch.tensor([[0.5, 0.3, 0.2], [0.6, 0.3, 0.1]]))
    return policy


def test_imitating_everything_changes_nothing_and_the_right_ones_condition_on_success(base):
    traces = sample(base, PROMPTS, 1)
    same = imitate(base, PROMPTS, traces, steps=150, lr=0.03, batch=400)
    assert torch.allclose(chances(same), chances(base), atol=0.03)
    rows = right(traces)
    better = imitate(base, PROMPTS[rows], traces[rows], steps=300, lr=0.1, batch=400)
    assert chances(better)[0, 2] > 0.97
    assert torch.allclose(chances(better)[1], chances(base)[1], atol=0.05)
    assert torch.allclose(chances(base)[0], torch.tensor([0.5, 0.3, 0.2]))  # the base itself is left as it was


def test_a_verifier_learns_which_steps_are_right(base):
    traces = sample(base, PROMPTS, 1)
    rewards = right(traces)[:, None].float().expand(-1, 2).contiguous()
    found = fit_verifier(Score(3, 3), PROMPTS, traces, rewards, steps=200, lr=0.1, batch=400)
    said = verified(found, PROMPTS, traces)
    assert said[right(traces), 0].min() > 0.9
    assert said[~right(traces), 0].max() < 0.1
    assert said[:, 1].mean() == pytest.approx(0.2, abs=0.05)  # the second word tells nothing of the first


def test_policy_gradients_climb_the_score_and_the_penalty_holds_them(base):
    def climbed(score, kl, steps=150):
        return chances(policy_gradient(base, PROMPTS, score, sample, steps=steps, lr=0.05, kl=kl, batch=200))

    def true(prompts, traces):
        return right(traces)[:, None].float().expand(-1, 2)

    free, held = climbed(true, 0.0), climbed(true, 20.0)
    assert free[0, 2] > 0.9
    assert chances(base)[0, 2] < held[0, 2] + 0.02
    assert held[0, 2] < 0.5
    noise = torch.Generator().manual_seed(0)
    useless = climbed(lambda prompts, traces: torch.rand(traces.shape, generator=noise), 0.1)
    assert useless[0, 2] < 0.5


def test_policy_gradients_credit_a_word_with_what_comes_later_and_with_no_more_than_the_mean(base):
    def climbed(score, steps):
        return chances(policy_gradient(base, PROMPTS, score, sample, steps=steps, lr=0.05, kl=0.0, batch=200))

    def late(prompts, traces):
        """The first word is right, and it is the second step that pays."""
        return torch.stack([torch.zeros(len(traces)), right(traces).float()], 1)

    assert climbed(late, 100)[0, 2] > 0.8
    assert torch.equal(climbed(lambda prompts, traces: torch.ones(traces.shape), 5), chances(base))  # all alike


# --------------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        (lambda: returns([0], 4), ValueError, "first"),
        (lambda: returns([1], 0), ValueError, "H must"),
        (lambda: heterogeneity([[1.0]]), ValueError, "at least 2"),
        (lambda: heterogeneity([[1.0, float("nan")]]), ValueError, "returns"),
        (lambda: anti_concentration([[1.0, 2.0]], -1), ValueError, "e must"),
        (lambda: budget_curve([], [1]), ValueError, "first"),
        (lambda: stepwise_heterogeneity(lambda p: [0.5, 0.4], lambda t: 0.0, 1), ValueError, "add up to 1"),
        (lambda: recommend(10.0, 0.2, 10, 8), ValueError, "sigma"),
        (lambda: recommend(1.0, 2.0, 10, 8), ValueError, "c must"),
        (lambda: fit([]), ValueError, "log must"),
        (lambda: fit([Logged("0", "", "1", ("1",), ("1",), (True,))]), ValueError, "at least 2"),
        (lambda: reweighted([], 1.0), ValueError, "rewards"),
        (lambda: reweighted([1.0], -1.0), ValueError, "radius"),
        (lambda: reweighted([1.0], 1.0, divergence="tv"), ValueError, "divergence"),
        (lambda: best_of_n_weights([], 1), ValueError, "scores"),
        (lambda: best_of_n_weights([1.0], 0), ValueError, "N must"),
        (lambda: Planted(V=1), ValueError, "V must"),
        (lambda: Planted(weights=(0.5, 0.5)), ValueError, "weights"),
        (lambda: Planted(strengths=(1.5, 0, 0)), ValueError, "strengths"),
        (lambda: imitate(Table(3, 3), PROMPTS, PROMPTS.float(), steps=1, lr=0.1), TypeError, "traces"),
        (lambda: imitate(Table(3, 3), PROMPTS, PROMPTS[:5], steps=1, lr=0.1), ValueError, "traces"),
        (lambda: imitate(Table(3, 3), PROMPTS, PROMPTS, steps=0, lr=0.1), ValueError, "steps"),
        (lambda: imitate(Table(3, 3), PROMPTS, PROMPTS, steps=1, lr=0.0), ValueError, "lr"),
        (lambda: fit_verifier(Score(3, 3), PROMPTS, PROMPTS, torch.zeros(4000, 2), steps=1, lr=0.1), ValueError, "rewards"),
        (lambda: policy_gradient(Table(3, 3), PROMPTS, None, sample, steps=1, lr=0.1, kl=-1.0), ValueError, "kl"),
    ],
)  # fmt: skip
def test_bad_input_is_named(call, error, said):
    with pytest.raises(error, match=said):
        call()
