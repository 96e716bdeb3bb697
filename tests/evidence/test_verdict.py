"""The written rule, at its boundaries."""

import math

import pytest
from evidence_maker import QUALITY, estimate, make
from hypothesis import given, settings
from hypothesis import strategies as st

from assay.evidence.types import Verdict
from assay.evidence.verdict import PAYS, judge, remarks, summaries, unit_name

R, D, N, F = Verdict.REPRODUCED, Verdict.DIRECTION_HOLDS, Verdict.DOES_NOT_PAY, Verdict.REFUTED
U, Q = Verdict.UNDECIDED, Verdict.QUALITY_NOT_SHOWN


def verdict(**changes):
    return judge(make(**changes)).verdict


@pytest.mark.parametrize(
    ("low", "median", "high", "expected"),
    [
        (1.5, 2.0**0.8 + 1e-9, 2.0, R),
        (1.5, 2.0**0.8 - 1e-9, 2.0, D),  # 80 % in log terms: 1.741
        (1.0 + 1e-9, 1.01, 1.02, D),
        (1.0, 1.02, 1.049, N),  # the interval touches no gain, and 5 % are ruled out
        (1.0, 1.02, 1.05, U),  # not ruled out
        (0.5, 1.5, 3.0, U),
        (0.9, 0.95, 1.0, N),
        (0.9, 0.95, 1.0 - 1e-9, F),
    ],
)
def test_a_ratio_against_the_papers_baseline(low, median, high, expected):
    assert verdict(measured=estimate(low, median, high)) is expected


@pytest.mark.parametrize("arm", ["free", "exact"])
@pytest.mark.parametrize(
    ("low", "median", "high", "expected"),
    [(1.0 + 1e-9, 1.1, 1.2, R), (0.99, 1.02, 1.04, N), (0.9, 1.02, 1.2, U), (0.5, 0.6, 0.7, N), (0.5, 0.6, 1.0, N)],
)
def test_it_must_beat_both_free_and_exact(arm, low, median, high, expected):
    assert verdict(**{f"vs_{arm}": estimate(low, median, high)}) is expected
    both = {"vs_free": estimate(1.5, 1.6, 1.7), "vs_exact": estimate(1.5, 1.6, 1.7)} | {
        f"vs_{arm}": estimate(low, median, high)
    }
    assert verdict(**both) is expected


def test_a_certain_loss_to_one_baseline_decides_however_uncertain_the_others_are():
    unclear = {"measured": estimate(0.9, 1.05, 1.3)}
    assert verdict(**unclear) is U
    assert verdict(**unclear, vs_exact=estimate(0.6, 0.7, 0.8)) is N
    assert verdict(**unclear, vs_free=estimate(0.9, 1.1, 1.3), vs_exact=estimate(0.6, 0.7, 1.0 - 1e-9)) is N
    assert verdict(**unclear, vs_exact=estimate(0.6, 0.7, 1.0)) is U
    assert (
        verdict(measured=estimate(0.5, 0.6, 0.7), vs_exact=estimate(0.6, 0.7, 0.8)) is F
    )  # the paper's own baseline first


def test_lower_is_better_turns_the_ratio():
    less = {"higher_is_better": False, "paper_value": 0.5, "metric": "time over the dense kernel's"}
    assert verdict(**less, measured=estimate(0.45, 0.5, 0.55)) is R
    assert verdict(**less, measured=estimate(0.8, 0.9, 0.99)) is D
    assert verdict(**less, measured=estimate(1.01, 1.1, 1.2)) is F


