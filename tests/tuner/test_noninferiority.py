"""The rule by which a loss is shown to be small enough: what it may accept wrongly, and what it says where it cannot tell."""

from __future__ import annotations

import math

import numpy as np
import pytest

from assay.tuner.noninferiority import (
    ALPHA,
    LEAST_DOCUMENTS,
    MOST_DOCUMENTS,
    SPENT,
    look,
    looks,
    mean_interval,
    score_interval,
    shares,
    verdict_of,
)

LIMIT = 0.01
AT_LIMIT = math.log1p(LIMIT)


def accepted(draw, documents, attempts=len(SPENT)):
    """Whether any candidate is accepted at any look; each candidate has `documents` differences from `draw`."""
    for attempt in range(attempts):
        differences, counts = draw(documents), looks(documents)
        for count, alpha in zip(counts, shares(attempt, len(counts)), strict=True):
            verdict = look({"prefill": differences[:count]}, alpha, LIMIT).verdict
            if verdict != "undecided":
                break
        if verdict == "holds":
            return True
    return False


def test_the_error_is_spent_over_all_looks_and_candidates():
    assert sum(map(sum, SPENT)) == pytest.approx(ALPHA) == 0.025
    assert [sum(shares(attempt, 1)) for attempt in (0, 1)] == [pytest.approx(sum(spent)) for spent in SPENT]


@pytest.mark.parametrize("documents", [LEAST_DOCUMENTS, 2 * LEAST_DOCUMENTS, MOST_DOCUMENTS])
@pytest.mark.parametrize("tails", ["normal", "heavy"])
def test_what_loses_exactly_the_limit_is_seldom_accepted_over_all_looks_and_candidates(documents, tails):
    rng = np.random.default_rng(documents)

    def draw(n):
        noise = rng.standard_normal(n) if tails == "normal" else rng.standard_t(4, n) / math.sqrt(2)
        return AT_LIMIT + 0.004 * noise

    runs = 1500
    wrong = sum(accepted(draw, documents) for _ in range(runs))
    # three standard errors above what is allowed; accepting by the median would be wrong in half of the runs and more
    assert wrong / runs <= ALPHA + 3 * math.sqrt(ALPHA * (1 - ALPHA) / runs)


def test_what_loses_little_is_accepted_and_mostly_at_the_first_look():
    rng = np.random.default_rng(0)
    first = second = 0
    for _ in range(200):
        differences = 0.004 + 0.004 * rng.standard_normal(30)
        at_first = look({"prefill": differences[:15]}, SPENT[0][0], LIMIT).verdict
        first += at_first == "holds"
        second += at_first == "holds" or look({"prefill": differences}, SPENT[0][1], LIMIT).verdict == "holds"
    assert first > 180
    assert second > 195


def test_the_bad_end_decides_and_not_the_median():
    spread = [0.007 + x for x in (-0.01, 0.01) * 8]
    found = look({"prefill": spread}, 0.01, LIMIT)
    assert found.drop < LIMIT < found.high
    assert found.verdict == "undecided"
    assert look({"prefill": [0.007, 0.0071] * 8}, 0.01, LIMIT).verdict == "holds"
    assert look({"prefill": [0.02, 0.021] * 8}, 0.01, LIMIT).verdict == "lost"


def test_every_path_must_hold_and_one_that_lost_is_enough():
    good, bad = [0.001, 0.0012] * 8, [0.05, 0.051] * 8
    found = look({"prefill": good, "decode": bad}, 0.01, LIMIT)
    assert (found.path, found.verdict) == ("decode", "lost")
    assert look({"prefill": good, "decode": good}, 0.01, LIMIT).verdict == "holds"


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_what_is_not_finite_has_lost(broken):
    found = look({"prefill": [0.0] * 15 + [broken]}, 0.01, LIMIT)
    assert found.verdict == "lost"
    assert found.drop == math.inf


def test_a_single_document_and_none_decide_nothing():
    assert looks(LEAST_DOCUMENTS - 1) == []
    found = mean_interval([0.0], 0.01)
    assert (found.low, found.high) == (-math.inf, math.inf)
    assert verdict_of([found], LIMIT) == "undecided"
    assert verdict_of([], LIMIT) == "undecided"


def test_prompts_that_all_agree_prove_only_as_much_as_they_are_many():
    few, many = (score_interval([1.0] * n, [1.0] * n, 0.025) for n in (20, 1000))
    assert few.median == many.median == 0
    assert few.high > 0.1
    assert many.high < 0.005
    assert few.low == pytest.approx(-few.high)


@pytest.mark.parametrize(("worse", "better", "n"), [(8, 1, 44), (0, 3, 60), (5, 5, 30)])
def test_the_ends_are_where_the_score_statistic_reaches_its_quantile(worse, better, n):
    """The constrained estimate is found here by trying a fine grid, not by the formula."""
    before = [1.0] * worse + [0.0] * better + [1.0] * (n - worse - better)
    after = [0.0] * worse + [1.0] * better + [1.0] * (n - worse - better)
    found = score_interval(before, after, 0.025)
    for end in (found.low, found.high):
        won = np.linspace(max(0.0, -end), (1 - end) / 2, 400_001)[1:-1]  # of prompts only the candidate gets right
        likelihood = worse * np.log(won + end) + better * np.log(won) + (n - worse - better) * np.log(1 - 2 * won - end)
        best = won[np.argmax(likelihood)]
        statistic = (worse - better - n * end) / math.sqrt(n * (2 * best + end * (1 - end)))
        assert abs(statistic) == pytest.approx(1.96, abs=0.01)
    turned = score_interval(after, before, 0.025)
    assert (turned.low, turned.high) == (pytest.approx(-found.high), pytest.approx(-found.low))


def test_a_score_lost_exactly_at_the_margin_is_seldom_accepted():
    rng, margin, runs, wrong = np.random.default_rng(1), 0.1, 1000, 0
    for _ in range(runs):
        kinds = rng.choice(3, size=150, p=[0.13, 0.03, 0.84])  # lost, won, same: 10 points are lost
        before, after = (kinds == 0).astype(float), (kinds == 1).astype(float)
        wrong += score_interval(before, after, 0.025).high <= margin
    assert wrong / runs <= 0.025 + 3 * math.sqrt(0.025 * 0.975 / runs)


def test_scores_between_0_and_1_are_no_more_certain_than_rights_and_wrongs():
    found = score_interval([0.5] * 50, [0.5] * 50, 0.025)
    assert found.high == pytest.approx(score_interval([1.0] * 50, [1.0] * 50, 0.025).high)
    with pytest.raises(ValueError, match="must pair up"):
        score_interval([1.0], [], 0.025)
