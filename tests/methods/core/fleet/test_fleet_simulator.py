"""What must hold of any simulation, hand-worked cases, and times found again in what they made."""

from __future__ import annotations

import random

import numpy as np
import pytest

from assay.methods.core.fleet.hardware import Device, Link, ModelShape
from assay.methods.core.fleet.simulator import Server, StepTimes, calibrated, errors, simulate, summary
from assay.methods.core.fleet.traces import Request, poisson

TIMES = StepTimes(prefill=1e-3, step=0.01, row=0.002, context=1e-6, turn=1e-4)


def crowd(n=60, seed=0):
    chance = random.Random(seed)
    return [Request(chance.uniform(0, 3), chance.randint(1, 600), chance.randint(1, 40)) for _ in range(n)]


def test_one_request_by_hand():
    times = StepTimes(prefill=1e-3, step=0.01, row=0.002)
    (served,) = simulate([Request(1.0, 300, 3)], [Server("a", times)]).served
    # 256 + 44 tokens of prompt in one turn with the first step, another step after it
    assert served.first == pytest.approx(1.3)
    assert served.end == pytest.approx(1.3 + 2 * 0.012)


def test_two_rows_share_a_step_by_hand():
    times = StepTimes(prefill=0.0, step=1.0, row=0.1)
    served = simulate([Request(0, 1, 3), Request(0, 1, 2)], [Server("a", times)]).served
    assert {one.request.new_tokens: round(one.end, 9) for one in served} == {2: 1.2, 3: 1.2 + 1.1}


def test_a_prompt_holds_up_who_decodes_by_a_chunk_at_most():
    times = StepTimes(prefill=1e-3, step=0.01)
    first = Request(0.0, 10, 50)
    found = simulate([first, Request(0.05, 2000, 2)], [Server("a", times, chunk=100)])
    longest = max(turn.end - turn.start for turn in found.turns)
    assert longest == pytest.approx(0.1 + 0.01)
    whole = simulate([first, Request(0.05, 2000, 2)], [Server("a", times, chunk=4000)])
    assert max(turn.end - turn.start for turn in whole.turns) == pytest.approx(2.01)


@pytest.mark.parametrize("servers", [1, 3])
def test_every_request_is_answered_once_and_never_faster_than_alone(servers):
    requests = crowd()
    found = simulate(requests, [Server(f"s{i}", TIMES, max_running=8) for i in range(servers)])
    assert sorted(one.request.at for one in found.served) == sorted(request.at for request in requests)
    for one in found.served:
        (alone,) = simulate([one.request], [Server("x", TIMES)]).served
        assert one.ttft >= alone.ttft - 1e-9
        assert one.e2e >= alone.e2e - 1e-9
    per_server = {f"s{i}": [turn for turn in found.turns if turn.server == f"s{i}"] for i in range(servers)}
    for turns in per_server.values():
        assert all(a.end <= b.start + 1e-12 for a, b in zip(turns, turns[1:], strict=False))
        assert max((turn.rows for turn in turns), default=0) <= 8
    assert sum(turn.prompt for turn in found.turns) == sum(request.prompt_tokens for request in requests)
    assert sum(turn.rows for turn in found.turns) == sum(request.new_tokens - 1 for request in requests)


def test_the_wait_is_that_of_a_queue_with_equal_services():
    """One row at a time and prompts of one length: Pollaczek and Khinchin's mean wait, rho s / (2 (1 - rho))."""
    service, rate = 0.1, 6.0
    requests = poisson(rate, 4000.0, [(100, 1)], seed=1)
    found = simulate(requests, [Server("a", StepTimes(prefill=service / 100, step=1e-9), max_running=1)])
    waited = float(np.mean([one.ttft for one in found.served])) - service
    rho = rate * service
    assert waited == pytest.approx(rho * service / (2 * (1 - rho)), rel=0.1)
    assert found.busy("a") == pytest.approx(rho, rel=0.05)


def test_more_servers_and_faster_ones_never_hurt_the_last_answer():
    requests = crowd()
    ends = [simulate(requests, [Server(f"s{i}", TIMES) for i in range(n)]).seconds for n in (1, 2, 4)]
    assert ends[0] > ends[1] > ends[2]
    faster = StepTimes(5e-4, 0.005, 0.001, 5e-7)
    assert simulate(requests, [Server("a", faster)]).seconds < ends[0]


def test_memory_bounds_who_runs():
    requests = [Request(0.0, 90, 10) for _ in range(5)]
    found = simulate(requests, [Server("a", TIMES, kv_tokens=250)])
    assert max(turn.rows for turn in found.turns) == 2
    assert len(found.served) == 5
    refused = simulate([*requests, Request(0.0, 300, 10)], [Server("a", TIMES, kv_tokens=250)]).refused
    assert [request.prompt_tokens for request in refused] == [300]