@pytest.mark.parametrize(
    ("form", "value", "measured", "expected"),
    [
        ("saved", 60, estimate(50, 60, 65), R),
        ("saved", 60, estimate(45, 100 * (1 - 2.5**-0.8) + 1e-6, 65), R),  # 52 % of the time saved
        ("saved", 60, estimate(45, 100 * (1 - 2.5**-0.8) - 1e-6, 65), D),
        ("saved", 60, estimate(-30, -20, -10), F),
        ("saved", 60, estimate(-1, 1, 4), N),  # under 5 % in time, 1/0.96 = 1.042
        ("added", 60, estimate(40, 50, 60), R),
        ("added", 60, estimate(20, 30, 40), D),
        ("added", 9.16, estimate(-2, 0, 4.9), N),
        ("added", 9.16, estimate(-2, 0, 5.1), U),
        ("added", 200, estimate(150, 190, 210), R),
    ],
)
def test_per_cent_are_read_by_their_form_not_by_their_words(form, value, measured, expected):
    figures = {"form": form, "paper_value": value, "paper_unit": "%", "unit": "%", "measured": measured}
    for metric in ("throughput gained", "reduction", "faster, higher, more"):
        assert verdict(**figures, metric=metric) is expected


@pytest.mark.parametrize(
    ("measured", "expected"),
    [
        (estimate(4.0, 5.0, 6.0), R),
        (estimate(4.0, 4.97, 6.0), D),
        (estimate(-1.0, 0.1, 0.30), N),
        (estimate(-1.0, 0.1, 0.32), U),
        (estimate(-2, -1, -0.1), F),
    ],
)
def test_points(measured, expected):
    """80 % of 6.22 points are 4.976; 5 % of them, 0.311, would be worth having."""
    points = {"kind": "figure", "form": "points", "unit": "points", "paper_unit": "points", "paper_value": 6.22}
    assert verdict(**points, measured=measured) is expected


def test_a_level_is_judged_by_its_gain_never_by_its_size():
    level = {"kind": "figure", "form": "level", "unit": "%", "paper_unit": "%", "paper_value": 92.0}
    assert verdict(**level, measured=estimate(74.0, 75.0, 76.0)) is U  # 75 of 92 % is no 80 %
    assert verdict(**level, measured=estimate(74.0, 75.0, 76.0), baseline=74.5) is U
    assert verdict(**level, measured=estimate(74.0, 75.0, 76.0), baseline=60.0) is D  # nobody knows the paper's gain
    known = level | {"paper_baseline": 39.0}
    assert verdict(**known, measured=estimate(80.0, 82.0, 84.0), baseline=39.5) is R  # 42.5 of 53 points
    assert verdict(**known, measured=estimate(80.0, 82.0, 84.0), baseline=41.0) is D
    assert verdict(**known, measured=estimate(38.0, 39.0, 40.0), baseline=41.0) is F
    reason = judge(make(**known, measured=estimate(98.0, 99.0, 99.9), baseline=91.0)).reason
    assert "over 91%" in reason
    assert "short of the paper's 92% over 39%" in reason  # 99 % falls short of nothing by itself


@pytest.mark.parametrize(
    ("value", "higher", "measured", "expected"),
    [
        (1.054, False, estimate(1.0, 1.02, 1.054**1.25 - 1e-9), R),
        (1.054, False, estimate(1.0, 1.02, 1.054**1.25 + 1e-9), U),
        (1.054, False, estimate(1.2, 1.3, 1.4), F),
        (0.968, True, estimate(0.968**1.25 + 1e-9, 0.97, 0.98), R),
        (0.968, True, estimate(0.968**1.25 - 1e-9, 0.97, 0.98), U),
        (0.968, True, estimate(0.8, 0.85, 0.9), F),
        (2.0, True, estimate(2.0**0.8 + 1e-9, 1.8, 1.9), R),
        (2.0, True, estimate(2.0**0.8 - 1e-9, 1.8, 1.9), U),
        (0.5, False, estimate(0.4, 0.5, 0.5**0.8 - 1e-9), R),
        (0.5, False, estimate(0.4, 0.5, 0.5**0.8 + 1e-9), U),
    ],
)
def test_a_bound_in_x(value, higher, measured, expected):
    bound = {"kind": "figure", "form": "bound", "paper_value": value, "higher_is_better": higher, "quality": None}
    assert verdict(**bound, measured=measured) is expected


def test_a_bound_on_time_needs_a_quality_too():
    bound = {
        "kind": "trial",
        "form": "bound",
        "paper_value": 1.054,
        "higher_is_better": False,
        "measured": estimate(1.0),
    }
    assert verdict(**bound, quantity="time", quality=None) is Q
    assert verdict(**bound, quantity="time") is R
    assert verdict(**bound, quantity="count", quality=None) is R


