"""Adaptive weighted rejection of one token: distribution, weights and calls, by exact enumeration of all random choices."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from assay.methods.inference.awrs import VARIANTS, draw
from assay.methods.inference.awrs.sampling import (
    Proposals,
    descending,
    estimate,
    geometric_runs,
    log1mexp,
    log_sum,
    recursive,
    two_rounds,
)

UNEVEN = [Fraction(n, 20) for n in (8, 5, 3, 2, 1, 1)]
FOUR = [Fraction(n, 10) for n in (4, 3, 2, 1)]
WITH_ZERO = [Fraction(n, 10) for n in (5, 0, 4, 1)]
ONE_SURE = [Fraction(n, 10) for n in (8, 1, 1)]


class Scripted:
    """A distribution whose random choices follow a script; the probability of what was chosen is exact."""

    MOST_FAILURES = 4

    def __init__(self, p, script):
        self.p, self.script, self.taken, self.probability = p, script, [], Fraction(1)
        with np.errstate(divide="ignore"):
            self.log_p = np.log(np.array([float(one) for one in p]))
        self.left = Fraction(1)

    def choose(self, weights):
        choice = self.script[len(self.taken)] if len(self.taken) < len(self.script) else 0
        self.taken.append((choice, len(weights)))
        self.probability *= weights[choice]
        return choice

    def walk(self, without=()):
        left = [token for token, one in enumerate(self.p) if one > 0 and token not in without]
        while left:
            total = sum(self.p[token] for token in left)
            yield left.pop(self.choose([self.p[token] / total for token in left]))

    def log_rest(self, without):
        left = 1 - sum(self.p[token] for token in set(without))
        return math.log(left) if left else -math.inf

    def rest(self):
        return self

    def take(self, token):
        self.left -= self.p[token]

    @property
    def log(self):
        return math.log(self.left) if self.left else -math.inf

    def failures(self, log_success):
        assert math.isclose(math.exp(log_success), self.left)
        again = 1 - self.left
        return self.choose([self.left * again**k for k in range(self.MOST_FAILURES)] + [again**self.MOST_FAILURES])


def outcomes(p, run):
    """(probability, what `run` returned) of every way the random choices can go."""
    script = []
    while True:
        source = Scripted(p, script)
        found = run(source)
        yield source.probability, found
        taken = source.taken
        while taken and taken[-1][0] + 1 == taken[-1][1]:
            taken.pop()
        if not taken:
            return
        script = [choice for choice, _ in taken]
        script[-1] += 1


def exact(log_weight):
    """The rational number that a weight is, up to rounding."""
    return Fraction(math.exp(log_weight)).limit_denominator(10**7) if log_weight > -math.inf else Fraction(0)


def moments(p, allowed, run):
    """The exact E[w 1{x}] of each token, and E[w^2]."""
    mean, square, total = [Fraction(0)] * len(p), Fraction(0), Fraction(0)
    for probability, (token, log_weight, _) in outcomes(p, lambda source: run(source, allowed.__contains__)):
        total += probability
        assert (token is None) == (log_weight == -math.inf)
        if token is not None:
            assert token in allowed
            mean[token] += probability * exact(log_weight)
            square += probability * exact(log_weight) ** 2
    assert total == 1
    return mean, square


def subsets(size):
    return [set(one) for n in range(size + 1) for one in itertools.combinations(range(size), n)]


ESTIMATORS = {
    "paper": two_rounds,
    "recursive": recursive,
    "recursive, one rejection": lambda p, test: recursive(p, test, 1),
    "recursive, two rejections": lambda p, test: recursive(p, test, 2),
    "geometric, one rejection": lambda p, test: geometric_runs(p, test, 2, 1),
    "geometric, three rejections": lambda p, test: geometric_runs(p, test, 2, 3),
    "geometric, three acceptances": lambda p, test: geometric_runs(p, test, 3, 2),
    "as_released": lambda p, test: estimate(p, test, "as_released", 2, 3),
    "masking": lambda p, test: estimate(p, test, "masking", 2, None),
    "twisted": lambda p, test: estimate(p, test, "twisted", 2, None),
}


@pytest.mark.parametrize("p", [FOUR, WITH_ZERO, ONE_SURE], ids=["four", "with zero", "one sure"])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_the_mean_weight_of_each_token_is_its_probability_exactly(name, p):
    for allowed in subsets(len(p)):
        mean, _ = moments(p, allowed, ESTIMATORS[name])
        assert mean == [one if token in allowed else 0 for token, one in enumerate(p)], allowed


@pytest.mark.parametrize("name", ["paper", "recursive", "geometric, one rejection"])
@pytest.mark.parametrize("allowed", [{5}, {0, 4}, {1, 2, 5}, {0, 1, 2, 3, 4, 5}], ids=str)
def test_six_tokens(name, allowed):
    mean, _ = moments(UNEVEN, allowed, ESTIMATORS[name])
    assert mean == [one if token in allowed else 0 for token, one in enumerate(UNEVEN)]


def test_the_geometric_estimator_without_a_bound():
    """Its counts have no end: what the enumeration leaves out (more than four failures) is bounded by how probable that is."""
    p = [Fraction(6, 10), Fraction(3, 10), Fraction(1, 10)]
    mean, _ = moments(p, {0, 1}, geometric_runs)  # the last choice stands for four failures and for all beyond
    assert abs(float(mean[0] - p[0])) < 1e-3
    assert abs(float(mean[1] - p[1])) < 1e-3


def only_second_round(p, test):
    first, second = [], []
    token = next((t for t in p.walk() if test(t) or first.append(t)), None)
    if token is None:
        return None, -math.inf, first
    next(t for t in p.walk(first) if test(t) or second.append(t))
    return token, p.log_rest(first) - math.log(len(second) + 1), first


def without_the_rest(p, test):
    token, log_weight, rejected = two_rounds(p, test)
    return token, -math.log(len(rejected) + 1) if token is not None else log_weight, rejected


@pytest.mark.parametrize("broken", [only_second_round, without_the_rest])
def test_the_enumeration_sees_a_biased_weight(broken):
    mean, _ = moments(FOUR, {1, 3}, broken)
    assert sum(mean) != FOUR[1] + FOUR[3]


def test_masking_knows_the_mass_and_the_others_vary_around_it():
    for name in ("paper", "recursive", "twisted"):
        mean, square = moments(FOUR, {1, 3}, ESTIMATORS[name])
        assert sum(mean) == Fraction(4, 10)
        assert square > sum(mean) ** 2
    mean, square = moments(FOUR, {1, 3}, ESTIMATORS["masking"])
    assert square == sum(mean) ** 2 == Fraction(16, 100)


def test_variances_are_ordered_as_documented():
    for allowed in ({0}, {3}, {1, 3}, {0, 1, 2}):
        second = {name: moments(FOUR, allowed, ESTIMATORS[name])[1] for name in ("paper", "recursive", "twisted")}
        assert max(second["recursive"], second["paper"]) <= second["twisted"]
        assert (second["recursive"] <= second["paper"]) == (len(allowed) < 3)


# --------------------------------------------------------------------------------------------------------- the real draws


def law(p, allowed):
    """The probability of each (token, weight) of the paper's estimator, from its description alone: orders without replacement, twice."""

    def first(left, gone, probability):
        """(token, rejected set, probability) of one round over the tokens `left`."""
        total = sum(p[t] for t in left)
        for token in left:
            chance = probability * p[token] / total
            if token in allowed:
                yield token, gone, chance
            else:
                yield from first(left - {token}, gone | {token}, chance)

    found = {}
    for token, one, chance in first(frozenset(range(len(p))), frozenset(), Fraction(1)):
        for _, both, joint in first(frozenset(range(len(p))) - one, one, chance):
            weight = (1 - sum((p[t] for t in one), Fraction(0))) / (len(both) + 1)
            found[token, weight] = found.get((token, weight), 0) + joint
    return found


