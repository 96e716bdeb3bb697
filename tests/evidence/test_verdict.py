"""The written rule, case by case."""

import pytest
from evidence_maker import estimate, make
from hypothesis import given
from hypothesis import strategies as st

from assay.evidence.types import Verdict
from assay.evidence.verdict import claimed_ratio, judge, summaries, unit_name

REPRODUCED, HOLDS, NO_PAY = Verdict.REPRODUCED, Verdict.DIRECTION_HOLDS, Verdict.DOES_NOT_PAY
REFUTED, NEEDS = Verdict.REFUTED, Verdict.NEEDS_HARDWARE


def verdict(**changes):
    return make(**changes).verdict


def quality(baseline, candidate, low=None, high=None, higher_is_better=True):
    return {
        "metric": "accuracy",
        "baseline": baseline,
        "candidate": candidate,
        "low": low,
        "high": high,
        "higher_is_better": higher_is_better,
    }


@pytest.mark.parametrize(
    ("measured", "paper", "expected"),
    [
        ((1.9, 2.0, 2.1), 2.0, REPRODUCED),
        ((2.9, 3.0, 3.1), 2.0, REPRODUCED),  # more than claimed
        ((1.70, 1.75, 1.80), 2.0, REPRODUCED),  # 2 ** 0.8 = 1.741 is reached
        ((1.70, 1.73, 1.80), 2.0, HOLDS),
        ((7.0, 8.1, 8.5), 13.5, REPRODUCED),  # 13.5 ** 0.8 = 8.02
        ((7.0, 8.0, 8.5), 13.5, HOLDS),
        ((1.01, 1.5, 9.0), 2.0, HOLDS),  # a wide interval earns nothing
        ((1.01, 1.02, 1.03), 2.0, HOLDS),
        ((0.99, 1.5, 9.0), 2.0, NO_PAY),  # the interval includes 1
        ((1.0, 1.0, 1.0), 2.0, NO_PAY),
        ((0.9, 0.95, 1.0), 2.0, NO_PAY),
        ((0.9, 0.95, 0.99), 2.0, REFUTED),
        ((1.5, 1.6, 1.7), None, HOLDS),
        ((0.5, 0.6, 0.7), None, REFUTED),
    ],
)
def test_a_speed_up(measured, paper, expected):
    assert verdict(measured=estimate(*measured), paper_value=paper) is expected


@pytest.mark.parametrize(
    ("vs_free", "expected"),
    [((1.1, 1.2, 1.3), REPRODUCED), ((0.99, 1.1, 1.2), NO_PAY), ((1.0, 1.0, 1.0), NO_PAY), ((0.5, 0.6, 0.7), NO_PAY)],
)
def test_what_is_free_must_be_beaten(vs_free, expected):
    record = make(vs_free=estimate(*vs_free), free_label="SDPA")
    assert record.verdict is expected
    if expected is NO_PAY:
        assert "SDPA" in record.reason
        assert "2x [1.9, 2.1]" in record.reason  # the paper's own ratio is still told


@pytest.mark.parametrize(
    ("quality", "expected"),
    [
        (quality(0.9, 0.9), REPRODUCED),
        (quality(0.9, 0.95), REPRODUCED),
        (quality(0.9, 0.8915), REPRODUCED),  # within 1 %
        (quality(0.9, 0.88), NO_PAY),
        (quality(0.9, 0.88, 0.86, 0.91), REPRODUCED),  # the drop may be noise
        (quality(0.9, 0.88, 0.86, 0.89), NO_PAY),
        (quality(2.7, 2.8, higher_is_better=False), NO_PAY),
        (quality(2.7, 2.6, higher_is_better=False), REPRODUCED),
        (quality(-2.0, -2.01), REPRODUCED),
        (quality(-2.0, -2.1), NO_PAY),
        (quality(0.0, 0.009, higher_is_better=False), REPRODUCED),
        (quality(0.0, 0.011, higher_is_better=False), NO_PAY),
        (quality(None, 0.1), REPRODUCED),  # nothing to compare with: shown, not judged
    ],
)
def test_speed_bought_with_quality_does_not_pay(quality, expected):
    assert verdict(quality=quality) is expected


