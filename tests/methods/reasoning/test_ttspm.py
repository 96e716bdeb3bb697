"""When another sample no longer pays: closed forms, fits, unequal items, rounds, plans, and logs."""

import itertools
import json
import math

import numpy as np
import pytest

from assay.methods.core.reasoning.estimates import coverage
from assay.methods.core.reasoning.logs import Logged, read_log
from assay.methods.reasoning.ttspm import (
    TTSPM,
    BetaTTSPM,
    Chain,
    Stopper,
    accuracies,
    allocate,
    fit,
    plan,
    rethinking_rate,
)

MODELS = [TTSPM(0.03), TTSPM(0.4, 0.7), TTSPM(0.9, 0.2), BetaTTSPM(0.3, 2.0), BetaTTSPM(5.0, 0.5)]


def logged(right, answers=None):
    """Items of a log from which samples are right; wrong ones say 0, or what `answers` has."""
    return [
        Logged(str(i), "", "1", ("",) * len(own), tuple(answers[i]) if answers else tuple("01"[ok] for ok in own), tuple(own))
        for i, own in enumerate(right)
    ]  # fmt: skip


def drawn(chances, n, seed=0):
    random = np.random.default_rng(seed)
    return [(random.random(n) < p).tolist() for p in chances]


# ------------------------------------------------------------------------------------------------------------ closed forms


@pytest.mark.parametrize("model", MODELS, ids=repr)
def test_the_curve_rises_and_bends_and_gains_add_up(model):
    curve = np.array([model.predict(N) for N in range(60)])
    assert curve[0] == 0
    assert (np.diff(curve) > 0).sum() >= 15
    assert (np.diff(curve) >= 0).all()
    assert (np.diff(curve, 2) <= 1e-15).all()
    gains = [model.marginal(N) for N in range(60)]
    assert np.allclose(np.diff(curve), gains[:-1], atol=1e-14)
    assert sum(gains[:40]) == pytest.approx(model.predict(40), abs=1e-12)


def test_the_limit_is_the_ceiling():
    assert TTSPM(0.2, 0.7).predict(1000) == pytest.approx(0.7, abs=1e-12)
    assert TTSPM(1.0, 0.7).predict(1) == 0.7
    assert TTSPM(0.0, 0.7).predict(1000) == 0
    assert BetaTTSPM(0.5, 0.5).predict(10**9) == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("model", MODELS, ids=repr)
@pytest.mark.parametrize("eps", [0.3, 0.05, 0.01, 1e-4])
def test_the_saturation_point_is_the_first_crossing(model, eps):
    N = model.saturation(eps)
    assert model.marginal(N) <= eps
    assert N == 0 or model.marginal(N - 1) > eps


def test_the_first_crossing_is_exact_where_logarithms_round():
    for p, N in itertools.product((0.1, 0.3, 0.5, 0.7), range(1, 20)):
        model = TTSPM(p)
        assert model.saturation(model.marginal(N)) == N  # equal counts as crossed
        assert model.saturation(model.marginal(N) * (1 - 1e-9)) == N + 1


def test_the_crossing_is_the_papers_formula():
    for p, ceiling, eps in itertools.product((0.02, 0.17, 0.63, 0.98), (0.3, 1.0), (1e-5, 0.013)):
        wanted = math.ceil(math.log(eps / (ceiling * p)) / math.log(1 - p)) if ceiling * p > eps else 0
        assert TTSPM(p, ceiling).saturation(eps) == wanted


@pytest.mark.parametrize("p", [1e-300, 1e-20, 1e-12, 1e-6])
def test_a_tiny_chance_has_its_crossing_too(p):
    """1 - p is 1 in floating point, or has lost digits that its powers would need."""
    assert TTSPM(p).saturation(p / 10) == pytest.approx(math.log(10) / p, rel=1e-6)
    assert TTSPM(p).marginal(round(1 / p)) == pytest.approx(p / math.e, rel=1e-5)


def test_saturation_falls_with_the_threshold_and_has_its_ends():
    points = [TTSPM(0.1, 0.9).saturation(eps) for eps in (1e-6, 1e-3, 0.01, 0.05, 0.0899, 0.0901, 0.5)]
    assert points == sorted(points, reverse=True)
    assert points[-2:] == [0, 0]
    assert points[-3] == 1
    assert TTSPM(1.0, 0.4).saturation(0.39) == 1
    assert TTSPM(1.0, 0.4).saturation(0.4) == 0
    assert TTSPM(0.0).saturation(0.001) == 0


def test_saturation_is_small_at_both_ends_of_p():
    points = [TTSPM(p).saturation(0.01) for p in np.linspace(0.001, 0.999, 200)]
    at = int(np.argmax(points))
    assert 0 < at < 199
    assert points[0] == 0
    assert points[-1] <= 2
    assert max(points) > 15


