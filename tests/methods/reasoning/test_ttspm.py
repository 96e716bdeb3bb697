"""Saturation of samples and of rounds: closed forms against sums, chains and sampling."""

import itertools
import math

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.stats import beta

from assay.methods.core.reasoning.estimates import coverage
from assay.methods.reasoning.ttspm import TTSPM, BetaTTSPM, Chain, Stopper, plan

GRID = [(F, p) for F in (0.3, 1.0) for p in (0.001, 0.1, 0.5, 0.99, 1.0)]


@pytest.mark.parametrize(("F_max", "p"), GRID)
def test_the_curve_rises_bends_down_and_its_gains_add_up(F_max, p):
    model = TTSPM(F_max, p)
    N = np.arange(200)
    curve = model.predict(N)
    assert curve[0] == 0
    assert (np.diff(curve) >= 0).all()
    assert (np.diff(curve, 2) <= 1e-12).all()
    assert model.predict(10**7) == pytest.approx(F_max)
    for n in (0, 1, 7, 100):
        assert sum(float(model.marginal(k)) for k in range(n)) == pytest.approx(float(model.predict(n)), abs=1e-12)
        assert model.predict(n) == pytest.approx(F_max * (1 - (1 - p) ** n), abs=1e-12)
    assert TTSPM(F_max, 0).predict(5) == 0
    assert TTSPM(F_max, 0).marginal(5) == 0


@pytest.mark.parametrize(("F_max", "p"), GRID)
@pytest.mark.parametrize("eps", [0.3, 0.05, 1e-3, 1e-9])
def test_the_saturation_point_is_the_first_crossing(F_max, p, eps):
    model = TTSPM(F_max, p)
    first = next(N for N in itertools.count() if model.marginal(N) <= eps)
    assert model.saturation(eps) == first
    if F_max * p <= eps:
        assert first == 0
    elif p < 1:
        assert first in {math.ceil(x) + d for x in [math.log(eps / (F_max * p)) / math.log(1 - p)] for d in (-1, 0, 1)}
    if p == 1 and eps < F_max:
        assert first == 1


def test_the_saturation_point_falls_with_eps_and_is_small_at_both_ends_of_p():
    points = [TTSPM(1.0, 0.1).saturation(eps) for eps in (1e-6, 1e-4, 1e-2, 0.05, 0.1, 0.5)]
    assert points == sorted(points, reverse=True)
    assert points[-2:] == [0, 0]  # F_max p <= eps
    by_p = [TTSPM(1.0, p).saturation(0.01) for p in (0.005, 0.05, 0.2, 0.99)]
    assert by_p[0] == 0
    assert by_p[1] > by_p[2] > by_p[3] > 0
    assert TTSPM(1.0, 0.0).saturation(0.01) == 0


@pytest.mark.parametrize(("F_max", "p"), [(0.8, 0.3), (0.35, 0.02), (1.0, 0.6), (0.5, 0.999)])
def test_a_curve_without_noise_gives_its_parameters_back(F_max, p):
    N = [1, 2, 3, 4, 8, 16, 64, 256]
    found = TTSPM.fit(N, [float(x) for x in TTSPM(F_max, p).predict(N)])
    assert found.F_max == pytest.approx(F_max, rel=1e-5)
    assert found.p == pytest.approx(p, rel=1e-3)


def test_the_interval_says_when_nothing_is_known():
    low = [float(x) for x in TTSPM(0.5, 0.002).predict([1, 2, 4])]
    vague = TTSPM.fit([1, 2, 4], low, trials=60)
    N = [1, 8, 64, 512]
    sharp = TTSPM.fit(N, [float(x) for x in TTSPM(0.5, 0.05).predict(N)], trials=500)
    assert vague.interval[0][1] - vague.interval[0][0] > 0.9
    assert sharp.interval[0][1] - sharp.interval[0][0] < 0.15
    assert sharp.interval[0][0] < 0.5 < sharp.interval[0][1]


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    rng, N, held = np.random.default_rng(0), [1, 2, 4, 8, 16, 32], 0
    truth = TTSPM(0.7, 0.15)
    for _ in range(40):
        noisy = [rng.binomial(300, float(truth.predict(n))) / 300 for n in N]
        (low, high), _ = TTSPM.fit(N, noisy, trials=300).interval
        held += low <= 0.7 <= high
    assert held >= 33