@pytest.mark.parametrize(
    ("unit", "higher", "metric", "value", "measured", "expected"),
    [
        (
            "%",
            True,
            "latency reduction",
            60.0,
            (2.0, 2.2, 2.4),
            REPRODUCED,
        ),  # 60 % less time is 2.5x, 2.5 ** 0.8 = 2.08
        ("%", True, "latency reduction", 60.0, (1.8, 1.9, 2.0), HOLDS),
        ("%", True, "throughput increase", 60.0, (1.4, 1.46, 1.5), REPRODUCED),  # 1.6x
        ("%", True, "throughput increase", 60.0, (1.4, 1.42, 1.44), HOLDS),
        ("%", True, "latency reduction", 150.0, (2.0, 2.1, 2.2), REPRODUCED),  # cannot be a share of the time
        ("%", False, "time left", 40.0, (2.0, 2.2, 2.4), REPRODUCED),  # 40 % of the time is 2.5x
        ("x", False, "relative latency", 0.5, (1.9, 2.0, 2.1), REPRODUCED),
        ("x", False, "relative latency", 0.2, (1.9, 2.0, 2.1), HOLDS),
        ("s", False, "latency", 0.4, (1.9, 2.0, 2.1), HOLDS),  # the paper's seconds are not ours
    ],
)
def test_a_trial_against_other_units(unit, higher, metric, value, measured, expected):
    found = verdict(
        paper_unit=unit, higher_is_better=higher, metric=metric, paper_value=value, measured=estimate(*measured)
    )
    assert found is expected


def figure(value, unit, paper, **changes):
    measured = estimate(*value) if isinstance(value, tuple) else estimate(value)
    return verdict(kind="figure", measured=measured, unit=unit, paper_value=paper, paper_unit=unit, **changes)


def test_figures_with_a_baseline():
    assert figure((0.81, 0.82, 0.83), "", 0.9, baseline=0.7) is REPRODUCED
    assert figure((0.61, 0.62, 0.63), "", 0.9, baseline=0.5) is HOLDS
    assert figure((0.61, 0.62, 0.73), "", 0.9, baseline=0.7) is NO_PAY
    assert figure((0.61, 0.62, 0.63), "", 0.9, baseline=0.7) is REFUTED
    assert figure((0.61, 0.62, 0.63), "", None, baseline=0.5) is HOLDS
    assert figure(100.0, "MB", 100.0, baseline=300.0, higher_is_better=False) is REPRODUCED
    assert figure(126.0, "MB", 100.0, baseline=300.0, higher_is_better=False) is HOLDS
    assert figure(301.0, "MB", 100.0, baseline=300.0, higher_is_better=False) is REFUTED
    assert figure(-2.0, "nats", -1.9, baseline=-3.0) is REPRODUCED
    assert figure(-2.9, "nats", -1.9, baseline=-3.0) is HOLDS


def test_figures_with_something_free():
    assert figure(0.85, "", 0.9, baseline=0.7, free=0.8) is REPRODUCED
    assert figure(0.85, "", 0.9, baseline=0.7, free=0.85) is NO_PAY
    assert figure(100.0, "MB", 100.0, baseline=300.0, free=90.0, higher_is_better=False) is NO_PAY


def test_figures_without_a_baseline():
    assert figure(3.9, "x", 4.0) is REPRODUCED
    assert figure(2.9, "x", 4.0) is HOLDS
    assert figure(0.9, "x", 4.0) is REFUTED
    assert figure(0.26, "x", 0.25, higher_is_better=False) is REPRODUCED
    assert figure(0.5, "x", 0.25, higher_is_better=False) is HOLDS
    assert figure(1.5, "x", 0.25, higher_is_better=False) is REFUTED
    assert figure(50.0, "%", 60.0) is REPRODUCED
    assert figure(10.0, "%", 60.0) is HOLDS
    assert figure(-3.0, "%", 60.0) is REFUTED
    assert figure((0.1, 1.0, 1.9), "points", 7.0) is HOLDS
    assert figure((-0.1, 1.0, 6.0), "points", 7.0) is NO_PAY
    assert figure(0.5, "%", None, higher_is_better=False) is HOLDS  # a loss kept within 1 %
    assert figure((0.5, 1.0, 1.5), "%", None, higher_is_better=False) is NO_PAY
    assert figure(2.0, "%", None, higher_is_better=False) is REFUTED
    assert figure(0.6, "%", 0.56, higher_is_better=False) is REPRODUCED
    assert figure(0.9, "%", 0.56, higher_is_better=False) is NO_PAY
    assert figure(30.0, "dB", 32.0) is REPRODUCED
    assert figure(20.0, "dB", 32.0) is NO_PAY  # short, and nothing shows a gain
    assert figure(20.0, "dB", None) is NO_PAY
    assert figure(0.0, "points", 0.0, higher_is_better=False) is REPRODUCED
    # no direction, so nothing bounds the other end of the interval: all of it must reach the number
    assert figure((0.1, 0.2, 0.3), "points", 0.3, higher_is_better=False) is REPRODUCED
    assert figure((-4.7, -0.1, 4.5), "points", 0.3, higher_is_better=False) is HOLDS
    assert figure((24.0, 28.0, 32.0), "dB", 32.0) is HOLDS
    assert figure((26.0, 28.0, 32.0), "dB", 32.0) is REPRODUCED
    assert figure((18.0, 20.0, 22.0), "dB", 32.0) is NO_PAY
    # less is better, over a baseline: the median decides, not the end that happens to touch the number
    assert figure((0.1, 0.2, 9.0), "points", 0.3, baseline=30.0, higher_is_better=False) is REPRODUCED
    assert figure((0.1, 3.4, 7.4), "points", 0.3, baseline=30.0, higher_is_better=False) is HOLDS


