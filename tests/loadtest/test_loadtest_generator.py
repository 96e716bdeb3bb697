"""Load on scripted servers, on a simulated clock: who is asked what and when, and what is measured of it."""

from __future__ import annotations

import asyncio
import functools
import itertools
from dataclasses import replace

import pytest
from fake_openai import Script, SimulatedLoop, simulated

from assay.errors import InputError, MissingError
from assay.loadtest import report
from assay.loadtest.answers import Answer
from assay.loadtest.client import ask
from assay.loadtest.generator import GONE, WARMUP, Block, Load, Sample, drive, measure, order
from assay.loadtest.traces import Lengths, Line, Request

TEN = [Request(f"prompt {i}", 5) for i in range(10)]


def driven(script, requests, **how):
    """A block against a scripted server, and the server."""

    async def main(server, fake, *, connect):
        return await drive(iter(requests), functools.partial(ask, server, connect=connect), **how), fake

    return simulated(main, script)


def test_a_closed_loop_keeps_its_clients_busy():
    block, fake = driven(Script(ttft=0.3, itl=lambda place: 0.1), TEN, concurrency=3)
    assert fake.most_running == 3
    assert len(block.samples) == 10
    assert sorted(sample.sent for sample in block.samples) == pytest.approx(
        [0, 0, 0, 0.7, 0.7, 0.7, 1.4, 1.4, 1.4, 2.1], abs=1e-6
    )
    assert block.seconds == pytest.approx(2.8)
    for sample in block.samples:
        assert (sample.ttft, sample.itl, sample.gap, sample.e2e) == pytest.approx((0.3, 0.1, 0.1, 0.7), abs=1e-6)


def test_an_open_loop_sends_at_its_times_whatever_is_answered():
    times = [0.0, 0.1, 0.1, 5.0]
    block, fake = driven(Script(ttft=2.0, itl=lambda place: 0.5), [Request("x", 3, at) for at in times])
    assert fake.most_running == 3
    assert sorted(sample.sent for sample in block.samples) == pytest.approx(times, abs=1e-6)
    assert block.seconds == pytest.approx(8.0)


def test_latency_counts_from_when_a_request_was_due():
    """A generator that is held up sends late, and what the user would have waited is counted all the same."""

    async def run():
        async def send(request):
            asyncio.get_running_loop().clock.now += 0.4  # the generator itself is busy
            now = asyncio.get_running_loop().time()
            return Answer((now + 0.1,), now + 0.1, 1, True, "length")

        return await drive(iter(Request("x", 1, at) for at in (0.0, 0.1, 0.2)), send)

    with asyncio.Runner(loop_factory=SimulatedLoop) as runner:
        block = runner.run(run())
    assert [sample.intended for sample in block.samples] == pytest.approx([0.0, 0.1, 0.2])
    late = [sample.sent - sample.intended for sample in block.samples]
    assert late[2] > late[1] > 0.2
    assert [sample.ttft for sample in block.samples] == pytest.approx([value + 0.5 for value in late])


@pytest.mark.parametrize("how", [{"concurrency": 2}, {}])
def test_no_request_starts_after_the_time_given(how):
    endless = (Request("x", 5, float(i)) for i in itertools.count())
    block, _ = driven(Script(ttft=0.6, itl=lambda place: 0.1), endless, seconds=2.5, **how)
    starts = [sample.sent for sample in block.samples]
    assert max(starts) < 2.5
    assert len(starts) == (6 if how else 3)  # at 0, 1 and 2


def test_each_error_is_counted_and_the_rest_goes_on():
    refused = b"HTTP/1.1 503 Busy\r\nContent-Length: 4\r\n\r\nbusy"
    block, _ = driven(Script(answer=lambda body, number: refused if number % 2 else None), TEN, concurrency=2)
    errors = [sample for sample in block.samples if sample.error]
    assert [(sample.error, sample.message) for sample in errors] == [("HTTP 503", "busy")] * 5
    assert [sample.ttft for sample in errors] == [None] * 5
    assert not block.gone


def test_a_server_that_dies_ends_the_run():
    async def main(server, fake, *, connect):
        async def dying(make, server):
            if len(fake.bodies) >= 3:
                raise ConnectionRefusedError
            return await connect(make, server)

        send = functools.partial(ask, server, connect=dying)
        return await drive(iter([Request("x", 5)] * 1000), send, concurrency=2)

    block = simulated(main, Script())
    assert block.gone
    kinds = [sample.error for sample in block.samples]
    assert kinds[-GONE:] == ["connection refused"] * GONE
    assert kinds.count("") in (3, 4)  # the two clients connect at the same time
    assert len(kinds) <= 4 + 2 * GONE  # of 1000