def test_the_joint_law_of_token_and_weight():
    """Not through our own code: every outcome is as probable as the formula says, and the weights are its weights."""
    allowed, rng = {1, 3}, np.random.default_rng(8)
    expected = law(FOUR, allowed)
    assert sum(expected.values()) == 1
    for token in range(4):
        mean = sum(w * chance for (x, w), chance in expected.items() if x == token)
        assert mean == (FOUR[token] if token in allowed else 0)
    log_p = np.log(np.array(FOUR, dtype=float))
    seen = dict.fromkeys(expected, 0)
    for _ in range(4000):
        found = draw(log_p, allowed.__contains__, rng)
        seen[found.token, exact(found.log_weight)] += 1  # a weight that the formula does not know is a KeyError
    assert chisquare(list(seen.values()), [4000 * float(one) for one in expected.values()]).pvalue > 1e-3


@pytest.mark.parametrize("variant", VARIANTS)
def test_tokens_follow_the_distribution_over_the_allowed_ones(variant):
    p = np.array([0.3, 0.22, 0.18, 0.12, 0.08, 0.05, 0.03, 0.02])
    allowed = [1, 3, 4, 6]
    rng = np.random.default_rng(5)
    drawn = [draw(np.log(p), lambda token: token in allowed, rng, variant=variant).token for _ in range(2000)]
    seen = [drawn.count(token) for token in allowed]
    assert chisquare(seen, p[allowed] / p[allowed].sum() * sum(seen)).pvalue > 1e-3
    refused = drawn.count(None)
    assert abs(refused - 2000 * (1 - p[allowed].sum())) < 100 if variant == "twisted" else refused == 0


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_mean_of_real_weights(variant):
    p, rng = np.array([0.5, 0.3, 0.15, 0.05]), np.random.default_rng(1)
    weights = np.exp(
        [draw(np.log(p), lambda token: token in (1, 3), rng, variant=variant).log_weight for _ in range(1500)]
    )
    assert abs(weights.mean() - 0.35) <= 4 * weights.std() / math.sqrt(1500) + 1e-12