def test_other_bounds():
    bound = {"kind": "figure", "form": "bound", "higher_is_better": False, "quality": None, "unit": "points"}
    bound |= {"paper_unit": "points"}
    assert verdict(**bound, paper_value=0.4, measured=estimate(0.1, 0.2, 0.5)) is R  # 1.25 times 0.4
    assert verdict(**bound, paper_value=0.4, measured=estimate(0.1, 0.2, 0.5 + 1e-9)) is U
    assert verdict(**bound, paper_value=0.0, measured=estimate(0.0)) is R  # a paper's zero
    assert verdict(**bound, paper_value=0.0, measured=estimate(1e-9)) is F
    assert verdict(**bound, paper_value=None, tolerance=1.0, measured=estimate(0.1, 0.5, 1.0)) is R
    assert verdict(**bound, paper_value=None, tolerance=1.0, measured=estimate(1.1, 1.5, 2.0)) is F
    assert verdict(**bound, paper_value=None, measured=estimate(0.1)) is U
    assert verdict(**bound, paper_value=0.4, tolerance=0.3, measured=estimate(0.6, 0.65, 0.7)) is R


def test_about_is_two_sided():
    about = {"kind": "figure", "form": "about", "paper_value": 1.0, "paper_unit": "", "unit": "", "quality": None}
    about |= {"higher_is_better": False}
    assert verdict(**about, tolerance=0.1, measured=estimate(0.9, 1.0, 1.1)) is R
    assert verdict(**about, tolerance=0.1, measured=estimate(0.89, 1.0, 1.1)) is U
    assert verdict(**about, tolerance=0.1, measured=estimate(0.45, 1.0, 1.66)) is U
    assert verdict(**about, tolerance=0.1, measured=estimate(1.2, 1.3, 1.4)) is F
    assert verdict(**about, tolerance=0.1, measured=estimate(0.5, 0.6, 0.7)) is D  # cheaper than promised
    assert verdict(**about, measured=estimate(1.0)) is U  # no tolerance was fixed
    zero = about | {"paper_value": 0.0, "higher_is_better": True}
    assert verdict(**zero, tolerance=1.0, measured=estimate(-0.9, 0.1, 0.9)) is R


def quality(**changes):
    return {"quality": QUALITY | changes}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, R),
        ({"low": 0.891 + 1e-9}, R),  # 1 % of 0.9 may be lost
        ({"low": 0.891 - 1e-6}, U),
        ({"candidate": 0.895, "low": 0.5, "high": 0.9}, U),  # the point is fine, the bad end is not
        ({"candidate": 0.88, "low": 0.87, "high": 0.89}, N),
        ({"candidate": 0.88, "low": 0.87, "high": 0.895}, U),
        ({"candidate": 0.88, "low": None, "high": None}, N),
        ({"candidate": 0.95, "low": 0.94, "high": 0.96}, R),
        ({"margin": None}, Q),
        ({"controls": {"deleted": 0.5, "random": 0.6}}, Q),  # no rival
        ({"controls": {"deleted": 0.5, "rival": 0.85}}, Q),
        ({"controls": {"deleted": 0.5, "rival": 0.85}, "without": {"random": "it chooses nothing"}}, R),
        ({"controls": {"deleted": 0.895, "random": 0.6, "rival": 0.85}}, Q),  # blind to the deletion
        ({"controls": {"deleted": 0.5, "random": 0.892, "rival": 0.85}}, Q),  # blind to the choice
        ({"controls": {"deleted": 0.5, "random": 0.6, "rival": 0.9}}, R),  # a remark, no verdict
        ({"margin": 0.05, "relative": False, "low": 0.851}, R),
        ({"margin": 0.05, "relative": False, "low": 0.849}, U),
    ],
)
def test_quality_is_non_inferiority_and_must_be_sensitive(changes, expected):
    assert verdict(**quality(**changes)) is expected


