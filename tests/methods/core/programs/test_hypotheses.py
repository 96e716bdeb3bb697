"""The tests that all benchmarks share: by enumeration, by what must not change, by simulation, and against statsmodels where it is."""

import math
import random
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from assay.methods.core.programs import hypotheses
from assay.methods.core.programs.hypotheses import (
    binomial,
    compare_groups,
    dunn,
    equivalent_means,
    equivalent_shares,
    friedman,
    holm,
    independence,
    mcnemar,
    paired_difference,
    power_of_pairs,
    power_of_share,
    tasks_for_pairs,
    tasks_for_share,
    wilson,
)


def tail(k, n, p):
    """P(X >= k) for X ~ Binomial(n, p), added up."""
    return math.fsum(math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(k, n + 1))


# ------------------------------------------------------------------------------------------------------------------ one rate


@pytest.mark.parametrize("p0", [0.1, 0.5, 0.6, 0.7])
def test_the_exact_p_value_is_the_binomial_tail(p0):
    for n in (1, 2, 7, 20, 33):
        for k in range(n + 1):
            assert binomial(k, n, p0).p == pytest.approx(tail(k, n, p0), rel=1e-9)
            assert binomial(k, n, p0, alternative="less").p == pytest.approx(
                1 - tail(k + 1, n, p0), rel=1e-9, abs=1e-12
            )


@pytest.mark.parametrize("p0", [0.05, 0.5, 0.6, 0.7, 0.9])
@pytest.mark.parametrize("alternative", hypotheses.ALTERNATIVES)
def test_it_errs_at_most_as_often_as_it_says_for_every_number_of_tasks(p0, alternative):
    """By enumeration of what may come out at p = p0."""
    for n in (*range(1, 16), 24, 50):
        chances = [math.comb(n, k) * p0**k * (1 - p0) ** (n - k) for k in range(n + 1)]
        wrong = [chances[k] for k in range(n + 1) if binomial(k, n, p0, alternative=alternative).significant()]
        assert math.fsum(wrong) <= 0.05 + 1e-12


def test_the_normal_approximation_does_not():
    n, p0 = 10, 0.05
    wrong = [
        math.comb(n, k) * p0**k * (1 - p0) ** (n - k)
        for k in range(n + 1)
        if binomial(k, n, p0, method="normal").significant()
    ]
    assert math.fsum(wrong) > 0.08


def test_p_falls_with_successes_and_rises_with_p0():
    p = [binomial(k, 40, 0.6).p for k in range(41)]
    assert p == sorted(p, reverse=True)
    assert len(set(p)) > 35
    by_p0 = [binomial(25, 40, p0).p for p0 in np.linspace(0.05, 0.95, 19)]
    assert by_p0 == sorted(by_p0)


def test_rates_of_the_paper_that_the_text_of_a_claim_depends_on():
    """72, 70, 66 and 60 of 100: all are above 50 %, two above 60 %, one of them after Holm, none above 70 %."""
    seen = {p0: [binomial(k, 100, p0).p for k in (72, 70, 66, 60)] for p0 in (0.5, 0.6, 0.7)}
    above = {p0: [sum(p <= 0.05 for p in each), sum(p <= 0.05 for p in holm(each))] for p0, each in seen.items()}
    assert above == {0.5: [4, 4], 0.6: [2, 1], 0.7: [0, 0]}


@given(st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), st.floats(0.5, 0.999))
def test_wilson_holds_the_rate_and_stays_within_0_and_1(pair, level):
    k, n = pair
    seen = wilson(k, n, level=level)
    assert 0 <= seen.low <= k / n <= seen.high <= 1
    assert seen.median == k / n
    mirrored = wilson(n - k, n, level=level)
    assert (mirrored.low, mirrored.high) == pytest.approx((1 - seen.high, 1 - seen.low), abs=1e-12)


def test_wilson_shrinks_as_the_root_of_n():
    widths = [wilson(k, n).high - wilson(k, n).low for k, n in ((30, 100), (3000, 10_000), (300_000, 1_000_000))]
    assert widths[0] / widths[1] == pytest.approx(10, rel=0.03)
    assert widths[1] / widths[2] == pytest.approx(10, rel=0.003)


def test_wilson_is_where_the_score_test_says_so():
    for k, n in ((0, 10), (3, 10), (55, 80)):
        seen = wilson(k, n)
        for end in (seen.low, seen.high):
            if 0 < end < 1:
                assert abs(k / n - end) / math.sqrt(end * (1 - end) / n) == pytest.approx(1.959964, abs=1e-5)