def test_an_answer_in_one_piece_has_no_time_between_tokens():
    block, _ = driven(Script(per_piece=5), TEN[:1], concurrency=1)
    sample = block.samples[0]
    assert (sample.itl, sample.gap, sample.answer.tokens) == (None, None, 5)


def test_the_longest_pause_is_seen():
    block, _ = driven(Script(itl=lambda place: 0.9 if place == 3 else 0.1), TEN[:1], concurrency=1)
    assert block.samples[0].gap == pytest.approx(0.9)
    assert block.samples[0].itl == pytest.approx(0.3)


# Whole measurements ----------------------------------------------------------------------------------------------------


def measured(load, *scripts, slo=None):
    """The document of a measurement, the servers, and what they were asked after the warm-up."""

    async def main(*given, connect):
        tested = await measure(given[::2], load, connect=connect)
        return tested, given[1::2]

    tested, fakes = simulated(main, *scripts)
    return report.document(tested, load, slo), tested, fakes


LOAD = Load(concurrency=2, requests=8, prompt_tokens=Lengths(20, 60), new_tokens=Lengths(5, 9), seed=7)


def test_prompts_have_the_length_asked_for_by_the_servers_own_count():
    script = Script(prompt_tokens=lambda prompt: len(prompt) // 6)
    _, _, (fake,) = measured(replace(LOAD, prompt_tokens=Lengths(100, 100)), script)
    sizes = [len(body["messages"][0]["content"]) // 6 for body in fake.bodies[WARMUP:]]
    assert len(sizes) == 8
    assert all(abs(size - 100) <= 2 for size in sizes)


def test_no_prompt_is_sent_twice_to_whichever_server():
    _, _, fakes = measured(replace(LOAD, blocks=2), Script(), Script())
    prompts = [body["messages"][0]["content"][:10] for fake in fakes for body in fake.bodies]
    assert len(set(prompts)) == len(prompts) == 2 * (8 + WARMUP)


def test_two_servers_get_the_same_requests_in_turn():
    load = replace(LOAD, blocks=4)
    _, tested, fakes = measured(load, Script(), Script(ttft=0.4))
    bodies = [
        [(body["messages"][0]["content"][11:], body["max_tokens"]) for body in fake.bodies[WARMUP:]] for fake in fakes
    ]
    assert sorted(bodies[0]) == sorted(bodies[1])
    begins = sorted((block.begin, which) for which, one in enumerate(tested) for block in one.blocks)
    assert "".join("AB"[which] for _, which in begins) == "ABBABAAB"
    ends = sorted(block.end for one in tested for block in one.blocks)
    assert all(begin >= end for (begin, _), end in zip(begins[1:], ends, strict=False))  # never both at a time


def test_the_order_of_the_turns():
    assert [which for _, which in order(5, 2)] == [0, 1, 1, 0, 1, 0, 0, 1, 0, 1]
    assert [which for _, which in order(2, 3)] == [0, 1, 2, 2, 1, 0]


def test_figures_are_those_of_the_script():
    slo = report.Slo(ttft=0.5, itl=0.06)
    load = replace(LOAD, new_tokens=Lengths(6, 6))
    found, _, _ = measured(load, Script(ttft=0.25, itl=lambda place: 0.05), slo=slo)
    (server,) = found["servers"]
    assert server["answered"] == server["requests"] == 8
    assert server["seconds"] == pytest.approx(4 * 0.5)
    assert server["in_flight"] == pytest.approx(2)
    assert server["ttft"]["p50"]["value"] == pytest.approx(250)
    assert server["itl"]["p95"]["value"] == pytest.approx(50)
    assert server["e2e"]["p99"] == {"value": pytest.approx(500), "low": pytest.approx(500), "high": None}
    assert server["tokens_per_second"]["value"] == pytest.approx(8 * 6 / 2)
    assert server["requests_per_second"]["value"] == pytest.approx(4)
    assert server["goodput_per_second"]["value"] == pytest.approx(4)
    assert server["within_slo"]["value"] == 1
    assert server["within_slo"]["low"] == pytest.approx(0.631, abs=1e-3)  # exact binomial: 8 of 8
    assert server["tokens"]["generated"] == 48
    assert server["tokens"]["counted_by_server"] == 8
    assert report.met(found)


def test_two_servers_are_compared_in_pairs():
    load = replace(LOAD, blocks=4, new_tokens=Lengths(6, 6))
    found, _, _ = measured(load, Script(ttft=0.25, itl=lambda place: 0.05), Script(ttft=0.5, itl=lambda place: 0.02))
    compared = found["comparison"]
    assert compared["pairs"] == 4
    assert compared["ttft"]["value"] == pytest.approx(2)
    assert compared["ttft_p95"]["value"] == pytest.approx(2)
    assert compared["itl"]["value"] == pytest.approx(0.4)
    assert compared["tokens_per_second"]["value"] == pytest.approx(0.5 / 0.6)
    assert compared["ttft"]["low"] == pytest.approx(2)  # the script has no noise


def test_a_server_compared_with_itself_is_found_equal():
    chance = iter(range(10**6))
    load = replace(LOAD, blocks=8, requests=64)
    noisy = Script(ttft=0.25, itl=lambda place: 0.05 + 0.01 * ((next(chance) * 7919) % 13) / 13)
    found, _, _ = measured(load, noisy, noisy)
    assert found["comparison"]["itl"]["low"] <= 1 <= found["comparison"]["itl"]["high"]


def test_a_rate_sends_at_random_times_and_a_trace_at_its_own():
    found, (one,), _ = measured(replace(LOAD, concurrency=None, rate=4.0, requests=200), Script())
    block = one.blocks[0]
    assert block.samples[-1].intended - block.begin == pytest.approx(50, rel=0.2)
    assert found["servers"][0]["lateness"]["most"] == pytest.approx(0, abs=1e-3)
    trace = tuple(Line(5, prompt_tokens=20, at=at) for at in (3.0, 3.5, 9.0, 9.25))
    _, tested, _ = measured(Load(replay=True, trace=trace, blocks=2), Script(), Script())
    for one in tested:
        sent = [[sample.sent - block.begin for sample in block.samples] for block in one.blocks]
        assert sent[0] == pytest.approx([0, 0.5], abs=1e-6)  # each block begins with its first request
        assert sent[1] == pytest.approx([0, 0.25], abs=1e-6)


def test_the_time_is_shared_by_the_blocks():
    _, tested, _ = measured(replace(LOAD, requests=None, seconds=8.0, blocks=4), Script(), Script())
    for one in tested:
        assert len(one.blocks) == 4
        for block in one.blocks:
            assert max(sample.sent - block.begin for sample in block.samples) < 2.0
            assert block.seconds >= 1.5


@pytest.mark.parametrize(
    ("script", "says"),
    [
        (Script(models=b"garbage\r\n\r\n"), "does not answer: not HTTP"),
        (
            Script(answer=lambda body, number: b"HTTP/1.1 404 No\r\nContent-Length: 2\r\n\r\nno"),
            "try --completions.*HTTP 404: no",
        ),
    ],
)
def test_a_server_that_does_not_answer_at_all(script, says):
    with pytest.raises(MissingError, match=says):
        measured(LOAD, script)


def warnings_of(script, load=LOAD, **changes):
    found, _, _ = measured(replace(load, **changes), script)
    return " | ".join(found["warnings"])


def test_what_to_beware_of_is_said():
    assert warnings_of(Script()) == ""
    assert "8 of 8 answers came without usage" in warnings_of(Script(usage=False))
    assert "answers have fewer tokens than asked for" in warnings_of(Script(tokens=3))
    assert "of the prompts' tokens came from its cache" in warnings_of(Script(cached=10))
    same = tuple(Line(5, prompt="again") for _ in range(8))
    assert "7 prompts of the trace occur more than once" in warnings_of(Script(), trace=same)
    assert "no more were sent" in warnings_of(
        Script(answer=lambda body, number: b"" if number > 4 else None), requests=100
    )


def test_servers_that_make_answers_of_other_lengths_did_not_do_the_same_work():
    found, _, _ = measured(replace(LOAD, blocks=2), Script(tokens=3), Script(tokens=4))
    assert any("did not do the same work" in text for text in found["warnings"])


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"rate": 2.0}, "either --concurrency or --rate"),
        ({"concurrency": None}, "either --concurrency or --rate"),
        ({"requests": None}, "--requests or --seconds"),
        ({"blocks": 5}, "--requests must be at least 10"),
        ({"trace": (Line(1, "a"),) * 3}, "--requests must be at most 3"),
        ({"trace": (Line(1, "a"),) * 3, "requests": None, "blocks": 2}, "--requests must be at least 4"),
        ({"concurrency": None, "replay": True, "requests": 2, "trace": (Line(1, "a"),) * 3}, "without times"),
    ],
)
def test_loads_that_cannot_be(changes, says):
    with pytest.raises(InputError, match=says):
        replace(LOAD, **changes)


def test_a_bug_in_sending_is_not_hidden():
    async def run():
        async def send(request):
            raise ZeroDivisionError

        await drive(iter(TEN), send, concurrency=2)

    with asyncio.Runner(loop_factory=SimulatedLoop) as runner, pytest.raises(ExceptionGroup) as caught:
        runner.run(run())
    assert all(isinstance(error, ZeroDivisionError) for error in caught.value.exceptions)


def test_a_failed_sample_has_no_times():
    sample = Sample(TEN[0], 1.0, 1.0, 2.0, error="timeout")
    assert (sample.ttft, sample.itl, sample.gap, sample.e2e) == (None,) * 4
    assert Block([sample], 1.0, 2.0).seconds == 1