def test_quality_where_less_is_better():
    loss = {"higher_is_better": False, "baseline": 10.0, "candidate": 10.05, "low": 10.0, "high": 10.1, "margin": 0.01}
    loss |= {"controls": {"deleted": 20.0, "random": 12.0, "rival": 10.5}}
    assert verdict(**quality(**loss)) is R
    assert verdict(**quality(**loss | {"high": 10.11})) is U
    assert verdict(**quality(**loss | {"low": 10.11, "candidate": 10.2, "high": 10.3})) is N
    assert verdict(**quality(**loss | {"controls": {"deleted": 10.1, "random": 12.0, "rival": 10.5}})) is Q


def test_a_speed_up_with_quality_from_10_to_5_is_not_reproduced():
    bad = {
        "baseline": 10.0,
        "candidate": 5.0,
        "low": -10.0,
        "high": 20.0,
        "controls": {"deleted": 0, "random": 0, "rival": 5},
    }
    assert verdict(measured=estimate(2.0, 2.1, 2.2), **quality(**bad)) is U


def test_no_quality_is_not_shown():
    assert verdict(quality=None) is Q


def test_a_figure_that_is_a_quality_must_be_better_than_its_controls():
    gain = {
        "kind": "figure",
        "form": "points",
        "unit": "points",
        "paper_unit": "points",
        "paper_value": 6.22,
        "quality": None,
    }
    gain |= {"measured": estimate(4.0, 5.0, 6.0)}
    assert verdict(**gain, controls={"deleted": 1.0, "random": 2.0}) is R
    assert verdict(**gain, controls={"deleted": 1.0, "random": 4.0}) is Q
    assert verdict(**gain, controls={"deleted": 4.5, "random": 2.0}) is Q
    assert verdict(**gain | {"controls": {}}) is Q
    rise = {"kind": "figure", "form": "bound", "unit": "%", "paper_unit": "%", "paper_value": None, "quality": None}
    rise |= {"higher_is_better": False, "tolerance": 1.0, "measured": estimate(0.1, 0.2, 0.9)}
    assert verdict(**rise, controls={"deleted": 50.0, "random": 3.0}) is R
    assert verdict(**rise, controls={"deleted": 50.0, "random": 0.5}) is Q


ARM = {
    "scores": (2.0, 2.05, 2.1),
    "floor": 3.46,
    "floor_name": "a bigram table",
    "rate": 3e-3,
    "rates": (1e-3, 3e-3, 1e-2),
}
ARM |= {"higher_is_better": False, "best": 0.0}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, R),
        ({"scores": (2.0, 2.1)}, U),
        ({"rates": (3e-3,)}, U),
        ({"scores": (2.0, 2.05, 3.30)}, U),  # hardly better than a bigram table
        ({"scores": (2.0, 2.05, 0.9 * 3.46 - 1e-9)}, R),
        ({"scores": (2.0, 2.05, 0.9 * 3.46 + 1e-9)}, U),
        ({"scores": (0.9, 0.7, 0.55), "floor": 0.5, "higher_is_better": True, "best": 1.0}, R),
        ({"scores": (0.9, 0.7, 0.549), "floor": 0.5, "higher_is_better": True, "best": 1.0}, U),
        ({"scores": (0.9, 0.7, 0.4), "floor": 0.5, "higher_is_better": True, "best": 1.0}, U),
    ],
)
def test_a_comparison_with_an_untrained_arm_is_void(changes, expected):
    found = judge(make(trained={"based": ARM, "attention": ARM | changes}))
    assert found.verdict is expected
    assert ("void" in found.reason and "attention" in found.reason) == (expected is U)


