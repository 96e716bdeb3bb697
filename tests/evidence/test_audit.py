"""The audit of somebody's figure: its verdict, what changes it and what does not, and each rule that samples can break."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from assay.errors import InputError
from assay.evidence.audit import LEAST_EACH, LEAST_PAIRS, audit
from assay.evidence.samples import Samples, Series, read
from assay.measure.clock import binomial_bound
from assay.measure.unpaired import critical


def of(before, after, *, order="", paired=False, **more):
    a = Series("old", tuple(map(float, before)), **more)
    b = Series("new", tuple(map(float, after)), **more)
    return audit(Samples("test", a, b, order), paired=paired)


def drawn(seed, n=20, noise=0.03, gain=1.0):
    rng = np.random.default_rng(seed)
    return np.exp(rng.normal(0, noise, n)) * gain, np.exp(rng.normal(0, noise, n))


def rules(found):
    return [one.rule for one in found.broken]


def bounds(found):
    return found.ratio.median, found.ratio.low, found.ratio.high


@pytest.mark.parametrize("paired", [False, True])
def test_the_scale_changes_nothing_and_swapping_inverts(paired):
    a, b = drawn(1, gain=1.1)
    found, scaled, swapped = of(a, b, paired=paired), of(a * 1e6, b * 1e6, paired=paired), of(b, a, paired=paired)
    assert bounds(scaled) == pytest.approx(bounds(found), rel=1e-9)
    assert (scaled.verdict, rules(scaled)) == (found.verdict, rules(found))
    assert bounds(swapped) == pytest.approx(
        (1 / found.ratio.median, 1 / found.ratio.high, 1 / found.ratio.low), rel=1e-9
    )
    assert swapped.verdict == found.verdict


def test_the_order_of_unpaired_samples_changes_nothing():
    rng = np.random.default_rng(2)
    a, b = drawn(2, gain=1.02)
    found, mixed = of(a, b), of(rng.permutation(a), rng.permutation(b))
    assert (bounds(mixed), mixed.verdict) == (bounds(found), found.verdict)
    assert bounds(of(a, rng.permutation(b), paired=True)) != bounds(of(a, b, paired=True))


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("n", [8, 20])
def test_equal_things_are_noise_and_break_few_rules(paired, n):
    sets = 200
    seen = [of(*drawn(1000 * n + seed, n), paired=paired) for seed in range(sets)]
    assert sum(one.verdict == "a difference" for one in seen) <= binomial_bound(sets, 0.05, 0.999)
    assert sum(bool(one.broken) for one in seen) <= binomial_bound(sets, 0.1, 0.999)
    assert {one.verdict for one in seen} <= {"a difference", "noise"}


@pytest.mark.parametrize("paired", [False, True])
def test_a_gain_of_a_tenth_under_three_percent_noise_is_found_in_twenty(paired):
    seen = [of(*drawn(seed, gain=1.1), paired=paired) for seed in range(50)]
    assert sum(one.verdict == "a difference" and one.ratio.low > 1 for one in seen) >= 49
    assert sum(one.ratio.contains(1.1) for one in seen) >= 43
    assert "takes less" in seen[0].words


@pytest.mark.parametrize("paired", [False, True])
def test_too_few_say_so_whatever_they_are(paired):
    least = LEAST_PAIRS if paired else LEAST_EACH
    a, b = np.linspace(1.0, 1.01, least), np.linspace(2.0, 2.03, least) ** 1.1
    few = of(a[1:], b[1:], paired=paired)
    assert few.verdict == "too few to say"
    assert rules(few)[0] == "enough samples"
    assert not few.believable
    assert "can exclude 1" in few.words
    assert of(a, b, paired=paired).verdict == "a difference"
    one = of([1.0], [2.0], paired=paired)
    assert one.document()["ratio"] | {"median": 0.5} == {"median": 0.5, "low": 0.0, "high": None, "n": 1}
    json.dumps(one.document(), allow_nan=False)


def test_the_least_numbers_are_the_least():
    assert critical(LEAST_EACH, LEAST_EACH) > 0 == critical(LEAST_EACH - 1, LEAST_EACH - 1)


def test_pairs_see_what_separate_samples_cannot():
    """A machine that gets slower and slower hits both of a pair alike."""
    a, b = drawn(3, 30, gain=1.1)
    drift = np.linspace(1, 3, 30)
    assert of(a * drift, b * drift).verdict == "noise"
    assert of(a * drift, b * drift, paired=True).verdict == "a difference"


def test_an_alternating_order_pairs_by_itself():
    a, b = drawn(4, 10, gain=1.2)
    lines = "".join(f"old,{x}\nnew,{y}\n" for x, y in zip(a, b, strict=True))
    found = audit(read("label,value\n" + lines))
    assert found.paired
    assert "changing order" in rules(found)
    turned = "".join(
        f"old,{x}\nnew,{y}\n" if i % 2 else f"new,{y}\nold,{x}\n" for i, (x, y) in enumerate(zip(a, b, strict=True))
    )
    assert audit(read("label,value\n" + turned), paired=False).paired
    assert "changing order" not in rules(audit(read("label,value\n" + turned)))
    blocks = "".join(f"old,{x}\n" for x in a) + "".join(f"new,{y}\n" for y in b)
    found = audit(read("label,value\n" + blocks))
    assert (found.paired, "interleaved" in rules(found)) == (False, True)


def test_paired_needs_as_many():
    with pytest.raises(InputError, match="got 6 of 'old' and 7 of 'new'"):
        of(range(1, 7), range(1, 8), paired=True)


def broken(a, b, rule, **more):
    """The finding of that rule; None where it is kept."""
    return next((one for one in of(a, b, **more).broken if one.rule == rule), None)


def test_counts_that_differ():
    a, b = drawn(5)
    assert "20 samples of the baseline, 15 of the candidate" in broken(a, b[:15], "equal counts").seen
    assert broken(a, b, "equal counts") is None


@pytest.mark.parametrize(
    ("first", "says"), [([2.0], "the first sample of 'old'"), ([1.4, 1.3, 1.25, 1.2, 1.15], "the first 5 samples")]
)
def test_a_warm_up_that_counts(first, says):
    a, b = drawn(6)
    slow = a.copy()
    slow[: len(first)] *= first
    assert says in broken(slow, b, "warm-up").seen
    assert broken(slow[::-1], b, "warm-up") is None  # slow at the end is no warm-up
    assert broken(a, b, "warm-up") is None


def test_drift_is_grave_unless_both_share_it():
    a, b = drawn(7, 30)
    drift = np.linspace(1, 1.3, 30)
    alone, shared = broken(a * drift, b, "no drift"), broken(a * drift, b * drift, "no drift", paired=True)
    assert (alone.grave, shared.grave) == (True, False)
    assert "rise" in alone.seen
    assert "fall" in broken(a * drift[::-1], b, "no drift").seen
    one_only = [one for one in of(a * drift, b, paired=True).broken if one.grave]
    assert "the ratio itself" in one_only[0].seen
    assert broken(a, b, "no drift") is None


def walk(seed, n, stay):
    rng = np.random.default_rng(seed)
    values = [0.0]
    for _ in range(n - 1):
        values.append(stay * values[-1] + rng.normal(0, 0.05))
    return np.exp(values)


def test_noise_that_lasts():
    a, b = drawn(8, 60)
    lasting = np.exp(0.1 * np.sin(np.arange(60) * 0.7)) * a
    found = broken(lasting, b, "independent samples")
    assert found.grave
    assert "fewer than they seem" in found.seen
    assert broken(a, b, "independent samples") is None
    assert broken(lasting, lasting * b, "independent samples", paired=True) is None  # the ratio's noise does not last
    assert broken(np.exp(0.3 * np.sin(np.arange(60) * 0.5)) * a, b, "independent samples", paired=True).grave


def test_a_random_walk_is_not_called_a_difference_to_believe():
    """Two slow walks from the same place: mostly "different", nearly never believable."""
    seen = [of(walk(seed, 60, 0.97), walk(500 + seed, 60, 0.97)) for seed in range(40)]
    assert sum(one.verdict == "a difference" for one in seen) > 20
    assert sum(one.verdict == "a difference" and one.believable for one in seen) <= 2


def test_a_rounded_timer():
    a, b = drawn(9)
    found = broken(np.round(a * 10), b, "a fine timer")
    assert "different value" in found.seen
    assert broken([3.0] * 20, b, "a fine timer").seen.endswith("all alike")
    assert broken(a, b, "a fine timer") is None


def test_two_humps_and_outliers():
    a, b = drawn(10, 30)
    humps = a * np.where(np.random.default_rng(0).random(30) < 0.5, 1.0, 1.6)
    assert "two groups" in broken(humps, b, "one thing measured").seen
    far = a.copy()
    far[[7, 19]] = 3.0, 4.0
    found = broken(far, b, "a quiet machine")
    assert found.seen.startswith("2 of 30")
    assert "times the median" in found.seen
    assert broken(a, b, "one thing measured") is broken(a, b, "a quiet machine") is None


def test_copies_and_units():
    a, b = drawn(11)
    copy = of(a, a)
    assert (copy.verdict, copy.believable) == ("noise", False)
    assert "identical" in broken(a, a, "two measurements").seen
    scaled = of(a, a / 1.5)
    assert scaled.verdict == "a difference"
    assert "do not believe it" in scaled.words
    assert "times a constant" in broken(a, a / 1.5, "two measurements").seen
    assert "1,000 times" in broken(a * 1000, b, "one unit").seen
    assert "1,000,000 times" in broken(a, b * 1.3e6, "one unit").seen
    assert broken(a * 30, b, "one unit") is broken(a, b, "two measurements") is None


def test_a_mean_in_the_place_of_the_median():
    a, b = drawn(12)
    for name, word in (("mean_before", "mean"), ("best (old)", "minimum"), ("avg", "mean")):
        samples = Samples("test", Series(name, tuple(a)), Series("new", tuple(b)))
        assert f"of a {word} each" in next(one.seen for one in audit(samples).broken if one.rule == "the median")
    mind = Samples("test", Series("minded meaning", tuple(a)), Series("new", tuple(b)))
    assert "the median" not in rules(audit(mind))
    stated = [Series("old", tuple(a), {"mean": 3.0}), Series("new", tuple(b), {"mean": 1.0})]
    found = audit(Samples("test", *stated))
    assert "means that the file states is 3" in next(one.seen for one in found.broken if one.rule == "the median")
    stated = [Series("old", tuple(a), {"mean": 1.0}), Series("new", tuple(b), {"mean": 1.0})]
    assert "the median" not in rules(audit(Samples("test", *stated)))


def test_runs_that_failed():
    a, b = drawn(13)
    assert broken(a, b, "runs that succeed", failed=2).grave
    assert broken(a, b, "runs that succeed") is None


def test_what_is_too_far_apart_is_refused():
    for pair in ([1e300] * 6, [1e-300] * 6), ([1e-300] * 6, [1e300] * 6):
        for paired in (False, True):
            with pytest.raises(InputError, match="too far apart"):
                of(*pair, paired=paired)


def test_long_series_are_judged_too():
    rng = np.random.default_rng(14)
    a, b = rng.lognormal(0, 0.1, 60_000), rng.lognormal(-0.02, 0.1, 50_000)
    found = of(a, b)
    assert (found.verdict, rules(found)) == ("a difference", ["equal counts"])
    assert math.isclose(found.ratio.median, math.exp(0.02), rel_tol=0.01)
    assert "no drift" in rules(of(a * np.linspace(1, 1.05, 60_000), b))


def test_every_finding_says_what_to_do():
    a, b = drawn(15)
    found = of([9.0, *a], b, order="blocks")
    assert len(found.broken) >= 3
    for one in found.broken:
        assert one.seen
        assert one.do
        assert not one.seen.endswith(".")
    assert "free baselines" in found.unseen


extreme = st.sampled_from(
    [5e-324, 2.3e-308, 1e-300, 1e-9, 1.0, 1.0 + 2**-52, 3.5, 1e9, 1e300, 1.7976931348623157e308]
) | st.floats(5e-324, 1.7e308)


@given(
    before=st.lists(extreme, min_size=1, max_size=9),
    after=st.lists(extreme, min_size=1, max_size=9),
    paired=st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_whatever_times_are_given_there_is_an_answer_or_a_line_that_says_why_not(before, after, paired):
    samples = Samples("CSV", Series("before", tuple(before)), Series("after", tuple(after)))
    found = answered(samples, paired)
    if isinstance(found, str):
        assert "too far apart" in found or (paired and len(before) != len(after) and "as many of each" in found)
    else:
        json.dumps(found.document(), allow_nan=False)
        assert 0 < found.ratio.median < math.inf
        assert found.words


def answered(samples, paired):
    """The audit, or the line that says why there is none."""
    try:
        return audit(samples, paired=paired)
    except InputError as error:
        return str(error)