def test_orders_are_draws_without_replacement():
    p, rng = np.array([0.6, 0.3, 0.1]), np.random.default_rng(0)
    seen = [tuple(Proposals(np.log(p), rng).walk()) for _ in range(3000)]
    orders = list(itertools.permutations(range(3)))
    expected = [p[a] * p[b] / (1 - p[a]) for a, b, _ in orders]
    assert chisquare([seen.count(order) for order in orders], np.array(expected) * 3000).pvalue > 1e-3


def test_failures_are_geometric():
    source = Proposals(np.log(np.array([0.5, 0.5])), np.random.default_rng(3))
    seen = [source.failures(math.log(0.25)) for _ in range(4000)]
    expected = [0.25 * 0.75**k for k in range(6)]
    counts = [seen.count(k) for k in range(6)]
    assert chisquare([*counts, 4000 - sum(counts)], np.array([*expected, 0.75**6]) * 4000).pvalue > 1e-3


@pytest.mark.parametrize("variant", VARIANTS)
def test_everything_allowed_weighs_one(variant):
    found = draw(np.log([0.5, 0.25, 0.25]), lambda token: True, np.random.default_rng(0), variant=variant)
    assert found.log_weight == pytest.approx(0, abs=1e-12)
    assert found.rejected == ()
    assert found.calls <= (3 if variant == "masking" else 2)


@pytest.mark.parametrize("variant", VARIANTS)
def test_nothing_allowed_weighs_nothing(variant):
    found = draw(np.log([0.5, 0.25, 0.25]), lambda token: False, np.random.default_rng(0), variant=variant)
    assert (found.token, found.log_weight) == (None, -math.inf)
    assert found.calls == (1 if variant == "twisted" else 3)


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_has_no_mass_is_not_tested(variant):
    log_p = np.array([0.0, -np.inf, -np.inf])
    asked = []
    found = draw(log_p, lambda token: asked.append(token) or True, np.random.default_rng(0), variant=variant)
    assert (found.token, found.log_weight, asked) == (0, 0.0, [0])
    nothing = draw(np.full(3, -np.inf), asked.append, np.random.default_rng(0), variant=variant)
    assert (nothing.token, nothing.log_weight, nothing.calls) == (None, -math.inf, 0)


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_token_is_tested_twice(variant):
    rng = np.random.default_rng(0)
    log_p = rng.standard_normal(30)
    for _ in range(20):
        asked = []
        found = draw(log_p, lambda token, asked=asked: asked.append(token) or token > 25, rng, variant=variant)
        assert len(asked) == len(set(asked)) == found.calls <= 30


@pytest.mark.parametrize(("variant", "calls"), [("paper", 1), ("geometric", 1), ("recursive", 2), ("as_released", 1)])
def test_a_certain_token_takes_one_or_two_calls(variant, calls):
    log_p = np.log(np.array([1 - 3e-12, 1e-12, 1e-12, 1e-12]))
    assert draw(log_p, lambda token: True, np.random.default_rng(0), variant=variant).calls == calls


def test_pruned_mass_stays_in_the_weight():
    p, rng = np.array([0.2, 0.1, 0.1]), np.random.default_rng(0)
    weights = [math.exp(draw(np.log(p), lambda token: token == 1, rng).log_weight) for _ in range(1500)]
    assert np.mean(weights) == pytest.approx(0.1, abs=4 * np.std(weights) / math.sqrt(1500))
    assert math.exp(draw(np.log(p), lambda token: token == 1, rng, variant="masking").log_weight) == pytest.approx(0.1)