def test_the_order_of_the_rules():
    worse = {"measured": estimate(0.5, 0.6, 0.7)}
    assert verdict(**worse, noisy=True) is U  # noise decides nothing about times
    assert verdict(**worse, noisy=True, kind="figure") is F
    assert verdict(**worse, noisy=True, kind="figure", quantity="time") is U
    assert verdict(**worse, noisy=True, kind="figure", quantity="count") is F
    assert verdict(**worse, computed="it follows from the sizes") is Verdict.COMPUTED
    assert verdict(**worse, trained={"a": ARM | {"rates": ()}}) is U
    assert verdict(refuted=True, refuted_if="pigs fly") is F
    assert verdict(refuted=True, refuted_if="pigs fly", noisy=True) is U
    assert verdict(refuted=False, refuted_if="pigs fly") is R
    assert verdict(measured=None, needs=("cuda",), noisy=True) is Verdict.NEEDS_HARDWARE
    assert verdict(**worse, quality=None) is F
    assert verdict(vs_free=estimate(0.5, 0.6, 0.7), quality=None) is N
    with pytest.raises(ValueError, match="'timeout' has no verdict"):
        judge(make(status="timeout"))


def test_reasons_are_one_line_and_name_what_beat_it():
    reason = judge(make(vs_free=estimate(0.5, 0.6, 0.7), free_label="SDPA")).reason
    assert "\n" not in reason
    assert "SDPA (0.6x [0.5, 0.7]) is better" in reason


finite = st.floats(0.01, 100)


@given(values=st.tuples(finite, finite, finite).map(sorted), paper=st.floats(1.01, 50), factor=st.floats(1.0, 10.0))
@settings(max_examples=200, deadline=None)
def test_a_greater_gain_is_never_judged_worse(values, paper, factor):
    order = [F, N, U, D, R]
    low = judge(make(measured=estimate(*values), paper_value=paper)).verdict
    scaled = estimate(*(factor * value for value in values))
    high = judge(make(measured=scaled, paper_value=paper)).verdict
    rank = {N: 1, U: 1}  # these two depend on how wide the interval is
    assert rank.get(high, order.index(high)) >= rank.get(low, order.index(low))


@given(values=st.tuples(finite, finite, finite).map(sorted), paper=st.floats(1.01, 50))
@settings(max_examples=200, deadline=None)
def test_a_ratio_and_its_reciprocal_are_judged_alike(values, paper):
    low, median, high = values
    up = judge(make(measured=estimate(low, median, high), paper_value=paper)).verdict
    turned = estimate(1 / high, 1 / median, 1 / low)
    down = judge(make(measured=turned, paper_value=1 / paper, higher_is_better=False)).verdict
    near = abs(math.log(median) - 0.8 * math.log(paper)) < 1e-9
    assert up is down or near


def test_remarks_say_which_arm_is_better():
    trial = make(ratios={"baseline": estimate(2.0), "rfft": estimate(0.7, 0.8, 0.9), "slow": estimate(0.9, 1.2, 1.3)})
    assert remarks(trial) == ["rfft is faster (1.25x)"]
    assert remarks(make(ratios={"free": estimate(0.5), "exact": estimate(0.5), "candidate again": estimate(0.9)})) == []
    figure = make(
        kind="figure", arms={"without squash": 2.5, "other": 2.05, "worse": 1.0}, measured=estimate(1.9, 2.0, 2.1)
    )
    assert remarks(figure) == ["without squash does better (2.5x)"]
    less = make(
        kind="figure",
        higher_is_better=False,
        arms={"a": 1.0, "b": 3.0},
        measured=estimate(1.9, 2.0, 2.1),
        controls={"rival": 2.0},
    )
    assert remarks(less) == ["a does better (1x)", "the cheapest rival does as well (2x)"]
    rival = make(**quality(controls={"deleted": 0.5, "random": 0.6, "rival": 0.9}, rival="sinks and window"))
    assert remarks(rival) == ["sinks and window keeps as much quality at this budget (top-1 0.9)"]


def test_remarks_name_the_deletion_and_the_draw_that_do_as_well():
    """Also where they keep less than the baseline and the metric is sensitive to both: here the method itself lost more."""
    lossy = {
        "metric": "nats a byte",
        "higher_is_better": False,
        "baseline": 1.806,
        "candidate": 1.858,
        "low": 1.85,
        "high": 1.866,
    }
    controls = {"deleted": 1.838, "random": 1.858, "rival": 1.859, "gate only": 1.845}
    found = make(quality=QUALITY | lossy | {"controls": controls})
    assert judge(found).verdict is N
    assert remarks(found) == [
        "the method deleted keeps as much quality at this budget (nats a byte 1.838)",
        "a random choice keeps as much quality at this budget (nats a byte 1.858)",
        "gate only keeps as much quality at this budget (nats a byte 1.845)",
    ]
    assert remarks(make(**quality(controls={"deleted": 0.5, "random": 0.6, "rival": 0.85}))) == []