def test_intervals_of_simulated_experiments_cover_as_often_as_they_say():
    """2000 experiments of 100 tasks, each at a rate of its own: 95 % within 1.5 points."""
    rng = np.random.default_rng(0)
    ends = [wilson(k, 100) for k in range(101)]
    rates = rng.uniform(0.1, 0.9, 2000)
    covered = [ends[k].low <= rate <= ends[k].high for k, rate in zip(rng.binomial(100, rates), rates, strict=True)]
    assert abs(np.mean(covered) - 0.95) <= 0.015


# ------------------------------------------------------------------------------------------------------ two rates, same tasks


def outcomes(both, first, second, neither):
    return (
        [True] * both + [True] * first + [False] * second + [False] * neither,
        [True] * both + [False] * first + [True] * second + [False] * neither,
    )


def test_mcnemar_depends_on_the_discordant_pairs_only():
    p = {mcnemar(*outcomes(both, 9, 2, neither)).p for both, neither in ((0, 0), (5, 40), (80, 3))}
    assert len(p) == 1
    assert p.pop() == pytest.approx(2 * tail(9, 11, 0.5))
    assert mcnemar(*outcomes(3, 0, 0, 4)).p == 1
    assert mcnemar(*outcomes(3, 9, 2, 4), alternative="greater").p == pytest.approx(tail(9, 11, 0.5))


def test_mcnemar_mirrors():
    a, b = outcomes(10, 7, 2, 5)
    one, other = mcnemar(a, b), mcnemar(b, a)
    assert one.p == other.p
    assert (one.effect, one.low, one.high) == pytest.approx((-other.effect, -other.high, -other.low), abs=1e-9)


def test_the_score_statistic_is_that_of_the_likeliest_rates():
    """The share of the second alone that is taken under the hypothesis maximises the likelihood, which is looked for by trying."""
    for b, c, n, delta in ((7, 2, 30, 0.1), (1, 6, 25, -0.3), (0, 4, 20, 0.05), (3, 3, 12, 0.2)):
        second = np.linspace(max(-delta, 0) + 1e-9, (1 - abs(delta)) / 2 + max(-delta, 0) / 1 - 1e-9, 400_001)
        second = second[(second + delta > 0) & (2 * second + delta < 1)]
        likelihood = b * np.log(second + delta) + c * np.log(second) + (n - b - c) * np.log(1 - 2 * second - delta)
        best = second[likelihood.argmax()]
        wanted = (b - c - n * delta) / math.sqrt(n * (2 * best + delta * (1 - delta)))
        assert hypotheses._tango(b, c, n, delta) == pytest.approx(wanted, rel=1e-3)


def test_the_paired_interval_is_where_the_score_test_says_so_and_covers():
    for b, c, n in ((7, 2, 30), (0, 5, 20), (0, 0, 40), (9, 0, 9), (12, 11, 60)):
        seen = paired_difference(*outcomes(n - b - c, b, c, 0))
        assert -1 <= seen.low <= (b - c) / n <= seen.high <= 1
        for end in (seen.low, seen.high):
            if abs(end) < 1 and end != seen.median:
                assert abs(hypotheses._tango(b, c, n, end)) == pytest.approx(1.959964, abs=1e-4)
    rng = np.random.default_rng(1)
    kept = {}
    covered = 0
    for b, c, same in rng.multinomial(80, [0.2, 0.1, 0.7], 1000):
        key = int(b), int(c)
        if key not in kept:
            kept[key] = paired_difference(*outcomes(int(same), *key, 0))
        covered += kept[key].low <= 0.1 <= kept[key].high
    assert abs(covered / 1000 - 0.95) <= 0.02


def test_equal_rates_on_few_tasks_are_no_equality_and_on_many_they_are():
    few, many = outcomes(10, 1, 1, 8), outcomes(500, 20, 20, 460)
    assert not mcnemar(*few).significant()
    assert not equivalent_shares(*few, 0.05).significant()
    assert equivalent_shares(*many, 0.05).significant()
    assert not equivalent_shares(*outcomes(300, 150, 50, 500), 0.05).significant()  # ten points apart


def test_equivalence_agrees_with_its_interval_and_errs_seldom_at_the_margin():
    for b, c in ((3, 2), (9, 8), (12, 5), (20, 20), (0, 0)):
        seen = equivalent_shares(*outcomes(150, b, c, 0), 0.05)
        assert seen.significant() == (seen.low > -0.05 and seen.high < 0.05)
    rng = np.random.default_rng(2)
    drawn = rng.multinomial(200, [0.15, 0.05, 0.8], 2000)  # apart by the margin itself, 0.1
    b, c = drawn[:, 0], drawn[:, 1]
    p = [NormalDist().cdf(hypotheses._tango(int(x), int(y), 200, 0.1)) for x, y in zip(b, c, strict=True)]
    assert np.mean(np.array(p) <= 0.05) <= 0.065