@pytest.mark.parametrize("variant", ["paper", "recursive", "geometric", "masking"])
def test_weights_far_below_what_floats_hold(variant):
    log_p = np.array([0.0, -50.0, -900.0])
    log_p -= log_sum(log_p)
    found = draw(log_p, lambda token: token == 2, np.random.default_rng(0), variant=variant)
    assert found.token == 2
    expected = {"paper": -900 - math.log(3), "recursive": -900, "masking": -900}
    if variant in expected:
        assert found.log_weight == pytest.approx(expected[variant], abs=1e-9)
    else:
        assert found.log_weight < -100  # e^900 phantom draws: counted in floating point, or as too many to count
        assert not math.isnan(found.log_weight)


def test_what_is_left_is_accurate_at_both_ends():
    p = np.array([1 - 1e-9 - 1e-12, 1e-9, 1e-12])
    source = Proposals(np.log(p), np.random.default_rng(0))
    assert source.log_rest([0]) == pytest.approx(math.log(1e-9 + 1e-12), abs=1e-6)
    assert source.log_rest([2]) == pytest.approx(-1e-12, rel=1e-6)
    assert source.log_rest([0, 1, 2]) == -math.inf
    log_p = np.random.default_rng(0).standard_normal(500) * 40
    source = Proposals(log_p, np.random.default_rng(0))
    rest, taken = source.rest(), []
    assert rest.log == 0
    for token in source.walk():
        rest.take(token)
        taken.append(token)
        assert rest.log == pytest.approx(source.log_rest(taken), abs=1e-9)
    assert rest.log == -math.inf
    assert log1mexp(-1e-20) == pytest.approx(math.log(1e-20))
    assert log1mexp(1e-6) == -math.inf  # rounding above zero


def test_descending_sorts_what_is_walked():
    rng = np.random.default_rng(0)
    keys = rng.standard_normal(3000)
    keys[::7] = -np.inf
    keys[1::100] = 0.25  # ties
    found = list(descending(keys))
    assert sorted(found) == np.flatnonzero(keys > -np.inf).tolist()
    assert (np.diff(keys[found]) <= 0).all()
    assert next(descending(np.array([1.0, 3.0, 3.0]))) == 1  # as argmax
    assert list(descending(np.array([-np.inf]))) == []


def test_rejections_are_bounded():
    log_p = np.log(np.full(50, 0.02))
    for variant in ("recursive", "geometric", "as_released"):
        found = draw(log_p, lambda token: False, np.random.default_rng(0), variant=variant, max_rejections=5)
        assert found.calls == 5
        assert found.log_weight == -math.inf


def test_tensors_are_left_alone_and_seeds_repeat():
    logits = torch.randn(40, dtype=torch.float64)
    before = logits.clone()
    first, again = (draw(logits, lambda t: t % 3 == 0, np.random.default_rng(7)) for _ in range(2))
    assert first == again
    assert torch.equal(logits, before)
    assert draw(logits.bfloat16(), lambda t: True, np.random.default_rng(7)).token is not None


@pytest.mark.parametrize(
    ("change", "error", "named"),
    [
        ({"log_p": [0.5, 0.5]}, None, ""),
        ({"log_p": torch.tensor([1, 2])}, TypeError, "log_p"),
        ({"log_p": np.array([1, 2])}, TypeError, "log_p"),
        ({"log_p": torch.zeros(2, 2)}, ValueError, "log_p"),
        ({"log_p": np.zeros(0)}, ValueError, "log_p"),
        ({"log_p": torch.tensor([0.0, math.nan])}, ValueError, "log_p"),
        ({"log_p": np.array([0.0, math.inf])}, ValueError, "log_p"),
        ({"variant": "best"}, ValueError, "variant"),
        ({"accepts": 1}, ValueError, "accepts"),
        ({"max_rejections": 0, "variant": "recursive"}, ValueError, "max_rejections"),
        ({"max_rejections": 3}, ValueError, "max_rejections"),
        ({"test": lambda token: 1}, TypeError, "test"),
        ({"test": [True, False]}, TypeError, "test"),
        ({"rng": 3}, TypeError, "rng"),
        ({"log_p": torch.zeros(0)}, ValueError, "log_p"),
    ],
)
def test_bad_input_is_named(change, error, named):
    given = {"log_p": np.log([0.5, 0.5]), "test": lambda token: True, "rng": np.random.default_rng(0)} | change
    if error is None:
        assert draw(**given).token in (0, 1)
        return
    with pytest.raises(error, match=named):
        draw(**given)