def test_remarks_name_the_controls_of_a_figure_that_is_a_quality():
    gain = {"kind": "figure", "form": "points", "unit": "points", "paper_unit": "points", "quality": None}
    gain |= {"measured": estimate(4.0, 5.0, 6.0)}
    assert remarks(make(**gain, controls={"deleted": 1.0, "random": 4.0, "rival": 3.0})) == [
        "a random choice does as well (4 points)"
    ]
    assert remarks(make(**gain, controls={"deleted": 4.5, "random": 2.0})) == [
        "the method deleted does as well (4.5 points)"
    ]
    less = gain | {"higher_is_better": False}
    assert remarks(make(**less, controls={"deleted": 7.0, "random": 6.0})) == [
        "a random choice does as well (6 points)"
    ]


def of(*records, stale=()):
    (found,) = summaries(records, is_stale=lambda record: record.id in stale)
    return found


def test_the_named_point_decides_not_the_last_or_the_largest():
    named = make(index=0, measured=estimate(1.9, 2.0, 2.1))
    later = make(index=1, point={"n": 9}, decides=False, measured=estimate(0.5, 0.6, 0.7))
    assert of(later, named).verdict is R
    assert of(later, named).deciding == named
    assert of(later).verdict is U
    assert "was not measured" in of(later).reason
    failed = make(index=0, status="timeout", error="killed after 600 s")
    assert of(later, failed).verdict is None
    assert of(later, failed).word == "timeout"


def test_the_largest_scale_that_decides():
    smoke = make(scale="smoke", measured=estimate(0.5, 0.6, 0.7))
    assert of(smoke).verdict is F
    assert of(smoke, make()).verdict is R
    full = make(scale="full", measured=estimate(0.5, 0.6, 0.7), minutes=9)
    assert of(full, make()).verdict is F
    assert of(full, make(), stale=[full.id]).verdict is R


def test_stale_records_decide_nothing():
    old = make()
    assert of(old, stale=[old.id]).verdict is None
    assert of(old, stale=[old.id]).word == "stale"
    assert not of(old, stale=[old.id]).met
    new = make(minutes=5, measured=estimate(0.5, 0.6, 0.7))
    assert of(old, new, stale=[old.id]).verdict is F
    assert summaries([make(hashes={})])[0].word == "stale"


def test_runs_on_one_machine_that_disagree_are_contested():
    pays, loses = make(), make(minutes=5, measured=estimate(0.5, 0.6, 0.7))
    assert of(pays, loses).verdict is Verdict.CONTESTED
    assert "2x" in of(pays, loses).reason
    assert "0.6x" in of(pays, loses).reason
    assert not of(pays, loses).met
    assert len(of(pays, loses).runs) == 2
    assert (
        len(summaries([pays, make(fingerprint="beef", measured=estimate(0.5, 0.6, 0.7))])) == 2
    )  # machines side by side
    busy = make(minutes=9, noisy=True, measured=estimate(0.5, 0.6, 0.7))
    assert of(pays, busy).verdict is R  # an undecided run yields
    short = make(minutes=7, measured=estimate(1.2, 1.3, 1.4))
    assert of(pays, short).verdict is D
    assert of(short, make(minutes=9)).verdict is D  # the weaker of two that pay, whichever came last


def test_a_claim_is_met():
    assert of(make()).met
    assert of(make(computed="sizes")).met
    assert not of(make(quality=None)).met
    assert not of(make(), make(index=1, point={"n": 2}, decides=False, status="failed", error="x")).met
    assert set(PAYS) == {R, D}


def test_units_have_one_spelling():
    assert [unit_name(u) for u in ("×", "times", "percent", "% of tokens", "sec", "points", "tokens per second")] == [
        "x", "x", "%", "%", "s", "points", "tokens per second",
    ]  # fmt: skip