def test_equivalent_means_are_two_t_tests():
    values = list(np.random.default_rng(0).normal(0.01, 0.05, 30))
    wanted = max(
        stats.ttest_1samp(values, -0.03, alternative="greater").pvalue,
        stats.ttest_1samp(values, 0.03, alternative="less").pvalue,
    )
    seen = equivalent_means(values, 0.03)
    assert seen.p == pytest.approx(wanted)
    assert seen.significant() == (seen.low > -0.03 and seen.high < 0.03)
    assert (equivalent_means([0.1, 0.1], 0.2).p, equivalent_means([0.3, 0.3], 0.2).p) == (0, 1)


# -------------------------------------------------------------------------------------------------------------- by a factor


def test_chi_square_is_0_where_rates_are_equal_in_all_cells():
    seen = independence([[30, 10], [60, 20], [15, 5]])
    assert (seen.statistic, seen.effect, seen.p) == (pytest.approx(0, abs=1e-12), pytest.approx(0, abs=1e-6), 1)


def test_which_test_is_taken():
    assert independence([[30, 20], [10, 40]]).method == "chi-square"
    assert independence([[3, 2], [1, 4]]).method == "Fisher's exact"
    assert independence([[3, 2], [1, 4], [4, 1]]).method == "chi-square, Monte Carlo"
    seen = independence([[30, 20], [10, 40]])
    wanted = stats.chi2_contingency([[30, 20], [10, 40]], correction=False)
    assert (seen.statistic, seen.p) == (pytest.approx(wanted.statistic), pytest.approx(wanted.pvalue))
    assert independence([[3, 2], [1, 4]]).p == pytest.approx(stats.fisher_exact([[3, 2], [1, 4]])[1])


def test_nothing_changes_with_the_order_of_levels_and_outcomes():
    table = [[25, 25], [10, 40], [33, 17]]
    seen = {
        (round(s.p, 12), round(s.effect, 12)) for s in map(independence, (table, table[::-1], [r[::-1] for r in table]))
    }
    assert len(seen) == 1
    assert 0 < seen.pop()[1] < 1
    assert independence([[50, 0], [0, 50]]).effect == pytest.approx(1)


def test_monte_carlo_is_about_the_exact_sum_over_all_tables():
    table = [[4, 1], [1, 4], [2, 3]]
    rows, total = [5, 5, 5], 7

    def chi2(passed):
        return sum((k - 5 * 7 / 15) ** 2 for k in passed)

    weights = {
        (a, b, total - a - b): math.comb(5, a) * math.comb(5, b) * math.comb(5, total - a - b)
        for a in range(6)
        for b in range(6)
        if 0 <= total - a - b <= 5
    }
    as_far = sum(w for k, w in weights.items() if chi2(k) >= chi2((4, 1, 2)) - 1e-9)
    assert sum(rows) == 15
    assert independence(table).p == pytest.approx(as_far / sum(weights.values()), abs=0.02)
    assert independence(table).p == independence(table).p  # fixed by the seed
    assert independence(table, draws=99, seed=3).p >= 1 / 100


def test_an_outcome_that_nobody_had_tells_nothing():
    seen = independence([[5, 0], [7, 0]])
    assert (seen.p, seen.effect) == (1, 0)
    with_third = independence([[30, 20, 0], [10, 40, 0]])
    assert with_third.p == independence([[30, 20], [10, 40]]).p


# ---------------------------------------------------------------------------------------------------------------- numbers


def test_normal_groups_and_others():
    rng = np.random.default_rng(0)
    even = {name: list(rng.normal(mean, 1, 40)) for name, mean in (("a", 0), ("b", 0), ("c", 2))}
    seen = compare_groups(even)
    assert seen.overall.method == "one-way analysis of variance"
    assert min(seen.normality.values()) > 0.05
    assert seen.overall.p == pytest.approx(stats.f_oneway(*even.values()).pvalue)
    skewed = {name: list(np.exp(2 * np.array(values))) for name, values in even.items()}
    seen = compare_groups(skewed)
    assert seen.overall.method == "Kruskal-Wallis"
    assert seen.overall.p == pytest.approx(stats.kruskal(*skewed.values()).pvalue)
    assert {(p.first, p.second) for p in seen.pairs if p.adjusted < 0.05} == {("a", "c"), ("b", "c")}
    assert compare_groups({"a": [1, 1, 1], "b": [1, 1, 1]}).overall.p == 1