# -------------------------------------------------------------------------------------------------------------------- fits


@pytest.mark.parametrize("items", [None, 50])
@pytest.mark.parametrize(("p", "ceiling"), [(0.03, 0.9), (0.3, 0.5), (0.8, 1.0), (0.1, 0.2)])
def test_a_fit_finds_what_made_the_points(p, ceiling, items):
    sizes = [1, 2, 4, 8, 16]
    found = TTSPM.fit(sizes, [TTSPM(p, ceiling).predict(N) for N in sizes], items=items)
    assert found.p == pytest.approx(p, rel=1e-5)
    assert found.ceiling == pytest.approx(ceiling, rel=1e-5)


def test_a_fit_is_the_least_of_scipys_too():
    from scipy.optimize import curve_fit

    sizes, noisy = np.array([1, 2, 3, 5, 8, 13]), np.array([0.21, 0.3, 0.41, 0.5, 0.52, 0.57])
    for items in (None, 20):
        share = (noisy * 20 + 0.5) / 21  # items weight by the inverse of the binomial variance
        sigma = None if items is None else np.sqrt(share * (1 - share) / items)
        found = TTSPM.fit(sizes.tolist(), noisy.tolist(), items=items)
        (ceiling, p), _ = curve_fit(lambda N, F, q: F * (1 - (1 - q) ** N), sizes, noisy, p0=[0.5, 0.2], sigma=sigma)
        assert (found.p, found.ceiling) == pytest.approx((p, ceiling), rel=1e-4)


def test_a_fit_stays_within_its_bounds():
    assert TTSPM.fit([1, 2], [0.0, 0.0]) == TTSPM(0.0, 0.0)
    steep = TTSPM.fit([1, 2, 3], [0.3, 0.6, 0.9])  # a line, as no curve is
    assert steep.ceiling == 1.0
    assert TTSPM.fit([1, 2, 3], [1.0, 1.0, 1.0]).predict(1) == pytest.approx(1, abs=1e-4)


def test_the_estimate_of_coverage_has_no_bias():
    right = [True, False, False, True, False, False]
    for N in range(1, 7):
        over_all = np.mean([any(right[i] for i in chosen) for chosen in itertools.combinations(range(6), N)])
        assert accuracies(logged([right]), [N])[0, 0] == pytest.approx(over_all, abs=1e-12)
        assert coverage(2, 6, N) == pytest.approx(over_all, abs=1e-12)


# ----------------------------------------------------------------------------------------------------------- unequal items


def test_ever_more_equal_items_are_one_chance():
    for N in (1, 2, 10, 100):
        assert BetaTTSPM(2e7, 8e7).predict(N) == pytest.approx(TTSPM(0.2).predict(N), abs=1e-5)


def test_unequal_items_lie_below_equal_ones_of_the_same_mean():
    for a, b in ((0.1, 0.4), (1.0, 4.0), (20.0, 80.0)):
        unequal, equal = BetaTTSPM(a, b), TTSPM(0.2)
        assert unequal.predict(1) == pytest.approx(equal.predict(1))
        assert all(unequal.predict(N) < equal.predict(N) for N in (2, 3, 10, 50))


def test_the_beta_model_is_found_and_predicts_beyond_its_samples():
    chances = np.random.default_rng(1).beta(0.4, 1.6, 3000)
    right = drawn(chances, 64)
    found = BetaTTSPM.fit([sum(own[:8]) for own in right], 8)
    assert (found.a, found.b) == pytest.approx((0.4, 1.6), rel=0.15)
    observed = accuracies(logged(right[:500]), [32]).mean()
    one = TTSPM(found.mean).predict(32)
    assert abs(found.predict(32) - observed) < 0.05
    assert one - observed > 0.2  # what a single chance would promise


def test_equal_items_give_a_narrow_beta():
    found = BetaTTSPM.fit([sum(own) for own in drawn([0.3] * 500, 8)], 8)
    assert found.a + found.b > 50
    assert found.mean == pytest.approx(0.3, abs=0.02)


def test_a_posterior_moves_towards_what_was_seen():
    prior = BetaTTSPM(0.5, 0.5)
    assert prior.posterior(0, 0) == prior
    assert prior.posterior(3, 4).mean == pytest.approx(3.5 / 5)
    assert prior.posterior(0, 10).mean < 0.05


# ------------------------------------------------------------------------------------------------------------------ rounds


def test_rounds_in_which_right_answers_stay_are_the_papers_model():
    for N in range(10):
        assert Chain(0.3).predict(N) == pytest.approx(TTSPM(0.3).predict(N), abs=1e-12)