def test_priorities_go_first():
    requests = [Request(0.0, 400, 2), *(Request(0.01, 400, 2) for _ in range(3)), Request(0.02, 400, 2, priority=1)]
    served = simulate(requests, [Server("a", TIMES, max_running=1)]).served
    assert [one.request.priority for one in served] == [0, 1, 0, 0, 0]


def test_a_long_backlog_ends_and_keeps_its_order():
    found = simulate([Request(0.0, 5, 2) for _ in range(20_000)], [Server("a", TIMES, max_running=4)])
    assert len(found.served) == 20_000
    firsts = [one.first for one in found.served]
    assert firsts == sorted(firsts)


def test_what_is_left_to_do_is_counted_down():
    left = []

    def watching(request, able):
        left.append([one.load for one in able])
        return min(able, key=lambda one: one.load)

    requests = [Request(0.0, 100, 10), Request(0.0, 50, 5), Request(1000.0, 1, 1)]
    simulate(requests, [Server("a", TIMES), Server("b", TIMES)], router=watching)
    assert left == [[0, 0], [110, 0], [0, 0]]


def test_tenants_and_routers():
    servers = [Server("a", TIMES, tenants=("x",)), Server("b", TIMES)]
    found = simulate([Request(0, 5, 2, "x"), Request(0, 5, 2, "y"), Request(0, 5, 2, "y")], servers)
    assert all(one.server == "b" for one in found.served if one.request.tenant == "y")
    first = simulate(crowd(9), [Server("a", TIMES), Server("b", TIMES)], router=lambda request, able: able[0])
    assert {one.server for one in first.served} == {"a"}
    assert first.busy("b") == 0
    assert 0 < first.busy("a") <= 1


def test_a_closed_loop_keeps_as_many_in_flight():
    found = simulate([Request(0, 20, 5) for _ in range(30)], [Server("a", TIMES)], clients=4)
    assert len(found.served) == 30
    changes = sorted([(one.request.at, 1) for one in found.served] + [(one.end, -1) for one in found.served])
    inside = np.cumsum([change for _, change in changes])
    assert inside.max() == 4


def test_the_same_run_twice_and_arguments():
    assert simulate(crowd(), [Server("a", TIMES)]) == simulate(crowd(), [Server("a", TIMES)])
    with pytest.raises(ValueError, match="at least one server"):
        simulate([], [])
    with pytest.raises(ValueError, match="names of their own"):
        simulate([], [Server("a", TIMES), Server("a", TIMES)])
    with pytest.raises(ValueError, match="must not all be 0"):
        StepTimes(0.0, 0.0)
    with pytest.raises(ValueError, match="step"):
        StepTimes(0.1, float("nan"))
    assert summary([]) == {"requests": 0}


@pytest.mark.parametrize(("clients", "rate"), [(None, 4.0), (6, 6.0)])
def test_times_are_found_again_in_what_they_made(clients, rate):
    requests = poisson(rate, 20.0, [(40, 30), (400, 8), (150, 60)], seed=2)
    times = StepTimes(prefill=4e-4, step=0.006, row=0.0009, context=2e-6)
    served = simulate(requests, [Server("a", times)], clients=clients).served
    found = calibrated(served, clients=clients)
    for name in ("prefill", "step", "row", "context"):
        assert getattr(found, name) == pytest.approx(getattr(times, name), rel=0.1), name
    again = summary(simulate([one.request for one in served], [Server("a", found)], clients=clients).served)
    wrong = errors(again, summary(served))
    assert max(abs(wrong[name]) for name in wrong if "p99" not in name) < 0.1, wrong


def test_times_of_noisy_measurements_predict_another_load():
    """Found at one load with 20 % of noise on each answer, they say within a quarter what a load a quarter higher does."""
    from dataclasses import replace

    times = StepTimes(prefill=4e-4, step=0.006, row=0.0009, context=2e-6)
    noise = np.random.default_rng(0)
    lengths = [(40, 30), (400, 8), (150, 60)]
    served = simulate(poisson(4.0, 40.0, lengths, seed=2), [Server("a", times)]).served
    measured = []
    for one in served:
        first = one.request.at + one.ttft * noise.lognormal(0, 0.2)
        measured.append(replace(one, first=first, end=first + (one.end - one.first) * noise.lognormal(0, 0.2)))
    found = calibrated(measured)
    load = poisson(5.0, 40.0, lengths, seed=3)
    predicted, real = (summary(simulate(load, [Server("a", one)]).served) for one in (found, times))
    wrong = errors(predicted, real)
    assert max(abs(wrong["itl p50"]), abs(wrong["e2e p95"])) < 0.25, wrong