def test_the_mixture_is_the_integral_and_has_the_single_p_as_its_limit():
    for a, b in ((0.5, 3.0), (2.0, 2.0), (1.0, 9.0)):
        model = BetaTTSPM(a, b, 0.9)
        for N in (1, 2, 10, 50):
            wanted, _ = quad(lambda p, N=N, a=a, b=b: beta.pdf(p, a, b) * (1 - (1 - p) ** N), 0, 1)
            assert model.predict(N) == pytest.approx(0.9 * wanted, rel=1e-5)
            assert model.marginal(N) == pytest.approx(float(model.predict(N + 1) - model.predict(N)), rel=1e-9)
        single = TTSPM(0.9, a / (a + b))
        assert model.predict(1) == pytest.approx(float(single.predict(1)))
        assert all(model.predict(N) < single.predict(N) for N in range(2, 40))
    narrow = BetaTTSPM(0.2e7, 0.8e7)
    assert [float(narrow.predict(N)) for N in (1, 4, 9)] == pytest.approx(
        [float(TTSPM(1, 0.2).predict(N)) for N in (1, 4, 9)], rel=1e-5
    )
    for eps in (0.5, 0.02, 1e-4):
        model = BetaTTSPM(0.5, 3.0)
        N = model.saturation(eps)
        assert model.marginal(N) <= eps
        assert N == 0 or model.marginal(N - 1) > eps
    with pytest.raises(ValueError, match="eps"):
        BetaTTSPM(0.0001, 0.0001).saturation(1e-30)


def test_the_beta_is_found_again_and_equal_items_give_one_p():
    rng = np.random.default_rng(1)
    p = rng.beta(0.6, 2.4, 4000)
    found = BetaTTSPM.fit(list(rng.binomial(8, p)), 8)
    assert (found.a, found.b) == (pytest.approx(0.6, rel=0.15), pytest.approx(2.4, rel=0.15))
    equal = BetaTTSPM.fit(list(rng.binomial(8, 0.25, 2000)), 8)
    assert equal.a / (equal.a + equal.b) == pytest.approx(0.25, abs=0.01)
    assert equal.predict(16) == pytest.approx(1 - 0.75**16, abs=0.01)
    for counts in ([0, 0, 0], [8, 8]):
        assert 0 <= BetaTTSPM.fit(counts, 8).predict(1) <= 1


def test_unequal_items_are_overestimated_by_one_p_and_not_by_the_mixture():
    """The finding that the mixture is there for: fitted on N <= 8, asked at 64."""
    rng = np.random.default_rng(2)
    p = rng.beta(0.25, 2.0, 600)
    right = rng.random((600, 64)) < p[:, None]
    seen = right[:, :8].sum(1)
    curve = [float(np.mean([coverage(int(c), 8, N) for c in seen])) for N in range(1, 9)]
    truth = float(right.any(1).mean())
    one_p = TTSPM(1.0, curve[0])
    assert one_p.predict(64) > truth + 0.2
    assert BetaTTSPM.fit([int(c) for c in seen], 8).predict(64) == pytest.approx(truth, abs=0.05)
    ceiling = TTSPM.fit(list(range(1, 9)), curve, trials=600)
    assert ceiling.predict(64) < truth - 0.03  # the paper's fit of the mean curve takes the bend for a ceiling