def test_forgetting_lowers_the_limit():
    chain = Chain(0.3, forget=0.1)
    assert chain.limit == pytest.approx(0.75)
    assert chain.predict(500) == pytest.approx(0.75)
    assert chain.predict(5) < Chain(0.3).predict(5)
    assert Chain(0.0, start=0.4).predict(7) == 0.4


def test_an_item_is_at_risk_up_to_its_first_success():
    assert rethinking_rate([[False, True, False, True], [False, False, False], [True, True]]).p == pytest.approx(2 / 6)


def test_parallel_and_sequential_estimates_agree_for_independent_draws():
    right = drawn([0.25] * 4000, 8)
    sequential = rethinking_rate(right).p
    parallel = TTSPM.fit(range(1, 9), accuracies(logged(right[:1500]), range(1, 9)).mean(0).tolist()).p
    assert sequential == pytest.approx(0.25, abs=0.01)
    assert parallel == pytest.approx(0.25, abs=0.02)


def test_a_chain_is_found_from_its_rounds():
    random, rounds = np.random.default_rng(0), []
    for _ in range(3000):
        state, own = False, []
        for _ in range(8):
            state = bool(random.random() < (0.8 if state else 0.3))
            own.append(state)
        rounds.append(own)
    found = Chain.fit(rounds)
    assert (found.p, found.forget) == pytest.approx((0.3, 0.2), abs=0.02)
    assert found.predict(8) == pytest.approx(np.mean([own[-1] for own in rounds]), abs=0.02)
    assert rethinking_rate(rounds).predict(8) > found.predict(8) + 0.2  # taking right answers to stay is optimistic


# ------------------------------------------------------------------------------------------------------------------- plans


def test_a_plan_is_the_saturation_point_of_each():
    assert plan(MODELS, 0.02) == [model.saturation(0.02) for model in MODELS]


def test_an_allocation_is_the_best_of_all():
    models, total = [TTSPM(0.1), TTSPM(0.35), TTSPM(0.9), BetaTTSPM(0.2, 0.5)], 7
    counts = allocate(models, total)
    assert sum(counts) == total
    reached = sum(m.predict(N) for m, N in zip(models, counts, strict=True))
    best = max(
        sum(m.predict(N) for m, N in zip(models, split, strict=True))
        for split in itertools.product(range(total + 1), repeat=4)
        if sum(split) == total
    )
    assert reached == pytest.approx(best, abs=1e-12)


def test_an_allocation_keeps_to_sizes_and_limits():
    assert allocate([TTSPM(0.5), TTSPM(0.4)], 10, sizes=[4, 3]) == [1, 2]
    assert allocate([TTSPM(0.5), TTSPM(0.4)], 10, most=2) == [2, 2]
    assert allocate([TTSPM(0.0)], 5) == [0]
    assert allocate([TTSPM(0.5)] * 3, 9) == [3, 3, 3]  # alike: uniform, as without a plan


def test_stopping_is_a_limit_until_the_first_success():
    stopper = Stopper(BetaTTSPM(0.3, 0.9), eps=0.05)
    assert stopper([])
    assert not stopper([True])
    asked = 0
    while stopper([False] * asked):
        asked += 1
    assert asked == stopper.limit
    assert Stopper(BetaTTSPM(4e3, 4e3), eps=1e-9).limit == pytest.approx(4e12)  # found without counting up to it
    posterior = BetaTTSPM(0.3, 0.9).posterior(0, asked)
    assert posterior.marginal(0) <= 0.05 < BetaTTSPM(0.3, 0.9).posterior(0, asked - 1).marginal(0)


# -------------------------------------------------------------------------------------------------------------------- logs


def test_a_log_of_the_harness_is_fitted_without_a_model(tmp_path):
    right = drawn(np.random.default_rng(3).beta(0.5, 1.0, 60), 16)
    path = tmp_path / "samples_sums.jsonl"
    lines = [
        {"doc_id": i, "target": "7", "arguments": [["3 + 4 =", {}]], "resps": [["7" if ok else "8" for ok in own]], "filtered_resps": ["7"]}
        for i, own in enumerate(right)
    ]  # fmt: skip
    path.write_text("\n".join(map(json.dumps, lines)))
    found = fit(path, upto=8)
    assert found.observed[0] == pytest.approx(np.mean([own[:8] for own in right]))
    assert found.model is found.spread
    observed = accuracies(read_log(path), [16]).mean()
    value, low, high = found.predict(16)
    assert low <= value <= high
    assert abs(found.spread.predict(16) - observed) < abs(TTSPM(found.spread.mean).predict(16) - observed)
    point, least, most = found.saturation(0.02)
    assert least <= point <= most
    assert fit(read_log(path), upto=8).curve == found.curve