def test_dunn_of_two_groups_is_kruskal_and_wallis():
    groups = {"a": [1, 5, 3, 3, 9], "b": [2, 2, 8, 10, 11, 12]}
    (pair,) = dunn(groups)
    assert pair.z**2 == pytest.approx(stats.kruskal(*groups.values()).statistic)
    assert pair.p == pytest.approx(stats.kruskal(*groups.values()).pvalue)


def times(n=24, k=4, seed=0):
    rng = random.Random(seed)
    slow = [rng.lognormvariate(0, 3) for _ in range(n)]
    return {f"m{j}": [rng.lognormvariate(0.3 * j, 1) * slow[i] for i in range(n)] for j in range(k)}


def test_friedman_is_scipys_and_by_permutations_about_the_same():
    seen = friedman(times())
    wanted = stats.friedmanchisquare(*times().values())
    assert (seen.overall.statistic, seen.overall.p) == (pytest.approx(wanted.statistic), pytest.approx(wanted.pvalue))
    few = times(15)
    assert friedman(few).overall.method == "Friedman, by permutations"
    assert friedman(few).overall.p == pytest.approx(stats.friedmanchisquare(*few.values()).pvalue, abs=0.02)
    tied = {"a": [1, 1, 2, 2, 1] * 5, "b": [1, 2, 2, 3, 1] * 5, "c": [2, 2, 2, 3, 3] * 5}
    assert friedman(tied).overall.statistic == pytest.approx(stats.friedmanchisquare(*tied.values()).statistic)


def test_friedman_does_not_change_when_the_times_of_a_task_go_through_a_rising_function():
    one = times()
    curves = [math.sqrt, math.log, lambda x: 1000 * x, lambda x: x**3]
    other = {name: [curves[i % 4](x) for i, x in enumerate(values)] for name, values in one.items()}
    assert friedman(one) == friedman(other)
    assert compare_groups(one).overall.p != compare_groups(other).overall.p


def test_friedman_of_two_is_a_sign_test_and_all_equal_is_no_difference():
    a, b = [1.0] * 12 + [3.0] * 4, [2.0] * 16
    assert friedman({"a": a, "b": b}).overall.p == pytest.approx(stats.binomtest(4, 16).pvalue, abs=0.01)
    same = friedman({"a": a, "b": a, "c": a})
    assert (same.overall.p, same.overall.effect, {p.adjusted for p in same.pairs}) == (1, 0, {1})


def test_pairs_of_friedman_find_who_differs():
    groups = times(60, 3)
    groups["m9"] = [10 * x for x in groups["m2"]]
    found = {(p.first, p.second): p for p in friedman(groups).pairs}
    assert found["m0", "m9"].adjusted < 0.01
    assert found["m0", "m9"].z < 0
    assert len(found) == 6
    assert found["m0", "m1"].adjusted > found["m0", "m9"].adjusted


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_lowers_none_and_keeps_their_order(p):
    adjusted = holm(p)
    assert all(raw <= new <= 1 for raw, new in zip(p, adjusted, strict=True))
    assert all(adjusted[i] <= adjusted[j] for i in range(len(p)) for j in range(len(p)) if p[i] <= p[j])
    assert adjusted[p.index(min(p))] == min(len(p) * min(p), 1.0)


def test_holm_errs_at_most_as_often_as_it_says():
    p = np.random.default_rng(0).random((4000, 5))
    assert np.mean([min(holm(list(row))) <= 0.05 for row in p]) <= 0.06
    assert np.mean(p.min(axis=1) <= 0.05) > 0.2  # what it is for


# ------------------------------------------------------------------------------------------------------------- how many tasks


def test_power_is_how_often_the_test_says_so():
    for n, p0, p1 in ((40, 0.5, 0.7), (100, 0.6, 0.72), (30, 0.6, 0.3)):
        alternative = "greater" if p1 > p0 else "less"
        said = [binomial(k, n, p0, alternative=alternative).significant() for k in range(n + 1)]
        wanted = math.fsum(math.comb(n, k) * p1**k * (1 - p1) ** (n - k) for k in range(n + 1) if said[k])
        assert power_of_share(n, p0, p1) == pytest.approx(wanted)
    assert power_of_share(100, 0.5, 0.5) <= 0.05