def test_rounds_that_are_independent_draws_give_the_parallel_estimate():
    rng = np.random.default_rng(3)
    rounds = [list(rng.random(8) < 0.2) for _ in range(2000)]
    chain = Chain.fit([[bool(x) for x in item] for item in rounds], absorbing=True)
    assert chain.p_rethink == pytest.approx(0.2, abs=0.01)
    for N in (1, 3, 8):
        assert chain.predict(N) == pytest.approx(float(TTSPM(1, chain.p_rethink).predict(N)))
        assert chain.predict(N) == pytest.approx(np.mean([any(item[:N]) for item in rounds]), abs=0.03)
    assert Chain.fit([[False, True, False]], absorbing=True) == Chain(0.5, 0.0)
    assert Chain.fit([[False, True, False]]) == Chain(0.5, 1.0)


def test_the_chain_is_its_transition_matrix():
    for gain, lose in ((0.3, 0.1), (1.0, 1.0), (0.2, 0.0), (0.0, 0.5)):
        step = np.array([[1 - gain, gain], [lose, 1 - lose]])
        for N in range(6):
            wanted = (np.array([1.0, 0.0]) @ np.linalg.matrix_power(step, N))[1]
            assert Chain(gain, lose).predict(N) == pytest.approx(wanted)
    assert Chain(0.3, 0.1).predict(1000) == pytest.approx(0.75)


def test_the_plan_is_the_best_division():
    prior = BetaTTSPM(0.5, 2.0)
    counts, n, total = [0, 0, 2, 0], 4, 5
    models = [prior.posterior(c, n) for c in counts]

    def gained(given):
        return sum(float(m.predict(k)) for m, k, c in zip(models, given, counts, strict=True) if not c)

    found = plan(counts, n, total, prior=prior)
    assert sum(found) == total
    assert found[2] == 0
    best = max((g for g in itertools.product(range(total + 1), repeat=4) if sum(g) == total and not g[2]), key=gained)
    assert gained(found) == pytest.approx(gained(best))
    assert plan([0, 0], 4, 10, most=3) == [3, 3]
    assert plan([1, 4], 4, 10) == [0, 0]
    assert plan([0, 3], 4, 0) == [0, 0]


def test_a_plan_solves_more_than_equal_shares_where_items_differ():
    """Two kinds of items, of which a pilot tells something: hopeless ones get no more than others, solved ones nothing."""
    rng = np.random.default_rng(4)
    p = np.where(np.arange(400) % 2 == 0, 0.3, 0.01)
    pilot = rng.binomial(4, p)
    total = 400 * 6
    given = np.array(plan([int(c) for c in pilot], 4, total))
    solved = 1 - (1 - p) ** given
    equal = 1 - (1 - p) ** 6
    open_ones = pilot == 0
    assert solved[open_ones].sum() > equal[open_ones].sum() * 1.05


def test_it_stops_when_another_sample_costs_more_than_it_may_bring():
    stop = Stopper(BetaTTSPM(1, 9), kappa=2.0, value=40.0)
    while stop.go_on():
        stop.saw(False)
    assert 1 / (10 + stop.drawn) <= 0.05 < 1 / (10 + stop.drawn - 1)
    solved = Stopper(BetaTTSPM(1, 1), kappa=0)
    solved.saw(True)
    assert not solved.go_on()


def test_bad_arguments_are_named():
    for wrong, name in (
        (lambda: TTSPM(1.2, 0.5), "F_max"),
        (lambda: TTSPM(1, math.nan), "p"),
        (lambda: TTSPM(1, 0.5).predict(-1), "N"),
        (lambda: TTSPM(1, 0.5).saturation(0), "eps"),
        (lambda: TTSPM.fit([1], [0.5]), "N and accuracy"),
        (lambda: TTSPM.fit([1, 2], [0.5, 1.5]), "accuracy"),
        (lambda: BetaTTSPM(0, 1), "a must"),
        (lambda: BetaTTSPM.fit([], 4), "correct"),
        (lambda: BetaTTSPM.fit([5], 4), "correct"),
        (lambda: Chain(0.5, 2), "p_forget"),
        (lambda: Chain.fit([]), "rounds"),
        (lambda: Stopper(BetaTTSPM(1, 1), kappa=-1), "kappa"),
        (lambda: plan([0], 1, -1), "total"),
    ):
        with pytest.raises(ValueError, match=name):
            wrong()