def test_only_the_first_samples_are_looked_at():
    right = drawn([0.2, 0.5, 0.8, 0.3], 8)
    changed = [own[:4] + [not ok for ok in own[4:]] for own in right]
    assert fit(logged(right), upto=4).observed == fit(logged(changed), upto=4).observed
    assert fit(logged(right), upto=8).observed != fit(logged(changed), upto=8).observed


def test_a_vote_saturates_below_coverage_and_may_fall():
    right = [[True, False, False] * 4, [True] * 10 + [False] * 2]
    answers = [["1", "0", "0"] * 4, ["1"] * 10 + ["2", "3"]]
    items = logged(right, answers)
    votes, covered = accuracies(items, [1, 9], selector="majority"), accuracies(items, [1, 9])
    assert votes[0, 1] < votes[0, 0]  # most say the same wrong thing: voting makes it surer
    assert votes[1, 1] == 1
    assert covered[0, 1] == 1
    assert (votes[:, 1] <= covered[:, 1]).all()
    assert fit(items, upto=8, selector="majority").spread is None


def test_no_answer_is_never_voted_for_where_there_is_another():
    items = logged([[True, False, False, False]], [["1", "", "", ""]])
    assert accuracies(items, [4], selector="majority")[0, 0] == 1
    assert accuracies(items, [1], selector="majority")[0, 0] == 0.25


def test_restarts_of_a_local_search_saturate_too():
    """Not only language: a restart counts as right where it climbs to the highest of 40 places in a ring."""
    random, hits = np.random.default_rng(0), []
    for _ in range(150):
        height = random.random(40)
        own = []
        for at in random.integers(0, 40, 40):
            while (best := max((at - 1, at, at + 1), key=lambda i: height[i % 40])) != at:
                at = best
            own.append(bool(at % 40 == height.argmax()))
        hits.append(own)
    found = fit(logged(hits), upto=8)
    observed = accuracies(logged([own[8:] for own in hits]), [32]).mean()
    assert found.spread.predict(32) == pytest.approx(observed, abs=0.05)
    assert 1 <= found.spread.saturation(0.01) <= 32


# --------------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("call", "error", "said"),
    [
        (lambda: TTSPM(1.1), ValueError, "p must be"),
        (lambda: TTSPM(0.5, float("nan")), ValueError, "ceiling"),
        (lambda: TTSPM("a"), TypeError, "p must be"),
        (lambda: TTSPM(0.5).predict(1.5), TypeError, "N must be"),
        (lambda: TTSPM(0.5).marginal(-1), ValueError, "N must be"),
        (lambda: TTSPM(0.5).saturation(0), ValueError, "eps"),
        (lambda: TTSPM.fit([1, 1], [0.1, 0.2]), ValueError, "two different sizes"),
        (lambda: TTSPM.fit([1, 2], [0.1]), ValueError, "accuracy must have as many"),
        (lambda: TTSPM.fit([1, 2], [0.1, 1.2]), ValueError, "accuracy"),
        (lambda: BetaTTSPM(0, 1), ValueError, "a must be"),
        (lambda: BetaTTSPM(1, 1).saturation(-1), ValueError, "eps"),
        (lambda: BetaTTSPM(1, 1).posterior(3, 2), ValueError, "correct"),
        (lambda: BetaTTSPM.fit([0, 0], 8), ValueError, "one kind"),
        (lambda: BetaTTSPM.fit([8, 8], 8), ValueError, "one kind"),
        (lambda: BetaTTSPM.fit([9, 1], 8), ValueError, "correct"),
        (lambda: BetaTTSPM.fit([1], 8), ValueError, "two at least"),
        (lambda: Chain(0.5, forget=2), ValueError, "forget"),
        (lambda: Chain.fit([]), ValueError, "rounds"),
        (lambda: Chain.fit([[1]]), TypeError, "rounds"),
        (lambda: rethinking_rate([[]]), ValueError, "rounds"),
        (lambda: plan([TTSPM(0.1)], 0), ValueError, "eps"),
        (lambda: allocate([TTSPM(0.1)], 4, sizes=[1, 2]), ValueError, "sizes"),
        (lambda: allocate([TTSPM(0.1)], -1), ValueError, "total"),
        (lambda: Stopper(TTSPM(0.1), 0.1), TypeError, "prior"),
        (lambda: Stopper(BetaTTSPM(1, 1), 0), ValueError, "eps"),
        (lambda: accuracies([], [1]), ValueError, "logged"),
        (lambda: accuracies(logged([[True, False]]), [3]), ValueError, "sizes"),
        (lambda: accuracies(logged([[True]]), [1], selector="best"), ValueError, "selector"),
        (lambda: fit(logged([[True, False]]), upto=4), ValueError, "2 of '0'"),
        (lambda: fit(logged([[True, False]]), upto=1), ValueError, "upto"),
    ],
)
def test_bad_input_is_named(call, error, said):
    with pytest.raises(error, match=said):
        call()