def test_so_many_tasks_are_enough_and_one_fewer_is_not():
    for p0, p1 in ((0.6, 0.7), (0.5, 0.6), (0.7, 0.6), (0.5, 0.95)):
        n = tasks_for_share(p0, p1)
        assert min(power_of_share(m, p0, p1) for m in range(n, n + 60)) >= 0.8
        assert power_of_share(n - 1, p0, p1) < 0.8
    assert 140 < tasks_for_share(0.6, 0.7) < 165
    assert tasks_for_share(0.7, 0.72) > 3000  # a hundred tasks do not tell these apart


def test_power_of_pairs_is_how_often_mcnemar_says_so():
    """By enumeration of all pairs of counts."""
    n, first, second = 16, 0.4, 0.08
    power = 0.0
    for b in range(n + 1):
        for c in range(n + 1 - b):
            chance = math.comb(n, b) * math.comb(n - b, c) * first**b * second**c * (1 - first - second) ** (n - b - c)
            power += chance * mcnemar(*outcomes(n - b - c, b, c, 0)).significant()
    assert power_of_pairs(n, first, second) == pytest.approx(power)
    assert power_of_pairs(n, second, first) == pytest.approx(power)
    assert power_of_pairs(60, 0.1, 0.1) <= 0.05
    assert power_of_pairs(60, 0.0, 0.0) == 0
    n = tasks_for_pairs(0.25, 0.08)
    assert power_of_pairs(n, 0.25, 0.08) >= 0.8 > power_of_pairs(n - 3, 0.25, 0.08)


# ------------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: binomial(5, 4, 0.5), "successes"),
        (lambda: binomial(1, 0, 0.5), "n must"),
        (lambda: binomial(1, 4, 1.0), "p0"),
        (lambda: binomial(1, 4, 0.5, alternative="above"), "alternative"),
        (lambda: wilson(1, 4, level=1.0), "level"),
        (lambda: mcnemar([True], [True, False]), "same tasks"),
        (lambda: mcnemar([], []), "same tasks"),
        (lambda: equivalent_shares([True], [True], 0), "margin"),
        (lambda: equivalent_means([0.1], 0.1), "differences"),
        (lambda: equivalent_means([0.1, math.nan], 0.1), "differences"),
        (lambda: independence([[1, 2]]), "table"),
        (lambda: independence([[1, 2], [0, 0]]), "row"),
        (lambda: independence([[1, -2], [3, 0]]), "table"),
        (lambda: compare_groups({"a": [1, 2, 3]}), "groups"),
        (lambda: compare_groups({"a": [1, 2, 3], "b": [1, 2]}), "at least 3"),
        (lambda: friedman({"a": [1, 2, 3], "b": [1, 2]}), "one number for each task"),
        (lambda: holm([0.5, 1.5]), "p_values"),
        (lambda: holm([math.nan]), "p_values"),
        (lambda: tasks_for_share(0.6, 0.6), "p1"),
        (lambda: tasks_for_share(0.6, 0.6001), "more than"),
        (lambda: tasks_for_pairs(0.2, 0.2), "only_second"),
        (lambda: power_of_pairs(10, 0.7, 0.7), "together"),
    ],
)
def test_bad_input_is_named(call, says):
    with pytest.raises(ValueError, match=says):
        call()


def test_a_wrong_type_is_a_type_error():
    with pytest.raises(TypeError, match="first"):
        mcnemar([1, 0], [True, False])
    with pytest.raises(TypeError, match="successes"):
        binomial(1.5, 4, 0.5)


# -------------------------------------------------------------------------------------------------------------- somebody else's


def test_statsmodels_says_the_same():
    proportion = pytest.importorskip("statsmodels.stats.proportion")
    contingency = pytest.importorskip("statsmodels.stats.contingency_tables")
    multitest = pytest.importorskip("statsmodels.stats.multitest")
    for k, n in ((0, 9), (7, 20), (72, 100)):
        seen = wilson(k, n)
        assert (seen.low, seen.high) == pytest.approx(proportion.proportion_confint(k, n, method="wilson"), abs=1e-12)
        assert binomial(k, n, 0.6).p == pytest.approx(proportion.binom_test(k, n, 0.6, "larger"))
    table = [[12, 9], [2, 30]]
    seen = mcnemar(*outcomes(12, 9, 2, 30))
    assert seen.p == pytest.approx(contingency.mcnemar(table, exact=True).pvalue)
    raw = [0.01, 0.04, 0.03, 0.2, 0.5]
    assert holm(raw) == pytest.approx(list(multitest.multipletests(raw, method="holm")[1]))
    score = proportion.proportions_ztest(60, 100, 0.5, "larger", prop_var=0.5)
    assert binomial(60, 100, 0.5, method="normal").p == pytest.approx(score[1])