@pytest.mark.parametrize("steps", [4, 1000])
def test_several_steps_a_turn_are_the_same_work_and_only_who_comes_meanwhile_waits(steps):
    requests = crowd()
    one = simulate(requests, [Server("a", TIMES, max_running=8)])
    many = simulate(requests, [Server("a", TIMES, max_running=8, steps=steps)])
    assert len(many.turns) < 0.65 * len(one.turns)
    for found in (one, many):
        assert sum(turn.prompt for turn in found.turns) == sum(request.prompt_tokens for request in requests)
        assert sum(turn.rows * turn.steps for turn in found.turns) == sum(one.new_tokens - 1 for one in requests)
    alone = [simulate([Request(0.0, 700, 50)], [Server("a", TIMES, steps=n)]) for n in (1, steps)]
    assert alone[1].seconds == pytest.approx(
        alone[0].seconds + TIMES.turn * (len(alone[1].turns) - len(alone[0].turns))
    )
    assert alone[1].rows("a") == 1.0
    with pytest.raises(ValueError, match="steps"):
        Server("a", TIMES, steps=0)


def test_a_prompt_that_is_being_run_waits_for_one_step_a_turn():
    """However many steps a turn may take: the rest of the prompt is not put off by all of them, chunk by chunk."""
    times = StepTimes(prefill=1e-3, step=1.0)
    found = simulate([Request(0.0, 1, 200), Request(0.5, 1000, 1)], [Server("a", times, chunk=100, steps=50)])
    assert [turn.steps for turn in found.turns][:11] == [50, *[1] * 9, 50]
    (late,) = (one for one in found.served if one.request.prompt_tokens == 1000)
    assert late.first == pytest.approx(50.001 + 10 * 0.1 + 9 * 1.0)


def test_a_watch_sees_every_turn_and_changes_nothing_by_looking():
    seen = []
    plain = simulate(crowd(), [Server("a", TIMES), Server("b", TIMES)])
    found = simulate(
        crowd(),
        [Server("a", TIMES), Server("b", TIMES)],
        watch=lambda *what: seen.append((what[0], len(what[2]))),
        every=0.5,
    )
    assert found == plain
    assert [at for at, _ in seen] == [0.5 * n for n in range(1, len(seen) + 1)]
    assert found.seconds - 0.5 <= seen[-1][0] <= found.seconds + 0.5
    for at, turns in seen:
        assert sum(turn.start < at for turn in found.turns) <= turns <= sum(turn.start <= at for turn in found.turns)


def test_a_watch_may_change_the_times_of_later_turns():
    slow = StepTimes(prefill=1e-3, step=1.0)

    def watch(now, fleet, turns):
        if now == 2.0:
            fleet[0].times = slow

    found = simulate([Request(0.0, 1, 10)], [Server("a", StepTimes(prefill=1e-3, step=0.5))], watch=watch, every=1.0)
    lasting = [round(turn.end - turn.middle, 9) for turn in found.turns]
    assert lasting == [0.5] * 4 + [1.0] * 5
    assert simulate([], [Server("a", slow)], watch=watch).turns == ()
    with pytest.raises(ValueError, match="every"):
        simulate([], [Server("a", slow)], watch=watch, every=0)


def test_descriptors():
    device = Device("d", flops=1e12, bandwidth=1e11, memory=1e10, idle_watts=40, peak_watts=100)
    assert device.seconds(1e12, 1e10) == 1.0
    assert device.seconds(1e9, 1e11) == 1.0
    assert device.watts(0.0) == 40
    assert device.watts(1.0) == 100
    assert device.watts(1.0, 0.5) == 47.5
    assert Link(1e9, 1e-3).seconds(0) == 1e-3
    shape = ModelShape(layers=2, width=64, heads=4, kv_heads=2, head_dim=16, parameters=1000, window=8)
    assert shape.cache_bytes(3) == 2 * 2 * 2 * 16 * 2 * 3
    assert shape.cache_bytes(100) == shape.cache_bytes(8)
    assert shape.step_bytes([3, 100]) == 2000 + shape.cache_bytes(3) + shape.cache_bytes(8)
    assert shape.prefill_flops(3) == 2 * 1000 * 3 + 4 * 2 * 4 * 16 * 6
    assert shape.prefill_flops(2) + shape.prefill_flops(1, behind=2) == shape.prefill_flops(3)
    with pytest.raises(ValueError, match="peak_watts"):
        Device("d", 1.0, 1.0, 1.0, idle_watts=5, peak_watts=2)
    with pytest.raises(ValueError, match="kv_heads must divide"):
        ModelShape(1, 8, 3, 2, 4, 10)
