"""A row under a power budget: what must hold of its draw, of the controller, and of who is slowed down."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from assay.methods.core.fleet.simulator import StepTimes
from assay.methods.core.fleet.traces import Request
from assay.methods.serving.polca import (
    FULL,
    HIGH,
    LOW,
    Ladder,
    Phase,
    PowerLimit,
    Replay,
    RequestClass,
    RowSpec,
    ServerSpec,
    Setting,
    Step,
    Workload,
    dealt,
    fit_power,
    fit_sensitivity,
    gates_used,
    goodput,
    losses,
    no_capping,
    one_threshold,
    simulate_row,
    synthetic,
    two_thresholds,
)
from assay.methods.serving.polca.row import _Control

ROW = RowSpec(base=8)
WORKLOAD = Workload(seconds=400, day=400)
SLOTS = ServerSpec(times=StepTimes(prefill=1e-9, step=1.0), max_running=1, steps=64)


@pytest.fixture(scope="module")
def trace():
    return synthetic(WORKLOAD, replace(ROW, added=4), seed=3).requests


def of(trace, row):
    return [one for one in trace if int(one.tenant) < row.servers]


def tight(added=4, **changes):
    """A row whose budget the requests come to."""
    return replace(ROW, added=added, **changes)


# what a row draws


def test_thresholds_above_everything_are_the_uncapped_row(trace):
    row = tight(budget_watts=1e6)
    plain = simulate_row(trace, row, no_capping())
    found = simulate_row(trace, row, two_thresholds(1.5, 2.0))
    assert found.simulated == plain.simulated
    assert (found.watts == plain.watts).all()
    assert found.actions == ()
    assert found.brakes == 0
    # over the budget, with the brake taken out, too
    row = replace(row, budget_watts=1.0, brake_mhz=None)
    assert simulate_row(trace, row, two_thresholds(1e9, 1e9)).simulated == plain.simulated


def test_energy_is_the_integral_of_power_and_the_row_the_sum_of_its_servers(trace):
    row = tight(brake_mhz=None)
    found = simulate_row(trace, row, no_capping())
    spec, joules = row.spec, 0.0
    for turn in found.simulated.turns:
        if turn.prompt:
            joules += (spec.watts("prompt", turn.prompt) - spec.idle) * (turn.middle - turn.start)
        if turn.rows:
            begin = turn.middle if turn.prompt else turn.start
            joules += (spec.watts("token", turn.rows) - spec.idle) * (turn.end - begin)
    joules += row.servers * spec.idle * len(found.watts) * found.sampling
    assert found.joules == pytest.approx(joules, rel=1e-9)
    assert found.watts == pytest.approx(found.by_server.sum(axis=0))
    alone = simulate_row([one for one in trace if one.tenant == "5"], row, no_capping())
    length = alone.by_server.shape[1]
    assert found.by_server[5, :length] == pytest.approx(alone.by_server[5])
    assert found.watts.max() <= found.peak_watts <= row.servers * spec.provisioned


def test_an_idle_row_draws_its_idle_watts_exactly():
    found = simulate_row([], ROW, two_thresholds(), seconds=100)
    assert found.watts.tolist() == [8 * ROW.spec.idle] * 50
    assert found.peak_watts == 8 * ROW.spec.idle


def test_power_by_hand():
    """One request of 1,024 prompt tokens and 3 seconds of tokens, seen by two-second means."""
    spec = replace(ServerSpec(), times=StepTimes(prefill=1 / 1024, step=1.0), saturates=1024)
    found = simulate_row([Request(0.0, 1024, 4, "0")], RowSpec(base=1, spec=spec), no_capping())
    prompt, token = 1600 + 8 * 400, 1600 + 8 * 260
    assert found.watts == pytest.approx([(prompt + token) / 2, token])
    assert found.peak_watts == pytest.approx(prompt) == spec.provisioned
    half = replace(spec, saturates=2048)
    found = simulate_row([Request(0.0, 1024, 4, "0")], RowSpec(base=1, spec=half), no_capping())
    assert found.peak_watts == pytest.approx(1600 + 8 * 330)


@pytest.mark.parametrize("together", [False, True])
def test_a_row_of_independent_servers_averages_out(together):
    """Servers that are on or off by chance in each slot: mean n mu, standard deviation sqrt(n) sigma; n sigma if they go together."""
    n, slots, p = 40, 300, 0.3
    on = np.random.default_rng(0).random((slots, n)) < p
    if together:
        on[:] = on[:, :1]
    requests = [Request(10.0 * slot, 1, 11, str(server)) for slot, server in zip(*np.nonzero(on), strict=True)]
    row = RowSpec(base=n, spec=SLOTS, telemetry=10.0, brake_mhz=None)
    found = simulate_row(sorted(requests, key=lambda one: one.at), row, no_capping(), seconds=10.0 * slots)
    watts = found.watts[:slots]
    step = SLOTS.watts("token", 1) - SLOTS.idle
    sigma = step * np.sqrt(p * (1 - p))
    assert watts.mean() == pytest.approx(n * (SLOTS.idle + p * step), rel=0.08 if together else 0.01)
    assert watts.std() == pytest.approx((n if together else np.sqrt(n)) * sigma, rel=0.15)


def test_more_servers_at_the_same_load_each_draw_more(trace):
    means = [
        simulate_row(of(trace, row), row, no_capping(), seconds=400).watts[:200].mean()
        for row in (tight(added, brake_mhz=None) for added in (0, 2, 4))
    ]
    assert means[0] < means[1] < means[2]


def test_a_lower_clock_never_shortens_a_request():
    for mhz in (1300.0, 900.0, 300.0):
        policy = Ladder([Step(1e-9, {LOW: mhz, HIGH: mhz})])
        for prompt, new in ((1, 1), (3000, 1), (10, 500), (8000, 2000)):
            row = RowSpec(base=1, brake_mhz=None, cap_delay=0.0)
            fast = simulate_row([Request(0.0, prompt, new, "0")], row, no_capping()).served[0]
            slow = simulate_row([Request(5.0, prompt, new, "0")], row, policy).served[0]
            assert slow.e2e >= fast.e2e - 1e-9
            assert slow.ttft >= fast.ttft - 1e-9
    # a queue, one at a time: each by itself
    spec = replace(ServerSpec(), max_running=1)
    row = RowSpec(base=2, spec=spec, brake_mhz=None)
    requests = synthetic(Workload(rows=0.8, seconds=1200, day=1200), row, seed=1).requests
    fast = {one.request: one.e2e for one in simulate_row(requests, row, no_capping()).served}
    slow = simulate_row(requests, row, Ladder([Step(1e-9, {LOW: 700.0, HIGH: 700.0})])).served
    assert len(slow) == len(requests) > 10
    assert all(one.e2e >= fast[one.request] - 1e-9 for one in slow)


def test_a_lower_first_threshold_never_leaves_more_time_above_the_budget():
    """But for a few samples: what is put off by a cap is drawn later."""
    for seed in range(3):
        row = RowSpec(base=10, added=4, brake_mhz=None)
        requests = synthetic(WORKLOAD, row, seed=seed).requests
        above = [simulate_row(requests, row, two_thresholds(t1, 0.89)).seconds_above for t1 in (0.89, 0.8, 0.6)]
        above.insert(0, simulate_row(requests, row, no_capping()).seconds_above)
        assert all(later <= sooner + 6 for sooner, later in zip(above, above[1:], strict=False)), above
        assert above[-1] < 0.9 * above[0]


# what the controller does


def looks(policy, shares, row=None):
    control = _Control(row or replace(ROW, brake_mhz=None), policy)
    levels = []
    for number, share in enumerate(shares, 1):
        control.look(2.0 * number, share)
        levels.append(control.acting)
    return control, levels


@pytest.mark.parametrize("share", [0.7501, 0.78, 0.8])
def test_between_the_threshold_and_its_margin_nothing_happens(share):
    control, levels = looks(two_thresholds(), [0.82] + [share] * 200)
    assert len(control.actions) == 1
    assert levels[-1] == 1
    control, levels = looks(two_thresholds(), [0.9] * 60 + [0.86] * 200)
    assert levels[-1] == 3  # climbed while it did not suffice, and stays
    assert len(control.actions) == 2


def test_caps_act_after_their_delay_and_no_sooner():
    control, levels = looks(two_thresholds(), [0.5, 0.85] + [0.78] * 40)
    assert [(one.asked, one.acted, one.kind, one.level) for one in control.actions] == [(4.0, 44.0, "cap", 1)]
    assert levels.index(1) == 21
    control, _ = looks(two_thresholds(), [0.85] * 3 + [0.95] * 60)
    assert [(one.asked, one.acted, one.level) for one in control.actions] == [
        (2.0, 42.0, 1),
        (8.0, 48.0, 2),
        (48.0, 88.0, 3),
    ]


def test_uncapping_goes_the_same_way_back():
    _, levels = looks(two_thresholds(), [0.95] * 50 + [0.5] * 100)
    assert [level for level, before in zip(levels, [0, *levels], strict=False) if level != before] == [2, 3, 2, 1, 0]


def test_the_brake_acts_sooner_than_a_cap_and_slows_everybody_down():
    row = RowSpec(base=2, budget_watts=4000.0, spec=replace(ServerSpec(), steps=1))
    requests = [Request(0.0, 100, 2000, "0"), Request(0.0, 100, 2000, "1")]
    found = simulate_row(requests, row, two_thresholds())
    assert found.brakes >= 1
    first = found.actions[0]
    assert first.kind == "brake"
    assert row.brake_delay <= first.acted - first.asked < row.brake_delay + row.telemetry < row.cap_delay
    caps = [one for one in found.actions if one.kind == "cap"]
    assert all(one.acted - one.asked >= row.cap_delay for one in caps)
    lasting = [(turn.start, turn.end - turn.middle) for turn in found.simulated.turns if turn.rows]
    usual = np.median([seconds for at, seconds in lasting if at < first.acted])
    braked = [seconds for at, seconds in lasting if first.acted < at < first.acted + 4]
    assert min(braked) > 1.9 * usual  # beta 0.25 at 288 of 1,410 MHz: 1.97 times
    assert simulate_row(requests, replace(row, brake_mhz=None), two_thresholds()).brakes == 0


def test_the_brake_is_let_go_and_the_ladder_does_not_climb_down_under_it():
    control = _Control(ROW, two_thresholds())
    for number, share in enumerate([0.95] * 30 + [1.01] + [0.95] * 2 + [0.4] * 14, 1):
        control.look(2.0 * number, share)
    # asked at 62 s, the brake acts at 68; it is held while the third step is under way, until 82, and let go by 88
    seen = [(one.acted, one.kind, one.level) for one in control.actions]
    assert seen == [(42.0, "cap", 2), (68.0, "brake", 0), (82.0, "cap", 3), (88.0, "release", 0)]
    assert control.brakes == 1
    assert [(asked, kind, level) for _, asked, kind, level in control.under_way] == [(88.0, "cap", 2)]


def test_high_priority_is_capped_only_while_low_priority_is_at_its_lowest():
    policy = two_thresholds()
    rng = np.random.default_rng(1)
    for _ in range(5):
        shares = np.clip(0.85 + np.cumsum(rng.normal(0, 0.03, 500)) % 0.3 - 0.15, 0.5, 0.99)
        _, levels = looks(policy, shares.tolist())
        for level in set(levels):
            if policy.setting(level, HIGH) != FULL:
                assert policy.setting(level, LOW) == Setting(mhz=1110.0)
        assert all(
            b - a <= 2 and a - b <= 1 and not (b == 3 and a < 2) for a, b in zip(levels, levels[1:], strict=False)
        )


def test_capping_lowers_the_peak_and_costs_low_priority_more(trace):
    row = tight(brake_mhz=None)
    plain = simulate_row(trace, row, no_capping())
    capped = simulate_row(trace, row, two_thresholds(0.5, 0.6))
    assert capped.watts.max() < plain.watts.max()
    assert capped.capped_seconds[3] > 100
    lost = losses(capped, plain)
    assert lost[LOW, 0.5] > lost[HIGH, 0.5] > 0
    assert losses(plain, plain) == dict.fromkeys(lost, 0.0)
    assert gates_used(plain, plain) == 0
    assert gates_used(capped, plain) == pytest.approx(
        max(lost[HIGH, 0.5] / 0.01, lost[HIGH, 0.99] / 0.05, lost[LOW, 0.5] / 0.05, lost[LOW, 0.99] / 0.5)
    )
    braked = simulate_row(trace, tight(budget_watts=35_000.0), no_capping())
    assert braked.brakes > 0
    assert gates_used(braked, plain) > 1 + braked.brakes - 1e-9
    assert goodput(plain, plain) == pytest.approx(len(plain.served) / plain.simulated.seconds)
    assert goodput(capped, plain) < goodput(plain, plain)
    assert goodput(braked, plain) < goodput(plain, plain)


def test_a_larger_uncapped_row_is_a_reference_for_a_smaller_one(trace):
    large = simulate_row(trace, tight(brake_mhz=None), no_capping())
    row = tight(1, brake_mhz=None)
    small = simulate_row(of(trace, row), row, no_capping())
    assert gates_used(small, large) == 0
    assert small.by_server == pytest.approx(large.by_server[: row.servers, : small.by_server.shape[1]])


# who is told what


def test_a_power_limit_slows_the_phase_that_draws_more_and_no_other():
    spec = ServerSpec()
    limit = spec.token_watts(1) + 1
    row = RowSpec(base=1, spec=spec, brake_mhz=None)
    request = [Request(0.0, 4096, 200, "0")]
    plain, limited = (simulate_row(request, row, policy) for policy in (no_capping(), PowerLimit(limit)))
    assert limited.served[0].ttft > 1.2 * plain.served[0].ttft
    slower = limited.served[0].e2e - plain.served[0].e2e
    assert slower == pytest.approx(limited.served[0].ttft - plain.served[0].ttft)
    # spikes get through: the beginning of a prompt draws what it likes
    assert limited.peak_watts == plain.peak_watts
    assert simulate_row(request, replace(row, limit_delay=0.0), PowerLimit(limit)).peak_watts == pytest.approx(
        spec.host_busy + 8 * limit
    )


def test_ladders_and_their_arguments():
    assert one_threshold().setting(1, HIGH) == one_threshold().setting(1, LOW) == Setting(mhz=1110.0)
    assert one_threshold(high=None).setting(1, HIGH) == FULL
    assert Replay([(10.0, 2), (20.0, 0)]).level(15.0, 0.0, 0, 0) == 2
    assert [Replay([(10.0, 2), (20.0, 0)]).level(at, 1.0, 0, 0) for at in (0.0, 25.0)] == [0, 0]
    with pytest.raises(ValueError, match="must not descend"):
        two_thresholds(0.9, 0.8)
    with pytest.raises(ValueError, match="margin"):
        two_thresholds(margin=float("nan"))
    with pytest.raises(ValueError, match="must not both be given"):
        Setting(mhz=1.0, watts=1.0)
    with pytest.raises(ValueError, match="tenant of requests"):
        simulate_row([Request(0.0, 1, 1, "9")], ROW, no_capping())
    with pytest.raises(ValueError, match="groups"):
        simulate_row([], ROW, no_capping(), groups=[0])
    with pytest.raises(ValueError, match="both have answers of"):
        losses(simulate_row([], ROW, no_capping()), simulate_row([], ROW, no_capping()))
    with pytest.raises(ValueError, match="low_share"):
        RowSpec(low_share=1.5)
    with pytest.raises(ValueError, match="idle_watts"):
        ServerSpec(idle_watts=300.0)


def test_an_own_policy_is_taken(trace):
    class Always:
        def level(self, now, share, acting, asked):
            return 1

        def setting(self, level, group):
            return Setting(mhz=705.0) if level else FULL

    found = simulate_row(trace, tight(brake_mhz=None), Always())
    assert [(one.asked, one.acted) for one in found.actions] == [(2.0, 42.0)]


# how phases bear a lower clock


def test_phases_are_found_again_in_what_they_made():
    phase = Phase(watts=300, beta=0.3, scaled=0.7, exponent=2.4)
    clocks = [1.0, 0.8, 0.6, 0.4]
    assert fit_sensitivity(clocks, [5 * phase.slowdown(c) for c in clocks]) == pytest.approx(0.3)
    again = fit_power(clocks, [phase.draws(c, 50) for c in clocks], idle=50)
    assert (again.watts, again.scaled, again.exponent) == pytest.approx((300, 0.7, 2.4))
    assert fit_sensitivity([1.0, 0.5], [1.0, 0.9]) == 0.0  # faster at less: no sensitivity, not a negative one
    assert fit_sensitivity([1.0, 0.5], [1.0, 3.0]) == 1.0
    for c in clocks:
        assert phase.clock_for(phase.draws(c, 50), 50) == pytest.approx(c)
    assert phase.clock_for(1.0, 50) == pytest.approx(0.05)
    assert Phase(300, 1.0, 0.0).clock_for(100, 50) == pytest.approx(0.05)
    with pytest.raises(ValueError, match="two clocks"):
        fit_sensitivity([1.0, 1.0], [1.0, 1.0])
    with pytest.raises(ValueError, match="rise with the clock"):
        fit_power([1.0, 0.8, 0.6], [100.0, 150.0, 200.0], idle=50)
    with pytest.raises(ValueError, match="beta"):
        Phase(300, 1.5, 0.5)


# made-up requests


def test_a_server_has_the_same_requests_in_a_larger_row():
    small = synthetic(WORKLOAD, ROW, seed=5)
    large = synthetic(WORKLOAD, replace(ROW, added=3), seed=5)
    assert small.source.startswith("synthetic")
    assert [one for one in large.requests if int(one.tenant) < 8] == list(small.requests)
    assert synthetic(WORKLOAD, ROW, seed=6).requests != small.requests
    for one in large.requests:
        assert one.priority == ROW.group(int(one.tenant))
    assert [ROW.group(n) for n in range(4)].count(LOW) == 2


@pytest.mark.parametrize("correlation", [0.0, 0.5, 1.0])
def test_the_knob_sets_the_correlation_of_bursts_and_nothing_else(correlation):
    """Rates of servers over blocks, found in the requests: their covariance is the knob's share of a burst's variance."""
    workload = Workload(
        rows=5.0, seconds=30_000, trough=1.0, burst=3.0, burst_share=0.2, burst_seconds=100, correlation=correlation
    )
    row = RowSpec(base=6, low_share=0.0)
    lengths = {name: [(100, 1000)] for name in ("summarise", "search", "chat")}
    counts = np.zeros((6, 300))
    for one in synthetic(workload, row, seed=2, lengths=lengths).requests:
        counts[int(one.tenant), int(one.at / 100)] += 1
    mean = counts.mean()
    times = row.spec.times
    seconds = times.prefill * 100 + 1000 * (times.step + 5 * (times.row + times.context * 600))
    assert mean == pytest.approx(100 * 5 / seconds, rel=0.2)
    between = np.cov(counts)[~np.eye(6, dtype=bool)].mean()
    burst = mean**2 * (0.2 * 3.0**2 + 0.8 * 0.5**2 - 1)  # the variance that bursts give a server's rate
    assert between / burst == pytest.approx(correlation, abs=0.15)


def test_recorded_requests_are_dealt_out_by_priority():
    requests = [Request(float(n), 10, 5, "someone", n % 3) for n in range(300)]
    found = dealt(requests, ROW, seed=1)
    assert found == dealt(requests, ROW, seed=1)
    assert {
        ROW.group(int(one.tenant)) == (HIGH if before.priority else LOW)
        for one, before in zip(found, requests, strict=True)
    } == {True}
    assert len({one.tenant for one in found}) == 8
    assert simulate_row(found, ROW, two_thresholds()).simulated.refused == ()
    with pytest.raises(ValueError, match="low priority"):
        dealt(requests, replace(ROW, low_share=0.0))


def test_workloads_and_their_arguments():
    with pytest.raises(ValueError, match="at most 1"):
        Workload(burst=6.0, burst_share=0.2)
    with pytest.raises(ValueError, match="correlation"):
        Workload(correlation=1.1)
    with pytest.raises(ValueError, match="high priority"):
        Workload(classes=[RequestClass("a", (1, 2), (1, 2), 1.0, 0.0)])
    with pytest.raises(ValueError, match="prompt"):
        RequestClass("a", (5, 2), (1, 2), 1.0, 0.0)