def test_a_bounded_cost():
    """A ratio at or below 1 promises no gain, only a bound."""
    assert verdict(paper_value=0.95, measured=estimate(0.94, 0.95, 0.97)) is REPRODUCED  # 0.95 ** 1.25 = 0.938
    assert verdict(paper_value=0.95, measured=estimate(0.93, 0.95, 0.97)) is HOLDS  # its lower end costs more
    assert verdict(paper_value=0.95, measured=estimate(1.1, 1.2, 1.3)) is REPRODUCED
    assert verdict(paper_value=0.95, measured=estimate(0.6, 0.7, 0.8)) is REFUTED
    assert verdict(paper_value=0.95, measured=estimate(0.9, 0.95, 1.0), quality=quality(0.9, 0.5)) is NO_PAY
    assert figure(1.05, "x", 1.06, higher_is_better=False) is REPRODUCED  # an overhead of 5 % where 6 % was claimed
    assert figure(1.5, "x", 1.06, higher_is_better=False) is REFUTED


def test_what_the_machine_lacks():
    record = make(measured=None, needs=("cuda",))
    assert record.verdict is NEEDS
    assert "cuda" in record.reason


def test_a_failed_point_has_no_verdict():
    with pytest.raises(ValueError, match="no verdict"):
        judge(make(status="timeout"))


@given(st.floats(1.01, 1e6), st.floats(0.1, 10))
def test_better_is_never_judged_worse(paper, scale):
    order = [REFUTED, NO_PAY, HOLDS, REPRODUCED]
    better = verdict(paper_value=paper, measured=estimate(scale * 1.1, scale * 1.2, scale * 1.3))
    worse = verdict(paper_value=paper, measured=estimate(scale, scale * 1.05, scale * 1.1))
    assert order.index(better) >= order.index(worse)


@given(st.floats(0.01, 100), st.floats(0.01, 100))
def test_a_ratio_and_its_reciprocal_are_judged_alike(value, paper):
    more = figure(value, "x", paper)
    less = figure(1 / value, "x", 1 / paper, higher_is_better=False)
    near = [abs(value - edge) < 1e-9 * edge for edge in (1, paper**0.8, paper**1.25)]
    assert more is less or any(near) or abs(paper - 1) < 1e-12


def test_units_have_one_spelling():
    assert [unit_name(u) for u in ("x", "X", "×", " times ", "percent", "% of tokens", "seconds", "GB", "s a token", "")] == [
        "x", "x", "x", "x", "%", "%", "s", "GB", "s a token", "",
    ]  # fmt: skip
    assert claimed_ratio(make(paper_value=0.0)) is None


def test_the_largest_point_decides_a_claim():
    small = make(point={"n": 1}, index=0)
    large = make(point={"n": 2}, index=1, measured=estimate(0.5, 0.6, 0.7), minutes=-5)
    (claim,) = summaries([large, small])
    assert claim.verdict is REFUTED
    assert claim.deciding == large
    assert claim.points == (small, large)
    assert not claim.met


def test_the_largest_scale_decides_a_claim():
    (claim,) = summaries([make(scale="smoke", measured=estimate(0.5)), make(scale="small", minutes=-9)])
    assert claim.verdict is REPRODUCED
    assert len(claim.points) == 1


def test_the_newest_measurement_of_a_point_counts():
    (claim,) = summaries([make(minutes=5, measured=estimate(0.5)), make(minutes=1)])
    assert claim.verdict is REFUTED
    assert len(claim.points) == 1


def test_failed_points_are_told():
    failed = make(status="out of memory", error="killed at 900 MiB", point={"n": 2}, index=1)
    (claim,) = summaries([make(), failed])
    assert claim.verdict is REPRODUCED
    assert claim.reason.endswith("1 larger point failed")
    assert claim.failed == (failed,)
    assert not claim.met
    (claim,) = summaries([failed])
    assert claim.verdict is None
    assert claim.reason == "killed at 900 MiB"


def test_machines_are_not_mixed():
    assert [claim.fingerprint for claim in summaries([make(), make(fingerprint="beef")])] == ["f00d", "beef"]
